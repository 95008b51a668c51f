"""Guards: pure values that check each step's metrics, warn, and end a run. Independent of arrays on devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import isnan, nan
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from jaxrl_llm.errors import DroppedError, GradingError, MismatchError, NonFiniteError, UserError
from jaxrl_llm.update.config import GuardConfig

# Fraction of sampled tokens with more candidates than `rollout.max_kept_tokens`: above it another truncation than asked for.
MOST_OVERFLOW = 0.1


class Guards(NamedTuple):
    """Counts so far, of steps except for `alarm`; part of a checkpoint."""

    nonfinite: int = 0
    """Consecutive steps without a finite update."""
    ungraded: int = 0
    """Consecutive steps in which no group could be graded."""
    dropped: int = 0
    """Consecutive steps in which groups were graded, none was kept, and no stored one was trained on."""
    overflow: int = 0
    """Consecutive steps in which `rollout.max_kept_tokens` cut off too many candidates."""
    idle: int = 0
    """RL steps that learned nothing."""
    spoiled: int = 0
    """RL steps with a non-finite update."""
    seen: int = 0
    """RL steps."""
    alarm: int = 0
    """Consecutive stale updates whose ratios were all exactly 1: `RatioAlarm.streak`."""
    zero_gradient: Int[np.ndarray, " n"] = np.zeros(0, np.int64)
    """Per parameter, in the order of sorted paths: consecutive steps in which its gradient, but not every gradient, was exactly 0.
    A count stays once it is `zero_gradient_steps`: the parameter has been reported."""


class GuardReport(NamedTuple):
    guards: Guards
    warnings: tuple[str, ...]
    error: UserError | None
    """Error that ends the run, with exit code 4."""


@dataclass(frozen=True)
class RatioAlarm:
    """Alarm for importance ratios that are all 1 although the policy changed: behavior log-probs were recomputed, not captured."""

    streak: int = 0
    """Consecutive suspicious updates so far; part of a checkpoint."""

    def observe(self, ratio_min: float, ratio_max: float, stale: bool) -> tuple["RatioAlarm", bool]:
        """Next state, and True from the second consecutive stale update on whose ratios are all exactly 1.

        Args:
            ratio_min, ratio_max: extremes of pi(token) / behavior(token) over the tokens of the loss.
            stale: the policy changed since the batch was sampled (second and later updates on it, or an older batch).
                Updates that are not stale neither count nor reset.
        """
        if not stale:
            return self, False
        streak = self.streak + 1 if ratio_min == ratio_max == 1.0 else 0
        return RatioAlarm(streak), streak >= 2


def observe(
    guards: Guards, cfg: GuardConfig, metrics: Mapping[str, float], zero: Mapping[str, bool], first_failure: str = ""
) -> GuardReport:
    """Check one RL step.

    Args:
        guards: counts before the step.
        cfg: limits.
        metrics: of the step, with those of an evaluation. An absent one was not measured.
        zero: path of each trained parameter -> its gradient was exactly 0 in every update of the step. Empty if no update was
            finite or none had a token in the loss.
        first_failure: message of the first failure of a grader.
    """
    update = observe_update(guards, cfg, metrics)
    streaks, warnings = _zero_gradients(guards.zero_gradient, cfg.zero_gradient_steps, zero)
    reason = _nothing_learned(metrics, zero)
    spoiled = metrics.get("nonfinite", 0.0) > 0
    overflows = metrics.get("sampling/support_overflow", 0.0) > MOST_OVERFLOW
    graded, kept = metrics["groups/graded"], metrics["groups/kept"]
    after = update.guards._replace(
        dropped=guards.dropped + 1 if graded > 0 and kept == 0 and metrics["updates"] == 0 else 0,
        ungraded=guards.ungraded + 1 if graded == 0 else 0,
        overflow=guards.overflow + 1 if overflows else 0,
        idle=guards.idle + bool(reason),
        spoiled=guards.spoiled + spoiled,
        seen=guards.seen + 1,
        zero_gradient=streaks,
    )
    if reason and _is_doubling(after.idle, cfg.idle_steps):
        warnings.append(f"{after.idle} of {after.seen} RL steps so far learned nothing; this one: {reason}")
    if spoiled and _is_doubling(after.spoiled, cfg.idle_steps):
        warnings.append(
            f"{after.spoiled} of {after.seen} RL steps so far had updates with a non-finite loss or gradient; in this one "
            f"{metrics['nonfinite']:.0%}: look at the size of the rewards, and at update.optimizer.lr"
        )
    if after.overflow == cfg.idle_steps:
        warnings.append(
            f"sampling/support_overflow: got {metrics['sampling/support_overflow']:.2f} of the tokens, want at most "
            f"{MOST_OVERFLOW}: more candidates qualify than are kept, so only the likeliest can be sampled; raise "
            "rollout.max_kept_tokens"
        )
    if metrics["alarm/ratio"]:
        warnings.append("ALARM: all ratios were exactly 1 on stale data, twice: old log-probs are not those captured")
    error = update.error or _mismatch(cfg, metrics)
    if after.ungraded >= cfg.max_ungraded:
        error = GradingError(
            f"no group of {after.ungraded} consecutive steps could be graded (update.guards.max_ungraded), so nothing was learned; "
            f"the first failure: {first_failure or 'on another host, see its log'}"
        )
    if after.dropped >= cfg.max_dropped:
        # Of responses without a hint, if there were any.
        right = metrics.get("dropped/success", metrics.get("hints/success", nan))
        error = DroppedError(
            f"every graded group of {after.dropped} consecutive steps was dropped (update.guards.max_dropped), so nothing was "
            f"learned; of the last step's responses {right:.1%} were right: look at "
            "experience.filter and experience.refill, or take easier or harder prompts"
        )
    return GuardReport(after, tuple(warnings), error)


def observe_update(guards: Guards, cfg: GuardConfig, metrics: Mapping[str, float]) -> GuardReport:
    """Check a step's updates, in RL and before it, by `nonfinite`: the fraction of them that were not finite."""
    if "nonfinite" not in metrics:
        return GuardReport(guards, (), None)
    nonfinite, error = guards.nonfinite + 1 if metrics["nonfinite"] == 1 else 0, None
    if nonfinite >= cfg.max_nonfinite:
        error = NonFiniteError(
            f"no update of {nonfinite} consecutive steps was finite (update.guards.max_nonfinite); "
            "the parameters are those before them"
        )
    return GuardReport(guards._replace(nonfinite=nonfinite), (), error)


