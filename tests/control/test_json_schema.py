"""JSON schemas: what matches is JSON and valid under the schema, and what outlines-core would get wrong is refused."""

import datetime
import json
import random
import re
from typing import Any

import pytest
from outlines_core.json_schema import build_regex_from_schema

from jaxrl_llm.control import regex
from jaxrl_llm.control.byte_automaton import ByteAutomaton
from jaxrl_llm.control.compile_pattern import transitions
from jaxrl_llm.control.config import JsonSchemaControl
from jaxrl_llm.control.graph import ENDLESS, distances
from jaxrl_llm.control.json_schema import to_regex
from jaxrl_llm.errors import UserError


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Without a process per pattern."""

    def compiled(pattern: str, named: str):
        try:
            return transitions(pattern)
        except ValueError as error:
            raise UserError(f"{named}, {error}") from None

    monkeypatch.setattr(regex, "_transitions", compiled)


def automaton_of(schema: Any, **options: str) -> ByteAutomaton:
    return regex.from_regex(to_regex(JsonSchemaControl(schema=schema, **options), "here"), "here")


def accepts(automaton: ByteAutomaton, text: str) -> bool:
    state = automaton.start
    for byte in text.encode():
        state = automaton.next[state, byte] if state >= 0 else -1
    return state >= 0 and bool(automaton.accepts[state])


INTEGER, NULL = {"type": "integer"}, {"type": "null"}


@pytest.mark.parametrize(
    ("schema", "valid", "invalid"),
    [
        (INTEGER, ["0", "-7", "120"], ["01", "1.0", '"1"', "", "1 "]),
        ({"type": "number"}, ["1", "-1.5", "1e+3"], [".5", "1.", "NaN"]),
        ({"type": "string"}, ['""', '"é漢"', r'"\""', r'"\n"'], ['"', '"""', '"\n"', r'"\x"', '"\\"']),
        ({"type": "string", "minLength": 1, "maxLength": 2}, ['"é漢"', r'"\"a"'], ['""', '"abc"']),
        # Alternatives inside a pattern stay inside the string.
        ({"type": "string", "pattern": "^(a|b)$"}, ['"a"', '"b"'], ['"a', 'b"', '"ab"']),
        ({"type": "string", "pattern": "a|b"}, ['"a"', '"b"'], ['"a', 'b"']),
        ({"type": "string", "pattern": r"^a\$$"}, ['"a$"'], ['"a"']),
        ({"type": "string", "format": "date"}, ['"2024-12-31"'], ['"2024-13-01"', '"2024-04-31"', '"٢٠٢٤-01-01"']),
        ({"type": "string", "format": "time"}, ['"23:59:59Z"', '"01:02:03.5+02:00"'], [r'"23:59:59\x5"', '"24:00:00Z"']),
        ({"type": "string", "format": "email"}, ['"a.b@c-d.org"'], ['""a"@b.org"', '"a@b"']),
        ({"type": ["string", "null"], "maxLength": 1}, ['"a"', "null"], ['"ab"', "1"]),
        ({"enum": ["a", 'b"c', 1, None, True, {"x": [1]}]}, ['"a"', r'"b\"c"', "1", "null", "true", '{"x":[1]}'], ["a", "2"]),
        ({"const": "a.b"}, ['"a.b"'], ['"axb"']),
        ({"type": "array", "items": INTEGER, "minItems": 1, "maxItems": 2}, ["[1]", "[1,2]", "[ 1, 2 ]"], ["[]", "[1,2,3]"]),
        ({"type": "array", "maxItems": 0}, ["[]"], ["[1]"]),
        ({"type": "array", "prefixItems": [INTEGER, {}]}, ['[1,"a"]', "[1,[2]]"], ["[1]", '["a",1]']),
        ({"type": "array", "items": {}}, ["[]", "[null,1]", '[{"a":1}]'], ["[", "nul"]),
        ({"anyOf": [INTEGER, NULL]}, ["1", "null"], ["1null", '"a"']),
        ({"allOf": [INTEGER]}, ["1"], ["a"]),
        ({"properties": {"a": {}, "b": NULL}, "required": ["b"]}, ['{"a":1,"b":null}'], ['{"a":1}', '{"a":true', "null"]),
        ({"properties": {"a": INTEGER, "b": NULL}}, ["{}", '{"b":null}', '{"a":1}'], ['{"b":null,"a":1}']),
        ({"type": "object", "properties": {'a"b\\': INTEGER}, "required": ['a"b\\']}, [r'{"a\"b\\":1}'], ['{"a"b":1}']),
        ({"type": "object", "additionalProperties": False}, ["{}"], ['{"a":1}']),
        ({"type": "object", "additionalProperties": {}}, ['{"a":[1]}', "{}"], ['{"a":true', "{1:2}"]),
        ({"type": "object", "additionalProperties": NULL}, ['{"a":null,"b":null}'], ['{"a":1}']),
        ({"$ref": "#/$defs/a~1b", "$defs": {"a/b": NULL}, "title": "T"}, ["null"], ["1"]),
        ({"type": "array", "uniqueItems": False, "items": NULL}, ["[null]"], []),
        ({}, ["1", "null", '"a"', "[]", '{"a":[1,{}]}'], ["", "nul", "tru"]),
        (True, ["1"], ["x"]),
    ],
)  # fmt: skip
def test_what_matches_and_what_does_not(schema, valid, invalid, tmp_path):
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    for automaton in [automaton_of({}, path=str(path)), *([automaton_of(schema)] if isinstance(schema, dict) else [])]:
        assert [text for text in valid if not accepts(automaton, text)] == []
        assert [text for text in invalid if accepts(automaton, text)] == []


