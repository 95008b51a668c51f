"""pydantic's errors about a config's values as messages `name: got X, want Y`, one line per key."""

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import Any

from jaxrl_llm.config.flags import Flag
from jaxrl_llm.config.renamed_keys import new_name
from jaxrl_llm.config.schema import has_kinds, keys, types_as_written, variant_of, variants_of

# Error types that, among the members of a union, only exclude one member.
OTHER_MEMBER = ("literal_error", "dataclass_type")

# By the beginning of the error's type; the first match counts.
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
    "union_tag_invalid": "one of {expected_tags}",
    "union_tag": "a section, as {{key: value}}",
    "invalid_key": "a name as key",
}

KeyPath = tuple[str, ...]
PydanticError = dict[str, Any]


def display_name(path: Sequence[str], source: str, flags: Sequence[Flag]) -> str:
    """Name of a key as the user wrote it: a flag, or a key of the file `source`."""
    return f"--{'.'.join(path)}" if _is_flag(path, flags) else f"{source}: {'.'.join(path)}"


def _is_flag(path: Sequence[str], flags: Sequence[Flag]) -> bool:
    return any(tuple(path[: len(flag.path)]) == flag.path for flag in flags)


def errors_by_path(errors: Sequence[PydanticError], values: dict[str, Any]) -> dict[KeyPath, list[PydanticError]]:
    """Errors of reading `values`, by the path of the key, without those that only follow from others."""
    by_path: dict[KeyPath, list[PydanticError]] = {}
    for error in errors:
        by_path.setdefault(_path(error, values), []).append(error)
    parents = {path[:n] for path in by_path for n in range(len(path))}
    # A list with wrong entries is reported as too short as well, a section with a wrong key as no other member of its union.
    return {
        path: found
        for path, found in by_path.items()
        if path not in parents or not all(e["type"] in ("too_short", *OTHER_MEMBER) for e in found)
    }


def describe_errors(
    errors: Sequence[PydanticError], values: dict[str, Any], root: type, source: str, flags: Sequence[Flag]
) -> list[str]:
    """One message per key, without errors that only follow from others.

    Args:
        errors: of reading `values` as the dataclass `root`.
        source: name of the file that the values come from.
        flags: flags that are part of `values`.
    """
    lines, by_path = [], errors_by_path(errors, values)
    for path, found in by_path.items():
        if _follows_from_a_flag(path, by_path, root, flags):
            continue
        beside = [f for f in flags if f.path[:-1] == path[:-1]] if found[0]["type"].startswith("missing") else []
        by_flag = [*flags, *(Flag(path, None) for _ in beside[:1])]
        lines.append(f"{display_name(path, source, by_flag)}: {_description(path, found, values, root, by_flag)}")
    return lines


def _follows_from_a_flag(path: KeyPath, paths: Iterable[KeyPath], root: type, flags: Sequence[Flag]) -> bool:
    """True if the key is wrong only because a flag sets a key of another variant of the same section."""

    def chooses_variant(at: KeyPath) -> bool:
        variants = variants_of(types_as_written(at[:-1], root))
        return len(variants) > 1 and not has_kinds(variants) and at[-1] in keys(variants)

    given = {flag.path for flag in flags}
    return (
        path not in given
        and chooses_variant(path)
        and any(p in given and p[:-1] == path[:-1] and chooses_variant(p) for p in paths)
    )


def _path(error: PydanticError, values: Any) -> KeyPath:
    """Path of the key as the user wrote it: without the names of union members. A wrong `kind` is reported at the kind, or at the
    short form that stands for it."""
    absent = error["type"].startswith(("missing", "unexpected", "invalid_key"))
    path, variant = [], None
    for n, name in enumerate(error["loc"]):
        known = isinstance(values, dict) and name in values
        if known and values.get("kind") == name and variant is not values:
            # The member of a union, which has a key of its own name.
            variant = values
            continue
        if isinstance(name, int) and isinstance(values, list | tuple):
            values = values[name]
        elif known or (absent and n == len(error["loc"]) - 1):
            values = values.get(name) if isinstance(values, dict) else None
        else:
            continue
        path.append(str(name))
    has_kind = isinstance(values, dict) and (values.keys() & {"kind"} or error["type"] == "union_tag_not_found")
    return (*path, "kind") if error["type"].startswith("union_tag") and has_kind else (*path,)


def _description(path: KeyPath, errors: list[PydanticError], values: Any, root: type, flags: Sequence[Flag]) -> str:
    error, kind = errors[0], errors[0]["type"]
    if kind == "unexpected_keyword_argument":
        return _no_such_key(path, values, root, flags)
    if kind.startswith("union_tag") and isinstance(error["input"], dict):
        return _no_such_kind(path, error, root)
    return got_and_want(errors)


def got_and_want(errors: Sequence[PydanticError]) -> str:
    """Description of one value's errors, one per type that it may have."""
    error = errors[0]
    got = "nothing" if error["type"].startswith("missing") else _shortened(repr(error["input"]))
    return f"got {got}, want {', or '.join(dict.fromkeys(map(_wanted, errors)))}"


def _shortened(text: str, most: int = 200) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _wanted(error: PydanticError) -> str:
    """Description of a right value. Checks in this package have it in their message."""
    words = next((words for start, words in WANTED.items() if error["type"].startswith(start)), "{msg}")
    bounds = {name: f"{x:.15g}" if isinstance(x, int | float) else x for name, x in error.get("ctx", {}).items()}
    return words.format(msg=error["msg"], **bounds)


def _no_such_kind(path: KeyPath, error: PydanticError, root: type) -> str:
    section, value = path[:-1] if path[-1] == "kind" else path, error["input"]
    # The same key may have other kinds in another variant of the section around it.
    possible = re.findall(r"'(\w+)'", error.get("ctx", {}).get("expected_tags", ""))
    kinds = possible or [_kind(t) for t in variants_of(types_as_written(section, root))]
    got, short = value.get("kind"), [kind for kind in kinds if kind in value]
    if got is None and short:
        return f"got {' and '.join(map(str, value))}, want {' or '.join(short)} alone"
    near = difflib.get_close_matches(str(got), kinds, n=1) if got is not None else []
    hint = f"; perhaps you meant {near[0]}" if near else ""
    return f"got {'nothing' if got is None else repr(got)}, want one of {', '.join(kinds)}{hint}"


def _kind(variant: type) -> str:
    return variant.__dataclass_fields__["kind"].default


def _no_such_key(path: KeyPath, values: Any, root: type, flags: Sequence[Flag]) -> str:
    """Description of an unknown key: its new name, the variant that has it, or the key that was probably meant."""
    dashes = "--" if _is_flag(path, flags) else ""
    if renamed := new_name(path):
        return f"got a key that was renamed, want {dashes}{renamed}"
    *parents, name = path
    variants = variants_of(types_as_written(parents, root))
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
    if has_kinds(variants) and name in map(_kind, variants):
        return f"no such key, want kind: {name} and its settings"
    near = difflib.get_close_matches(name, [key for key in keys(variants) if key != name], n=1)
    meant = ".".join([*parents, *near])
    return "no such key" + (f", perhaps you meant {dashes}{meant}" if near else "")
