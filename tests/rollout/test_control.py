"""Controls in the decode loop: what rows consist of, what is recorded of them, and that they depend on nothing else."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, TOKENIZER, VOCAB, C, G, P, follows, policy, sampler, texts
from setups import make_prompts

from jaxrl_llm.control.config import AllowControl, RegexControl
from jaxrl_llm.distribution.control_tables import allowed_tokens, state_of
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.types import Finish, check

KEY = jax.random.key(0)
NAMES = list(CONTROLS)
# One row per sample of each prompt; prompt p is under control p.
BY_ROW = np.repeat(NAMES, G)
assert len(NAMES) == P


def generate(engine, sizes=(1, 1, 1), key=KEY, limit=None, **controls):
    """Prompt p under control p."""
    of = engine.controls(P, control=list(CONTROLS.values())).replace(**controls)
    return check(engine.generate(policy(sizes), make_prompts(P), key, of, limit))


@pytest.fixture(scope="module")
def engine():
    return sampler()


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_what_its_control_allows(engine, seed):
    """Eight controls in one batch, limits down to the shortest text that each allows."""
    least = np.array([engine.tables.distance[engine.control_set.start(c)] for c in CONTROLS.values()]) if seed else 0
    limit = np.maximum(np.random.default_rng(seed).integers(least, C + 1), 1) if seed else np.full(P, C)
    limit[NAMES.index("forbid")], limit[NAMES.index("budget")], limit[NAMES.index("waits")] = C, C, C
    of = generate(engine, key=jax.random.key(seed), limit=limit, temperature=np.full(P, 1.0 + seed, np.float32))
    for name, text, finish in zip(BY_ROW, texts(of), of.finish, strict=True):
        assert follows(name, text, Finish(finish).name), (name, text)
    assert len(set(texts(of))) > P


def test_what_is_forced_was_not_sampled(engine):
    of = generate(engine)
    inside = np.arange(C) < of.length[:, None]
    forced = inside & ~of.sampled
    begin = np.flatnonzero(BY_ROW == "begin")
    np.testing.assert_array_equal(forced[begin], np.arange(C) < 2 * np.ones((G, 1)))
    assert not forced[np.isin(BY_ROW, ("regex", "choice", "allow", "forbid", "stop"))].any()
    for column in (of.behavior_logprobs, of.entropy):
        np.testing.assert_array_equal(column[~of.sampled], 0)
    # A budget's closing, where the thinking was cut off.
    for b in np.flatnonzero(BY_ROW == "budget"):
        text = texts(of)[b]
        was_cut = ">" not in text[:4] and text[4:6] == "+>"
        np.testing.assert_array_equal(np.flatnonzero(forced[b]), [4, 5] if was_cut else [])


def test_recorded_states_are_those_of_the_automaton(engine):
    """The state in which each token was drawn: the start at first, then that behind the token before, unless it expired."""
    of, tables = generate(engine), engine.tables
    starts = engine.controls(P, control=list(CONTROLS.values())).control
    for b in range(P * G):
        state, budget = int(starts[b // G]), CONTROLS[BY_ROW[b]].tokens if "tokens" in dir(CONTROLS[BY_ROW[b]]) else C
        budget = budget if isinstance(budget, int) else C
        for slot in range(of.length[b]):
            state = int(tables.expires[state]) if slot >= budget else state
            recorded = int(state_of(of.control_state[b, slot]))
            assert recorded == state or tables.replaces[recorded], (BY_ROW[b], slot)
            state = int(tables.after(recorded, of.tokens[b, slot]))
    np.testing.assert_array_equal(of.control_state[np.arange(C) >= of.length[:, None]], 0)


def test_logprobs_are_those_of_the_allowed_tokens(engine):
    """A row under a control that allows two tokens has their probabilities, renormalized: entropy at most log 2."""
    two = AllowControl(tokens=("1", "2"))
    of = engine.generate(policy(), make_prompts(P), KEY, engine.controls(P, control=two))
    allowed = np.asarray(allowed_tokens(jax.tree.map(np.asarray, engine.tables), of.control_state).mask)
    assert set(np.flatnonzero(allowed[0, 0])) == {*TOKENIZER.encode("12"), *VOCAB.eos}
    assert of.entropy.max() <= np.log(3) and (of.behavior_logprobs[of.sampled] < 0).all()


@pytest.mark.slow
def test_the_mesh_changes_no_token(engine):
    one, many = generate(engine), generate(sampler((2, 2, 2)), (2, 2, 2))
    for name in ("tokens", "sampled", "finish", "length", "control_state"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name), err_msg=name)
    np.testing.assert_allclose(one.behavior_logprobs, many.behavior_logprobs, atol=1e-4)


def test_another_control_of_the_same_size_compiles_nothing():
    engine = sampler(control=RegexControl(pattern="[0-9]{2}#"))
    engine.generate(policy(), make_prompts(P), KEY)
    other = sampler(control=RegexControl(pattern="[1-5]{2}#"))
    assert other.tables.sizes == engine.tables.sizes
    other.programs._compiled = engine.programs._compiled
    compiles = CompileCounter()
    of = other.generate(policy(), make_prompts(P), KEY)
    assert compiles.take()["compiles"] == 0
    assert all(len(text) == 3 and set(text[:2]) <= set("12345") for text in texts(of))


def test_rows_without_a_control_are_free(engine):
    """In one batch with controlled rows they have the tokens, to the last bit, that they have in an engine without controls."""
    free, before = sampler().generate(policy(), make_prompts(P), KEY), engine.tables
    assert free.control_state is None and before is not None
    of = engine.generate(policy(), make_prompts(P), KEY)
    for name in ("tokens", "sampled", "finish", "length", "behavior_logprobs", "entropy"):
        np.testing.assert_array_equal(getattr(of, name), getattr(free, name), err_msg=name)


def test_requests_with_other_controls_join_while_others_decode(engine):
    """Each has the tokens that it has alone, though a control that comes later makes the tables larger."""
    alone, prompts, ids = generate(engine), make_prompts(P), []
    growing = sampler()
    session = growing.session(policy(), KEY)
    for p, control in enumerate(CONTROLS.values()):
        own = jax.tree.map(lambda x, p=p: x[p : p + 1], prompts)
        ids += session.add(own, controls=growing.controls(1, control=control)).tolist()
        session.advance()
    while session.pending:
        session.advance()
    got = session.take(ids)
    for name in ("tokens", "sampled", "finish", "length"):
        np.testing.assert_array_equal(getattr(got, name), getattr(alone, name), err_msg=name)
