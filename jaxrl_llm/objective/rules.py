"""Incompatible parts of an objective, with the reason, and whether groups of equal rewards are trained on. Imports no jax."""

from jaxrl_llm.objective.advantages import OwnAdvantage
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.group_estimators import BestWorst, Grpo
from jaxrl_llm.objective.loss_config import (
    Cispo,
    Clip,
    CorrectionConfig,
    Dpo,
    Gmpo,
    MaskedImportance,
    OwnLoss,
    PolicyGradient,
    SecondMoment,
    TruncatedImportance,
)
from jaxrl_llm.objective.token_estimators import GrpoSteps

# Presets whose source drops groups of equal rewards by default: DAPO's dynamic sampling, prime-rl's `filter_zero_advantages`.
FILTERED = ("paper:dapo", "verl:dapo", "prime:rl", "prime:dppo")


def teaches_without_signal(objective: ObjectiveConfig, graders: int) -> str:
    """Return why a group of equal rewards has a gradient: the part of the objective that gives its tokens a nonzero reward or
    advantage, or that reads no reward; "" if it has none. `graders`: their number."""
    if objective.loss.kind == "distillation":
        return "objective.loss distillation reads no reward: every group teaches"
    if objective.reward_kl.weight > 0:
        return "objective.reward_kl gives each token its own reward"
    why = objective.advantage.why_equal_rewards_teach(graders)
    return f"objective.advantage {objective.advantage.kind} {why}" if why else ""


def drops_equal_rewards(objective: ObjectiveConfig, graders: int) -> bool:
    """Return whether `experience.filter: auto` drops groups of equal rewards: as the preset's source does, unless they teach;
    without a preset, if they have no gradient (by advantage, KL or entropy) and change no batch statistic. `graders`: their
    number."""
    if teaches_without_signal(objective, graders):
        return False
    if objective.preset:
        return objective.preset in FILTERED
    advantage, loss = objective.advantage, objective.loss
    # A custom function may do anything.
    pulls = isinstance(loss, OwnLoss) or (isinstance(loss, PolicyGradient) and (loss.kl.weight > 0 or loss.entropy > 0))
    return not (advantage.uses_batch_statistics or pulls)


def refusals(
    objective: ObjectiveConfig, samples: int, packing: str, judged_by: str = "", graders: int = 1
) -> list[str]:
    """Return an error message per pair of incompatible parts.

    Args:
        objective: the objective.
        samples: completions per prompt.
        packing: `update.packing.kind`.
        judged_by: what the filter keeps groups by if their numbers differ: success, reward or a grader; "": it is no such filter.
        graders: number of graders.
    """
    found, advantage, loss = [], objective.advantage, objective.loss
    # A filter by one grader knows whether that grader's rewards differ, as a per-grader advantage needs.
    if judged_by and (why := teaches_without_signal(objective, graders if judged_by == "reward" else 1)):
        found.append(f"experience.filter: got signal by {judged_by}, want auto or none: {why}")
    if objective.advantage.compares_within_group and samples < 2:
        found.append(
            f"objective.advantage.kind: got {objective.advantage.kind} with rollout.samples {samples}, want 2 or more samples: "
            "a group of one has no mean of others"
        )
    if isinstance(advantage, Grpo) and advantage.mean_over == "batch" and advantage.std_over == "group":
        found.append(
            "objective.advantage.std_over: got group with mean_over batch, want batch: a group of equal rewards is away from the "
            "batch's mean, and would be divided by eps alone"
        )
    if loss.kind == "cross_entropy":
        found.append(
            "objective.loss.kind: got cross_entropy, want one for RL: it uses no reward; warm_start is supervised"
        )
    if isinstance(loss, OwnLoss):
        found += _length_refusals(loss)
    if isinstance(loss, Dpo):
        found += _dpo_refusals(objective, packing)
    if isinstance(loss, PolicyGradient):
        found += _policy_gradient_refusals(loss)
        if isinstance(objective.advantage, BestWorst):
            found.append(
                "objective.advantage.kind: got best_worst, which is for the loss dpo; want an advantage of every sample"
            )
    if isinstance(advantage, OwnAdvantage):
        found += _own_advantage_refusals(objective)
    if objective.reward_kl.to == "advantage" and objective.advantage.uses_returns_to_go:
        found.append(
            f"objective.reward_kl.to: got advantage with the advantage {objective.advantage.kind}, want reward: it already "
            "credits each token with its returns-to-go"
        )
    if objective.reference.kind == "pretrained" and not objective.reference.path:
        found.append("objective.reference.path: got nothing, want the model that reference.kind pretrained reads")
    return found


