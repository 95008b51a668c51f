"""What is wrong with a config's values, in words: pydantic's errors as `name: got X, want Y`, one line for each place."""

import difflib
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrl_llm.config.values import Flag, has_kinds, keys, sections, types_at, variant_of

# Of the members of a union, these only say that the value is not of this member.
OTHER_MEMBER = ("literal_error", "dataclass_type")

# By the beginning of the error's type; the first that fits.
WANTED = {
    "int_": "a whole number",
    "float_": "a number",
    "finite_number": "a finite number",
    "bool_": "true or false",
    "string_": "text",
    "greater_than_equal": "{ge} or more",
    "greater_than": "more than {gt}",
    "less_than_equal": "{le} or less",
    "less_than": "less than {lt}",
    "literal_error": "{expected}",
    "missing": "a value",
    "tuple_type": "a list, as [a, b]",
    "too_short": "{min_length} entries or more",
    "too_long": "{max_length} entries or less",
    "dict_type": "a section, as {{key: value}}",
    "dataclass_type": "a section, as {{key: value}}",
    "model_attributes_type": "a section, as {{key: value}}",
    "union_tag": "a section, as {{key: value}}",
    "invalid_key": "a name as key",
}


def named(path: Sequence[str], source: str, flags: Sequence[Flag]) -> str:
    """The place as its writer knows it: a flag, or a key of `source`."""
    by_flag = any(tuple(path[: len(flag.path)]) == flag.path for flag in flags)
    return f"--{'.'.join(path)}" if by_flag else f"{source}: {'.'.join(path)}"


def errors_in_words(
    errors: Sequence[dict[str, Any]], values: dict[str, Any], root: type, source: str, flags: Sequence[Flag]
) -> list[str]:
    """A line for each place where `values` are no `root`, without those that only follow from others."""
    by_place: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for error in errors:
        by_place.setdefault(_place(error, values), []).append(error)
    deeper = {place[:n] for place in by_place for n in range(len(place))}
    lines = []
    for place, found in by_place.items():
        # A list whose entries are wrong counts as too short as well, a section with a wrong key as no other member of its union.
        if place in deeper and all(e["type"] in ("too_short", *OTHER_MEMBER) for e in found):
            continue
        if _follows_from_a_flag(place, by_place, root, flags):
            continue
        beside = [f for f in flags if f.path[:-1] == place[:-1]] if found[0]["type"].startswith("missing") else []
        source_of = [*flags, *(Flag(place, None) for _ in beside[:1])]
        lines.append(f"{named(place, source, source_of)}: {_words(place, found, values, root, source_of)}")
    return lines


def _follows_from_a_flag(
    place: tuple[str, ...], places: Iterable[tuple[str, ...]], root: type, flags: Sequence[Flag]
) -> bool:
    """Whether the key is of another variant, and was there or filled in because a flag sets another one of that variant."""

    def of_another(at: tuple[str, ...]) -> bool:
        variants = [t for annotation in types_at(at[:-1], root) for t in sections(annotation)]
        return len(variants) > 1 and not has_kinds(variants) and at[-1] in keys(variants)

    given = {flag.path for flag in flags}
    return (
        place not in given
        and of_another(place)
        and any(p in given and p[:-1] == place[:-1] and of_another(p) for p in places)
    )


def _place(error: dict[str, Any], values: Any) -> tuple[str, ...]:
    """The path without what nobody wrote: a union adds the name of a member. A wrong `kind` is at the kind."""
    absent = error["type"].startswith(("missing", "unexpected", "invalid_key"))
    place = []
    for n, name in enumerate(error["loc"]):
        known = isinstance(values, dict) and name in values
        if isinstance(name, int) and isinstance(values, list | tuple):
            values = values[name]
        elif known or (absent and n == len(error["loc"]) - 1):
            values = values.get(name) if isinstance(values, dict) else None
        else:
            continue
        place.append(str(name))
    return (*place, "kind") if error["type"].startswith("union_tag") and isinstance(error["input"], dict) else (*place,)


def _words(place: tuple[str, ...], errors: list[dict[str, Any]], values: Any, root: type, flags: Sequence[Flag]) -> str:
    error, kind = errors[0], errors[0]["type"]
    if kind == "unexpected_keyword_argument":
        return _no_such_key(place, values, root, flags)
    if kind.startswith("union_tag") and isinstance(error["input"], dict):
        return _no_such_kind(place, error["input"].get("kind"), root)
    return got_and_want(errors)


def got_and_want(errors: Sequence[dict[str, Any]]) -> str:
    """Of one value, for which every one of pydantic's `errors` is a type that it is not of."""
    error = errors[0]
    got = "nothing" if error["type"].startswith("missing") else _shortened(repr(error["input"]))
    return f"got {got}, want {', or '.join(dict.fromkeys(map(_wanted, errors)))}"


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _wanted(error: dict[str, Any]) -> str:
    """What would have been right. Checks of our own say it in their message."""
    words = next((words for start, words in WANTED.items() if error["type"].startswith(start)), "{msg}")
    bounds = {name: f"{x:.15g}" if isinstance(x, int | float) else x for name, x in error.get("ctx", {}).items()}
    return words.format(msg=error["msg"], **bounds)


def _no_such_kind(place: tuple[str, ...], got: Any, root: type) -> str:
    variants = [t for annotation in types_at(place[:-1], root) for t in sections(annotation)]
    kinds = [_kind(t) for t in variants]
    near = difflib.get_close_matches(str(got), kinds, n=1)
    hint = f"; perhaps you meant {near[0]}" if near else ""
    return f"got {'nothing' if got is None else repr(got)}, want one of {', '.join(kinds)}{hint}"


def _kind(variant: type) -> str:
    return variant.__dataclass_fields__["kind"].default


def _no_such_key(place: tuple[str, ...], values: Any, root: type, flags: Sequence[Flag]) -> str:
    """And what was meant: the same key of another variant, or another key."""
    *parents, name = place
    variants = [t for annotation in types_at(parents, root) for t in sections(annotation)]
    section = values
    for parent in parents:
        section = section[int(parent)] if isinstance(section, list | tuple) else section[parent]
    owners = [t for t in variants if name in keys([t])]
    if owners and has_kinds(variants):
        now = _kind(variant_of(section, variants))
        return f"no such key with kind {now}, only with {' or '.join(map(_kind, owners))}"
    if owners:
        beside = [key for key in section if key in keys(variants) and key not in keys(owners)]
        return f"no such key beside {', '.join(beside)}"
    near = difflib.get_close_matches(name, [key for key in keys(variants) if key != name], n=1)
    meant = ".".join([*parents, *near])
    flagged = any(place[: len(flag.path)] == flag.path for flag in flags)
    return "no such key" + (f", perhaps you meant {'--' if flagged else ''}{meant}" if near else "")
