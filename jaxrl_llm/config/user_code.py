"""The user's functions and classes, named in a config as "module:name": import and checks of signatures. Imports no jax."""

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
    """Return the function `name`, or the class that makes one.

    Args:
        name: "module:name", or a key of `built_in`.
        want: description of what it should be, for error messages.
        built_in: short names for "module:name".

    Raises:
        UserError: nothing of that name was found (as in `find`), or it cannot be called.
    """
    found = find(name, built_in)
    if not callable(found):
        raise UserError(f'got "{name}", which is a {type(found).__name__}; want {want}')
    return found


def find(name: str, built_in: Mapping[str, str] = NOTHING) -> Any:
    """Return the object `name`, as in `resolve`.

    Raises:
        UserError: no such short name, no such module, its import failed, or it has no object of that name.
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


def importable_name(function: Callable, setting: str) -> str:
    """Return "module:name", by which another process finds the function. `setting`: its name in the error message.

    Raises:
        UserError: no other process can: it is defined in a notebook, a script or another function.
    """
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", type(function).__name__)
    if not hasattr(function, "__qualname__"):
        raise UserError(
            f"{setting}: got an instance of {name}, which other processes cannot import; want its class, or a function, and "
            "its arguments as options={...}"
        )
    if module == "__main__" or getattr(sys.modules.get(module), name, None) is not function:
        raise UserError(
            f"{setting}: got {name} of {module}, which other processes cannot import; want a function at the top of a module of "
            'its own, or its name, "module:function"'
        )
    return f"{module}:{name}"


def made(found: Callable, options: Mapping[str, Any]) -> Callable:
    """Return an instance of a class made with the options, or a function with the options as keyword arguments."""
    if isinstance(found, type):
        return found(**options)
    return functools.partial(found, **options) if options else found


def traced(function: Callable, name: str, where: str) -> Callable:
    """Return the function for tracing by JAX: a UserError says what to do if it needs a concrete number.

    Args:
        function: of traced arrays.
        name: of a function that has none.
        where: its name in the error message.
    """

    def call(*args: Any) -> Any:
        from jax.errors import ConcretizationTypeError

        try:
            return function(*args)
        except ConcretizationTypeError as error:
            raise UserError(
                f"{where}: got an if, a loop or a float() that asks for a number, which JAX does not know while it compiles; "
                "want jnp.where, and jax.numpy throughout"
            ) from error

    call.__name__ = getattr(function, "__name__", name)
    return call


def has_method(found: type, name: str) -> bool:
    """True if instances of the class have the method. `__call__` counts only for instances: every class itself has one."""
    return any(name in vars(base) and callable(getattr(found, name)) for base in found.__mro__ if base is not object)


def wrong_methods(
    name: str, found: type, methods: Mapping[str, tuple[str, ...]], optional_arguments: tuple[str, ...] = ()
) -> str:
    """Error message about a class whose instances lack a method or cannot be called as required; "" if there is none.

    Args:
        name: of the class, as the config has it.
        methods: required methods, each with the names of its arguments.
        optional_arguments: keyword arguments passed to the methods that have such a parameter.
    """
    listed = ", ".join(f"{method}({', '.join(arguments)})" for method, arguments in methods.items())
    want = f"want a class whose objects have {listed}"
    if lacking := [method for method in methods if not has_method(found, method)]:
        return f'got "{name}", which has no {", ".join(lacking)}; {want}'
    for method, arguments in methods.items():
        bound = isinstance(inspect.getattr_static(found, method), staticmethod | classmethod)
        if wrong := _call_error(
            getattr(found, method), arguments if bound else ("self", *arguments), {}, optional_arguments
        ):
            return f'got "{name}", whose {method} {wrong}; {want}'
    return ""


def wrong_arguments(
    name: str,
    found: Callable,
    options: Mapping[str, Any],
    arguments: tuple[Any, ...],
    optional_arguments: tuple[str, ...] = (),
) -> list[str]:
    """Error messages `: why` about options that do not fit the signature.

    Args:
        name: of the function or class, as the config has it.
        options: keyword arguments; a class takes nothing else.
        arguments: positional arguments of a function.
        optional_arguments: as in `wrong_methods`.
    """
    is_class = isinstance(found, type)
    wrong = _call_error(found, () if is_class else arguments, options, () if is_class else optional_arguments)
    return [f': "{name}" {wrong}'] if wrong else []


def _call_error(
    function: Callable, arguments: tuple[Any, ...], options: Mapping[str, Any], optional_arguments: tuple[str, ...]
) -> str:
    """ "takes ...: why" if the function cannot be called with these; "" if it can, or has no known signature."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return ""
    try:
        signature.bind(
            *arguments, **options, **{name: None for name in optional_arguments if name in signature.parameters}
        )
    except TypeError as error:
        return f"takes {signature}: {error}"
    return ""


def hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f' Perhaps you meant "{close[0]}"' if close else ""


def _make_importable(directory: str) -> None:
    """Append to sys.path: last, so that a user's `numeric.py` hides nothing. Spawned workers inherit the path."""
    if directory not in sys.path:
        sys.path.append(directory)