def _dpo_refusals(objective: ObjectiveConfig, packing: str) -> list[str]:
    found = []
    if not isinstance(objective.advantage, BestWorst):
        found.append(
            f"objective.advantage.kind: got {objective.advantage.kind}, want best_worst: the pairs of the loss dpo"
        )
    if packing != "shared_prefix":
        found.append(f"update.packing.kind: got {packing}, want shared_prefix: the loss dpo needs a pair in one row")
    if objective.reused_rows == "split":
        found.append(
            "objective.reused_rows: got split with the loss dpo, want joint: a pair each of fresh and of stored rows would be one "
            "pair to it"
        )
    return found


def taught_refusals(objective: ObjectiveConfig) -> list[str]:
    """Return error messages about tokens of hints that are trained on as if they had been sampled with probability 1: no number of
    a whole sequence, and none that compares with the sampler, may contain them."""
    loss, name = objective.loss, "experience.hints.train"
    if not isinstance(loss, PolicyGradient) or loss.shaping is None:
        return [
            f"{name}: got true without objective.loss.shaping, want false, or shaping 0.1 of the loss policy_gradient: the policy "
            "did not sample the tokens of hints, and a clipped ratio cannot use them"
        ]
    correction, kl = loss.correction, loss.kl
    wrong = {
        f"objective.loss.ratio {loss.ratio}, want token": loss.ratio != "token",
        "objective.loss.surrogate gmpo, want another": isinstance(loss.surrogate, Gmpo),
        f"objective.loss.correction {correction.kind}, want none, or one per token": isinstance(
            correction, SecondMoment
        )
        or getattr(correction, "level", "token") != "token",
        "objective.loss.kl, want to: reference and times: one, or weight 0": kl.weight > 0
        and (kl.to == "behavior" or kl.times == "ratio"),
        "objective.reward_kl, want weight 0": objective.reward_kl.weight > 0,
        f"objective.advantage {objective.advantage.kind}, want one without a critic": objective.has_critic,
    }
    return [
        f"{name}: got true with {what}: tokens of hints have no log-prob of the sampler"
        for what in wrong
        if wrong[what]
    ]


def tree_refusals(objective: ObjectiveConfig) -> list[str]:
    """Return error messages about parts of an objective that need independent responses, or numbers of whole ones: a row of a tree
    has the log-probs of what it sampled itself."""
    advantage, loss, found = objective.advantage, objective.loss, []
    if advantage.needs_independent_rows:
        found.append(
            f"objective.advantage.kind: got {advantage.kind} with rollout.tree, want tree_rl, tree_po, spo or tree_rpo: it counts "
            "on whole groups of independent responses"
        )
    if objective.reward_kl.weight > 0:
        found.append(
            f"objective.reward_kl.weight: got {objective.reward_kl.weight} with rollout.tree, want 0, and objective.loss.kl: a "
            "token of a tree belongs to several responses, and its KL would count in one"
        )
    if advantage.compares_trees and objective.baseline_over != "sampled":
        found.append(
            f"objective.baseline_over: got {objective.baseline_over} with {advantage.kind}, want sampled: values of subtrees are "
            "means over all their responses"
        )
    if isinstance(loss, Dpo | OwnLoss):
        found.append(
            f"objective.loss.kind: got {loss.kind} with rollout.tree, want policy_gradient: it may compare whole responses"
        )
    if not isinstance(loss, PolicyGradient):
        return found
    level = getattr(loss.correction, "level", "token")
    parts = {
        f"objective.loss.ratio: got {loss.ratio} with rollout.tree, want token": loss.ratio != "token",
        "objective.loss.surrogate: got gmpo with rollout.tree, want another": isinstance(loss.surrogate, Gmpo),
        f"objective.loss.correction.level: got {level} with rollout.tree, want token": level != "token",
    }
    return found + [f"{text}: a row has a part of a response" for text, is_wrong in parts.items() if is_wrong]


