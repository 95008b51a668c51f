"""Reuse of earlier rollouts: what another policy samples with their noise, token for token, and no more than that is decoded."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, MODEL, VOCAB, C, G, P, sampler
from setups import layouts, make_params, make_policy, make_prompts

from jaxrl_llm.rollout.config import EngineConfig
from jaxrl_llm.types import Finish, Rollouts, check

KEY = jax.random.key(0)
CHUNKS = EngineConfig(decode_chunk=2, eos_interval=1)


def policies(change: float = 0.15, sizes: tuple[int, ...] = (1, 1, 1)):
    """Two policies, of which the second has weights a bit apart, and is of version 7."""
    train, decode = layouts(sizes)
    old, noise = (make_params(MODEL, train, sharpness=2.0, seed=seed) for seed in (0, 1))
    new = jax.tree.map(lambda x, y: x + change * y, old, noise)
    first, second = (make_policy(MODEL, params, train, decode) for params in (old, new))
    return first, second.replace(version=second.version * 0 + 7)


def assert_same(got: Rollouts, want: Rollouts) -> None:
    check(got)
    for name in ("tokens", "length", "finish", "sampled", "control_state", "version", "temperature"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    for name in ("behavior_logprobs", "entropy", "raw_logprobs"):
        if getattr(want, name) is not None:
            # Of one pass and of a step: rounding in another order.
            np.testing.assert_allclose(getattr(got, name), getattr(want, name), atol=2e-5, err_msg=name)
    if want.kept_tokens is not None:
        np.testing.assert_array_equal(np.sort(got.kept_tokens), np.sort(want.kept_tokens))


CASES = {
    "plain": {},
    "read in chunks": {"engine": EngineConfig(decode_chunk=2, eos_interval=1, prefill_chunk=4)},
    "minimum length": {"min_new_tokens": 4},
    "truncated": {"top_p": 0.8, "top_k": 5, "raw_logprobs": True},
    "stop strings": {"stop": ("1", "+2")},
    **{name: {"control": control} for name, control in CONTROLS.items()},
}


FAST = ("read in chunks", "truncated", "stop strings", "regex", "budget", "waits")


@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.soak) for n in CASES])
def test_what_a_fresh_call_with_the_same_noise_samples(name):
    old, new = policies()
    engine, prompts = sampler(**{"engine": CHUNKS, **CASES[name]}), make_prompts(P)
    known, want = (engine.generate(policy, prompts, KEY) for policy in (old, new))
    got = engine.reuse(new, known, KEY)
    assert_same(got.rollouts, want)
    equal = (known.tokens == want.tokens) & (np.arange(C) < np.minimum(known.length, want.length)[:, None])
    np.testing.assert_array_equal(got.kept, np.cumprod(equal, axis=1).sum(axis=1))
    assert 0 < got.kept.sum() < known.length.sum()


def test_the_same_policy_keeps_all_and_decodes_nothing():
    old, _ = policies()
    engine = sampler()
    known = engine.generate(old, make_prompts(P), KEY)
    got = engine.reuse(old, known, KEY)
    assert_same(got.rollouts, known)
    np.testing.assert_array_equal(got.kept, known.length)


def test_other_noise_keeps_hardly_a_token():
    """A mutant: the noise of the pass is not that of the call."""
    old, _ = policies()
    engine = sampler()
    known = engine.generate(old, make_prompts(P), KEY)
    got = engine.reuse(old, known, jax.random.key(1))
    assert got.kept.sum() < 0.4 * known.length.sum()
    assert_same(got.rollouts, engine.generate(old, make_prompts(P), jax.random.key(1)))


@pytest.mark.parametrize("control", [None, "regex"])
def test_unfinished_rows_and_a_lower_limit(control):
    """Stopped after four tokens, some rows at their ends; and cut at five."""
    old, new = policies()
    engine = sampler(engine=CHUNKS, **({"control": CONTROLS[control]} if control else {}))
    prompts, session = make_prompts(P), engine.session(old, KEY)
    ids = session.add(prompts)
    for _ in range(2):
        session.advance()
    session.stop(ids)
    known = session.take(ids)
    assert (known.finish == Finish.UNFINISHED).any()
    assert_same(engine.reuse(new, known, KEY).rollouts, engine.generate(new, prompts, KEY))
    limit = np.full(P, 5 if control is None else 9)
    whole = engine.generate(old, prompts, KEY)
    assert_same(engine.reuse(new, whole, KEY, limit=limit).rollouts, engine.generate(new, prompts, KEY, limit=limit))


def test_tokens_that_were_given_stay_and_are_context():
    """A hint is kept whatever the noise says, and the rest is as behind the hint."""
    old, new = policies()
    engine, prompts = sampler(engine=CHUNKS), make_prompts(P)
    hints = [[3, 5, 7][: b % 4] for b in range(P * G)]

    def hinted(policy):
        session = engine.session(policy, KEY)
        ids = session.add(prompts, known=hints)
        while session.pending:
            session.advance()
        return session.take(ids)

    got = engine.reuse(new, hinted(old), KEY)
    assert_same(got.rollouts, hinted(new))
    assert (got.kept >= [len(hint) for hint in hints]).all()


@pytest.mark.parametrize(("before", "now"), [((), CASES["stop strings"]["stop"]), (CASES["stop strings"]["stop"], ())])
def test_other_stop_strings_end_other_rows(before, now):
    """Kept tokens end where the engine's own stop strings do, and are continued where another engine's ended."""
    old, new = policies(change=0.02)
    known = sampler(engine=CHUNKS, stop=before).generate(old, make_prompts(P), KEY)
    engine = sampler(engine=CHUNKS, stop=now)
    got, want = engine.reuse(new, known, KEY), engine.generate(new, make_prompts(P), KEY)
    assert_same(got.rollouts, want)
    assert (want.finish == Finish.STOP).any() == bool(now) and (got.kept > 0).any()


def test_samples_of_other_numbers_and_of_other_temperatures():
    old, new = policies()
    engine, prompts, warm = sampler(), make_prompts(P), np.linspace(0.5, 1.5, P * G).astype(np.float32)
    controls = jax.tree.map(lambda x: np.repeat(x, G), engine.controls(P)).replace(temperature=warm)

    def sampled(policy):
        session = engine.session(policy, KEY)
        ids = session.add(prompts, controls=controls, first_sample=np.arange(P) + 3)
        while session.pending:
            session.advance()
        return session.take(ids)

    assert_same(engine.reuse(new, sampled(old), KEY, controls).rollouts, sampled(new))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["truncated", *(pytest.param(n, marks=pytest.mark.soak) for n in ("plain", "waits"))])
def test_the_mesh_changes_no_token(name):
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        old, new = policies(sizes=sizes)
        engine = sampler(sizes, **CASES[name])
        found.append(engine.reuse(new, engine.generate(old, make_prompts(P), KEY), KEY))
    np.testing.assert_array_equal(found[0].kept, found[1].kept)
    for column in ("tokens", "length", "finish", "sampled"):
        np.testing.assert_array_equal(getattr(found[0].rollouts, column), getattr(found[1].rollouts, column))
    np.testing.assert_allclose(found[0].rollouts.behavior_logprobs, found[1].rollouts.behavior_logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"sample": np.resize([0, 2], P * G)}, "known.sample: got numbers with gaps"),
        ({"prompt": np.resize(np.arange(P), P * G)}, "known.prompt: got rows without a prompt"),
        ({"tokens": np.full((P * G, C), VOCAB.size)}, "known.tokens: got 16, want token ids from 0 to 15"),
    ],
)
def test_what_could_not_be_rollouts_of_a_call_is_refused(change, error):
    old, _ = policies()
    engine = sampler()
    known = engine.generate(old, make_prompts(P), KEY)
    with pytest.raises(ValueError, match=error):
        engine.reuse(old, known.replace(**{name: x.astype(np.int32) for name, x in change.items()}), KEY)


def test_states_of_another_engine_are_refused():
    old, _ = policies()
    engine = sampler(control=CONTROLS["regex"])
    known = engine.generate(old, make_prompts(P), KEY)
    states = known.control_state + np.int32(len(engine.tables.next))
    with pytest.raises(ValueError, match=r"known.control_state: got states that this engine's controls have not"):
        engine.reuse(old, known.replace(control_state=states), KEY)
