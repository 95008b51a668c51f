"""Every value that a config has, as `--help` lists them: flag, type, the value it has, and the docstring of its field."""

import ast
import dataclasses
import inspect
import itertools
import textwrap
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

from jaxrl_llm.config.values import alternatives, defaults, sections, variant_of

WIDTH = 118
WORDS = {str: "TEXT", int: "INTEGER", float: "NUMBER", bool: "true|false", type(None): "null", Any: "VALUE"}


def listing(values: dict[str, Any], root: type) -> str:
    """Of the section `root` that has `values`, all variants of its parts included."""
    return "\n".join(_lines("--", root, values))


def _lines(prefix: str, section: type, values: dict[str, Any]) -> Iterator[str]:
    docs = _docs(section)
    for f in dataclasses.fields(section):
        value = values.get(f.name)
        if variants := sections(f.type):
            yield from _variants(prefix + f.name, f.type, variants, value)
        if not variants or isinstance(value, str):
            has = f" = {_shown(value)}" if f.name in values else ""
            yield f"{prefix}{f.name} {_type(f.type)}{has}"
            yield from textwrap.wrap(docs.get(f.name, ""), WIDTH, initial_indent="    ", subsequent_indent="    ")
        for entry in (e for a in alternatives(f.type) if get_origin(a) is tuple for e in sections(get_args(a)[0])):
            yield from _lines(f"{prefix}{f.name}.0.", entry, next(iter(value or ()), {}))


def _variants(name: str, annotation: Any, variants: list[type], value: Any) -> Iterator[str]:
    """A section of each variant: first the one that there is, with its values; the others with their defaults."""
    given = value if isinstance(value, dict) else {}
    there = variant_of(given, variants) if given else None
    for variant in sorted(variants, key=lambda v: v is not there):
        instead = "" if variant is there or not given else "(instead of the one above) "
        yield "\n" + textwrap.fill(f"{name}: {instead}{' '.join((variant.__doc__ or '').split())}", WIDTH)
        yield from _lines(f"{name}.", variant, given if variant is there else defaults(variant))


def _docs(section: type) -> dict[str, str]:
    """The strings that stand behind the fields in the source; those of bases too."""
    found: dict[str, str] = {}
    for cls in reversed([c for c in section.__mro__ if dataclasses.is_dataclass(c)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for field, doc in itertools.pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant):
                found[field.target.id] = " ".join(str(doc.value.value).split())
    return found


def _type(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation]
    if origin is Annotated:
        return _type(parts[0])
    if origin is Literal:
        return "|".join(map(str, parts))
    if origin is tuple:
        return f"[{_type(parts[0])}, ...]"
    if origin is dict:
        return "{KEY: VALUE, ...}"
    return "|".join(_type(part) for part in parts) if parts else "{...}"


def _shown(value: Any) -> str:
    """As YAML has it, on one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_shown(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else f"{value}" or '""'
