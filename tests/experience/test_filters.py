"""Groups that may teach: chosen by their rewards, never by their advantages."""

import numpy as np
import pytest

from jaxrl_llm.config.consistency import cautions, training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience import filters, row_filters
from jaxrl_llm.experience.filters import make_filter, stateless_filter
from jaxrl_llm.experience.group_filters import KeepAll, Signal
from jaxrl_llm.experience.replay import blank_groups
from jaxrl_llm.roles.build import filter_for
from jaxrl_llm.types import Groups

NAN = np.nan


def groups_of(reward: np.ndarray, parts: np.ndarray | None = None, names=("numeric", "length", "short")) -> Groups:
    """Graded groups; of one grader unless `parts` [n P G] are given."""
    parts = reward[None] if parts is None else parts
    blank = blank_groups(*reward.shape, (1, 1), len(parts), (), 0)
    keep = np.repeat(~np.isnan(reward).any(axis=1), reward.shape[1])
    return blank.replace(
        reward=reward.reshape(-1), components=parts.reshape(len(parts), -1).T, keep=keep, graders=names
    )


def kept(filter: filters.Filter, *graded: np.ndarray) -> np.ndarray:
    """Kept groups; a group has all rows kept, or none."""
    before = groups_of(*graded)
    state, groups, metrics = filter.apply(filter.init(), before)
    assert state == () and all(n == before.keep.sum() - groups.keep.sum() for n in metrics.values())
    rows = groups.keep.reshape(len(groups.failure), -1)
    assert (rows.all(axis=1) == rows.any(axis=1)).all()
    return rows[:, 0]


def has_signal(reward: np.ndarray) -> np.ndarray:
    return kept(stateless_filter(filters.has_signal), reward)


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
    for rule in (KeepAll(), *(Signal(by=by) for by in ("reward", "success", "numeric"))):
        np.testing.assert_array_equal(kept(filters.of(rule), reward), [False, False, False, True])


def test_none_keeps_every_graded_group():
    reward = np.array([[1, 1], [0, 1], [NAN, NAN]], np.float32)
    np.testing.assert_array_equal(kept(filters.of(KeepAll()), reward), [True, True, False])


def test_a_filter_may_keep_single_rows_and_never_brings_one_back():
    """Rows of two tokens and more, of groups of which the second was dropped before."""
    groups = groups_of(np.float32([[0, 1, 0], [1, 0, 0]]))
    groups = groups.replace(
        rollouts=groups.rollouts.replace(length=np.int32([1, 2, 3, 1, 2, 3])), keep=np.repeat([True, False], 3)
    )
    _, found, _ = stateless_filter(lambda groups: groups.rollouts.length >= 2).apply((), groups)
    np.testing.assert_array_equal(found.keep, [False, True, True, False, False, False])
    np.testing.assert_array_equal(found.kept, [True, False])


@pytest.mark.parametrize(
    ("keep", "got"),
    [
        (lambda groups: groups.reward, "float32[6]"),
        (lambda groups: np.ones(2, bool), "bool[2]"),
        (lambda _: True, "bool[]"),
    ],
)
def test_what_is_no_truth_per_row_is_refused(keep, got):
    with pytest.raises(UserError) as error:
        stateless_filter(keep, "mine:keep").apply((), groups_of(np.float32([[0, 1, 0], [1, 0, 0]])))
    assert str(error.value) == f"mine:keep: got {got}, want bool[6], one truth per row"


# Right or wrong, and a penalty for length: all wrong, all right, some right; then the same with equal lengths.
RIGHT = np.float32([[0, 0], [1, 1], [0, 1], [0, 0], [1, 1], [0, 1]])
LENGTH = np.float32([[-0.1, -0.2], [0, -0.1], [0, 0], [0, 0], [0, 0], [-1, -1]])


@pytest.mark.parametrize(
    ("name", "want"),
    [
        # The weighted sum differs wherever a length does: an all-wrong group is kept for its lengths.
        ("has_signal", [True, True, True, False, False, True]),
        ("success", [False, False, True, False, False, True]),
        ("length", [True, True, False, False, False, False]),
        ("numeric", [False, False, True, False, False, True]),
        ("none", [True] * 6),
    ],
)
def test_a_filter_may_look_at_success_or_at_one_grader(name, want):
    graders = ["numeric", {"grader": "length", "weight": 0.01, "options": {"limit": 9}}]
    keep = filter_for(validate({"reward": {"graders": graders}, "experience": {"filter": name}}, "a test"), None)
    np.testing.assert_array_equal(kept(keep, RIGHT + np.float32(0.01) * LENGTH, np.stack([RIGHT, LENGTH])), want)


