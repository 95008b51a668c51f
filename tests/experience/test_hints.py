"""Rules of hints by hand, and what is left of groups without the responses that began with one."""

import numpy as np
import pytest
from random_groups import groups_of

from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.hints import (
    CosineHints,
    Demonstration,
    LevelHints,
    OwnHints,
    StagedHints,
    hinted,
)
from jaxrl_llm.experience.independent_rows import independent_rows
from jaxrl_llm.types import check


def asked(step: int, length: int = 20, samples: int = 4, first: int = 0, ends=None) -> Demonstration:
    """Request of a run of 101 steps, for a prompt of row 7."""
    ends = np.arange(1, length) if ends is None else np.array(ends, int)
    return Demonstration(step, 101, 7, first + np.arange(samples), length, ends)


def test_the_cosine_falls_from_first_to_last():
    """Shares of 20 tokens: 0.95 is 19; at a quarter of the way 0.05 + 0.9 (1 + cos 45 degrees) / 2 = 0.81820 is 16.36; half way
    0.5; at the end, and behind it, 0.05 is 1."""
    rule = CosineHints()
    assert [rule(asked(step)).tolist() for step in (0, 25, 50, 100, 200)] == [
        [19, 0, 0, 0], [16, 0, 0, 0], [10, 0, 0, 0], [1, 0, 0, 0], [1, 0, 0, 0],
    ]  # fmt: skip
    assert CosineHints(first=0.8, last=0, steps=11, samples=2)(asked(5)).tolist() == [8, 8, 0, 0]
    assert CosineHints(steps=11, last=0)(asked(10)).tolist() == [0, 0, 0, 0]
    assert CosineHints(samples=0, first=1)(asked(0)).tolist() == [20] * 4
    # A run of one step.
    assert CosineHints(steps=1)(asked(0)).tolist() == [19, 0, 0, 0]


def test_which_responses_have_a_hint_depends_on_their_numbers_and_not_on_the_request():
    """The rows 2 to 5 of a group that is asked for in two requests."""
    assert CosineHints(samples=3)(asked(50, first=2)).tolist() == [10, 0, 0, 0]
    assert LevelHints(levels=4)(asked(0, first=2)).tolist() == [10, 15, 0, 5]


def test_a_share_is_not_rounded_below_itself():
    """0.29 * 100 is 28.999999999999996."""
    assert CosineHints(first=0.29, samples=0)(asked(0, length=100, samples=1)).tolist() == [29]


def test_stages_follow_each_other_and_then_there_are_no_hints():
    rule = StagedHints(shares=(0.5, 0.25), until=(10, 30))
    found = [rule(asked(step, length=9)).tolist()[0] for step in (0, 9, 10, 29, 30, 99)]
    assert found == [4, 4, 2, 2, 0, 0] and rule(asked(0, length=9)).tolist() == [4] * 4
    # Thirds of 101 steps end at 33.7 and 67.3.
    thirds = StagedHints(samples=1)
    assert [thirds(asked(step)).tolist() for step in (33, 34, 67, 68)] == [
        [10, 0, 0, 0], [5, 0, 0, 0], [5, 0, 0, 0], [0, 0, 0, 0],
    ]  # fmt: skip


def test_levels_are_steps_of_the_demonstration():
    """20 tokens in four parts; then steps that end behind 3, 4, 9 and 15 tokens, five with the last one: the first m - 1 = 3 levels
    of four have 1, 2 and 3 of them."""
    assert LevelHints()(asked(7, samples=6)).tolist() == [0, 5, 10, 15, 0, 5]
    assert LevelHints()(asked(7, ends=[3, 4, 9, 15])).tolist() == [0, 3, 4, 9]
    # Two steps in four levels: a level of less than a step is none.
    assert LevelHints()(asked(7, ends=[12])).tolist() == [0, 0, 12, 12]
    assert LevelHints()(asked(7, ends=[])).tolist() == [0, 0, 0, 0]
    assert LevelHints(steps=7)(asked(6))[3] == 15 and not LevelHints(steps=7)(asked(7)).any()


def test_a_custom_rule_is_called_and_checked():
    rule = OwnHints(function="own_stages:half_of_every_second")
    assert rule(asked(0)).tolist() == [0, 10, 0, 10]
    for function, got in (
        ("one_hint", r"\[3\]"),
        ("half_a_token", r"\[0.5, 0.5, 0.5, 0.5\]"),
        ("less_than_none", r"\[-1,"),
    ):
        with pytest.raises(
            UserError, match=rf"experience.hints own_stages:{function}: got {got}.*want 4 whole numbers, 0 or"
        ):
            OwnHints(function=f"own_stages:{function}")(asked(0))


def test_short_forms():
    def hints_of(value):
        return validate({"experience": {"hints": value}}, "test").experience.hints

    assert hints_of("cosine") == CosineHints() and hints_of("none").kind == "none"
    assert hints_of("own_stages:half_of_every_second") == OwnHints(function="own_stages:half_of_every_second")
    assert hints_of({"kind": "stages", "shares": [0.5], "until": [9]}) == StagedHints(shares=(0.5,), until=(9,))


def test_without_hints_a_prompt_keeps_its_other_rows_and_may_have_none():
    """Three prompts of three rows: one, all and none of them with a hint."""
    groups = groups_of([3, 3, 3], [1, 0, 0, 1, 1, 1, 0, 0, 1], length=[1, 2, 3, 4, 5, 6, 1, 2, 3], rows=10)
    assert independent_rows(groups) is groups and not hinted(groups).any()
    rows = len(groups.keep)
    none = groups.replace(hint=np.zeros(rows, np.int32))
    assert independent_rows(none) is none
    hint = np.zeros(rows, np.int32)
    hint[[1, 3, 4, 5]] = [2, 1, 4, 1]
    left = check(independent_rows(groups.replace(hint=hint)))
    own = np.flatnonzero(groups.rollouts.prompt >= 0)
    stays = own[hint[own] == 0]
    assert left.rollouts.size.tolist() == [2, 0, 3] and len(left.failure) == 3
    np.testing.assert_array_equal(left.reward, groups.reward[stays])
    np.testing.assert_array_equal(left.rollouts.tokens, groups.rollouts.tokens[stays])
    np.testing.assert_array_equal(left.rollouts.sample, groups.rollouts.sample[stays])
