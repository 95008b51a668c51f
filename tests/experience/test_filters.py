"""Groups that may teach: chosen by their rewards, never by their advantages."""

import numpy as np
import pytest

from jaxrl_llm.experience.filters import FILTERS, graded, has_signal

NAN = np.nan


def check_equal_rewards_are_dropped(keep) -> None:
    """Float32 means of equal numbers are an ulp off: for three of 0.9532, for six of 0.3 and for many more."""
    for size, value in ((5, 0.9532), (3, 0.9532), (6, 0.3), (7, 0.9532), (8, 0.0), (8, 1.0)):
        assert not keep(np.full((1, size), value, np.float32)).any(), (size, value)


def by_advantage(reward: np.ndarray) -> np.ndarray:
    """The mutant: z-scores, as a trainer in use divides them, and those unequal 0."""
    return ((reward - reward.mean(axis=1, keepdims=True)) / (reward.std(axis=1, keepdims=True) + 1e-8) != 0).any(axis=1)


def test_equal_rewards_have_no_signal():
    check_equal_rewards_are_dropped(has_signal)


def test_the_filter_by_advantages_does_not_pass():
    with pytest.raises(AssertionError):
        check_equal_rewards_are_dropped(by_advantage)
    # By hand: 6 x 0.3 has mean 0.3 - 2.98e-8, so each "advantage" is 2.98e-8 / (2.98e-8 + 1e-8) = 0.749.
    reward = np.full(6, 0.3, np.float32)
    np.testing.assert_allclose((reward - reward.mean()) / (reward.std() + 1e-8), 0.749, atol=1e-3)


def test_has_signal():
    reward = np.array(
        [[1, 1, 1], [0, 0, 1], [0.5, 0.5, np.nextafter(np.float32(0.5), np.float32(1))], [0, 0, 0]], np.float32
    )
    np.testing.assert_array_equal(has_signal(reward), [False, True, True, False])


def test_a_group_that_was_not_graded_is_dropped_by_every_filter():
    reward = np.array([[NAN, NAN], [NAN, 1], [0, NAN], [0, 1]], np.float32)
    for keep in FILTERS.values():
        np.testing.assert_array_equal(keep(reward), [False, False, False, True])


def test_none_keeps_every_graded_group():
    np.testing.assert_array_equal(graded(np.array([[1, 1], [0, 1], [NAN, NAN]], np.float32)), [True, True, False])
    assert FILTERS == {"has_signal": has_signal, "none": graded}
