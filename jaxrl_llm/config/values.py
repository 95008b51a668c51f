"""A config's values before they are checked: YAML text, flags, and flags over a file, by the types of the config's sections.

A section is a dataclass. Where the type of a section is a choice, the keys of all its variants are known, and the values say which
variant is meant: by `kind`, or by the keys themselves.
"""

import dataclasses
import difflib
import re
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import yaml

from jaxrl_llm.errors import UserError

# Of a config, with every alias written out.
MOST_NODES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML as people write it: a key that stands twice is told, and 1e-5 is a number."""

    def __init__(self, text: str):
        super().__init__(text)
        self.repeated: list[str] = []

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = []
        for key, _ in node.value:
            if key.value in seen:
                place = f"line {key.start_mark.line + 1}, column {key.start_mark.column + 1}"
                self.repeated.append(f"the key {key.value!r} stands twice, want it once: {place}")
            seen.append(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(text: str) -> tuple[Any, list[str]]:
    """The value, and the keys that stand twice, in words. Raises ValueError in words, on one line."""
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None, []
            if _nodes(node, {}, set()) > MOST_NODES:
                raise ValueError(f"its aliases make more than {MOST_NODES:,} values of it")
            return loader.construct_document(node), loader.repeated
        finally:
            loader.dispose()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


def _nodes(node: yaml.Node, known: dict[int, int], above: set[int]) -> int:
    """How many values there are with every alias written out. Raises ValueError for one that is inside of itself."""
    if id(node) in above:
        raise ValueError(f"an alias stands inside of what it names: line {node.start_mark.line + 1}")
    if id(node) not in known:
        inside = [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else node.value
        parts = [] if isinstance(node, yaml.ScalarNode) else inside
        known[id(node)] = 1 + sum(_nodes(part, known, above | {id(node)}) for part in parts)
    return known[id(node)]


def unreadable(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """Texts that no file name, tokenizer or terminal can take, as place and words; YAML can spell them all the same."""
    if isinstance(value, str):
        if wrong := next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None):
            yield path, f"got {value[:80]!r}, want text without {wrong!r}, which is no character"
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from unreadable(part, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from unreadable(part, (*path, str(index)))


def truths(value: Any, root: type, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], str]]:
    """`true` and `false` where a number is wanted, as place and words: to Python they are 1 and 0."""
    if isinstance(value, bool):
        types_there = {a for annotation in types_at(path, root) for a in alternatives(annotation)}
        if types_there & {int, float} and not types_there & {bool, Any}:
            yield path, f"got {value}, want a {'whole ' if float not in types_there else ''}number"
    for name, part in (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    ):
        yield from truths(part, root, (*path, str(name)))


def numbers(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int | float]]:
    """Every number of a section and its parts, by path; what is free in form (dicts) is left out."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from numbers(getattr(value, f.name), (*path, f.name))
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from numbers(part, (*path, str(i)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def sections(annotation: Any) -> list[type]:
    """The dataclasses among the types that a value may have."""
    return [a for a in alternatives(annotation) if dataclasses.is_dataclass(a)]


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, or the one type that there is."""
    if get_origin(annotation) is Annotated:
        return alternatives(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        return [a for part in get_args(annotation) for a in alternatives(part)]
    return [annotation]


def _inside(annotation: Any, name: str) -> list[Any]:
    """Types of what stands at `name` in a value of this type; none where nothing can."""
    found: list[Any] = []
    for a in alternatives(annotation):
        if dataclasses.is_dataclass(a):
            found += [f.type for f in dataclasses.fields(a) if f.name == name]
        elif a is Any or get_origin(a) is dict:
            found.append(Any)
        elif get_origin(a) is tuple and name.isdigit():
            found.append(get_args(a)[0])
    return found


def types_at(path: Sequence[str], root: type) -> list[Any]:
    """Types of what stands at `path`, in all variants together; none where there is no such key."""
    found = [root]
    for name in path:
        found = [within for annotation in found for within in _inside(annotation, name)]
    return found


def keys(variants: Sequence[type]) -> list[str]:
    """Names of the fields of all variants together."""
    return list(dict.fromkeys(f.name for t in variants for f in dataclasses.fields(t)))


def _variants(annotations: Sequence[Any]) -> list[type]:
    return [t for annotation in annotations for t in sections(annotation)]


def defaults(variant: type) -> dict[str, Any]:
    """Of the fields that have one; sections as mappings."""
    found = {}
    for f in dataclasses.fields(variant):
        if f.default_factory is not dataclasses.MISSING:
            found[f.name] = f.default_factory()
        elif f.default is not dataclasses.MISSING:
            found[f.name] = f.default
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def variant_of(section: dict[str, Any], variants: Sequence[type]) -> type:
    """The one that is meant: of this `kind`, the first where none is said; where there are no kinds, that which knows most keys."""
    if has_kinds(variants):
        return next((v for v in variants if defaults(v)["kind"] == section.get("kind")), variants[0])
    return max(variants, key=lambda v: len(section.keys() & set(keys([v]))))


def has_kinds(variants: Sequence[type]) -> bool:
    return all("kind" in keys([variant]) for variant in variants)


class Flag(NamedTuple):
    path: tuple[str, ...]
    value: Any
    whole: bool = False
    """Given as part of a mapping, with its section."""


def read_flags(args: Sequence[str], root: type, own: Sequence[str] = ()) -> tuple[list[Flag], list[str]]:
    """`--section.field VALUE` and `--section.field=VALUE` for a config of the type `root`, and what is wrong with them, in words.

    `own`: further flags that a person may have meant.
    """
    flags, wrong, rest = [], [], list(args)
    while rest:
        name, equals, text = rest.pop(0).partition("=")
        if not name.startswith("--"):
            wrong.append(f"{name}{equals}{text}: got a word that belongs to no flag, want --section.field VALUE")
            continue
        if not equals and rest and not rest[0].startswith("--"):
            equals, text = "=", rest.pop(0)
        try:
            path = _path(name, root, own)
            if not equals:
                raise UserError(f"{name}: got no value, want {name} VALUE; {name}=VALUE where it begins with --")
            annotations = types_at(path, root)
            flags += _flags(path, _parsed(name, text, annotations), annotations)
        except UserError as error:
            wrong.append(str(error))
    return flags, wrong


def _path(name: str, root: type, own: Sequence[str]) -> tuple[str, ...]:
    """What a flag names; dashes in names of fields are underscores."""
    if name in own:
        raise UserError(f"{name}: got a value, or stands where it is not read, want {name} alone")
    path, words = (), name[2:].split(".")
    for n, word in enumerate(words):
        known = keys(_variants(types_at(path, root)))
        word = word.replace("-", "_") if known else word
        if not types_at((*path, word), root):
            flags = {k: "--" + ".".join([*path, k, *words[n + 1 :]]) for k in known}
            flags |= {} if path else {flag[2:]: flag for flag in own}
            near = [flags[key] for key in difflib.get_close_matches(word, flags, n=1)]
            near = (len(words) == 1 and ["--" + ".".join(place) for place in _places(word, root)][:3]) or near
            raise UserError(f"{name}: no such flag" + (f", perhaps you meant {' or '.join(near)}" if near else ""))
        path = (*path, word)
    return path


def _places(word: str, root: type, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Where a field of this name stands, at most two sections deep."""
    for key in keys(_variants(types_at(path, root))):
        if key == word:
            yield (*path, key)
        elif len(path) < 2:
            yield from _places(word, root, (*path, key))


def _parsed(name: str, text: str, annotations: Sequence[Any]) -> Any:
    """YAML, but for what is text in any case: there 007, null and "a: b" mean themselves."""
    if all(map(_is_text, annotations)):
        return text
    if text == "None" and any(type(None) in alternatives(a) for a in annotations):
        return None
    try:
        value, repeated = read_yaml(text)
    except ValueError as error:
        raise UserError(f"{name}: got {text[:200]!r}, which is not YAML: {error}") from None
    if repeated:
        raise UserError("\n".join(f"{name}: {line}" for line in repeated))
    return value


def _is_text(annotation: Any) -> bool:
    return all(
        a is str or (get_origin(a) is Literal and all(isinstance(x, str) for x in get_args(a)))
        for a in alternatives(annotation)
    )


def _flags(path: tuple[str, ...], value: Any, annotations: Sequence[Any], whole: bool = False) -> Iterator[Flag]:
    """One flag; a mapping for a section is one for each key, so that what it does not name stays."""
    variants = _variants(annotations)
    value = _written_out(value, variants)
    if not variants or not isinstance(value, dict):
        yield Flag(path, value, whole)
        return
    for name, part in value.items():
        within = [found for annotation in annotations for found in _inside(annotation, str(name))]
        yield from _flags((*path, str(name)), part, within, True)


def _written_out(value: Any, variants: Sequence[type]) -> Any:
    """Without the short forms that some sections have."""
    for variant in variants:
        if hasattr(variant, "written_out"):
            value = variant.written_out(value)
    return value


def put(values: dict[str, Any], flags: Sequence[Flag], root: type) -> tuple[dict[str, Any], list[str]]:
    """`values` with those of `flags` in their places, and what has no place, in words.

    A flag of a part wins over one of its section; of two for one path the last wins.
    """
    wrong = []
    for parent, group in groupby(sorted(flags, key=lambda f: (len(f.path), f.path[:-1])), key=lambda f: f.path[:-1]):
        given = {flag.path[-1]: flag for flag in group}
        try:
            values = _changed(values, parent, [root], lambda *now, given=given: _over(*now, given))
        except IndexError as error:
            wrong.append(f"--{'.'.join((*parent, next(iter(given))))}: {error}")
    return values, wrong


def merged(base: dict[str, Any], top: dict[str, Any], root: type) -> dict[str, Any]:
    """`top` over `base`, both values of the section `root`, key by key; another variant starts from its own defaults."""
    return put(base, list(_flags((), top, [root])), root)[0]


def _changed(value: Any, path: Sequence[str], annotations: Sequence[Any], change: Callable[[Any, Any], Any]) -> Any:
    """`value` with `change` made to what stands at `path`; what is not there starts from its default."""
    variants = _variants(annotations)
    holder = _holder(_written_out(value, variants), annotations)
    if holder is None:
        return value
    if not path:
        return change(holder, annotations)
    name, *rest = path
    within = [found for annotation in annotations for found in _inside(annotation, name)]
    if isinstance(holder, list):
        now = holder[int(name)] if int(name) < len(holder) else None
        return _with_item(holder, name, _changed(now, rest, within, change))
    now = holder.get(name)
    if name not in holder and variants:
        now = defaults(variant_of(holder, variants)).get(name)
    return _over(holder, annotations, {name: Flag((name,), _changed(now, rest, within, change))})


def _holder(value: Any, annotations: Sequence[Any]) -> dict[str, Any] | list[Any] | None:
    """The mapping or list that parts are put into, empty in the place of nothing or of a word; None: such a value is wrong here."""
    members = [a for annotation in annotations for a in alternatives(annotation)]
    is_list = any(get_origin(a) is tuple for a in members)
    if value is None or (isinstance(value, str) and any(a is str or get_origin(a) is Literal for a in members)):
        return [] if is_list else {}
    if isinstance(value, list | tuple):
        return list(value) if is_list or Any in members else None
    return value if isinstance(value, dict) and not is_list else None


def _with_item(items: list[Any], index: str, item: Any) -> list[Any]:
    if int(index) > len(items):
        raise IndexError(
            f"got entry {index} of a list that has {len(items)}, want {len(items)} at most: entries count from 0"
        )
    return [*items[: int(index)], item, *items[int(index) + 1 :]]


def _over(base: dict[str, Any] | list[Any], annotations: Sequence[Any], given: dict[str, Flag]) -> Any:
    """`given` over `base`."""
    parts = {name: flag.value for name, flag in given.items()}
    if isinstance(base, list):
        for index in sorted(parts, key=int):
            base = _with_item(base, index, parts[index])
        return base
    variants = _variants(annotations)
    if variants and ("preset" in parts or _is_another(base, parts, variants, any(f.whole for f in given.values()))):
        return parts
    return base | parts


def _is_another(base: dict[str, Any], given: dict[str, Any], variants: Sequence[type], whole: bool) -> bool:
    """Whether `given` chooses another variant than `base` is of, so that nothing of `base` is meant any more.

    Where there is no `kind`, a key that only others have chooses, unless `base` says what has no default: that is not thrown away
    for a part's sake.
    """
    if not base or len(variants) < 2:
        return False
    now = variant_of(base, variants)
    if has_kinds(variants):
        return "kind" in given and given["kind"] != defaults(now)["kind"]
    known = given.keys() & set(keys(variants))
    if known <= set(keys([now])):
        return False
    chosen = base.keys() & (set(keys([now])) - defaults(now).keys())
    return (whole or not chosen) and any(known <= set(keys([variant])) for variant in variants)
