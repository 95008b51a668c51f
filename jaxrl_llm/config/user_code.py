"""Functions and classes of your own, by the names that a config gives them: "module:name". Imports no jax."""

import difflib
import functools
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jaxrl_llm.errors import UserError

NOTHING: Mapping[str, Any] = {}


def resolve(name: str, want: str, built_in: Mapping[str, str] = NOTHING) -> Callable:
    """What `name` stands for: a function, or a class that makes one. `want`: what it should be, in words; `built_in`: short names.

    Raises:
      UserError: nothing of that name was found, as in `find`, or it cannot be called.
    """
    found = find(name, built_in)
    if not callable(found):
        raise UserError(f'got "{name}", which is a {type(found).__name__}; want {want}')
    return found


def find(name: str, built_in: Mapping[str, str] = NOTHING) -> Any:
    """What `name` stands for.

    Raises:
      UserError: no such built-in, no such module, its import failed, or there is nothing of that name in it.
    """
    module_name, colon, function_name = built_in.get(name, name).partition(":")
    if not colon:
        known = f"one of: {', '.join(built_in)}; or " if built_in else ""
        raise UserError(f'got "{name}", want {known}"module:function".{hint(name, built_in)}')
    if module_name == "__main__":
        raise UserError(
            f'got "{name}"; in other processes "__main__" is not your script; move the function to a module of its own'
        )
    _make_importable(os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f'got "{name}", and importing "{module_name}" failed: {type(error).__name__}: {error}. '
            "If the module is not found, put its directory on PYTHONPATH, or start from there"
        ) from error
    found = getattr(module, function_name, None)
    if found is None:
        raise UserError(
            f'got "{name}", but "{module_name}" has no "{function_name}".{hint(function_name, vars(module))}'
        )
    return found


def made(found: Callable, options: Mapping[str, Any]) -> Callable:
    """A class made with the options; a function that has them as keyword arguments."""
    if isinstance(found, type):
        return found(**options)
    return functools.partial(found, **options) if options else found


def has_method(found: type, name: str) -> bool:
    """Objects of the class have it; `__call__` too, which every class has for itself."""
    return any(name in vars(base) and callable(getattr(found, name)) for base in found.__mro__ if base is not object)


def wrong_methods(name: str, found: type, methods: Mapping[str, tuple[str, ...]], named: tuple[str, ...] = ()) -> str:
    """Why objects of the class cannot be called as `methods` say, each with what it is called with; "" if they can. `named`: what
    is given by name too, to those that take it."""
    listed = ", ".join(f"{method}({', '.join(arguments)})" for method, arguments in methods.items())
    want = f"want a class whose objects have {listed}"
    if lacking := [method for method in methods if not has_method(found, method)]:
        return f'got "{name}", which has no {", ".join(lacking)}; {want}'
    for method, arguments in methods.items():
        bound = isinstance(inspect.getattr_static(found, method), staticmethod | classmethod)
        if wrong := _cannot_take(getattr(found, method), arguments if bound else ("self", *arguments), {}, named):
            return f'got "{name}", whose {method} {wrong}; {want}'
    return ""


def wrong_arguments(
    name: str,
    found: Callable,
    options: Mapping[str, Any],
    arguments: tuple[Any, ...],
    named: tuple[str, ...] = (),
) -> list[str]:
    """What is wrong with the options, as ": why": a function takes `arguments` and the options, a class the options alone; `named`
    as in `wrong_methods`."""
    of_class = isinstance(found, type)
    wrong = _cannot_take(found, () if of_class else arguments, options, () if of_class else named)
    return [f': "{name}" {wrong}'] if wrong else []


def _cannot_take(
    function: Callable, arguments: tuple[Any, ...], options: Mapping[str, Any], named: tuple[str, ...]
) -> str:
    """ "takes ...: why" where the function cannot be called so; "" where it can, or says nothing of itself."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(*arguments, **options, **{name: None for name in named if name in signature.parameters})
    except TypeError as error:
        return f"takes {signature}: {error}"
    return ""


def hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f' Perhaps you meant "{close[0]}"' if close else ""


def _make_importable(directory: str) -> None:
    """Last on the path, so that a user's `numeric.py` hides nothing. Spawned workers inherit the path."""
    if directory not in sys.path:
        sys.path.append(directory)
