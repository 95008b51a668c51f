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


def wrong_arguments(name: str, found: Callable, options: Mapping[str, Any], arguments: tuple[Any, ...]) -> list[str]:
    """What is wrong with the options, as ": why": a function takes `arguments` and the options, a class the options alone."""
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return []
    try:
        signature.bind(*(() if isinstance(found, type) else arguments), **options)
    except TypeError as error:
        return [f': "{name}" takes {signature}: {error}']
    return []


def hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f' Perhaps you meant "{close[0]}"' if close else ""


def _make_importable(directory: str) -> None:
    """Last on the path, so that a user's `numeric.py` hides nothing. Spawned workers inherit the path."""
    if directory not in sys.path:
        sys.path.append(directory)
