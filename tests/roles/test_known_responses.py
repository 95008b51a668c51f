"""Known responses as a control sees them: their masks are those of sampling, forced tokens are not sampled."""

import jax
import numpy as np
import pytest
from controlled import CONTROLS, TOKENIZER, C, policy, sampler
from setups import make_prompts

from jaxrl_llm.control.config import BeginControl, RegexControl
from jaxrl_llm.roles.known_responses import allowed_rows, under_control
from jaxrl_llm.rollout.config import RolloutConfig


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
    assert allowed_rows(of, engine.control_set, engine.cfg).all()


def test_a_response_that_is_not_allowed_has_an_entry_that_refuses_it():
    engine = sampler(control=BeginControl(text="<", then=RegexControl(pattern="[0-9]{2}#")))
    of = engine.generate(policy(), make_prompts(8), jax.random.key(0))
    tokens = of.tokens.copy()
    tokens[1, 1] = TOKENIZER.encode("+")[0]
    changed = of.replace(tokens=tokens)
    np.testing.assert_array_equal(allowed_rows(changed, engine.control_set, engine.cfg), np.arange(16) != 1)
    codes = under_control(changed, engine.control_set, engine.cfg, np.full(8, C)).control_state
    np.testing.assert_array_equal(codes[:, :2], of.control_state[:, :2])


def test_without_a_control_nothing_is_recorded():
    engine = sampler()
    of = engine.generate(policy(), make_prompts(8), jax.random.key(0))
    assert under_control(of, engine.control_set, RolloutConfig(), np.full(8, C)) is of
