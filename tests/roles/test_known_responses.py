"""Known responses as a control sees them: their masks are those of sampling, forced tokens are not sampled."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, TOKENIZER, C, policy, sampler
from setups import make_prompts

from jaxrl_llm.control.config import BeginControl, RegexControl
from jaxrl_llm.roles.known_responses import allowed_rows, under_control
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.update.batch import supervised


@pytest.mark.parametrize("name", ["regex", "choice", "budget", "begin", "stop", "forbid"])
def test_entries_are_those_that_sampling_records(name):
    """Responses were sampled under the control, with a minimum length, most of them within a smaller limit than the config's."""
    engine = sampler(control=CONTROLS[name], min_new_tokens=3)
    limit = np.array([C] + [C - 2] * 7)
    of = engine.generate(policy(), make_prompts(8), jax.random.key(0), limit=limit)
    got = under_control(
        of.replace(control_state=None, sampled=np.arange(C) < of.length[:, None]), engine.control_set, engine.cfg, limit
    )
    np.testing.assert_array_equal(got.control_state, of.control_state)
    np.testing.assert_array_equal(got.sampled, of.sampled)
    assert allowed_rows(got, engine.control_set).all()


def test_a_response_that_is_not_allowed_has_an_entry_that_refuses_it():
    engine = sampler(control=BeginControl(text="<", then=RegexControl(pattern="[0-9]{2}#")))
    of = engine.generate(policy(), make_prompts(8), jax.random.key(0))
    tokens = of.tokens.copy()
    tokens[1, 1] = TOKENIZER.encode("+")[0]
    changed = of.replace(tokens=tokens)
    got = under_control(changed, engine.control_set, engine.cfg, np.full(8, C))
    np.testing.assert_array_equal(allowed_rows(got, engine.control_set), np.arange(16) != 1)
    np.testing.assert_array_equal(got.control_state[:, :2], of.control_state[:, :2])


def test_without_a_control_nothing_is_recorded():
    engine = sampler()
    of = engine.generate(policy(), make_prompts(8), jax.random.key(0))
    assert under_control(of, engine.control_set, RolloutConfig(), np.full(8, C)) is of


def known(*texts: str):
    """Responses to one prompt each, that others wrote."""
    length = np.array([len(text) for text in texts])
    tokens = np.zeros((len(texts), C), np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = TOKENIZER.encode(text)
    return supervised(make_prompts(len(texts)), tokens, length).groups.rollouts


@pytest.mark.parametrize(
    ("control", "minimum", "limit", "texts", "want"),
    [
        (RegexControl(pattern="[0-9]+#"), 0, 5, ("1234#", "12345#", "12#"), (True, False, True)),
        (RegexControl(pattern="[0-9]+(\\+[0-9]{5})?#"), 0, 10, ("1234567+", "123+45678#"), (False, True)),
        (RegexControl(pattern="[0-9]+#"), 3, 10, ("12#", "123#"), (False, True)),
        (None, 3, 10, ("12#", "123#", "+"), (False, True, True)),
        (BeginControl(text="<1"), 0, 10, ("<1#", "57#", "<2#"), (True, False, False)),
    ],
)
def test_what_could_not_have_been_sampled_is_said_so(control, minimum, limit, texts, want):
    """Longer than the limit, too long to end within it, shorter than the minimum, without the text that is forced."""
    engine = sampler(min_new_tokens=minimum, **({"control": control} if control else {}))
    of = under_control(known(*texts), engine.control_set, engine.cfg, np.full(len(texts), limit))
    assert allowed_rows(of, engine.control_set).tolist() == list(want)


def test_a_runs_own_responses_under_waits_are_allowed():
    """The recorded `sampled` says which tokens took the place of others."""
    engine = sampler(control=CONTROLS["waits"])
    for seed in range(3):
        of = engine.generate(policy(), make_prompts(8), jax.random.key(seed))
        assert (~of.sampled & (np.arange(C) < of.length[:, None])).any()
        got = under_control(of.replace(control_state=None), engine.control_set, engine.cfg, np.full(8, C))
        assert allowed_rows(got, engine.control_set).all()
        np.testing.assert_array_equal(got.control_state, of.control_state)