def chain(levels: int) -> dict:
    """References through many levels that are no recursion, which outlines-core takes for one."""
    steps = {f"l{i}": {"type": "array", "items": {"$ref": f"#/$defs/l{i + 1}"}} for i in range(levels)}
    return {"$ref": "#/$defs/l0", "$defs": {**steps, f"l{levels}": INTEGER}}


def test_references_through_many_levels():
    automaton = automaton_of(chain(6))
    assert accepts(automaton, "[[[[[[1]]]]]]") and not accepts(automaton, "[[[[1]]]]")


@pytest.mark.parametrize(
    ("schema", "wanted"),
    [
        # Ignored by outlines-core.
        ({"type": "integer", "minimum": 3}, "here.schema: got minimum, which is not supported: leave it out"),
        ({"type": "number", "multipleOf": 2, "exclusiveMaximum": 3}, "here.schema: got multipleOf, exclusiveMaximum, which"),
        ({"type": "array", "items": INTEGER, "uniqueItems": True}, "got uniqueItems"),
        ({"type": "array", "contains": INTEGER}, "got contains"),
        ({"type": "object", "patternProperties": {"a": INTEGER}}, "got patternProperties"),
        ({"type": "object", "minProperties": 1}, "got minProperties"),
        ({"type": "string", "not": {"const": "a"}}, "got not"),
        ({"if": INTEGER, "then": NULL}, "got if, then"),
        ({"type": "string", "pattern": "a", "maxLength": 3}, "want lengths, a pattern or a format, one of them"),
        ({"type": "string", "format": "date", "minLength": 3}, "want lengths, a pattern or a format"),
        ({"type": "integer", "anyOf": [INTEGER]}, "got anyOf beside type, want one of them alone"),
        ({"$ref": "#/$defs/x", "$defs": {"x": INTEGER}, "type": "null"}, "got $ref beside type"),
        ({"type": "object", "properties": {"a": INTEGER}, "required": ["z"]}, 'here.schema.required: got ["z"]'),
        ({"type": "string", "enum": ["a", 1]}, "got the value 1, want values of type string"),
        ({"type": "integer", "const": "a"}, 'got the value "a"'),
        ({"enum": ["a"], "maxLength": 3}, "got maxLength beside values"),
        ({"type": "array", "prefixItems": [INTEGER], "minItems": 2}, "got prefixItems of 1 schemas"),
        ({"type": "string", "minLength": -1}, "here.schema.minLength: got -1, want a whole number"),
        ({"type": "array", "items": INTEGER, "maxItems": True}, "here.schema.maxItems: got true"),
        ({"type": "integer", "maxLength": 2}, "got maxLength, which says nothing of integer"),
        # Made into something else by outlines-core.
        ({"allOf": [INTEGER, NULL]}, "here.schema.allOf: want one schema that says all"),
        ({"oneOf": [INTEGER, {"type": "number"}]}, "got oneOf, which is not supported: want anyOf"),
        ({"type": "string", "pattern": "[^a]*"}, "here.schema.pattern: it matches '\\x00'"),
        ({"type": "string", "pattern": 'say "'}, "it matches '\"'"),
        ({"enum": []}, "want enum, a list of values"),
        ({"type": []}, "got type [], want a type"),
        ({"type": "array", "items": INTEGER, "minItems": 3, "maxItems": 2}, "got minItems 3 above maxItems 2"),
        # Wrong.
        ({"type": "foo"}, 'got type "foo", want a type: one or a list of string, '),
        ({"minLength": 3}, "got minLength and no type"),
        ({"type": "string", "pattern": "("}, "here.schema.pattern: got '('"),
        ({"type": "string", "format": "hostname"}, 'here.schema.format: got "hostname", want one of date, '),
        ({"type": "object", "properties": {"a": 3}}, "here.schema.a: got 3, want a schema"),
        ({"$ref": "#/$defs/nope"}, 'here.schema.$ref: got "#/$defs/nope", want a part of this schema'),
        ({"$ref": "https://example.org/s"}, "want a part of this schema"),
        ({"type": "array", "items": {"$ref": "#"}}, "got # inside itself, want levels that are written out"),
        ({"enum": [datetime.date(2020, 1, 1)]}, "want values that JSON has (a date needs quotes)"),
        ({"enum": [float("nan")]}, "want values that JSON has"),
    ],
)  # fmt: skip
def test_what_no_grammar_says_is_refused(schema, wanted):
    with pytest.raises(UserError) as refused:
        to_regex(JsonSchemaControl(schema=schema), "here")
    assert wanted in str(refused.value) and str(refused.value).startswith("here.schema")


