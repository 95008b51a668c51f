"""The user's functions and classes by their names: import, options, and errors about them."""

import os
import sys

import pytest

from jaxrl_llm.config import user_code
from jaxrl_llm.errors import UserError


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Name of a module in the working directory."""
    (tmp_path / "user_module.py").write_text(
        "NUMBER = 3\n"
        "def scaled(x, by=2):\n    return x * by\n"
        "class Plus:\n"
        "    def __init__(self, what):\n        self.what = what\n"
        "    def __call__(self, x):\n        return x + self.what\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "user_module"
    sys.modules.pop("user_module", None)


def test_a_function_takes_its_options_per_call_and_a_class_once(module):
    made = lambda name, options: user_code.made(user_code.resolve(f"{module}:{name}", "a function"), options)  # noqa: E731
    assert made("scaled", {})(5) == 10
    assert made("scaled", {"by": 3})(5) == 15
    assert made("Plus", {"what": 3})(5) == 8
    # Last, so that a module of the user hides no other.
    assert sys.path[-1] == os.getcwd()


def test_errors_about_a_name(module):
    def error_of(name, built_in=user_code.NOTHING):
        with pytest.raises(UserError) as error:
            user_code.resolve(name, "a function of x", built_in)
        return str(error.value)

    assert error_of("grpo") == 'got "grpo", want "module:function".'
    known = {"short": f"{module}:scaled", "long": f"{module}:Plus"}
    assert error_of("shrt", known) == (
        'got "shrt", want one of: short, long; or "module:function". Perhaps you meant "short"'
    )
    assert user_code.resolve("short", "", known) is user_code.resolve(f"{module}:scaled", "")
    assert error_of(f"{module}:scale") == (
        f'got "{module}:scale", but "{module}" has no "scale". Perhaps you meant "scaled"'
    )
    assert error_of(f"{module}:NUMBER") == f'got "{module}:NUMBER", which is a int; want a function of x'
    assert error_of("no_module_user_module:f").startswith(
        'got "no_module_user_module:f", and importing "no_module_user_module" failed: ModuleNotFoundError'
    )
    assert "move the function to a module of its own" in error_of("__main__:f")


def test_errors_about_options(module):
    def error_of(name, options):
        return user_code.wrong_arguments(name, user_code.resolve(f"{module}:{name}", ""), options, (1,))

    assert error_of("scaled", {}) == error_of("scaled", {"by": 1}) == error_of("Plus", {"what": 1}) == []
    assert error_of("scaled", {"of": 1}) == [": \"scaled\" takes (x, by=2): got an unexpected keyword argument 'of'"]
    assert error_of("Plus", {}) == [": \"Plus\" takes (what): missing a required argument: 'what'"]


def test_a_function_of_a_module_has_a_name_for_other_processes(module):
    scaled = user_code.resolve(f"{module}:scaled", "a function")
    assert user_code.importable_name(scaled, "reward") == f"{module}:scaled"


def test_a_function_that_no_other_process_finds_is_refused():
    def inner():
        return 0

    script = type(inner)(inner.__code__, {"__name__": "__main__"})
    for function, name in ((inner, "inner"), (lambda: 0, "<lambda>"), (script, "inner")):
        with pytest.raises(UserError) as error:
            user_code.importable_name(function, "reward")
        assert "reward: got" in str(error.value) and name in str(error.value)
        assert 'want a function at the top of a module of its own, or its name, "module:function"' in str(error.value)
    with pytest.raises(
        UserError, match=r"reward: got an instance of object, .* want its class, or a function, and its arg"
    ):
        user_code.importable_name(object(), "reward")
