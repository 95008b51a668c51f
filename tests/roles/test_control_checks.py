"""Controls beside tokenizer, limits and right responses: errors before anything compiles, and warnings."""

import dataclasses
from contextlib import nullcontext

import numpy as np
import pytest
from controlled import C, sampler
from fakes import config, sums

from jaxrl_llm.config.loading import validate
from jaxrl_llm.control.automaton import REFUSED, states_of
from jaxrl_llm.control.config import BudgetControl, RegexControl, budget_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import blueprint_of
from jaxrl_llm.roles.control_checks import allows, check_control, longest_below
from jaxrl_llm.rollout.built_control import limit_problem

ROLLOUT = {"prompts": 8, "samples": 4, "max_new_tokens": 6}


def found(control: dict, warm_start: int = 0, **rollout):
    cfg = config(rollout=ROLLOUT | rollout | {"control": control}, warm_start={"steps": warm_start})
    return check_control(cfg, sums(), True)


def regex(pattern: str) -> dict:
    return {"kind": "regex", "pattern": pattern}


def budget(tokens: int, **more) -> dict:
    return {"kind": "budget", "tokens": tokens, "close": ">", **more}


def test_what_fits_is_neither_refused_nor_warned_of():
    assert found(regex("[0-9]{1,2}#")) == ([], [])
    assert found({"kind": "none"}, stop=["3"]) == ([], [])
    assert found({"kind": "forbid", "tokens": ["+"]}, stop=["3"], min_new_tokens=5).problems == []


@pytest.mark.parametrize(
    ("control", "words"),
    [
        (regex("[0-9"), "got '[0-9', want a regular expression"),
        (regex("abc"), "rollout.control: got texts that this tokenizer cannot spell"),
        ({"kind": "forbid", "tokens": ["x"]}, "rollout.control.tokens: got 'x'"),
        (budget(2, closing="<"), "rollout.control.closing: got '<'"),
    ],
)
def test_what_cannot_be_built_is_refused_by_name(control, words):
    [problem] = found(control).problems
    assert words in problem and problem.startswith("rollout.control")


def test_a_limit_below_the_shortest_text_is_refused():
    """Seven digits and the end token are 8 tokens."""
    want = "rollout.max_new_tokens: got 7, want at least 8: the control allows no response of fewer tokens"
    assert found(regex("[0-9]{7}#"), max_new_tokens=7).problems == [want]
    assert found(regex("[0-9]{7}#"), max_new_tokens=8).problems == []


def test_what_follows_a_budget_needs_room():
    """Behind 4 tokens of thinking: `>`, two digits and the end token."""
    then = regex("[0-9]{2}#")
    want = (
        "rollout.max_new_tokens: got 7, want at least 8, or a budget of 3 at most: the control's budget is 4 tokens, and what "
        "follows it takes 4 at least"
    )
    assert found(budget(4, then=then), max_new_tokens=7).problems == [want]
    assert found(budget(4, then=then), max_new_tokens=8).problems == []
    begins = {"kind": "begin", "text": "<", "then": budget(4, then=then)}
    assert found(begins, max_new_tokens=7).problems == [want] and found(begins, max_new_tokens=8).problems == []


def test_each_task_of_a_mixture_has_its_own_limit():
    parts = [
        {"name": "short", "task": {"kind": "arithmetic", "terms": 2, "held_out": 8}, "max_new_tokens": 4},
        {"name": "long", "task": {"kind": "arithmetic", "terms": 2, "held_out": 8}},
    ]
    cfg = config(rollout=ROLLOUT | {"control": regex("[0-9]{4}#")}, task=parts)
    want = "task.tasks.0.max_new_tokens: got 4, want at least 5: the control allows no response of fewer tokens"
    assert check_control(cfg, sums(), True).problems == [want]


def test_a_row_has_the_limit_of_its_column():
    task, cfg = sums(), config(rollout=ROLLOUT | {"control": regex("[0-9]{4}#")})
    short = dataclasses.replace(task.train[3], max_new_tokens=4)
    rows = (*task.train[:3], short, dataclasses.replace(task.train[4], max_new_tokens=5), *task.train[5:])
    want = (
        f"task.prompting.columns.max_new_tokens: {short.where}: got 4, want at least 5: the control allows no response of fewer "
        "tokens"
    )
    assert check_control(cfg, dataclasses.replace(task, train=rows), True).problems == [want]


def test_hints_that_the_control_refuses_are_refused_in_training():
    """One digit and the end are allowed; 45 of all 100 sums have two digits, fewer without the held-out ones."""
    cfg = config(rollout=ROLLOUT | {"control": regex("[0-9]#")}, experience={"hints": {"kind": "cosine"}})
    two = [row for row in sums().train if len(row.response) > 1]
    want = f"experience.hints: got right responses that rollout.control refuses, {len(two)} of 97, as '{two[0].response}#' to"
    [problem] = check_control(cfg, sums(), True).problems
    assert problem.startswith(want)
    assert not check_control(cfg, sums(), False).problems
    wide = config(rollout=ROLLOUT | {"control": regex("[0-9]+#")}, experience={"hints": {"kind": "cosine"}})
    assert not check_control(wide, sums(), True).problems


