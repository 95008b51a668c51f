"""`jaxrl COMMAND CONFIG --help`: every key of the config with its flag, type, present value and the docstring of its field."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from jaxrl_llm.config.schema import alternatives, defaults, sections, variant_of

WIDTH = 118
TYPE_NAMES = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false", type(None): "null", Any: "VALUE"}


def help_text(values: dict[str, Any], root: type) -> str:
    """Return the listing of the section `root` with these values; other variants of its parts are listed with their defaults."""
    return "\n".join(_lines("--", root, values))


def _lines(prefix: str, section: type, values: dict[str, Any]) -> Iterator[str]:
    docs = _field_docstrings(section)
    for f in dataclasses.fields(section):
        value = values.get(f.name)
        if variants := sections(f.type):
            yield from _variant_lines(prefix + f.name, variants, value)
        if not variants or isinstance(value, str):
            present = f" = {_yaml(value)}" if f.name in values else ""
            yield f"{prefix}{f.name} {_type_name(f.type)}{present}"
            yield from textwrap.wrap(docs.get(f.name, ""), WIDTH, initial_indent="    ", subsequent_indent="    ")
        for entry in (e for a in alternatives(f.type) if get_origin(a) is tuple for e in sections(get_args(a)[0])):
            yield from _lines(f"{prefix}{f.name}.0.", entry, next(iter(value or ()), {}))


def _variant_lines(name: str, variants: list[type], value: Any) -> Iterator[str]:
    """The lines of each variant of a section: first the one that `value` chooses."""
    given = value if isinstance(value, dict) else {}
    chosen = variant_of(given, variants) if given else None
    for variant in sorted(variants, key=lambda v: v is not chosen):
        instead = "" if variant is chosen or not given else "(instead of the one above) "
        yield "\n" + textwrap.fill(f"{name}: {instead}{' '.join((variant.__doc__ or '').split())}", WIDTH)
        yield from _lines(f"{name}.", variant, given if variant is chosen else defaults(variant))


def _field_docstrings(section: type) -> dict[str, str]:
    """The strings after the fields in the source of a dataclass and of its bases."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in section.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


def _type_name(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation]
    if origin is Annotated:
        return _type_name(parts[0])
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return f"[{_type_name(parts[0])}, ...]"
    if origin is dict:
        return "{KEY: VALUE, ...}"
    return "|".join(_type_name(part) for part in parts) if parts else "{...}"


def _yaml(value: Any) -> str:
    """The value as YAML on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_yaml, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}" or '""'
