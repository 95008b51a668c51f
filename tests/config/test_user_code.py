"""Names of functions of one's own: what is made of them, and what is wrong with them."""

import os
import sys

import pytest

from jaxrl_llm.config import user_code
from jaxrl_llm.errors import UserError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A module beside the directory in which the command was typed."""
    (tmp_path / "of_mine.py").write_text(
        "NUMBER = 3\n"
        "def scaled(x, by=2):\n    return x * by\n"
        "class Plus:\n"
        "    def __init__(self, what):\n        self.what = what\n"
        "    def __call__(self, x):\n        return x + self.what\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "of_mine"
    sys.modules.pop("of_mine", None)


def test_a_function_takes_its_options_with_each_call_and_a_class_when_it_is_made(module):
    made = lambda name, options: user_code.made(user_code.resolve(f"{module}:{name}", "a function"), options)  # noqa: E731
    assert made("scaled", {})(5) == 10
    assert made("scaled", {"by": 3})(5) == 15
    assert made("Plus", {"what": 3})(5) == 8
    # Last, so that a module of the user's hides nothing.
    assert sys.path[-1] == os.getcwd()


def test_what_is_wrong_with_a_name(module):
    def told(name, built_in=user_code.NOTHING):
        with pytest.raises(UserError) as error:
            user_code.resolve(name, "a function of x", built_in)
        return str(error.value)

    assert told("grpo") == 'got "grpo", want "module:function".'
    known = {"short": f"{module}:scaled", "long": f"{module}:Plus"}
    assert told("shrt", known) == (
        'got "shrt", want one of: short, long; or "module:function". Perhaps you meant "short"'
    )
    assert user_code.resolve("short", "", known) is user_code.resolve(f"{module}:scaled", "")
    assert told(f"{module}:scale") == (
        f'got "{module}:scale", but "{module}" has no "scale". Perhaps you meant "scaled"'
    )
    assert told(f"{module}:NUMBER") == f'got "{module}:NUMBER", which is a int; want a function of x'
    assert told("no_module_of_mine:f").startswith(
        'got "no_module_of_mine:f", and importing "no_module_of_mine" failed: ModuleNotFoundError'
    )
    assert "move the function to a module of its own" in told("__main__:f")


def test_what_is_wrong_with_options(module):
    def told(name, options):
        return user_code.wrong_arguments(name, user_code.resolve(f"{module}:{name}", ""), options, (1,))

    assert told("scaled", {}) == told("scaled", {"by": 1}) == told("Plus", {"what": 1}) == []
    assert told("scaled", {"of": 1}) == [": \"scaled\" takes (x, by=2): got an unexpected keyword argument 'of'"]
    assert told("Plus", {}) == [": \"Plus\" takes (what): missing a required argument: 'what'"]
