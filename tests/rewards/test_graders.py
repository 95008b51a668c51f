import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from jaxrl_llm.errors import UserError
from jaxrl_llm.rewards.config import RewardConfig
from jaxrl_llm.rewards.graders import Sample, exact_match, resolve


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


@pytest.mark.parametrize(
    ("completion", "finish", "want"),
    [
        ("12#", "eos", 1.0),
        ("12", "length", 0.0),
        ("012#", "eos", 0.0),
        ("12##", "eos", 0.0),
        ("13#", "eos", 0.0),
        (" 12#", "eos", 0.0),
        ("12# ", "length", 0.0),
        ("", "length", 0.0),
    ],
)
def test_exact_match_reads_the_whole_response(completion, finish, want):
    assert exact_match(Sample("<3+4+5>", completion, "12#", finish)) == want


def test_resolve_finds_built_in_and_imported_graders():
    assert resolve("exact_match") is exact_match
    assert resolve("jaxrl_llm.rewards.graders:exact_match") is exact_match


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_mach", ["exact_mach", 'meant "exact_match"', '"module:function"']),
        ("zzz", ["zzz", "exact_match"]),
        ("no_such_package.graders:f", ["no_such_package", "PYTHONPATH"]),
        ("bad_graders:by_complection", ['meant "by_completion"']),
        ("bad_graders:", ['has no ""']),
        (":f", ["importing"]),
        (".relative:f", ["importing"]),
        ("bad_graders:NOT_A_FUNCTION", ["is a int"]),
        ("__main__:f", ["module of its own"]),
        ("exits_on_import:f", ["SystemExit"]),
        ("broken_on_import:f", ["SyntaxError"]),
    ],
)
def test_resolve_names_what_is_wrong(name, words, tmp_path, monkeypatch):
    (tmp_path / "exits_on_import.py").write_text("raise SystemExit(1)")
    (tmp_path / "broken_on_import.py").write_text("def f(:")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        resolve(name)
    for word in words:
        assert word in str(error.value)


def test_config_is_checked_by_pydantic():
    check = pydantic.TypeAdapter(RewardConfig).validate_python
    assert check({"workers": 3}) == RewardConfig("exact_match", 3, 10.0)
    for bad in ({"workers": 0}, {"deadline_s": 0}, {"deadline_s": float("inf")}, {"grader": ""}, {"deadline": 1}):
        with pytest.raises(pydantic.ValidationError):
            check(bad)


def test_the_room_does_not_import_jax():
    code = "import jaxrl_llm.rewards.pool, jaxrl_llm.rewards.config, sys; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