def test_all_problems_at_once():
    schema = {"properties": {"a": {"type": "integer", "minimum": 1}, "b": {"items": {"type": "text"}, "type": "array"}}}
    with pytest.raises(UserError) as refused:
        to_regex(JsonSchemaControl(schema=schema), "here")
    assert [line.split(": ")[0] for line in str(refused.value).splitlines()] == ["here.schema.a", "here.schema.b.items"]


def test_white_space():
    automaton = automaton_of({"type": "array", "items": INTEGER}, whitespace=r"|\n")
    assert accepts(automaton, "[\n1,\n2\n]") and accepts(automaton, "[1,2]") and not accepts(automaton, "[ 1]")
    with pytest.raises(UserError, match=r"here.whitespace: got '\[x \]\*': it matches 'x'"):
        automaton_of(INTEGER, whitespace="[x ]*")


def test_files(tmp_path):
    path = tmp_path / "schema.json"
    for text, wanted in ((None, "No such file"), ("{", "Expecting property name"), (b"\xff", "codec can't decode")):
        if text is not None:
            path.write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(UserError, match=f"^here.path: .*schema.json: .*{wanted}"):
            to_regex(JsonSchemaControl(path=str(path)), "here")
    path.write_text('{"type": "integer", "minimum": 1}')
    with pytest.raises(UserError, match=r"schema\.json: got minimum"):
        to_regex(JsonSchemaControl(path=str(path)), "here")
    with pytest.raises(UserError, match="here: got schema and path, want one of them"):
        to_regex(JsonSchemaControl(schema=INTEGER, path=str(path)), "here")


