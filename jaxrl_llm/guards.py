"""What ends or interrupts a run by itself: pure values that look at each step's metrics. Knows nothing of arrays on devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from jaxrl_llm.errors import MismatchError, NonFiniteError, UserError
from jaxrl_llm.update.config import GuardConfig


@dataclass(frozen=True)
class Guards:
    """Streaks of steps so far; belong into checkpoints."""

    nonfinite: int = 0
    """Steps in a row of which no update was finite."""
    no_gradient: int = 0
    """Steps in a row that learnt from tokens while the gradient of every parameter was exactly 0."""
    zero_gradient: tuple[int, ...] = ()
    """Of each parameter, in the order of their sorted paths: steps in a row in which its gradient alone was exactly 0. A count that
    has reached `zero_gradient_steps` stays: the parameter has been named."""


class Verdict(NamedTuple):
    guards: Guards
    warnings: tuple[str, ...]
    error: UserError | None
    """Ends the run, with exit code 4."""


def observe(guards: Guards, cfg: GuardConfig, metrics: Mapping[str, float], zero: Mapping[str, bool]) -> Verdict:
    """What one step of RL means.

    Args:
        metrics: of the step. Reads `nonfinite` (the share of its updates that were not finite), `mismatch/kl` (NaN where the data
            was not drawn by the parameters that were updated; nothing where the loss has no ratio) and `alarm/ratio`.
        zero: of each parameter that is trained, by its path: its gradient was exactly 0 in every update of the step. Empty where
            no update counts: none was finite, or none had a token to learn from.
    """
    nonfinite = guards.nonfinite + 1 if metrics["nonfinite"] == 1 else 0
    no_gradient, streaks, warnings = _zero_gradients(guards, cfg.zero_gradient_steps, zero)
    if metrics["alarm/ratio"]:
        warnings.append("ALARM: all ratios were exactly 1 on stale data, twice: old log-probs are not those captured")
    error = None
    if nonfinite >= cfg.max_nonfinite:
        error = NonFiniteError(
            f"no update of {nonfinite} steps in a row was finite (update.guards.max_nonfinite); "
            "parameters are those from before them"
        )
    elif cfg.max_mismatch_kl is not None and metrics.get("mismatch/kl", 0.0) > cfg.max_mismatch_kl:
        error = MismatchError(
            f"mismatch/kl: got {metrics['mismatch/kl']:.3g} nats a token, want at most {cfg.max_mismatch_kl} "
            "(update.guards.max_mismatch_kl): sampler and trainer give the same tokens different probabilities under the same "
            "parameters. Look at rollout.engine.weights and cache (8 bits are further off), model.compute, the temperature and "
            "support that the scorer uses, and at a model whose training pass differs from its decoding"
        )
    return Verdict(Guards(nonfinite, no_gradient, streaks), tuple(warnings), error)


def _zero_gradients(guards: Guards, most: int, zero: Mapping[str, bool]) -> tuple[int, tuple[int, ...], list[str]]:
    """The next streaks, and what to say of those that have just become `most` steps long."""
    paths = sorted(zero)
    before = guards.zero_gradient or (0,) * len(paths)
    if not paths:
        return guards.no_gradient, before, []
    if all(zero.values()):
        # Nothing is wrong with single parameters while no reward tells any response from another.
        no_gradient = guards.no_gradient + 1
        told = f"every gradient was exactly 0 for {most} steps: are the rewards of each group equal, or the advantages all 0?"
        return no_gradient, before, [told] if no_gradient == most else []
    after = tuple(n if n >= most else n + 1 if zero[path] else 0 for path, n in zip(paths, before, strict=True))
    dead = [path for path, old, new in zip(paths, before, after, strict=True) if old < most <= new]
    told = f"the gradient of {', '.join(dead)} was exactly 0 for {most} steps: nothing in the loss depends on it"
    return 0, after, [told] if dead else []
