"""Settings of reused responses that do not fit together with other stages. Imports no jax."""

from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.experience.config import AdmitAll, NoHints, Shuffled, StratifiedByColumn, UniformBudget
from jaxrl_llm.rollout.config import NoReuse, NoTree


def reuse_problems(cfg: RunConfig) -> list[str]:
    """Errors about `rollout.reuse`."""
    kind, experience = cfg.rollout.reuse.kind, cfg.experience
    if isinstance(cfg.rollout.reuse, NoReuse):
        return []
    beside = f"beside rollout.reuse.kind {kind}, want"
    depends = "which responses are continued may not depend on what they earned"
    found = []
    if not isinstance(cfg.rollout.tree, NoTree):
        found.append(
            f"rollout.tree: got {cfg.rollout.tree.kind} {beside} none: what a branch shares was drawn with another response's noise"
        )
    if not isinstance(experience.hints, NoHints):
        found.append(f"experience.hints: got {experience.hints.kind} {beside} none: both say how a response begins")
    if experience.replays:
        found.append(
            f"experience.replay: got a buffer {beside} none: a response would be trained on twice, once as a fresh one"
        )
    if not isinstance(experience.curriculum, Shuffled | StratifiedByColumn):
        found.append(
            f"experience.curriculum: got {experience.curriculum.kind} {beside} shuffled or stratified: {depends}"
        )
    if not isinstance(experience.gate, AdmitAll):
        found.append(f"experience.gate: got {experience.gate.kind} {beside} none: {depends}")
    if not isinstance(experience.budget, UniformBudget):
        found.append(f"experience.budget: got {experience.budget.kind} {beside} uniform: {depends}")
    return found
