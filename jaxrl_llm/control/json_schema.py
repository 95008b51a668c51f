"""JSON schemas as regular expressions: what matches is valid, though not all that is valid matches.

Objects have the listed properties alone, in their order; a string matches `pattern` as a whole.
"""

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from jaxrl_llm.control.config import JsonSchemaControl
from jaxrl_llm.control.graph import ENDLESS, distances
from jaxrl_llm.control.plain_schema import PlainSchema
from jaxrl_llm.control.regex import from_regex
from jaxrl_llm.errors import UserError, describe_os_error

# Bytes that stand for themselves in a JSON string.
IN_STRINGS = frozenset(range(0x20, 256)) - {0x22, 0x5C, 0x7F}
SPACE = frozenset(b" \t\r\n")


def to_regex(control: JsonSchemaControl, where: str) -> str:
    """Return the regular expression of JSON texts that are valid under a schema.

    Raises:
        UserError: The file cannot be read, or the schema is wrong, or it has what no regular expression says. All problems at once.
    """
    from outlines_core.json_schema import build_regex_from_schema

    schema, name = _read(control, where)
    if wrong := _wrong_bytes(control.whitespace, SPACE):
        raise UserError(f"{where}.whitespace: got {control.whitespace!r}: {wrong}")
    plain = PlainSchema(schema, name, lambda pattern: _wrong_bytes(pattern, IN_STRINGS))
    if plain.problems:
        raise UserError("\n".join(plain.problems))
    try:
        return build_regex_from_schema(json.dumps(plain.schema, ensure_ascii=False), f"(?:{control.whitespace})")
    except ValueError as error:
        raise UserError(f"{name}: {' '.join(str(error).split())}") from None


def _read(control: JsonSchemaControl, where: str) -> tuple[Any, str]:
    """Return the schema and its name."""
    if not control.path:
        name = f"{where}.schema"
        try:
            # In YAML, dates are no texts, and keys may be numbers.
            return json.loads(json.dumps(control.schema, allow_nan=False)), name
        except (TypeError, ValueError) as error:
            raise UserError(f"{name}: {error}, want values that JSON has (a date needs quotes)") from None
    if control.schema:
        raise UserError(f"{where}: got schema and path, want one of them")
    path = Path(control.path).expanduser()
    try:
        return json.loads(path.read_text(encoding="utf-8")), str(path)
    except OSError as error:
        raise UserError(f"{where}.path: {describe_os_error(error, path)}") from None
    except ValueError as error:
        raise UserError(f"{where}.path: {path}: {error}, want a JSON schema") from None


@cache
def _wrong_bytes(pattern: str, allowed: frozenset[int]) -> str:
    """What is wrong with a pattern whose texts may have these bytes only; "" if nothing is."""
    try:
        found = from_regex(pattern, "pattern")
    except UserError as error:
        return str(error).removeprefix("pattern: ")
    live = distances(found.next, found.accepts) < ENDLESS
    used = np.append(live, False)[found.next[live]].any(0).nonzero()[0].tolist()
    beyond = [repr(chr(byte)) for byte in used if byte not in allowed]
    return (
        f"it matches {' '.join(beyond[:8])}, want a pattern without them, such as [a-z ] in place of ."
        if beyond
        else ""
    )
