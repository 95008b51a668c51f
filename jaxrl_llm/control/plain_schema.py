"""JSON schemas in the part of the language of which outlines-core makes right regular expressions.

outlines-core ignores keywords that it does not know, and some that it knows beside others; in places it joins alternatives without
parentheses, and it writes names and patterns into strings as they are. So what matches its expression need not be valid, or not
even JSON. What is not in the part that it gets right is refused here.
"""

import json
from collections.abc import Callable
from typing import Any

# Keywords that say nothing about what is valid, or that only `$ref` reads.
ANNOTATIONS = {
    "$comment", "$defs", "$id", "$schema", "default", "definitions", "deprecated", "description", "discriminator", "examples",
    "readOnly", "title", "writeOnly",
}  # fmt: skip
KEYWORDS: dict[str, set[str]] = {
    "string": {"minLength", "maxLength", "pattern", "format"},
    "array": {"items", "prefixItems", "minItems", "maxItems"},
    "object": {"properties", "required", "additionalProperties"},
    "integer": set(),
    "number": set(),
    "boolean": set(),
    "null": set(),
}
KNOWN = {"$ref", "allOf", "anyOf", "const", "enum", "type"}.union(*KEYWORDS.values())
_BYTE = "(?:25[0-5]|2[0-4][0-9]|1[0-9]{2}|[1-9]?[0-9])"
# Without the 29th of February.
_DATE = (
    "[1-9][0-9]{3}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    "|02-(?:0[1-9]|1[0-9]|2[0-8]))"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
_LABEL = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,30}[A-Za-z0-9])?"
# outlines-core's own are not JSON (time, email, uri), have no offset (date-time), or have digits of all scripts (date).
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "email": rf"[A-Za-z0-9_+-]+(?:\.[A-Za-z0-9_+-]+)*@(?:{_LABEL}\.)+[A-Za-z]{{2,}}",
    "ipv4": rf"(?:{_BYTE}\.){{3}}{_BYTE}",
    "uri": r"https?://[A-Za-z0-9-]+(?:\.[A-Za-z0-9-]+)*(?::[0-9]{1,4})?(?:/[A-Za-z0-9._~!$&'()*+,;=:@-]*)*"
    r"(?:\?[A-Za-z0-9._~!$&'()*+,;=:@/?-]*)?",
    "uuid": "[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
}
# For any value; without anyOf it has no parentheses around it.
ANYTHING = {"anyOf": [{}]}


