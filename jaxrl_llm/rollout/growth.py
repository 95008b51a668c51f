"""Growth of trees: which rows of a prompt are left where, until it has as many rows as were asked for.

    roots -> (choose branch points -> sample the branches) per round -> rollouts

A tree costs what its own tokens cost: what rows share is sampled once.
"""

from collections.abc import Callable

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrl_llm.config import user_code
from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import BRANCH_SCORES, PointTree, SegmentTree, Tree
from jaxrl_llm.rollout.output import COMPLETE
from jaxrl_llm.rollout.tree import Branches, root_rows, with_trunks
from jaxrl_llm.types import Rollouts

# Digits of scores by which branch points are compared.
DECIMALS = 4
SampleBranches = Callable[[Rollouts, Branches, Int[np.ndarray, " n"]], Rollouts]
"""sample(rollouts, branches, limit): the rollouts with the branches, of so many completion tokens at most."""


def grow(
    tree: PointTree | SegmentTree, rollouts: Rollouts, samples: Int[np.ndarray, " P"], limit: Int[np.ndarray, " P"],
    key: Key[Array, ""], sample: SampleBranches,
) -> Rollouts:  # fmt: skip
    """Return the rollouts of each prompt with as many rows as it shall have.

    Args:
        tree: how trees grow.
        rollouts: their roots, as many as `num_roots` says, of at most `first_limit` tokens.
        samples: rows that each prompt shall have.
        limit: maximum completion tokens of its rows.
        key: of the random choices.
        sample: samples branches.
    """
    seed = np.asarray(jax.random.key_data(key)).astype(np.uint32).tolist()
    if isinstance(tree, PointTree):
        return _grow_at_points(tree, with_trunks(rollouts), samples, limit, seed, sample)
    return _grow_in_segments(tree, with_trunks(rollouts), samples, limit, seed, sample)


def check_tree(tree: Tree) -> None:
    """Raise UserError if its rule is a function that is not found."""
    if isinstance(tree, PointTree) and tree.by not in BRANCH_SCORES:
        try:
            user_code.resolve(tree.by, "a function of rollouts", BRANCH_SCORES)
        except UserError as error:
            raise UserError(f"tree.by: {error}") from None


