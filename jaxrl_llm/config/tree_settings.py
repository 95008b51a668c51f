"""Settings of trees of rollouts that do not fit together, or not with other stages. Imports no jax."""

from jaxrl_llm.config import user_code
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.config import NoHints, OwnBudget, ReinforceAda, Rounds, Screening
from jaxrl_llm.objective.rules import tree_refusals
from jaxrl_llm.rollout.config import BRANCH_SCORES, NoTree, PointTree, SegmentTree


def tree_problems(cfg: RunConfig) -> list[str]:
    """Errors about `rollout.tree`, and about an objective that compares subtrees without one."""
    tree, rollout, experience = cfg.rollout.tree, cfg.rollout, cfg.experience
    if isinstance(tree, NoTree):
        if cfg.objective.advantage.compares_trees:
            return [
                f"objective.advantage.kind: got {cfg.objective.advantage.kind} without rollout.tree, want one, or grpo: it "
                "compares the responses behind each token"
            ]
        return []
    found = []
    if tree.roots >= rollout.samples:
        found.append(
            f"rollout.tree.roots: got {tree.roots}, want less than rollout.samples ({rollout.samples}): the rest are branches"
        )
    if isinstance(tree, PointTree) and tree.by not in BRANCH_SCORES:
        try:
            user_code.resolve(tree.by, "a function of rollouts", BRANCH_SCORES)
        except UserError as error:
            found.append(f"rollout.tree.by: {error}")
    if isinstance(tree, SegmentTree) and tree.tokens >= rollout.max_new_tokens:
        found.append(
            f"rollout.tree.tokens: got {tree.tokens}, want less than rollout.max_new_tokens ({rollout.max_new_tokens}): no row "
            "would reach the end of a segment"
        )
    if isinstance(tree, SegmentTree) and rollout.control.kind != "none":
        found.append(
            f"rollout.tree.kind: got segments under rollout.control.kind {rollout.control.kind}, want points: a control ends each "
            "row within its limit, and here that would be the end of a segment"
        )
    if isinstance(experience.budget, Rounds | Screening | ReinforceAda | OwnBudget):
        found.append(
            f"experience.budget: got {experience.budget.kind} beside rollout.tree, want one of the two, or a budget without "
            "rounds: further ones would be other trees of the same prompt"
        )
    if not isinstance(experience.hints, NoHints):
        found.append(
            f"experience.hints: got {experience.hints.kind} beside rollout.tree, want one of the two: both say how a row begins"
        )
    if cfg.update.ess_scaling:
        found.append(
            "update.ess_scaling: got one beside rollout.tree, want none: the weight of a whole response is not known from the part "
            "that its row sampled"
        )
    if experience.replay.join:
        found.append(
            "experience.replay.join: got one beside rollout.tree, want none: rows of another step are no leaves of this one's trees"
        )
    if experience.replay.start:
        found.append(
            f"experience.replay.start: got {experience.replay.start!r} beside rollout.tree, want none: stored responses of a file "
            "have no trees"
        )
    return found + tree_refusals(cfg.objective)