def is_valid(value: Any, schema: dict) -> bool:
    """An independent check, of the keywords that the schemas below have; patterns are searched for, as JSON schema says."""
    if "anyOf" in schema:
        return any(is_valid(value, part) for part in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    kind = schema.get("type")
    types = {
        "string": str,
        "array": list,
        "object": dict,
        "integer": int,
        "number": int | float,
        "boolean": bool,
        "null": type(None),
    }
    if kind and (not isinstance(value, types[kind]) or (isinstance(value, bool) and kind != "boolean")):
        return False
    if kind == "string":
        checks = {
            "date": datetime.date.fromisoformat,
            "date-time": datetime.datetime.fromisoformat,
            "time": datetime.time.fromisoformat,
        }
        try:
            checks.get(schema.get("format"), str)(value)
        except ValueError:
            return False
        in_bounds = schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return in_bounds and bool(re.search(schema.get("pattern", ""), value))
    if kind == "array":
        in_bounds = schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))
        return in_bounds and all(is_valid(item, schema.get("items", {})) for item in value)
    if kind == "object":
        known = schema.get("properties", {})
        return set(schema.get("required", [])) <= set(value) and all(
            is_valid(part, known.get(name, schema.get("additionalProperties", {}))) for name, part in value.items()
        )
    return True


def random_text(automaton: ByteAutomaton, rng: random.Random, most: int) -> str:
    """A random text, which takes the shortest way to its end after `most` bytes."""
    left = distances(automaton.next, automaton.accepts)
    state, text = automaton.start, bytearray()
    while not (
        automaton.accepts[state] and (len(text) >= most or rng.random() < 0.2 or (automaton.next[state] < 0).all())
    ):
        ways = [b for b in range(256) if (to := automaton.next[state, b]) >= 0 and left[to] < ENDLESS]
        if len(text) >= most:
            ways = [b for b in ways if left[automaton.next[state, b]] < left[state]]
        # Most bytes of a text would else be parts of long characters.
        byte = rng.choice([b for b in ways if b < 128] or ways) if rng.random() < 0.8 else rng.choice(ways)
        state = automaton.next[state, byte]
        text.append(byte)
    return text.decode()


FORMATS = ("date", "time", "date-time", "email", "ipv4", "uri", "uuid")


def random_schema(rng: random.Random, depth: int) -> dict:
    if rng.random() < 0.35 and depth:
        names = rng.sample(["a", "b c", 'q"', "é", "x\\y"], rng.randint(0, 3))
        parts = {name: random_schema(rng, depth - 1) for name in names}
        return rng.choice(
            [
                {"type": "object", "properties": parts, "required": [name for name in names if rng.random() < 0.5]},
                {"type": "array", "items": random_schema(rng, depth - 1), "minItems": 1, "maxItems": 3},
                {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]},
                {"type": "object", "additionalProperties": random_schema(rng, depth - 1)},
            ]
        )
    return rng.choice(
        [
            {"type": rng.choice(["integer", "number", "boolean", "null", "string"])},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": rng.choice(["^x|y$", "[a-f]{2,4}", "^(no|yes)$", r"^\$[0-9]+$"])},
            {"type": "string", "format": rng.choice(FORMATS)},
            {"enum": rng.sample(["a", 'b"', 1, None, 2.5, [1, "x"], {"k": "\n"}, "\\"], 3)},
        ]
    )


@pytest.mark.parametrize("seed", range(5))
def test_random_texts_of_random_schemas_are_valid(seed):
    rng = random.Random(seed)
    for _ in range(8):
        schema = random_schema(rng, 2)
        automaton = automaton_of(schema)
        for _ in range(10):
            text = random_text(automaton, rng, rng.choice([5, 40]))
            assert is_valid(json.loads(text), schema), (schema, text)


def test_the_mutant_that_hands_the_schema_to_outlines_core_as_it_is():
    """What this module is there for: expressions of outlines-core that match what is not JSON, or not valid."""
    wrong = [
        ({"type": "string", "pattern": "a|b"}, '"a'),
        ({"type": "string", "format": "time"}, r'"23:59:59\x5"'),
        ({"type": "string", "format": "email"}, '""a"@b.org"'),
        ({"type": "object", "properties": {'a"b': INTEGER}, "required": ['a"b']}, '{"a"b":1}'),
        ({"type": "object", "properties": {"a": {}}, "required": ["a"]}, "null"),
        ({"type": "integer", "minimum": 3}, "1"),
        ({"allOf": [INTEGER, NULL]}, "1null"),
    ]
    for schema, text in wrong:
        assert accepts(regex.from_regex(build_regex_from_schema(json.dumps(schema)), "here"), text), schema