def test_success_is_what_the_evaluation_counts():
    """The first grader's threshold: 0.4 and 0.6 differ in success at 0.5 alone."""
    parts = np.float32([[[0.4, 0.6], [0.1, 0.2]]])
    for threshold, want in ((0.5, [True, False]), (1.0, [False, False]), (0.15, [False, True])):
        groups = groups_of(parts[0], parts).replace(threshold=threshold)
        np.testing.assert_array_equal(filters.of(Signal())(groups).kept, want)


GRADERS = {"graders": ["numeric", {"grader": "length", "name": "short", "weight": 0.01, "options": {"limit": 9}}]}


@pytest.mark.parametrize("name", ["auto", "has_signal", "success", "none", "numeric", "short"])
def test_a_config_may_name_them(name):
    assert not config_problems({"reward": GRADERS, "experience": {"filter": name}})


def test_another_name_is_refused_with_those_that_there_are():
    [line] = config_problems({"reward": GRADERS, "experience": {"filter": "length"}})
    assert line == (
        "experience.filter.by: got 'length', want one of: success, reward, or a grader's name: numeric, short"
    )
    [line] = config_problems({"reward": GRADERS, "experience": {"filter": ["success", "length"]}})
    assert line.startswith("experience.filter.filters.1.by: got 'length', want one of: success")


@pytest.mark.parametrize("name", ["success", "numeric"])
def test_a_filter_by_name_is_refused_where_equal_rewards_teach(name):
    asked = {"reward": GRADERS, "experience": {"filter": name}, "objective": {"advantage": {"kind": "raw"}}}
    [line] = config_problems(asked)
    assert line.startswith(
        f"experience.filter: got signal by {name}, want auto or none: objective.advantage raw has no baseline"
    )
    # One that compares each grader by itself has nothing to give where this grader's parts are equal.
    assert not config_problems(asked | {"objective": {"advantage": {"kind": "gdpo"}}})


def config_problems(values):
    return [line for line in training_problems(validate(values, "a test")) if line.startswith("experience.filter")]


def lengths(groups: Groups) -> np.ndarray:
    return groups.rollouts.length >= 5


class Alternate:
    """Keeps every second row; its state, the number of calls, shifts which."""

    def init(self):
        return 0

    def apply(self, state, groups):
        mine = np.arange(len(groups.keep)) % 2 == state % 2
        return state + 1, groups.replace(keep=groups.keep & mine), {"calls": state + 1}


REWARD = np.float32([[1, 0], [1, 1], [0, 1]])


def of_lengths(length: list[int]) -> Groups:
    groups = groups_of(REWARD)
    return groups.replace(rollouts=groups.rollouts.replace(length=np.array(length, np.int32)))


def test_a_chain_keeps_what_all_of_them_keep():
    """By hand: rows 0, 1, 4, 5 are of groups whose rewards differ; of these 1 and 4 have five tokens."""
    keep = filters.chain(filters.has_signal, lengths)
    found = keep(of_lengths([4, 5, 9, 9, 6, 1]))
    assert found.keep.tolist() == [False, True, False, False, True, False]
    assert filters.chain()(of_lengths([1] * 6)).keep.all()
    # A chain is a filter like any other.
    assert filters.chain(keep, lambda groups: groups.reward == 1)(of_lengths([9] * 6)).keep.tolist() == [
        True, False, False, False, False, True,
    ]  # fmt: skip


def test_a_chain_keeps_the_state_of_each():
    keep = filters.chain(lengths, Alternate(), filters.has_signal)
    state, found = keep.init(), []
    for _ in range(2):
        state, groups, metrics = keep.apply(state, of_lengths([9] * 6))
        found.append(groups.keep.tolist())
    assert found == [[True, False, False, False, True, False], [False, True, False, False, False, True]]
    assert state == ((), 2, ())
    assert metrics == {
        "filter/lengths/dropped": 0,
        "filter/Alternate/dropped": 3,
        "calls": 2,
        "filter/has_signal/dropped": 1,
    }
    with pytest.raises(UserError, match=r"got a state, .* want state = keep.init\(\)"):
        keep(of_lengths([9] * 6))


def test_a_filter_that_returns_no_row_per_truth_is_named():
    with pytest.raises(UserError, match=r"the filter lengths: got int64\[2\], want bool\[6\], one truth per row"):
        bad = lambda groups: np.arange(2)  # noqa: E731
        bad.__name__ = "lengths"
        filters.chain(bad)(groups_of(REWARD))
    with pytest.raises(UserError, match="the filter str: got a str, want a function of groups"):
        filters.chain("has_signal")


