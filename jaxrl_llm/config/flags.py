"""Flags of the command line, `--section.field VALUE`: reading them by the config's schema, and applying them to its values."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Any, Literal, NamedTuple, get_args, get_origin

from jaxrl_llm.config.renamed_keys import new_name
from jaxrl_llm.config.schema import (
    alternatives,
    child_types,
    defaults,
    has_kinds,
    keys,
    types_at,
    variant_of,
    variants_of,
)
from jaxrl_llm.config.yaml_text import read_yaml
from jaxrl_llm.errors import UserError


class Flag(NamedTuple):
    path: tuple[str, ...]
    value: Any
    from_section: bool = False
    """True if it was given as part of a mapping for its section."""


def read_flags(args: Sequence[str], root: type, command_options: Sequence[str] = ()) -> tuple[list[Flag], list[str]]:
    """Read `--section.field VALUE` and `--section.field=VALUE`.

    Args:
        root: the dataclass of the config.
        command_options: options of the command itself, suggested for misspelled flags.

    Returns:
        The flags, and error messages.
    """
    flags, errors, rest = [], [], list(args)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            errors.append(f"{name}{equals}{text}: got a word that belongs to no flag, want --section.field VALUE")
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        try:
            path = _path(name, root, command_options)
            if not equals:
                raise UserError(f"{name}: got no value, want {name} VALUE; {name}=VALUE where it begins with --")
            annotations = types_at(path, root)
            flags += _flags(path, _parsed(name, text, annotations), annotations)
        except UserError as error:
            errors.append(str(error))
    return flags, errors


def _path(name: str, root: type, command_options: Sequence[str]) -> tuple[str, ...]:
    """Path of the key that a flag names; dashes in field names are underscores."""
    if name in command_options:
        raise UserError(f"{name}: got a value, or stands where it is not read, want {name} alone")
    path, words = (), name[2:].split(".")
    for n, word in enumerate(words):
        known = keys(variants_of(types_at(path, root)))
        word = word.replace("-", "_") if known else word
        if not types_at((*path, word), root):
            if renamed := new_name([*path, word, *words[n + 1 :]]):
                raise UserError(f"{name}: got a flag that was renamed, want --{renamed}")
            flags = {k: "--" + ".".join([*path, k, *words[n + 1 :]]) for k in known}
            flags |= {} if path else {option[2:]: option for option in command_options}
            near = [flags[key] for key in difflib.get_close_matches(word, flags, n=1)]
            near = (len(words) == 1 and ["--" + ".".join(p) for p in _paths_of(word, root)][:3]) or near
            raise UserError(f"{name}: no such flag" + (f", perhaps you meant {' or '.join(near)}" if near else ""))
        path = (*path, word)
    return path


def _paths_of(field: str, root: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of the fields with this name, at most two sections deep."""
    for key in keys(variants_of(types_at(path, root))):
        if key == field:
            yield (*path, key)
        elif len(path) < 2:
            yield from _paths_of(field, root, (*path, key))


def _parsed(name: str, text: str, annotations: Sequence[Any]) -> Any:
    """The text as YAML; unchanged if the key takes nothing but text, where 007, null and "a: b" mean themselves."""
    if all(map(_is_text, annotations)):
        return text
    if text == "None" and any(type(None) in alternatives(a) for a in annotations):
        return None
    try:
        value, repeated_keys = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{name}: got {text[:200]!r}, which is not YAML: {error}") from None
    if repeated_keys:
        raise UserError("\n".join(f"{name}: {line}" for line in repeated_keys))
    return value


def _is_text(annotation: Any) -> bool:
    return all(
        a is str or (get_origin(a) is Literal and all(isinstance(x, str) for x in get_args(a)))
        for a in alternatives(annotation)
    )


def _flags(path: tuple[str, ...], value: Any, annotations: Sequence[Any], from_section: bool = False) -> Iterator[Flag]:
    """One flag; for a mapping in place of a section, one per key, so that keys it does not name stay."""
    variants = variants_of(annotations)
    value = _written_out(value, variants)
    if not variants or not isinstance(value, dict):
        yield Flag(path, value, from_section)
        return
    for name, part in value.items():
        yield from _flags((*path, str(name)), part, child_types(annotations, str(name)), True)


