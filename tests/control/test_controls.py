"""`rl.controls`: what each function makes, and what it refuses."""

import jax
import pytest
from controlled import C, P, policy, sampler, texts
from setups import make_prompts

import jaxrl_llm as rl
from jaxrl_llm.control.config import (
    AllowControl,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    ForbidControl,
    JsonSchemaControl,
    NoControl,
    RegexControl,
    StopControl,
)  # fmt: skip
from jaxrl_llm.errors import UserError

c = rl.controls


def test_each_makes_its_config(tmp_path):
    schema = {"type": "object"}
    assert c.none() == NoControl() and c.regex("[0-9]+") == RegexControl(pattern="[0-9]+")
    assert c.json_schema(schema, whitespace="") == JsonSchemaControl(schema=schema, whitespace="")
    assert c.json_schema("a.json") == JsonSchemaControl(path="a.json")
    assert c.json_schema(tmp_path) == JsonSchemaControl(path=str(tmp_path))
    assert c.choice("yes", "no") == ChoiceControl(texts=("yes", "no")) and c.stop("#") == StopControl(texts=("#",))
    assert c.allow("1", 7) == AllowControl(tokens=("1", 7)) and c.forbid(0) == ForbidControl(tokens=(0,))
    budget = BudgetControl(tokens=9, close=">", closing="+>", waits=2, wait="<", then=ChoiceControl(texts=("1",)))
    assert c.budget(9, ">", "+>", 2, "<", c.choice("1")) == budget and c.budget(3).then == NoControl()
    assert c.begin("<", then=budget) == BeginControl(text="<", then=budget) and c.begin("<").then == NoControl()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: c.regex(3), "pattern: got 3, want text"),
        (lambda: c.regex(""), "pattern: got '', want text"),
        (lambda: c.choice(), "texts: got (), want 1 entries or more"),
        (lambda: c.choice(["yes", "no"]), "texts.0: got ['yes', 'no'], want text"),
        (lambda: c.allow(1.5), "tokens.0: got 1.5, want a whole number, or text"),
        (lambda: c.json_schema({"enum": {1, 2}}), "schema: got values that are not JSON"),
        (lambda: c.json_schema(3), "schema: got 3, want a section"),
        (lambda: c.budget(0), "tokens: got 0, want 1 or more"),
        (lambda: c.budget(4, waits=-1), "waits: got -1, want 0 or more"),
        (lambda: c.budget(4, then=c.stop("#")), "then: got StopControl("),
        (lambda: c.begin("<", then=c.begin("<")), "want one of 'none', 'regex', 'json_schema', 'choice', 'budget'"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, words):
    with pytest.raises(UserError) as error:
        call()
    assert words in str(error.value) and "\n" not in str(error.value)


def test_an_engine_takes_them():
    engine, key = sampler(control=c.choice("12#", "7#")), jax.random.key(0)
    assert set(texts(engine.generate(policy(), make_prompts(P), key))) <= {"12#", "7#"}
    controls = engine.controls(P, control=[c.regex("[1-3]{2}#")] * (P - 1) + [c.none()])
    *controlled, free, other = texts(engine.generate(policy(), make_prompts(P), key, controls))
    assert all(len(text) == 3 and set(text[:2]) <= set("123") and text[2] == "#" for text in controlled)
    assert len(free) == C or len(other) == C


@pytest.mark.parametrize("control", ["[0-9]+", 3, {"kind": "none"}, [c.none()] * (P - 1) + ["x"]])
def test_what_is_no_control_is_refused(control):
    with pytest.raises(
        UserError, match=r"^control: got .*, want what rl.controls makes, or a list with one for each prompt$"
    ):
        sampler().controls(P, control=control)
    with pytest.raises(UserError, match=rf"^control: got 2, want one for each of the {P} prompts$"):
        sampler().controls(P, control=[c.none()] * 2)
