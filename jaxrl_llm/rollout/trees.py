"""Trees for scripts, `rl.trees`: how the rows of a prompt share their beginnings. Imports no jax.

    engine = rl.Engine(model, samples=8, tree=rl.trees.points(roots=2))
    rollouts = engine.generate(policy, prompts, key)

Each function returns a config, as `rollout.tree` of a run has it, and raises UserError for wrong arguments.
"""

from jaxrl_llm.config.options import with_options
from jaxrl_llm.rollout.config import NoTree, PointTree, SegmentTree


def none() -> NoTree:
    """Rows are sampled independently.

    rl.trees.none()
    """
    return NoTree()


def points(roots: int = 2, branches: int = 2, rounds: int = 1, by: str = "entropy") -> PointTree:
    """Rows leave others before the tokens at which the policy was most uncertain.

        rl.trees.points(roots=6, branches=2)      # TreeRL's EPTree (6, 2, 1, 2) with samples=30: two points per root

    Args:
        roots: rows of a prompt that are sampled from the prompt on; the others of its `samples` leave them.
        branches: rows that leave another at the same token.
        rounds: rounds of branching; later ones may leave the branches of earlier ones.
        by: entropy, surprisal, random, or "module:function" of rollouts that returns one number per token.
    """
    return with_options(PointTree(), {"roots": roots, "branches": branches, "rounds": rounds, "by": by})


def segments(tokens: int, width: int = 2, roots: int = 1) -> SegmentTree:
    """Every path becomes several at fixed distances, until a prompt has its `samples` rows.

        rl.trees.segments(512, width=2)           # TreePO

    Args:
        tokens: tokens per segment.
        width: paths that a path becomes at the end of a segment.
        roots: rows of a prompt that are sampled from the prompt on.
    """
    return with_options(SegmentTree(), {"tokens": tokens, "width": width, "roots": roots})
