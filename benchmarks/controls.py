"""`python -m benchmarks.controls [--tokens 150000] [--out FILE.json]`: grammars as automata over a vocabulary, their time and size.

Per grammar the seconds to build it from nothing and to read it from the cache, the states, the classes of tokens, and the bytes of
what a device holds: transitions as int16 and the class of each token as int16.

--tokens  in the vocabulary
--out     a JSON file for the numbers
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

from benchmarks.machine import machine
from benchmarks.vocabulary import texts
from jaxrl_llm.control.automaton import TokenAutomaton, TokenTexts
from jaxrl_llm.control.build import build
from jaxrl_llm.control.config import ChoiceControl, Control, JsonSchemaControl, RegexControl

WORD = {"type": "string", "maxLength": 64}
TOOL_CALL = {
    "type": "object",
    "properties": {
        "name": {"enum": ["search", "open_file", "calculator"]},
        "arguments": {
            "type": "object",
            "properties": {"query": WORD, "limit": {"type": "integer"}},
            "required": ["query", "limit"],
        },
    },
    "required": ["name", "arguments"],
}
NESTED = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 4},
        "home": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "size": {"type": "number"}, "owned": {"type": "boolean"}},
            "required": ["city"],
        },
    },
    "required": ["name", "age", "home"],
}
# Lists of lists of lists of numbers.
LISTS = {"type": "integer"}
for _ in range(3):
    LISTS = {"type": "array", "items": LISTS, "maxItems": 3}
GRAMMARS: dict[str, Control] = {
    "integer": RegexControl(pattern="-?(0|[1-9][0-9]*)"),
    "decimal": RegexControl(pattern=r"-?(0|[1-9][0-9]*)\.[0-9]{1,6}"),
    "date": RegexControl(pattern="[0-9]{4}-(0[1-9]|1[0-2])-(0[1-9]|[12][0-9]|3[01])"),
    "email": RegexControl(pattern=r"[a-z0-9_]+(\.[a-z0-9_]+)*@([a-z0-9]+(-[a-z0-9]+)*\.)+[a-z]{2,8}"),
    "nested": JsonSchemaControl(schema=NESTED),
    "enum": ChoiceControl(texts=("yes", "no", "not sure", "不知道", "yesterday")),
    "unicode": RegexControl(pattern='[^"<]{1,16}'),
    "lists": JsonSchemaControl(schema=LISTS),
    "think": RegexControl(pattern=r"<think>[^<]*</think>\n<answer>-?[0-9]{1,8}</answer>"),
    "tool_call": JsonSchemaControl(schema=TOOL_CALL),
    "answer_64": RegexControl(pattern="<answer>[^<]{1,64}</answer>"),
    "answer_512": RegexControl(pattern="<answer>[^<]{1,512}</answer>"),
    "any_json": JsonSchemaControl(),
}


def vocabulary(size: int) -> TokenTexts:
    """The synthetic texts, and an end token without a text."""
    return TokenTexts((*texts(size), None), (size,), lambda text: [], f"synthetic {size}")


def table_bytes(automaton: TokenAutomaton) -> int:
    return 2 * (automaton.next.size + automaton.classes.size)


def timed(control: Control, words: TokenTexts) -> tuple[float, TokenAutomaton]:
    begun = time.perf_counter()
    found = build(control, words)
    return time.perf_counter() - begun, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=150_000)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    found, before, words = {}, machine(), vocabulary(args.tokens)
    with tempfile.TemporaryDirectory() as directory:
        os.environ["XDG_CACHE_HOME"] = directory
        for name, control in GRAMMARS.items():
            (cold, automaton), (cached, _) = timed(control, words), timed(control, words)
            states, classes = automaton.next.shape
            found[name] = {
                "build_s": cold, "cached_s": cached, "states": states, "classes": classes, "bytes": table_bytes(automaton),
                "longest_distance": int(automaton.distance.max()),
            }  # fmt: skip
            print(
                f"{name:10} {states:5} states, {classes:4} classes, {table_bytes(automaton) / 1e6:.2f} MB; built in {cold:.2f} s, "
                f"from the cache in {cached:.3f} s"
            )
    if args.out:
        args.out.write_text(
            json.dumps(
                {"machine": before | {"load_after": os.getloadavg()[0]}, "tokens": args.tokens, "grammars": found},
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
