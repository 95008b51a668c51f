"""Branches of rollouts: rows that begin with tokens of a trunk have the tokens of rows that were given the same tokens."""

import dataclasses

import jax
import numpy as np
import pytest
from controlled import CONTROLS, MODEL, VOCAB, C, G, P, sampler
from setups import FAMILIES, layouts, make_params, make_policy, make_prompts, until_of
from setups import engine as engine_of

from jaxrl_llm.errors import UserError
from jaxrl_llm.model.transformer import hidden, logits
from jaxrl_llm.rollout.config import EngineConfig
from jaxrl_llm.rollout.tree import Branches, whole_paths
from jaxrl_llm.types import Finish, Rollouts, check

KEY = jax.random.key(0)
CHUNKS = EngineConfig(decode_chunk=2, eos_interval=1)


def policy_of(cfg=MODEL, sizes=(1, 1, 1)):
    train, decode = layouts(sizes)
    return make_policy(cfg, make_params(cfg, train, sharpness=2.0), train, decode)


def branches_of(rollouts: Rollouts, num: int = 11, seed: int = 0) -> Branches:
    """Branches of some rows, several of one row, at places at which they can be left."""
    rng = np.random.default_rng(seed)
    rows = np.flatnonzero(rollouts.length > 1)
    row = rng.choice(rows, num)
    row[:3] = row[0]
    return Branches(row, np.array([rng.integers(0, rollouts.length[b]) for b in row]))


def continued(engine, policy, rollouts: Rollouts, tree: Rollouts, limit=None) -> Rollouts:
    """The new rows of a tree, in a plain session: each row's path given as known tokens, keys held per row."""
    new = np.flatnonzero(tree.sample > rollouts.sample.max())
    paths, fork = whole_paths(tree), tree.fork[new]
    inside = np.arange(paths.tokens.shape[1]) < fork[:, None]
    known = jax.tree.map(lambda x: x[new], paths.replace(prompts=None)).replace(
        prompts=jax.tree.map(lambda x: x[tree.prompt[new]], tree.prompts),
        prompt=np.arange(len(new), dtype=np.int32),
        length=fork,
        finish=np.full(len(new), int(Finish.UNFINISHED), np.int32),
        trunk=None,
        fork=None,
    )
    known = known.replace(tokens=np.where(inside, known.tokens, 0), sampled=known.sampled & inside)
    session = engine.session(policy, KEY)
    each = np.ones(len(new), int)
    ids = session.add(known.prompts, each, None, limit, known, first_sample=tree.sample[new])
    while session.pending:
        session.advance()
    return session.take(ids)


def assert_branches(tree: Rollouts, want: Rollouts, first: int) -> None:
    """`want`: the new rows with their whole paths; `first`: the smallest new sample number."""
    check(tree)
    new = np.flatnonzero(tree.sample >= first)
    own = np.arange(tree.tokens.shape[1]) >= tree.fork[new][:, None]
    paths = whole_paths(tree)
    for name in ("tokens", "length", "finish", "sampled", "version", "control_state"):
        if getattr(want, name) is not None:
            np.testing.assert_array_equal(getattr(paths, name)[new], getattr(want, name), err_msg=name)
    for name in ("behavior_logprobs", "entropy"):
        np.testing.assert_allclose(getattr(paths, name)[new], getattr(want, name), atol=2e-5, err_msg=name)
        assert not getattr(tree, name)[new][~own].any(), name
    assert not tree.sampled[new][~own].any() and tree.sampled[new][own].any()