@pytest.mark.parametrize(
    "control", [regex("[0-9]#"), budget(2, then=regex("[0-9]#")), {"kind": "choice", "texts": ["1#"]}]
)
def test_stop_strings_beside_a_form_are_refused(control):
    [problem] = found(control, stop=["3"], max_new_tokens=6).problems
    assert problem.startswith(f"rollout.stop: got ['3'] beside rollout.control {control['kind']}, want []")


@pytest.mark.parametrize(
    ("control", "small"),
    [
        (RegexControl(pattern="[0-9]{7}#"), {1, 2, 3, 4, 5, 6, 7}),
        # `>12#` fits into 4 slots, but a row that thinks relies on its closing, in slot 4.
        (BudgetControl(tokens=4, close=">", then=RegexControl(pattern="[0-9]{2}#")), {1, 2, 3, 4, 5, 6, 7}),
    ],
)
def test_engine_and_config_say_the_same_of_a_limit(control, small):
    engine = sampler()
    controls = engine.controls(1, control=control)
    [automaton] = engine.control_set.automata.values()
    for limit in range(1, C + 1):
        wrong = limit_problem(limit, automaton, budget_of(control))
        assert bool(wrong) == (limit in small)
        with pytest.raises(ValueError) if wrong else nullcontext() as error:
            engine.control_set.start_states(controls, np.array([limit]), None)
        assert not wrong or str(error.value).startswith(f"limit: {wrong}")


def test_right_responses_that_are_refused():
    """Held out are three sums, of which at least one has two digits: the control allows one digit and the end."""
    right = [row.response for row in sums().held_out]
    two = [text for text in right if len(text) > 1]
    assert 0 < len(two) < 3
    [exact] = found(regex("[0-9]#")).cautions
    assert exact.startswith(
        f"rollout.control: eval/exact is 0 where the right response is refused, {len(two)} of 3, as '{two[0]}#'"
    )
    both = found(regex("[0-9]#"), warm_start=5).cautions
    # Of all 100 sums of two digits 55 are below 10.
    train = [row for row in sums().train if len(row.response) > 1]
    assert both[1].startswith(f"warm_start: trains on responses that rollout.control refuses, {len(train)} of 97, as")


def test_settings_that_a_control_makes_useless_are_warned_of():
    [longest] = found(regex("[0-9]{1,2}#"), min_new_tokens=5).cautions
    assert longest.startswith("rollout.min_new_tokens: 5, and the control allows no response of more than 3 tokens")
    # A budget that could never be used up is refused: what follows it needs room.
    assert found(budget(6)).problems and not found(budget(5)).problems


@pytest.mark.parametrize(
    ("pattern", "length", "want"),
    [("[0-9]{1,2}#", 4, 3), ("[0-9]{1,2}#", 3, None), ("[0-9]+#", 50, None), ("1#|234#", 5, 4)],
)
def test_the_longest_response(pattern, length, want):
    engine = sampler()
    engine.controls(1, control=RegexControl(pattern=pattern))
    [automaton] = engine.control_set.automata.values()
    assert longest_below(automaton, length) == want


def test_followed_as_the_engine_follows():
    engine = sampler()
    tokenizer = engine.model.tokenizer
    for control in (RegexControl(pattern="[0-9]{2}#"), BudgetControl(tokens=3, close=">")):
        start = engine.controls(1, control=control).control[0]
        automaton = list(engine.control_set.automata.values())[-1]
        for text in ("12#", "1#", "123#", "12>4#", "123>#", "1234>#", ">#", "#"):
            tokens, slots = tokenizer.encode(text), budget_of(control)
            behind = states_of(engine.tables, start, 0, tokens, slots)[-1]
            assert allows(automaton, tokens, slots) == (behind != REFUSED), text


def test_everything_wrong_is_reported_at_once_before_anything_compiles():
    compiles = CompileCounter()
    values = {
        "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
        "rollout": ROLLOUT | {"control": regex("[0-9]{9}#"), "stop": ["+"], "top_k": 200},
        "reward": "exact_match",
    }
    cfg = validate(values, "test")
    with pytest.raises(UserError) as error:
        blueprint_of(cfg, inputs.read(cfg, trains=True))
    lines = str(error.value).splitlines()
    assert [line.split(":")[0] for line in lines] == ["rollout.stop", "rollout.max_new_tokens", "rollout.top_k"]
    assert compiles.take()["compiles"] == 0