class PlainSchema:
    """Translation of one schema. `problems` has what is wrong with it, each with its place."""

    def __init__(self, root: Any, name: str, wrong_pattern: Callable[[str], str]):
        """`wrong_pattern`: what is wrong with a pattern inside a JSON string; "" if nothing is."""
        self._root, self._name, self._wrong_pattern = root, name, wrong_pattern
        self.problems: list[str] = []
        self.schema = self._any(root, name, ())

    def _refuse(self, at: str, what: str) -> dict:
        self.problems.append(f"{at}: {what}")
        return ANYTHING

    def _any(self, schema: Any, at: str, behind: tuple[str, ...]) -> dict:
        """Translate a schema. `behind`: references that led here."""
        if schema is True:
            return ANYTHING
        if not isinstance(schema, dict):
            return self._refuse(at, f"got {json.dumps(schema)}, want a schema: an object or true")
        # `uniqueItems: false` says nothing either.
        silent = {key for key in schema if key in ANNOTATIONS or (key == "uniqueItems" and schema[key] is False)}
        keys = {key: value for key, value in schema.items() if key not in silent}
        if unknown := [key for key in keys if key not in KNOWN]:
            return self._refuse(at, f"got {', '.join(unknown)}, which is not supported: {_advice(unknown)}")
        if not keys:
            return ANYTHING
        for key, translate in (("$ref", self._reference), ("anyOf", self._one_of_some), ("allOf", self._all)):
            if key in keys:
                if others := [other for other in keys if other != key]:
                    return self._refuse(at, f"got {key} beside {', '.join(others)}, want one of them alone")
                return translate(keys[key], f"{at}.{key}", behind)
        if "enum" in keys or "const" in keys:
            return self._values(keys, at)
        return self._typed(keys, at, behind)

    def _reference(self, ref: Any, at: str, behind: tuple[str, ...]) -> dict:
        if ref in behind:
            return self._refuse(
                at, f"got {ref} inside itself, want levels that are written out: no grammar nests without a bound"
            )
        found: Any = self._root
        parts = ref[1:].split("/")[1:] if isinstance(ref, str) and ref.startswith("#") else None
        for part in parts if parts is not None else [""]:
            part = part.replace("~1", "/").replace("~0", "~")
            if parts is None or not isinstance(found, dict) or part not in found:
                return self._refuse(at, f"got {json.dumps(ref)}, want a part of this schema, such as #/$defs/name")
            found = found[part]
        return self._any(found, f"{self._name}{ref}", (*behind, ref))

    def _one_of_some(self, schemas: Any, at: str, behind: tuple[str, ...]) -> dict:
        if not isinstance(schemas, list) or not schemas:
            return self._refuse(at, f"got {json.dumps(schemas)}, want a list of schemas")
        return {"anyOf": [self._any(schema, f"{at}[{i}]", behind) for i, schema in enumerate(schemas)]}

    def _all(self, schemas: Any, at: str, behind: tuple[str, ...]) -> dict:
        if not isinstance(schemas, list) or len(schemas) != 1:
            return self._refuse(at, "want one schema that says all")
        return self._any(schemas[0], f"{at}[0]", behind)

    def _values(self, keys: dict, at: str) -> dict:
        if others := [key for key in keys if key not in ("enum", "const", "type")]:
            return self._refuse(at, f"got {', '.join(others)} beside values, want enum or const without")
        values = keys.get("enum", [keys.get("const")])
        if not isinstance(values, list) or not values or {"enum", "const"} <= keys.keys():
            return self._refuse(at, "want enum, a list of values, or const, one of them")
        kinds = self._kinds(keys, at) if "type" in keys else list(KEYWORDS)
        for value in values:
            if kinds and not kinds_of(value) & set(kinds):
                return self._refuse(at, f"got the value {json.dumps(value)}, want values of type {' or '.join(kinds)}")
        return {"enum": values}

    def _kinds(self, keys: dict, at: str) -> list[str]:
        """Return the types of a schema, none if they are wrong."""
        kind = keys.get("type", "object" if "properties" in keys else None)
        kinds = kind if isinstance(kind, list) else [kind]
        if not kinds or any(not isinstance(one, str) or one not in KEYWORDS for one in kinds):
            got = f"type {json.dumps(kind)}" if "type" in keys else f"{', '.join(keys)} and no type"
            self._refuse(at, f"got {got}, want a type: one or a list of {', '.join(KEYWORDS)}")
            return []
        return kinds

    def _typed(self, keys: dict, at: str, behind: tuple[str, ...]) -> dict:
        if not (kinds := self._kinds(keys, at)):
            return ANYTHING
        known = {"type"}.union(*(KEYWORDS[kind] for kind in kinds))
        if extra := [key for key in keys if key not in known]:
            return self._refuse(at, f"got {', '.join(extra)}, which says nothing of {' or '.join(kinds)}: leave it out")
        found = []
        for kind in dict.fromkeys(kinds):
            part = {key: value for key, value in keys.items() if key in KEYWORDS[kind]}
            translate = {"string": self._string, "array": self._array, "object": self._object}.get(kind)
            found.append({"type": kind} if translate is None else translate(part, at, behind))
        return found[0] if len(found) == 1 else {"anyOf": found}

    def _bounds(self, keys: dict, low: str, high: str, at: str) -> dict:
        """Return the two bounds that are there."""
        found = {key: keys[key] for key in (low, high) if key in keys}
        for key, value in found.items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                self._refuse(f"{at}.{key}", f"got {json.dumps(value)}, want a whole number from 0 on")
                return {}
        if found.get(high, found.get(low, 0)) < found.get(low, 0):
            self._refuse(at, f"got {low} {found[low]} above {high} {found[high]}, want it at most that")
            return {}
        return found

    def _string(self, keys: dict, at: str, behind: tuple[str, ...]) -> dict:
        bounds = self._bounds(keys, "minLength", "maxLength", at)
        if len({"pattern", "format"} & keys.keys()) + bool(bounds) > 1:
            return self._refuse(at, f"got {', '.join(keys)}, want lengths, a pattern or a format, one of them")
        if "format" in keys:
            if keys["format"] not in FORMATS:
                return self._refuse(
                    f"{at}.format", f"got {json.dumps(keys['format'])}, want one of {', '.join(FORMATS)}, or a pattern"
                )
            return {"type": "string", "pattern": f"(?:{FORMATS[keys['format']]})"}
        if "pattern" not in keys:
            return {"type": "string", **bounds}
        pattern = keys["pattern"]
        if not isinstance(pattern, str):
            return self._refuse(f"{at}.pattern", f"got {json.dumps(pattern)}, want a text")
        pattern = pattern.removeprefix("^")
        if pattern.endswith("$") and (len(pattern) - len(pattern[:-1].rstrip("\\"))) % 2:
            pattern = pattern[:-1]
        if wrong := self._wrong_pattern(pattern):
            return self._refuse(f"{at}.pattern", wrong)
        return {"type": "string", "pattern": f"(?:{pattern})"}

    def _array(self, keys: dict, at: str, behind: tuple[str, ...]) -> dict:
        bounds = self._bounds(keys, "minItems", "maxItems", at)
        if "prefixItems" in keys:
            first = keys["prefixItems"]
            if not isinstance(first, list) or not first:
                return self._refuse(f"{at}.prefixItems", f"got {json.dumps(first)}, want a list of schemas")
            if not bounds.get("minItems", 0) <= len(first) <= bounds.get("maxItems", len(first)):
                return self._refuse(
                    at, f"got prefixItems of {len(first)} schemas, want minItems and maxItems that allow that many"
                )
            each = [self._any(schema, f"{at}.prefixItems[{i}]", behind) for i, schema in enumerate(first)]
            return {"type": "array", "prefixItems": each}
        if keys.get("items") is False:
            return self._refuse(f"{at}.items", "got false, want maxItems 0")
        items = self._any(keys.get("items", True), f"{at}.items", behind)
        return {"type": "array", "items": items, **bounds}

    def _object(self, keys: dict, at: str, behind: tuple[str, ...]) -> dict:
        named, required, other = (
            keys.get("properties", {}),
            keys.get("required", []),
            keys.get("additionalProperties", True),
        )
        if not isinstance(named, dict):
            return self._refuse(f"{at}.properties", f"got {json.dumps(named)}, want names and their schemas")
        if not isinstance(required, list) or any(name not in named for name in required):
            return self._refuse(
                f"{at}.required", f"got {json.dumps(required)}, want a list of names that are in properties"
            )
        if not named and "properties" not in keys and other is not False:
            return {"type": "object", "additionalProperties": self._any(other, f"{at}.additionalProperties", behind)}
        # Names are written into the expression as they are, but for its own special characters.
        spelled = {name: json.dumps(name, ensure_ascii=False)[1:-1] for name in named}
        return {
            "type": "object",
            "properties": {spelled[name]: self._any(part, f"{at}.{name}", behind) for name, part in named.items()},
            "required": [spelled[name] for name in required],
        }


def _advice(keys: list[str]) -> str:
    return "want anyOf" if keys == ["oneOf"] else "leave it out, and let the reward check it"


def kinds_of(value: Any) -> set[str]:
    """Types of a JSON value."""
    if isinstance(value, bool):
        return {"boolean"}
    if isinstance(value, int | float):
        return {"number", "integer"} if float(value).is_integer() else {"number"}
    return {{str: "string", list: "array", dict: "object", type(None): "null"}[type(value)]}