def _mismatch(cfg: GuardConfig, metrics: Mapping[str, float]) -> MismatchError | None:
    """Error if the mismatch of the step's fresh rollouts or of an evaluation's is too large."""
    measured = [name for name in ("mismatch/kl", "eval/mismatch_kl") if name in metrics and not isnan(metrics[name])]
    worst = max(measured, key=metrics.__getitem__, default=None)
    if worst is None or cfg.max_mismatch_kl is None or not metrics[worst] > cfg.max_mismatch_kl:
        return None
    return MismatchError(
        f"{worst}: got {metrics[worst]:.3g} nats per token, want at most {cfg.max_mismatch_kl} "
        "(update.guards.max_mismatch_kl): sampler and trainer give the same tokens different probabilities under the same "
        "parameters. Look at rollout.engine.weights and cache (8 bits differ more), model.compute, the temperature and "
        "kept tokens that the scorer uses, and at a model whose training pass differs from its decoding"
    )


def _nothing_learned(metrics: Mapping[str, float], zero: Mapping[str, bool]) -> str:
    """Reason why a step learned nothing, and what to check; "" if it did."""
    if metrics["updates"] == 0:
        if metrics["groups/graded"] == 0:
            return "no group could be graded, see rewards/<grader>/<failure>"
        if metrics["groups/kept"] == 0:
            return _why_none_was_kept(metrics)
        return "no token of the kept groups is in the loss"
    if not zero:
        return "no update was finite"
    if all(zero.values()):
        return (
            "every gradient was exactly 0: are the rewards of each group equal, the advantages or weights all 0, or all tokens "
            "beyond the clip?"
        )
    return ""


def _why_none_was_kept(metrics: Mapping[str, float]) -> str:
    if metrics.get("refill/accepted") == 0:
        return f"none of {metrics['refill/prompts']:.0f} groups was accepted (experience.refill)"
    dropped = {name.split("/")[1]: n for name, n in metrics.items() if name.startswith("filter/") and n > 0}
    if any(not name.startswith("signal") for name in dropped):
        rows = ", ".join(f"{name} {n:.0f}" for name, n in dropped.items())
        return f"the filters dropped every response (experience.filter): {rows}"
    return "the rewards of each group were equal (experience.filter), so the task is too hard, or too easy, for this policy"


def _is_doubling(count: int, first: int) -> bool:
    """True if `count` is first, 2 first, 4 first, ...: warnings at these come early, and never too often."""
    times, rest = divmod(count, first)
    return count > 0 and rest == 0 and times & (times - 1) == 0


def _zero_gradients(
    before: Int[np.ndarray, " n"], most: int, zero: Mapping[str, bool]
) -> tuple[Int[np.ndarray, " n"], list[str]]:
    """Next streaks, and a warning on those that have just become `most` steps long."""
    paths = sorted(zero)
    before = before if len(before) else np.zeros(len(paths), np.int64)
    if all(zero.values()):
        # While nothing at all is learned, no single parameter is at fault.
        return before, []
    after = np.array([n if n >= most else n + 1 if zero[path] else 0 for path, n in zip(paths, before, strict=True)])
    dead = [path for path, old, new in zip(paths, before, after, strict=True) if old < most <= new]
    warning = f"the gradient of {', '.join(dead)} was exactly 0 for {most} steps: nothing in the loss depends on it"
    return after, [warning] if dead else []
