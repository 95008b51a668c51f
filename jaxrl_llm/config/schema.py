"""The schema of a config, read from the annotations of its dataclasses: types at a path, variants of a section, defaults.

A section is a dataclass. If its annotation is a union, each member is a variant; a value chooses one by its `kind` or by its keys.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args, get_origin


def sections(annotation: Any) -> list[type]:
    """Dataclasses among the alternatives of a type."""
    return [a for a in alternatives(annotation) if dataclasses.is_dataclass(a)]


def alternatives(annotation: Any) -> list[Any]:
    """Members of a union, without Annotated; the type itself if it is no union."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [a for part in get_args(annotation) for a in alternatives(part)]
    return [annotation]


def child_types(annotations: Sequence[Any], name: str) -> list[Any]:
    """Types of the entry `name` (a field, key or index) in a value of these types; empty if it cannot have one."""
    found: list[Any] = []
    for a in (a for annotation in annotations for a in alternatives(annotation)):
        if dataclasses.is_dataclass(a):
            found += [f.type for f in dataclasses.fields(a) if f.name == name]
        elif a is Any or get_origin(a) is dict:
            found.append(Any)
        elif get_origin(a) is tuple and name.isdigit():
            found.append(get_args(a)[0])
    return found


def types_at(path: Sequence[str], root: type) -> list[Any]:
    """Types of the value at `path`, over all variants; empty if there is no such key."""
    found = [root]
    for name in path:
        found = child_types(found, name)
    return found


def types_as_written(path: Sequence[str], root: type) -> list[Any]:
    """`types_at`, where a section that has `listed` may stand in its short form: the list of that field, alone or under the name
    of the kind."""
    found = [root]
    for name in path:
        found = child_types(found, name) or _in_short_form(variants_of(found), name)
    return found


def _in_short_form(variants: Sequence[type], name: str) -> list[Any]:
    """Types of the entry `name`, an index or a kind, in the short forms of these sections."""
    found: list[Any] = []
    for variant in (v for v in variants if hasattr(v, "listed")):
        lists = child_types([variant], variant.listed)
        found += lists if name == defaults(variant)["kind"] else child_types(lists, name)
    return found


def variants_of(annotations: Sequence[Any]) -> list[type]:
    """Dataclasses among the alternatives of all these types, each once."""
    return list(dict.fromkeys(t for annotation in annotations for t in sections(annotation)))


def keys(variants: Sequence[type]) -> list[str]:
    """Field names of all variants together."""
    return list(dict.fromkeys(f.name for t in variants for f in dataclasses.fields(t)))


def defaults(variant: type) -> dict[str, Any]:
    """Defaults of the fields that have one, sections as mappings."""
    found = {}
    for f in dataclasses.fields(variant):
        if f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            found[f.name] = f.default
    return {name: _as_mapping(value) for name, value in found.items()}


def _as_mapping(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_as_mapping, value))
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def variant_of(section: dict[str, Any], variants: Sequence[type]) -> type:
    """The variant that `section` chooses: by `kind`, by default the first; without kinds, the one that has most of its keys."""
    if has_kinds(variants):
        return next((v for v in variants if defaults(v)["kind"] == section.get("kind")), variants[0])
    return max(variants, key=lambda v: len(section.keys() & set(keys([v]))))


def has_kinds(variants: Sequence[type]) -> bool:
    """True if every variant has a field `kind`."""
    return all("kind" in keys([variant]) for variant in variants)
