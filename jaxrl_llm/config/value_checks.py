"""Checks of a config's values that its types do not express. Each yields the path of a wrong value and an error message."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from jaxrl_llm.config.schema import alternatives, types_as_written
from jaxrl_llm.objective.presets import PRESETS, nearest_preset
from jaxrl_llm.tasks.config import CharacterTokenizer

# Limits of 32 bits: integers, and floats from the smallest normal number.
MAX_INT, MAX_FLOAT, MIN_FLOAT = 2**31 - 1, 3.4e38, 1.2e-38

KeyPath = tuple[str, ...]
Finding = tuple[KeyPath, str]
"""Path of a wrong value, and an error message."""


def unprintable_text(value: Any, path: KeyPath = ()) -> Iterator[Finding]:
    """Text with NUL or half a surrogate pair: YAML can spell it, but no file name, tokenizer or terminal can take it."""
    if isinstance(value, str):
        if wrong := next((c for c in value if c == "\0" or "\ud800" <= c <= "\udfff"), None):
            yield path, f"got {value[:80]!r}, want text without {wrong!r}, which is no character"
    for name, part in _parts(value):
        yield from unprintable_text(part, (*path, name))


def booleans_for_numbers(value: Any, root: type, path: KeyPath = ()) -> Iterator[Finding]:
    """`true` and `false` in place of a number: Python takes them for 1 and 0."""
    if isinstance(value, bool):
        types = {a for annotation in types_as_written(path, root) for a in alternatives(annotation)}
        if types & {int, float} and not types & {bool, Any}:
            yield path, f"got {value}, want a {'whole ' if float not in types else ''}number"
    for name, part in _parts(value):
        yield from booleans_for_numbers(part, root, (*path, name))


def _parts(value: Any) -> list[tuple[str, Any]]:
    """Entries of a mapping or a list, by name or index."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [(str(name), part) for name, part in entries]


def numbers_out_of_range(config: Any) -> list[Finding]:
    """Numbers of a dataclass that no 32-bit array can hold."""
    found = []
    for path, x in _numbers(config):
        if isinstance(x, int) and abs(x) > MAX_INT and path != ("seed",):
            found.append((path, f"got {x}, want at most {MAX_INT:,}: integers have 32 bits"))
        if isinstance(x, float) and abs(x) > MAX_FLOAT:
            found.append((path, f"got {x}, want at most {MAX_FLOAT}: numbers are float32"))
        if isinstance(x, float) and 0 < abs(x) < MIN_FLOAT:
            found.append((path, f"got {x}, want 0, or {MIN_FLOAT} at least: it is 0 in float32"))
    return found


def _numbers(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, int | float]]:
    """Every number of a section and its parts, by path; free-form mappings are left out."""
    if dataclasses.is_dataclass(value):
        for f in dataclasses.fields(value):
            yield from _numbers(getattr(value, f.name), (*path, f.name))
    elif isinstance(value, tuple | list):
        for i, part in enumerate(value):
            yield from _numbers(part, (*path, str(i)))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def conflicting_values(values: dict[str, Any]) -> list[Finding]:
    """An unknown preset, an empty run directory, a pretrained tokenizer without a path. `values` may have other errors."""
    found = []
    name = values["objective"].get("preset") if isinstance(values.get("objective"), dict) else None
    if isinstance(name, str) and name and name not in PRESETS:
        hint = f"; perhaps you meant {nearest_preset(name)}" if nearest_preset(name) else ""
        found.append((("objective", "preset"), f"got {name!r}, want one of {', '.join(PRESETS)}{hint}"))
    if values.get("run_dir") == "":
        found.append((("run_dir",), "got nothing, want a directory"))
    model, tokenizer = values.get("model", {}), values.get("tokenizer", CharacterTokenizer())
    is_pretrained = isinstance(tokenizer, dict) and "alphabet" not in tokenizer and not tokenizer.get("path")
    if is_pretrained and isinstance(model, dict) and "path" not in model:
        found.append((("tokenizer", "path"), "got nothing, want a directory, since model has no path either"))
    return found