def _written_out(value: Any, variants: Sequence[type]) -> Any:
    """The value with the short forms of sections expanded."""
    for variant in variants:
        if hasattr(variant, "written_out"):
            value = variant.written_out(value)
    return value


def apply_flags(values: dict[str, Any], flags: Sequence[Flag], root: type) -> tuple[dict[str, Any], list[str]]:
    """Return the values with the flags over them, and errors about flags that have no place.

    A flag of a part takes precedence over a flag of its section; of two flags for one path, the last.
    """
    errors = []
    for parent, group in groupby(sorted(flags, key=lambda f: (len(f.path), f.path[:-1])), key=lambda f: f.path[:-1]):
        given = {flag.path[-1]: flag for flag in group}
        try:
            values = _changed(values, parent, [root], lambda *now, given=given: _overlay(*now, given))
        except IndexError as error:
            errors.append(f"--{'.'.join((*parent, next(iter(given))))}: {error}")
    return values, errors


def merged(base: dict[str, Any], top: dict[str, Any], root: type) -> dict[str, Any]:
    """Return `top` over `base`, both values of the section `root`, key by key. Another variant starts from its own defaults."""
    return apply_flags(base, list(_flags((), top, [root])), root)[0]


def _changed(value: Any, path: Sequence[str], annotations: Sequence[Any], change: Callable[[Any, Any], Any]) -> Any:
    """Return `value` with `change` applied to the part at `path`; a missing part starts from its default."""
    variants = variants_of(annotations)
    container = _container(_written_out(value, variants), annotations)
    if container is None:
        return value
    if not path:
        return change(container, annotations)
    name, *rest = path
    types = child_types(annotations, name)
    if isinstance(container, list):
        part = container[int(name)] if int(name) < len(container) else None
        return _with_entry(container, name, _changed(part, rest, types, change))
    part = container.get(name)
    if name not in container and variants:
        part = defaults(variant_of(container, variants)).get(name)
    return _overlay(container, annotations, {name: Flag((name,), _changed(part, rest, types, change))})


def _container(value: Any, annotations: Sequence[Any]) -> dict[str, Any] | list[Any] | None:
    """The mapping or list to put parts into: empty in place of null or of a word; None if the value is wrong here."""
    members = [a for annotation in annotations for a in alternatives(annotation)]
    is_list = any(get_origin(a) is tuple for a in members)
    if value is None or (isinstance(value, str) and any(a is str or get_origin(a) is Literal for a in members)):
        return [] if is_list else {}
    if isinstance(value, list | tuple):
        return list(value) if is_list or Any in members else None
    return value if isinstance(value, dict) and not is_list else None


def _with_entry(entries: list[Any], index: str, entry: Any) -> list[Any]:
    if int(index) > len(entries):
        raise IndexError(
            f"got entry {index} of a list that has {len(entries)}, want {len(entries)} at most: entries count from 0"
        )
    return [*entries[: int(index)], entry, *entries[int(index) + 1 :]]


def _overlay(base: dict[str, Any] | list[Any], annotations: Sequence[Any], given: dict[str, Flag]) -> Any:
    """Return `base` with the given parts; the parts alone if they choose another variant or preset."""
    parts = {name: flag.value for name, flag in given.items()}
    if isinstance(base, list):
        for index in sorted(parts, key=int):
            base = _with_entry(base, index, parts[index])
        return base
    variants, from_section = variants_of(annotations), any(f.from_section for f in given.values())
    if variants and ("preset" in parts or _is_another_variant(base, parts, variants, from_section)):
        return parts
    return base | parts


def _is_another_variant(
    base: dict[str, Any], parts: dict[str, Any], variants: Sequence[type], from_section: bool
) -> bool:
    """True if `parts` choose another variant than the one of `base`, which is then dropped.

    Without kinds, a key that only other variants have chooses, unless `base` sets a key without default: one part does not discard
    that.
    """
    if not base or len(variants) < 2:
        return False
    now = variant_of(base, variants)
    if has_kinds(variants):
        return "kind" in parts and parts["kind"] != defaults(now)["kind"]
    known = parts.keys() & set(keys(variants))
    if known <= set(keys([now])):
        return False
    required = base.keys() & (set(keys([now])) - defaults(now).keys())
    return (from_section or not required) and any(known <= set(keys([variant])) for variant in variants)