@pytest.mark.parametrize("name", ["truncated", "stop strings", "budget"])
def test_branches_have_the_tokens_of_rows_that_were_given_the_same_tokens(name):
    cases = {
        "truncated": {"top_p": 0.8, "top_k": 5},
        "stop strings": {"stop": ("1", "+2")},
    }
    more = cases[name] if name in cases else {"control": CONTROLS[name]}
    engine, policy = sampler(engine=CHUNKS, **more), policy_of()
    roots = engine.generate(policy, make_prompts(P), KEY)
    tree = engine.branch(policy, roots, branches_of(roots), KEY)
    assert len(tree.length) == len(roots.length) + 11 and set(tree.trunk[tree.fork == 0]) <= set(tree.sample)
    assert_branches(tree, continued(engine, policy, roots, tree), G)
    # The roots are as they were.
    old = np.flatnonzero(tree.sample < G)
    for field in dataclasses.fields(Rollouts):
        if field.name not in ("prompts", "trunk", "fork") and getattr(roots, field.name) is not None:
            np.testing.assert_array_equal(getattr(tree, field.name)[old], getattr(roots, field.name))


def test_a_sliding_window_shorter_than_prompt_and_trunk():
    cfg = FAMILIES["gemma2, window 5"]
    engine = engine_of(cfg, layouts()[1], prompts=P, samples=G, max_new_tokens=C, engine=CHUNKS)
    policy = policy_of(cfg)
    roots = engine.generate(policy, make_prompts(P), KEY)
    tree = engine.branch(policy, roots, branches_of(roots), KEY)
    assert_branches(tree, continued(engine, policy, roots, tree), G)


def test_branches_of_branches():
    engine, policy = sampler(engine=CHUNKS), policy_of()
    tree = engine.generate(policy, make_prompts(P), KEY)
    for seed in range(3):
        first, roots = tree.sample.max() + 1, tree
        tree = engine.branch(policy, tree, branches_of(tree, seed=seed), KEY)
        assert_branches(tree, continued(engine, policy, roots, tree), first)
    trunk = tree.trunk_rows
    assert ((tree.fork > tree.fork[trunk]) | (tree.fork == 0)).all(), "a branch leaves a token of its trunk's own"
    depth = np.zeros(len(trunk), int)
    for row in np.argsort(tree.sample):
        depth[row] = depth[trunk[row]] + (trunk[row] != row)
    assert depth.max() >= 2
    # Its log-probs are those of a pass over each row by itself.
    paths = whole_paths(tree)
    inside = np.arange(C) < paths.length[:, None]
    np.testing.assert_array_equal(paths.sampled, inside)
    np.testing.assert_allclose(np.where(inside, score_rows(paths), 0), paths.behavior_logprobs, atol=2e-5)


def score_rows(paths: Rollouts) -> np.ndarray:
    """Log-probs of the completion tokens, each row in a pass of its own."""
    train = layouts()[0]
    params, begin = make_params(MODEL, train, sharpness=2.0), paths.prompts.length[paths.prompt]
    slots = 7 + C
    whole = np.zeros((len(begin), slots), np.int32)
    for row, tokens, prompt, own, n in zip(
        whole, paths.prompts.tokens[paths.prompt], begin, paths.tokens, paths.length, strict=True
    ):
        row[: prompt + n] = [*tokens[:prompt], *own[:n]]
    position = np.broadcast_to(np.arange(slots), whole.shape)
    h = hidden(params, whole, position, until_of(begin + paths.length, slots), MODEL, train)
    raw = logits(params, h, MODEL)
    logp = np.asarray(jax.nn.log_softmax(raw[..., : VOCAB.size], axis=-1))
    at = np.minimum(begin[:, None] + np.arange(C), slots - 1)
    return logp[np.arange(len(begin))[:, None], at - 1, whole[np.arange(len(begin))[:, None], at]]


def test_unfinished_rows_are_left_where_they_stand_and_limits_hold():
    engine, policy = sampler(engine=CHUNKS), policy_of()
    prompts = make_prompts(P)
    roots = engine.generate(policy, prompts, KEY, limit=np.full(P, 4))
    row = np.flatnonzero(roots.finish == Finish.LENGTH)
    tree = engine.branch(policy, roots, Branches(np.repeat(row, 2), np.full(2 * len(row), 4)), KEY, limit=7)
    new = tree.sample >= G
    assert (tree.fork[new] == 4).all() and tree.length[new].min() >= 5 and tree.length[new].max() == 7
    assert_branches(tree, continued(engine, policy, roots, tree, limit=np.full(new.sum(), 7)), G)