def test_side_by_side_each_sees_all_rows():
    """Two of a group of three by number of tokens, from all of them; in a chain from those that the rewards left."""
    first = {"kind": "first_samples", "keep": 2}
    groups = groups_of(np.float32([[0, 0, 1, 1]]))
    late = lambda groups: np.array([False, True, True, True])  # noqa: E731
    of = row_filters.FirstSamples(keep=2)
    assert filters.all_of(late, of)(groups).keep.tolist() == [False, True, False, False]
    assert filters.any_of(late, of)(groups).keep.tolist() == [True] * 4
    made = make_filter(
        validate(
            {"experience": {"filter": {"any_of": [first, {"kind": "between", "at_least": 1}]}}}, "x"
        ).experience.filter,
        None,
    )
    assert made(groups).keep.tolist() == [True] * 4
    # A row that was dropped before comes back in none of them.
    lost = groups.replace(keep=np.array([False, True, True, True]))
    assert not filters.any_of(late, of)(lost).keep[0]
    with pytest.raises(UserError, match="a filter of filters: got none, want one or more"):
        filters.any_of()


def test_the_states_of_filters_side_by_side_stay_apart():
    keep = filters.any_of(Alternate(), filters.chain(Alternate()))
    state = keep.init()
    state, groups, _ = keep.apply(state, of_lengths([9] * 6))
    assert state == (1, (1,)) and groups.keep.tolist() == [True, False] * 3


def test_a_sum_of_several_graders_is_never_judged_silently():
    """By the sum, groups stay whose answers are all wrong (arXiv 2609.13866): asked for by name, or refused, or a warning."""
    with pytest.raises(
        UserError, match=r"has_signal: got rewards that are the sum of 2 graders, want Signal\(by=...\)"
    ):
        filters.has_signal(groups_of(RIGHT, np.stack([RIGHT, LENGTH])))
    for name, warns in (("has_signal", 1), ({"kind": "signal", "by": "reward"}, 1), ("success", 0), ("auto", 0)):
        cfg = validate({"reward": GRADERS, "experience": {"filter": name}}, "x")
        assert len(cautions(cfg)) == warns and training_problems(cfg) == []
    assert cautions(validate({"experience": {"filter": "has_signal"}}, "x")) == []
    # The default, with several graders, is the first one's word.
    keep = filter_for(validate({"reward": GRADERS}, "x"), None)
    sums = RIGHT + np.float32(0.01) * LENGTH
    np.testing.assert_array_equal(kept(keep, sums, np.stack([RIGHT, LENGTH])), [False, False, True, False, False, True])


@pytest.mark.parametrize(
    "experience, warning",
    [
        ({"filter": {"kind": "between"}}, "it has no bound"),
        (
            {"filter": ["success", {"kind": "max_variance", "keep": 8}]},
            "keep is 8, and a prompt has 8 (rollout.samples)",
        ),
        ({"filter": {"kind": "max_variance", "keep": 7}}, ""),
        ({"filter": {"kind": "max_variance", "keep": 8}, "budget": {"kind": "vip"}}, ""),
        ({"filter": {"kind": "between", "at_most": 1}}, ""),
    ],
)
def test_a_filter_that_keeps_everything_is_warned_of(experience, warning):
    found = cautions(validate({"experience": experience, "rollout": {"samples": 8}}, "x"))
    assert [line.partition("signal too: ")[2] for line in found] == ([warning] if warning else [])


def test_a_name_alone_stands_for_a_rule():
    of = lambda experience: validate({"experience": experience}, "x").experience  # noqa: E731
    given = {"filter": ["success", "not_cut_off"], "gate": "greso", "budget": "vip", "curriculum": "shuffled"}
    written = {
        "filter": [{"kind": "signal"}, {"kind": "not_cut_off"}],
        **{k: {"kind": given[k]} for k in ("gate", "budget")},
    }
    assert of(given) == of(written)
    assert of({"refill": "success"}) == of({"refill": {"filter": {"kind": "signal"}}})
    assert of({"filter": "max_variance"}) == of({"filter": {"kind": "max_variance"}})
    with pytest.raises(UserError, match=r"experience.gate: got 'gresso', want one of .*; perhaps you meant greso"):
        of({"gate": "gresso"})


