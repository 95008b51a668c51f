"""Settings of reused responses: what does not fit together is refused by name, with what to do."""

import pytest

from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.errors import UserError

DEPENDS = "which responses are continued may not depend on what they earned"


def problems(kind="exact", **more):
    base = {"task": {"kind": "arithmetic"}, "reward": {"grader": "exact_match"}}
    rollout = {"samples": 8, "max_new_tokens": 8, "reuse": {"kind": kind}} | more.pop("rollout", {})
    return training_problems(validate({**base, "rollout": rollout, **more}, "test"))


REFUSED = {
    "a tree": (
        {"rollout": {"tree": {"kind": "points", "roots": 2}}},
        "rollout.tree: got points beside rollout.reuse.kind exact, want none: ",
    ),
    "hints": (
        {"experience": {"hints": {"kind": "cosine"}}},
        "experience.hints: got cosine beside rollout.reuse.kind exact, want none: ",
    ),
    "replay": ({"experience": {"replay": {"capacity": 8}}}, "experience.replay: got a buffer beside "),
    "replay of one's own": ({"experience": {"replay": "own_stages:Base"}}, "experience.replay: got a buffer beside "),
    "a curriculum by success": (
        {"experience": {"curriculum": "unsolved"}},
        f"experience.curriculum: got unsolved beside rollout.reuse.kind exact, want shuffled or stratified: {DEPENDS}",
    ),
    "a curriculum of one's own": (
        {"experience": {"curriculum": "own_stages:Curriculum"}},
        "experience.curriculum: got own ",
    ),
    "a gate": (
        {"experience": {"gate": "exclude_solved"}},
        f"experience.gate: got exclude_solved beside rollout.reuse.kind exact, want none: {DEPENDS}",
    ),
    "a budget by success": (
        {"experience": {"budget": "vip"}},
        f"experience.budget: got vip beside rollout.reuse.kind exact, want uniform: {DEPENDS}",
    ),
}


@pytest.mark.parametrize("kind", ["exact", "inexact"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name, kind):
    more, error = REFUSED[name]
    found = problems(kind, **more)
    assert sum(text.startswith(error.replace("exact,", f"{kind},")) for text in found) == 1, found


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"experience": {"curriculum": {"kind": "stratified", "column": "source"}}},
        {"experience": {"refill": "reward"}},
        {"rollout": {"top_p": 0.9, "per_sample": {"temperature": [0.8, 1.2]}}},
    ],
)
def test_what_fits(more):
    assert problems(**more) == []


def test_a_run_without_reuse_may_have_all_of_these():
    for more, error in REFUSED.values():
        assert not any("rollout.reuse" in text for text in problems("none", **more)), error


def test_numbers_out_of_range_are_refused_by_name():
    with pytest.raises(UserError, match=r"rollout.reuse.leniency: got -0.1"):
        validate({"rollout": {"reuse": {"kind": "inexact", "leniency": -0.1}}}, "test")
    with pytest.raises(UserError, match=r"rollout.reuse.max_repeats: got -1"):
        validate({"rollout": {"reuse": {"kind": "exact", "max_repeats": -1}}}, "test")