def step_refusals(objective: ObjectiveConfig, has_steps: bool) -> list[str]:
    """Return an error message if the advantage compares steps and no grader has them."""
    if has_steps or not isinstance(objective.advantage, GrpoSteps):
        return []
    return [
        "objective.advantage.kind: got grpo_steps without a grader that has steps, want a step_end in reward.graders, or grpo: "
        "grpo_steps compares the rewards of steps"
    ]


def _own_advantage_refusals(objective: ObjectiveConfig) -> list[str]:
    found = []
    if objective.reward_kl.weight > 0:
        found.append(
            f"objective.reward_kl.weight: got {objective.reward_kl.weight} with a custom advantage, want 0: name "
            "reference_logprobs in objective.advantage.columns, and take the KL there"
        )
    if objective.baseline_over != "sampled":
        found.append(
            f"objective.baseline_over: got {objective.baseline_over} with a custom advantage, want sampled: the function itself "
            "chooses the rows of its statistics"
        )
    return found


def _policy_gradient_refusals(loss: PolicyGradient) -> list[str]:
    found = []
    name, surrogate = "objective.loss", loss.surrogate
    per_sequence = loss.ratio in ("sequence", "product") or isinstance(surrogate, Gmpo)
    if per_sequence and loss.aggregation != "sequence":
        found.append(
            f"{name}.aggregation: got {loss.aggregation}, want sequence: with a ratio of whole sequences every other mean weighs a "
            "sequence by its length"
        )
    if loss.ratio == "sequence_token" and loss.aggregation not in ("sequence", "token"):
        found.append(f"{name}.aggregation: got {loss.aggregation}, want sequence or token: sums undo GSPO's 1 / length")
    if loss.ratio != "token" and not isinstance(surrogate, Clip):
        found.append(
            f"{name}.ratio: got {loss.ratio} with the surrogate {surrogate.kind}, want token: only clip is defined on sequences"
        )
    if isinstance(surrogate, Clip) and surrogate.dual is not None and loss.ratio != "token":
        found.append(
            f"{name}.surrogate.dual: got {surrogate.dual}, want null with the ratio {loss.ratio}: no source defines it"
        )
    if isinstance(surrogate, Cispo) and surrogate.low >= surrogate.high:
        found.append(
            f"{name}.surrogate.low: got {surrogate.low}, want less than high ({surrogate.high}): bounds of the ratio itself"
        )
    if loss.anchor == "behavior" and _weighs(loss.correction):
        found.append(
            f"{name}.anchor: got behavior with the correction {loss.correction.kind}, want proximal: the ratio to the sampler "
            "already contains the weight, which would count twice"
        )
    if loss.kl.times != "one" and loss.kl.kind in ("k2", "k3_plus", "full"):
        found.append(
            f"{name}.kl.times: got {loss.kl.times} with {loss.kl.kind}, want one: its gradient is right without a factor"
        )
    if loss.kl.kind == "full" and loss.kl.to == "behavior":
        found.append(
            f"{name}.kl.to: got behavior with the kind full, want reference: the sampler's logits are not kept"
        )
    found += _length_refusals(loss)
    if loss.kl.kind == "k1" and loss.kl.weight and loss.kl.times == "one":
        found.append(
            f"{name}.kl.kind: got k1 in the loss, want k2, k3, reward_kl, or kl.times score: the mean gradient of k1 alone is 0"
        )
    return found + _bound_refusals(loss.correction, f"{name}.correction")


def _length_refusals(loss: PolicyGradient | OwnLoss) -> list[str]:
    if loss.length is None or loss.aggregation == "constant":
        return []
    return [f"objective.loss.length: got {loss.length}, want null: only the aggregation constant reads it"]


def _weighs(correction: CorrectionConfig) -> bool:
    """Return whether the correction multiplies by p_proximal / p_behavior, not only by 0 or 1."""
    masks = isinstance(correction, MaskedImportance) and correction.weight == "one"
    return correction.kind not in ("auto", "none", "second_moment") and not masks


def _bound_refusals(correction: CorrectionConfig, name: str) -> list[str]:
    if isinstance(correction, MaskedImportance) and correction.low >= correction.high:
        return [f"{name}.low: got {correction.low}, want less than high ({correction.high}): else nothing is kept"]
    if isinstance(correction, TruncatedImportance) and correction.floor >= correction.cap:
        return [
            f"{name}.floor: got {correction.floor}, want less than cap ({correction.cap}): else every weight is the same"
        ]
    return []