def test_rows_continue_beside_their_branches():
    """As in a call without the first limit."""
    engine, policy = sampler(engine=CHUNKS), policy_of()
    prompts = make_prompts(P)
    roots, whole = (engine.generate(policy, prompts, KEY, limit=limit) for limit in (np.full(P, 4), None))
    row = np.repeat(np.flatnonzero(roots.finish == Finish.LENGTH), 3)
    continues = np.arange(len(row)) % 3 == 1
    tree = engine.branch(policy, roots, Branches(row, np.full(len(row), 4), continues), KEY)
    assert len(tree.length) == len(roots.length) + np.count_nonzero(~continues)
    old = tree.sample < G
    assert not tree.fork[old].any() and (tree.trunk[old] == tree.sample[old]).all()
    for name in ("tokens", "length", "finish", "sampled", "version"):
        np.testing.assert_array_equal(getattr(tree, name)[old], getattr(whole, name), err_msg=name)
    np.testing.assert_allclose(tree.behavior_logprobs[old], whole.behavior_logprobs, atol=2e-5)
    assert_branches(tree, continued(engine, policy, roots, tree), G)


def test_keys_of_a_trunk_are_held_once():
    engine, policy = sampler(engine=CHUNKS), policy_of()
    roots = engine.generate(policy, make_prompts(P), KEY)
    row = np.repeat(np.flatnonzero(roots.length > 3)[:2], 4)
    engine.branch(policy, roots, Branches(row, np.tile([1, 2, 3, 3], 2)), KEY)
    sizes, programs = engine.branching[2]
    assert sizes.rows_per_group == 2 and sizes.prompt_slots[-1] == 7 + C
    decoded = [name for name in programs._compiled if name[0] == "decode_chunk"]
    for _, groups, window in decoded:
        trunks, own = programs.caches(groups, window)
        assert {x.shape[0] for x in jax.tree.leaves(trunks)} == {groups}
        assert {x.shape[0] for x in jax.tree.leaves(own)} == {groups * 2}


BAD = {
    "no branch": (Branches(np.zeros(0, int), np.zeros(0, int)), "branches: got none, want one or more"),
    "no row": (Branches(np.array([99]), np.array([0])), "branches.row: got 99, want rows from 0 to 15"),
    "behind the end": (Branches(np.array([0]), np.array([50])), "branches.fork[0]: got 50, want 0 to "),
    "negative": (Branches(np.array([0]), np.array([-1])), "branches.fork[0]: got -1, want 0 to "),
    "not numbers": (Branches(np.array([0.5]), np.array([0])), "branches.row: got float64[1], want one whole number"),
    "no end to continue from": (
        Branches(np.array([0]), np.array([0]), np.array([True])),
        "branches.continues[0]: got True behind 0 tokens, want all ",
    ),
    "of two lengths": (Branches(np.array([0]), np.array([0, 1])), "branches.fork: got int64[2], want one whole number"),
}


@pytest.mark.parametrize("name", BAD)
def test_branches_that_cannot_be(name):
    engine, policy = sampler(engine=CHUNKS), policy_of()
    roots = engine.generate(policy, make_prompts(P), KEY)
    branches, message = BAD[name]
    with pytest.raises(ValueError) as error:
        engine.branch(policy, roots, branches, KEY)
    assert message in str(error.value)


def test_what_is_no_rollouts_and_a_limit_within_the_trunk():
    engine, policy = sampler(engine=CHUNKS), policy_of()
    roots = engine.generate(policy, make_prompts(P), KEY)
    with pytest.raises(UserError, match="rollouts: got str, want Rollouts"):
        engine.branch(policy, "roots", branches_of(roots), KEY)
    row = np.flatnonzero(roots.length > 3)[:1]
    with pytest.raises(ValueError, match="limit: got 2 for a row that begins with 3 tokens"):
        engine.branch(policy, roots, Branches(row, np.array([3])), KEY, limit=2)
