"""The inexact form of reuse: which tokens are accepted how often, what is recorded of them, and that it is no fresh sample."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, MODEL, VOCAB, C, P, sampler
from setups import layouts, make_policy, make_prompts
from test_reuse import CASES, CHUNKS, policies
from test_reuse_exactness import counted, probabilities, test_statistic, weights

from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import INEXACT, Engine, EngineModel
from jaxrl_llm.types import Finish, Prompts, check

KEY, OTHER = jax.random.key(0), jax.random.key(1)
TRIALS, LENIENCY = 8192, 0.5
EOS = 15


@pytest.fixture(scope="module")
def drawn():
    """Responses of at most two tokens, of the old policy, and what the new one made of them."""
    train, decode = layouts()
    engine = Engine(EngineModel(MODEL, decode, VOCAB), RolloutConfig(prompts=64, samples=8, max_new_tokens=2), 3)
    old, new = (make_policy(MODEL, params, train, decode) for params in weights())
    new = new.replace(version=new.version * 0 + 7)
    uid = np.arange(TRIALS // 8, dtype=np.int32)
    prompts = Prompts(
        np.tile(np.array([3, 7, 1], np.int32), (len(uid), 1)), np.full(len(uid), 3, np.int32), uid, uid * 0
    )
    known = engine.generate(old, prompts, KEY)
    # With the same key: the noise is another one.
    return known, engine.reuse(new, known, KEY, leniency=LENIENCY)


def of_first() -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the first token under the old and the new policy."""
    return tuple(probabilities(params).sum(axis=1) for params in weights())


def test_how_often_a_token_is_accepted(drawn):
    """min(1, exp(leniency) new / old): of the wrong sign, it would be far less."""
    known, got = drawn
    old, new = of_first()
    share = {sign: np.minimum(old, np.exp(sign * LENIENCY) * new).sum() for sign in (1, 0, -1)}
    assert share[1] > share[0] + 0.02 > share[-1] + 0.1
    # Five standard deviations.
    assert np.mean(got.kept > 0) == pytest.approx(share[1], abs=5 * np.sqrt(share[1] * (1 - share[1]) / TRIALS))
    for token in np.flatnonzero(old > 0.02):
        rows, accepted = known.tokens[:, 0] == token, min(1, np.exp(LENIENCY) * new[token] / old[token])
        deviation = np.sqrt(accepted * (1 - accepted) / rows.sum())
        assert np.mean(got.kept[rows] > 0) == pytest.approx(accepted, abs=5 * deviation + 1e-4)


def test_the_log_prob_of_a_kept_token_is_that_of_drawing_and_accepting_it(drawn):
    known, got = drawn
    old, new = of_first()
    kept = got.kept > 0
    token, rollouts = known.tokens[kept, 0], check(got.rollouts)
    want = np.log(np.minimum(old, np.exp(LENIENCY) * new))[token]
    np.testing.assert_allclose(rollouts.behavior_logprobs[kept, 0], want, atol=2e-5)
    assert (rollouts.version[kept, 0] == known.version[0, 0]).all() and (rollouts.version[~kept, 0] == 7).all()
    # In the place of a rejected token the new policy draws, as if nothing had been seen.
    np.testing.assert_allclose(rollouts.behavior_logprobs[~kept, 0], np.log(new)[rollouts.tokens[~kept, 0]], atol=2e-5)


def test_accepted_tokens_weighted_by_their_ratio_have_the_means_of_the_new_policy(drawn):
    """What the correction is for. With the old log-probs alone the means are too small where tokens were rejected."""
    known, got = drawn
    old, new = of_first()
    kept, token = got.kept > 0, known.tokens[:, 0]
    corrected = np.where(kept, new[token] / np.exp(got.rollouts.behavior_logprobs[:, 0]), 0)
    plain = np.where(kept, new[token] / old[token], 0)
    f = (new < old)[token]
    want = new[new < old].sum()
    assert np.mean(corrected * f) == pytest.approx(want, abs=5 * np.std(corrected * f) / np.sqrt(TRIALS))
    assert np.mean(plain * f) < want - 5 * np.std(plain * f) / np.sqrt(TRIALS)


def test_it_is_not_distributed_as_fresh_samples(drawn):
    assert test_statistic(counted(drawn[1].rollouts.tokens), probabilities(weights()[1])) < 1e-6


