"""Stages of a newcomer's own: what they give is checked where they give it, in words."""

import numpy as np
import pytest

from jaxrl_llm.config import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience import curriculum, filters
from jaxrl_llm.own_part import own_problems
from jaxrl_llm.unread import unread
from jaxrl_llm.update.optimizer.transform import learning_rate


def experience(**parts):
    return validate({"experience": parts}, "a.yaml").experience


def filter_of(name: str) -> filters.Filter:
    part = experience(filter=f"own_stages:{name}").filter
    return filters.of_own(part.made(), part.function, None)


def test_a_state_of_numbers_goes_from_step_to_step():
    mine = filter_of("Filter")
    state, groups, metrics = mine.apply(mine.init(), "groups")
    assert (state["seen"], groups, metrics) == (1, "groups", {"mine/seen": 0})
    # As it comes back from a checkpoint.
    state, _, metrics = mine.apply({"seen": np.array(5), "mean": np.ones(2, np.float32)}, "groups")
    assert (state["seen"], metrics) == (6, {"mine/seen": 5})


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "Grows",
            "got a state of {'mean': 'float32[3]', 'seen': 'int64[]'}, want one as before, {'mean': 'float32[2]', ",
        ),
        ("Words", "got a state that holds <U4, want numbers and arrays of numbers alone"),
        ("Pair", "got tuple, want (state, groups, metrics)"),
        ("Silent", "got NoneType for metrics, want a dict of numbers, perhaps empty"),
    ],
)
def test_what_no_checkpoint_holds_is_refused_at_once(name, told):
    mine = filter_of(name)
    with pytest.raises(UserError) as error:
        mine.apply(mine.init(), "groups")
    assert str(error.value).startswith(f"experience.filter own_stages:{name}: {told}")


def test_a_curriculum_that_forgets_its_state_is_told():
    mine = curriculum.of_own(experience(curriculum="own_stages:Curriculum").curriculum)
    state = mine.init(4)
    with pytest.raises(UserError, match=r"curriculum own_stages:Curriculum: got ndarray, want \(state, rows\)$"):
        mine.choose(state, np.random.default_rng(0), 2)
    with pytest.raises(UserError, match=r"got a state of float64\[3\], want one as before, float64\[4\]"):
        mine.observe(state, "groups")


def test_methods_that_are_missing_are_named_before_anything_starts():
    [line] = own_problems(validate({"experience": {"filter": "own_stages:WithoutInit"}}, "a.yaml"))
    assert line == (
        'experience.filter.function: got "own_stages:WithoutInit", which has no init; want a class whose objects have init, apply'
    )


def test_a_schedule_gives_one_number_and_is_read():
    cfg = validate({"update": {"optimizer": {"schedule": "own_stages:two_rates", "lr": 0.5}}}, "a.yaml")
    with pytest.raises(
        UserError, match=r"schedule own_stages:two_rates: got \[2\] numbers, want one: the learning rate"
    ):
        learning_rate(cfg.update.optimizer, 1)
    assert unread(cfg) == [
        "update.optimizer.lr: nothing reads this, since update.optimizer.schedule is one of your own"
    ]