def num_roots(tree: PointTree | SegmentTree, samples: Int[np.ndarray, " P"], configured: int) -> Int[np.ndarray, " P"]:
    """Return the roots of prompts with so many rows: the same share of them as of the configured number, and at least one."""
    return np.maximum(samples * tree.roots // configured, 1)


def first_limit(tree: PointTree | SegmentTree, limit: Int[np.ndarray, " P"]) -> Int[np.ndarray, " P"]:
    """Return the maximum completion tokens of roots, before any branch. `limit`: of all rows."""
    return np.minimum(tree.tokens, limit) if isinstance(tree, SegmentTree) else limit


def _grow_at_points(
    tree: PointTree, rollouts: Rollouts, samples: Int[np.ndarray, " P"], limit: Int[np.ndarray, " P"], seed: list[int],
    sample: SampleBranches,
) -> Rollouts:  # fmt: skip
    for number in range(tree.rounds):
        missing = samples - rollouts.size
        count = missing - missing * (tree.rounds - 1 - number) // (tree.rounds - number)
        if count.any():
            score = token_scores(tree.by, rollouts, [*seed, number])
            branches = branches_at(rollouts, score, count, tree.branches)
            rollouts = sample(rollouts, branches, limit[rollouts.prompt[branches.row]])
    return rollouts


def token_scores(by: str, rollouts: Rollouts, seed: list[int]) -> Float[np.ndarray, "B C"]:
    """Return a score per token, the larger the sooner the row is left before it.

    Entropy does not look at the drawn token, and the mean reward of the leaves stays near the policy's. Surprisal, -log p of the
    drawn token, does: rows are left where an improbable token was drawn, and the branches replace it, so they are right more often
    than the policy. TreeRL (arXiv 2506.11902) uses it, under the name of entropy.

    Args:
        by: entropy, surprisal, random, or "module:function" of rollouts.
        rollouts: of which rows are left.
        seed: of random scores; they depend on a row's uid and sample number too.

    Raises:
        UserError: a function that is not found, or whose result is no number per token.
    """
    if by == "entropy":
        return rollouts.entropy
    if by == "surprisal":
        return -rollouts.behavior_logprobs
    if by == "random":
        uid, slots = rollouts.prompts.uid[rollouts.prompt], rollouts.tokens.shape[1]
        each = zip(uid.tolist(), rollouts.sample.tolist(), strict=True)
        return np.array([np.random.default_rng([*seed, u, max(s, 0)]).random(slots) for u, s in each])
    own = user_code.resolve(by, "a function of rollouts", BRANCH_SCORES)
    found = np.asarray(own(rollouts))
    if found.shape != rollouts.tokens.shape or found.dtype.kind not in "iuf" or not np.isfinite(found).all():
        raise UserError(
            f"rollout.tree.by {by}: got {found.dtype}{list(found.shape)}, want a finite number per token, "
            f"{list(rollouts.tokens.shape)}"
        )
    return found


def branches_at(
    rollouts: Rollouts, score: Float[np.ndarray, "B C"], count: Int[np.ndarray, " P"], each: int
) -> Branches:
    """Return the branches at the tokens with the largest scores: equally many in each root's tree, and what is left where scores
    are largest.

    A row may be left before each token that it sampled itself but the first, which is where it left its own trunk. If a prompt has
    too few such tokens, further rows begin at the prompt, as further roots.

    Args:
        rollouts: with trunks.
        score: of each token.
        count: branches of each prompt.
        each: branches at a point.
    """
    root, slot = root_rows(rollouts), np.arange(rollouts.tokens.shape[1])
    may = rollouts.sampled & (slot > rollouts.fork[:, None]) & (slot < rollouts.length[:, None])
    rows, forks = [], []
    for p in np.flatnonzero(count).tolist():
        own = np.flatnonzero(rollouts.prompt == p)
        found = _best_points(may[own], score[own], root[own], -(-count[p] // each))
        row, fork = np.repeat(found, each, axis=0)[: count[p]].T
        missing = count[p] - len(row)
        rows += [*own[row].tolist(), *[root[own[0]]] * missing]
        forks += [*fork.tolist(), *[0] * missing]
    return Branches(np.array(rows, np.int32), np.array(forks, np.int32))


def _best_points(
    may: Bool[np.ndarray, "G C"], score: Float[np.ndarray, "G C"], root: Int[np.ndarray, " G"], points: int
) -> Int[np.ndarray, "n 2"]:
    """Return row and slot of at most `points` tokens of one prompt: of each root's tree equally many, then the best of the rest."""
    roots = np.unique(root)
    row, slot = np.nonzero(may)
    # On another mesh the same numbers are rounded otherwise: nearly equal ones count as equal, and the first token wins.
    order = np.argsort(-np.round(score[row, slot], DECIMALS), kind="stable")
    row, slot = row[order], slot[order]
    number = np.searchsorted(roots, root[row])
    rank = np.zeros(len(row), int)
    for m in range(len(roots)):
        rank[number == m] = np.arange(np.count_nonzero(number == m))
    beyond = rank >= points // len(roots)
    chosen = np.argsort(beyond, kind="stable")[:points]
    return np.stack([row[chosen], slot[chosen]], axis=1)


def _grow_in_segments(
    tree: SegmentTree, rollouts: Rollouts, samples: Int[np.ndarray, " P"], limit: Int[np.ndarray, " P"], seed: list[int],
    sample: SampleBranches,
) -> Rollouts:  # fmt: skip
    while True:
        going = ~np.isin(rollouts.finish, COMPLETE) & (rollouts.length < limit[rollouts.prompt])
        going = np.flatnonzero(going & (rollouts.prompt >= 0))
        if not len(going):
            break
        more = _children(rollouts, going, samples, tree.width - 1)
        row = np.repeat(going, 1 + more)
        continues = np.diff(row, prepend=-1) > 0
        most = np.minimum(rollouts.length[row] + tree.tokens, limit[rollouts.prompt[row]])
        rollouts = sample(rollouts, Branches(row, rollouts.length[row], continues), most)
    count = samples - rollouts.size
    if not count.any():
        return rollouts
    # Paths ended before the budget was spent: the rest leaves them where segments meet, at random.
    at_border = np.arange(rollouts.tokens.shape[1]) % tree.tokens == 0
    borders = rollouts.replace(sampled=rollouts.sampled & at_border)
    branches = branches_at(borders, token_scores("random", rollouts, seed), count, 1)
    return sample(rollouts, branches, limit[rollouts.prompt[branches.row]])


def _children(
    rollouts: Rollouts, going: Int[np.ndarray, " n"], samples: Int[np.ndarray, " P"], most: int
) -> Int[np.ndarray, " n"]:
    """Return how many rows leave each row that continues: `most`, or its share of the rows that its prompt lacks."""
    prompt = rollouts.prompt[going]
    missing, num = (samples - rollouts.size)[prompt], np.bincount(prompt, minlength=len(samples))[prompt]
    rank = np.arange(len(going)) - np.searchsorted(prompt, prompt)
    return np.minimum(missing // num + (rank < missing % num), most)
