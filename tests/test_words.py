"""Private words of earlier versions, for which the field has terms, do not come back (CONTRIBUTING.md: In docstrings)."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
UNITS = (
    "chip|token|row|step|second|prompt|group|layer|device|update|head|slot|channel|batch|minute|chunk|process|core|response"
    "|run|sample|minibatch"
)
COUNTED = (
    "numbers?|tokens|rows|bytes|FLOPs?|seconds|samples|prompts|steps|updates|groups|memory|scales?|layers|GB|MB|keys|slots|times"
    "|programs|collectives|copies|epochs|responses"
)
WORDS = {
    "output buffer": r"\bharvest\w*",
    "masked": r"\bbarred\b",
    "active batch": r"\bin[ _]flight\b",
    "again": r"\banew\b",
    "reported, or told from": r"\btold\b(?! (apart|from)\b)",
    "continues, or resumes": r"\b(go|goes|going|went|gone) on\b",
    "is active": r"\blives\b",
    "package": r"\brooms\b|\bthe house\b",
    "attention windows": r"\breaches\(",
    "diagnostic": r"\bfor the eye\b",
    "bytes per chip": rf"\b({COUNTED}) an? ({UNITS})\b",
    "a docstring that begins with a noun": r'"""Of [a-z]',
}
# The table of renamed keys, its test and this file name old words.
EXEMPT = {"jaxrl_llm/config/renamed_keys.py", "tests/config/test_renamed_keys.py", "tests/test_words.py"}


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    if listed.returncode:
        pytest.skip("not a git checkout")
    read = re.compile(
        r"(README|CONTRIBUTING)\.md|(jaxrl_llm|tests|docs|configs|launch|benchmarks|experiments)/.*\.(py|md|yaml|j2)"
    )
    return [name for name in listed.stdout.split() if read.fullmatch(name) and name not in EXEMPT]


def found(text: str) -> list[tuple[int, str]]:
    return [
        (number, f"{match[0]!r}, want {better}")
        for number, line in enumerate(text.splitlines(), 1)
        for better, pattern in WORDS.items()
        for match in re.finditer(pattern, line)
    ]


def test_no_private_words():
    names = tracked()
    assert len(names) > 300
    assert [
        f"{name}:{number}: got {what}"
        for name in names
        for number, what in found((ROOT / name).read_text(encoding="utf-8"))
    ] == []


def test_the_search_finds_them_and_leaves_ordinary_words():
    text = '3 tokens a row, told\ntold apart from units, 3 tokens per row\n"""Of a run."""\nit goes on'
    assert [number for number, _ in found(text)] == [1, 1, 3, 4]