def test_accepted_a_second_time_it_is_the_probability_of_all_that_happened():
    """old, then newer ones: min(old, exp(leniency) new, exp(leniency) newer)."""
    old, new = policies(change=0.08)
    _, newer = policies(change=0.16)
    engine, prompts = sampler(), make_prompts(P)
    first = engine.generate(old, prompts, KEY)
    by_new, by_newer = (engine.reuse(policy, first, OTHER, leniency=0.0) for policy in (new, newer))
    both = engine.reuse(newer, by_new.rollouts, jax.random.key(2), leniency=0.0)
    kept = np.arange(C) < np.min([by_new.kept, by_newer.kept, both.kept], axis=0)[:, None]
    want = np.minimum(by_new.rollouts.behavior_logprobs, by_newer.rollouts.behavior_logprobs)
    assert (kept & (want < first.behavior_logprobs - 0.01)).sum() > 5
    np.testing.assert_allclose(both.rollouts.behavior_logprobs[kept], want[kept], atol=2e-5)


@pytest.mark.parametrize("name", ["truncated", "regex", "budget", "waits", "stop strings"])
def test_what_is_kept_and_what_follows(name):
    """Kept tokens and their columns are the known ones; what follows is what a request that begins with them samples."""
    old, new = policies()
    engine, prompts = sampler(**{"engine": CHUNKS, **CASES[name]}), make_prompts(P)
    known = engine.generate(old, prompts, KEY)
    got = engine.reuse(new, known, OTHER, leniency=0.2)
    inside = np.arange(C) < got.kept[:, None]
    assert 0 < got.kept.sum() < known.length.sum()
    check(got.rollouts)
    for column in ("tokens", "sampled", "version", "entropy", "raw_logprobs", "kept_tokens", "control_state"):
        if (mine := getattr(got.rollouts, column)) is not None:
            np.testing.assert_array_equal(mine[inside], getattr(known, column)[inside], err_msg=column)
    whole = got.kept == known.length
    np.testing.assert_array_equal(got.rollouts.finish[whole], known.finish[whole])
    if name == "waits":
        # Its wait is what it puts in the place of a token that was drawn: a token given to a request is none.
        return
    session = engine.session(new, jax.random.fold_in(jax.random.fold_in(OTHER, INEXACT), 7))
    begun = [row[:n].tolist() for row, n in zip(known.tokens, got.kept, strict=True)]
    ids = session.add(prompts, known=begun)
    while session.pending:
        session.advance()
    np.testing.assert_array_equal(got.rollouts.tokens[~whole], session.take(ids).tokens[~whole])


def test_a_token_outside_the_new_support_is_rejected():
    """However lenient: its probability is 0."""
    old, new = policies(change=1.0)
    engine, prompts = sampler(top_k=2), make_prompts(P)
    known = engine.generate(old, prompts, KEY)
    got = engine.reuse(new, known, OTHER, leniency=50.0)
    again = engine.reuse(new, known, KEY)
    # Behind equal tokens both forms see the same supports: what the exact form keeps is in them.
    assert (got.kept >= again.kept).all() and (got.kept > again.kept).any()
    assert (got.kept < known.length).any()
    assert np.isfinite(got.rollouts.behavior_logprobs).all()


def test_a_lenient_policy_keeps_all_and_a_limit_cuts():
    old, new = policies()
    engine, prompts = sampler(), make_prompts(P)
    known = engine.generate(old, prompts, KEY)
    got = engine.reuse(new, known, OTHER, leniency=100.0)
    np.testing.assert_array_equal(got.kept, known.length)
    # Accepted for certain: the log-probs are the old ones to the bit.
    np.testing.assert_array_equal(got.rollouts.behavior_logprobs, known.behavior_logprobs)
    short = engine.reuse(new, known, OTHER, limit=np.full(P, 3), leniency=100.0)
    np.testing.assert_array_equal(short.rollouts.length, np.minimum(known.length, 3))
    assert (short.rollouts.finish[known.length > 3] == Finish.LENGTH).all()


def test_numbers_that_are_no_leniency_are_refused():
    old, _ = policies()
    engine = sampler()
    known = engine.generate(old, make_prompts(P), KEY)
    for wrong in (-0.1, np.nan, np.inf, "0.5"):
        with pytest.raises(ValueError, match=r"leniency: got .*, want None, or a number of nats from 0"):
            engine.reuse(old, known, OTHER, leniency=wrong)


@pytest.mark.soak
def test_the_mesh_changes_no_token():
    found = []
    for sizes in ((1, 1, 1), (2, 2, 2)):
        old, new = policies(sizes=sizes)
        engine = sampler(sizes, control=CONTROLS["regex"])
        found.append(engine.reuse(new, engine.generate(old, make_prompts(P), KEY), OTHER, leniency=0.2))
    np.testing.assert_array_equal(found[0].kept, found[1].kept)
    for column in ("tokens", "length", "finish", "sampled"):
        np.testing.assert_array_equal(getattr(found[0].rollouts, column), getattr(found[1].rollouts, column))
    np.testing.assert_allclose(found[0].rollouts.behavior_logprobs, found[1].rollouts.behavior_logprobs, atol=1e-4)