@pytest.mark.parametrize(
    ("experience", "message"),
    [
        ({"refill": {"filter": ["none", "none"]}}, "experience.refill.filter: got chain, want one that may reject"),
        (
            {"refill": {"filter": {"any_of": ["success", "none"]}}},
            "experience.refill.filter: got any_of, want one that may",
        ),
        (
            {"refill": {}, "budget": {"kind": "vip"}},
            "experience.refill: got one beside the budget vip, want one of the two",
        ),
        (
            {"budget": {"kind": "screening", "initial": 4, "high": 2}},
            "experience.budget.initial: got 4, want at most high (2)",
        ),
        (
            {"refill": {"filter": {"kind": "between", "at_least": 2, "by": "success"}}},
            "experience.refill.filter.at_least: got 2.0, want 1 at most: success is 0 or 1",
        ),
        (
            {"budget": {"kind": "vip", "by": "reward"}},
            "experience.budget vip.by: got reward, want success or a grader whose",
        ),
        (
            {"budget": {"kind": "knapsack", "low": 9}},
            "experience.budget knapsack: got low 9 and high 128, want rollout.samples",
        ),
        (
            {"budget": {"kind": "rounds", "per_round": 99}},
            "experience.budget rounds: got 99 samples of each prompt in the first",
        ),
        (
            {"filter": {"kind": "difficulty_band", "low": 0.9}},
            "experience.filter.low: got 0.9, want at most high (0.8)",
        ),
        (
            {"filter": ["success", {"kind": "between", "at_least": 1, "at_most": 0}]},
            "experience.filter.filters.1.at_least: got 1.0, want at most at_most (0.0)",
        ),
        (
            {"refill": {"filter": {"any_of": [{"kind": "difficulty_band", "low": 0.9}]}}},
            "experience.refill.filter.filters.0.low: got 0.9, want at most high (0.8)",
        ),
        (
            {"refill": {"filter": ["success", {"kind": "not_stale"}]}},
            "experience.refill.filter.filters.1: got not_stale, want a filter that judges each group on its own",
        ),
        ({"gate": {"kind": "greso", "by": "nobody"}}, "experience.gate.by: got 'nobody', want one of: success, reward"),
        ({"gate": {"kind": "greso", "low": 0.9, "high": 0.5}}, "experience.gate.low: got 0.9, want at most high (0.5)"),
        (
            {"gate": {"kind": "greso", "hard": 0.98}},
            "experience.gate.hard: got 0.98, want less than easy (0.98): a mean cannot be both",
        ),
        (
            {"gate": {"kind": "exclude_solved", "hopeless": 0.95}},
            "experience.gate.hopeless: got 0.95, want less than solved (0.9): a mean cannot be both",
        ),
        ({"budget": {"kind": "vip", "low": 9, "high": 4}}, "experience.budget.low: got 9, want at most high (4)"),
        (
            {"budget": {"kind": "screening", "initial": 4, "high": 7}},
            "experience.budget screening.high: got 7, want rollout.samples (8) or more",
        ),
        (
            {"budget": {"kind": "rounds", "per_round": 2, "rounds": 3}},
            "experience.budget rounds: got per_round 2 times rounds 3, want rollout.samples (8) or more",
        ),
        (
            {"budget": {"kind": "reinforce_ada", "per_round": 4, "rounds": 2, "keep": 9}},
            "experience.budget reinforce_ada.keep: got 9, want at most 8, the most samples of a prompt",
        ),
    ],
)
def test_what_does_not_go_together_is_refused(experience, message):
    (found,) = training_problems(validate({"experience": experience}, "x"))
    assert found.startswith(message)
    assert (
        training_problems(validate({"experience": {"refill": {"filter": {"all_of": ["none", "success"]}}}}, "x")) == []
    )


@pytest.mark.parametrize(
    "experience",
    [
        {"gate": {"kind": "exclude_solved", "hopeless": None, "solved": -1.0}},
        {"gate": {"kind": "exclude_solved", "hopeless": 2.0, "solved": None}},
        {"budget": {"kind": "screening", "initial": 8, "high": 8}},
        {"budget": {"kind": "rounds", "per_round": 4, "rounds": 2}},
        {"budget": {"kind": "reinforce_ada", "per_round": 4, "rounds": 2, "keep": 8}},
        # It stops at one right response, and never reads `keep`.
        {"budget": {"kind": "reinforce_ada", "per_round": 4, "rounds": 2, "keep": 9, "until": "positive"}},
    ],
)
def test_what_just_fits_is_accepted(experience):
    assert training_problems(validate({"experience": experience}, "x")) == []


@pytest.mark.parametrize("prompts, most", [(1, 8), (2, 12), (4, 16)])
def test_reinforce_ada_can_keep_no_more_than_a_prompt_can_get(prompts, most):
    """8 samples per prompt, rounds of 4, 4 of them: 16 at most, and 8 P less one round of each other prompt, 4 (P - 1)."""
    budget = {"kind": "reinforce_ada", "per_round": 4, "rounds": 4}
    values = {"rollout": {"prompts": prompts}, "update": {"minibatches": 1}}
    found = [
        training_problems(validate(values | {"experience": {"budget": budget | {"keep": keep}}}, "x"))
        for keep in (most, most + 1)
    ]
    assert found[0] == [] and len(found[1]) == 1 and f"want at most {most}, " in found[1][0]
