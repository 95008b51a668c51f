"""Custom stages: faulty definitions are errors before anything starts, faulty results are errors at the call."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.own_part import own_problems
from jaxrl_llm.config.unused_settings import unused_settings
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.curricula import own_curriculum
from jaxrl_llm.experience.filters import Filter, make_filter
from jaxrl_llm.experience.replay import blank_groups, make_replay
from jaxrl_llm.experience.stage_checks import checked_groups
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.types import Groups
from jaxrl_llm.update.optimizer.transform import learning_rate


def experience(**parts):
    return validate({"experience": {name: f"own_stages:{part}" for name, part in parts.items()}}, "a.yaml").experience


def filter_of(name: str) -> Filter:
    return make_filter(experience(filter=name).filter, lambda groups: ["a", "b", "c", "d"])


def groups() -> Groups:
    """Two groups of two; the third row was dropped."""
    blank = blank_groups(2, 2, (1, 1), 1, (), 0)
    return blank.replace(reward=np.float32([0, 1, 1, 1]), keep=np.array([True, True, False, True]))


def test_a_state_keeps_its_dtypes_from_step_to_step():
    """Half of 0 and of the mean 0.75, then half of that: 0.375, 0.5625. What was dropped stays dropped."""
    mine = filter_of("Mean")
    first = mine.init()
    assert {name: x.dtype for name, x in first.items()} == {"seen": np.int64, "mean": np.float64}
    state, found, metrics = mine.apply(first, groups())
    np.testing.assert_array_equal(found.keep, [False, True, False, True])
    assert (state["seen"], state["mean"], metrics) == (1, 0.375, {"filter/Mean/dropped": 1, "mine/mean": 0.375})
    state, *_ = mine.apply(state, groups())
    assert (state["seen"], state["mean"], state["mean"].dtype) == (2, 0.5625, np.float64)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Grows", "got a state of float64[3], want one as before, float64[2]: shapes and dtypes are fixed"),
        ("Kinds", "got a state of float64[], want one as before, int64[]: shapes and dtypes are fixed"),
        ("Words", "got a state that holds <U4, want numbers and arrays of numbers alone"),
        ("Keys", "got a state that is no tree "),
        ("Pair", "got tuple, want (state, groups, metrics)"),
        ("Silent", "got NoneType for metrics, want a dict of numbers, perhaps empty"),
        ("Lists", "got array([0., 0.]) for the metric 'mine', want a name and one number"),
        ("Floats", "got float32[4], want bool[4], one truth per row"),
        ("PerGroup", "got bool[2], want bool[4], one truth per row"),
        ("Rows", "got ndarray, want Groups with another keep"),
    ],
)
def test_a_faulty_result_of_a_filter_is_an_error_at_the_call(name, message):
    mine = filter_of(name)
    with pytest.raises(UserError) as error:
        mine.apply(mine.init(), groups())
    assert str(error.value).startswith(f"experience.filter own_stages:{name}: {message}")


def test_no_filter_brings_a_row_back():
    mine = filter_of("Raises")
    np.testing.assert_array_equal(mine.apply(mine.init(), groups())[1].keep, groups().keep)


def test_a_curriculum_that_forgets_its_state_is_told():
    mine = own_curriculum(experience(curriculum="Curriculum").curriculum)
    state = mine.init(4)
    with pytest.raises(UserError, match=r"curriculum own_stages:Curriculum: got ndarray, want \(state, rows\)$"):
        mine.choose(state, np.random.default_rng(0), 2)
    with pytest.raises(UserError, match=r"got a state of float64\[3\], want one as before, float64\[4\]"):
        mine.observe(state, groups())


def test_a_replay_that_changes_the_shapes_of_a_step_is_told():
    mine = make_replay(experience(replay="Shrinks").replay)
    with pytest.raises(
        UserError, match=r"replay own_stages:Shrinks: got float32\[2\] for groups\.reward, want float32\[4\]"
    ):
        mine.exchange(mine.init(groups()), groups(), np.random.default_rng(0), None)


METHODS = "want a class whose objects have init(), apply(state, groups)"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"experience": {"filter": "own_stages:Mean"}}, ""),
        ({"experience": {"filter": "own_stages:Called"}}, ""),
        ({"experience": {"filter": "own_stages:WithoutInit"}}, f"which has no init; {METHODS}"),
        ({"experience": {"filter": "own_stages:OnlyInit"}}, f"which has no apply; {METHODS}"),
        (
            {"experience": {"filter": "own_stages:Greedy"}},
            "whose apply takes (self, state, groups, more): missing a required",
        ),
        (
            {"experience": {"curriculum": "own_stages:ShortChoice"}},
            "whose choose takes (self, state, n): too many positional",
        ),
        (
            {"objective": {"advantage": "own_stages:NotCalled"}},
            "has no __call__; want a class whose objects have __call__(",
        ),
        ({"update": {"optimizer": {"schedule": "own_stages:NotCalled"}}}, "which has no __call__; want"),
        (
            {"objective": {"loss": {"function": "own_stages:capped", "own_columns": ["own_stages:of_three"]}}},
            'objective.loss.own_columns.0: "own_stages:of_three" takes (groups, scores, more): missing a required argument',
        ),
    ],
)
def test_a_faulty_definition_is_an_error_before_anything_starts(values, message):
    found = own_problems(validate(values, "a.yaml"))
    assert len(found) == bool(message) and (not message or message in found[0]), found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two_rates", "got an array of [2], want one number, the learning rate of an update"),
        ("no_rate", "got NoneType, want one number"),
        ("stepped", "got an if, a loop or a float() that asks for a number"),
    ],
)
def test_a_schedule_gives_one_number_and_is_read(name, message):
    cfg = validate({"update": {"optimizer": {"schedule": f"own_stages:{name}", "lr": 0.5}}}, "a.yaml")
    with pytest.raises(UserError) as error:
        jax.jit(lambda update: learning_rate(cfg.update.optimizer, update))(1)
    assert str(error.value).startswith(f"optimizer.schedule own_stages:{name}: {message}")
    assert unused_settings(cfg) == [
        "update.optimizer.lr: nothing reads this, since update.optimizer.schedule is one of your own"
    ]


def test_a_loss_that_asks_for_a_number_is_told():
    loss = make_loss(validate({"objective": {"loss": "own_stages:capped"}}, "a.yaml").objective)
    with pytest.raises(UserError, match=r"objective\.loss own_stages:capped: got an if, a loop or .* want jnp\.where"):
        jax.jit(lambda x: loss.terms(TokenScores(x, x), None))(jnp.zeros((1, 2)))


def test_groups_of_a_replay_of_ones_own_may_say_which_rows_are_old_but_lack_nothing():
    fresh = blank_groups(2, 2, (1, 1), 1, ("steps",), 0)
    mixed = fresh.replace(reused=np.array([False, True] * 2), loss_weight=np.ones(4, np.float32))
    assert checked_groups("mine", mixed, fresh) is mixed
    for wrong, message in (
        (mixed.replace(reused=np.zeros(3, bool)), r"mine: got bool\[3\] for groups.reused, want bool\[4\]"),
        (mixed.replace(loss_weight=np.ones(4)), r"mine: got float64\[4\] for groups.loss_weight, want float32\[4\]"),
        (mixed.replace(step_reward=None), r"mine: got nothing for groups.step_reward, want float32\[4, 1\]"),
    ):
        with pytest.raises(UserError, match=message):
            checked_groups("mine", wrong, fresh)
