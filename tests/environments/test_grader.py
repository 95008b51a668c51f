"""Graders from a config: short forms, names, options, and all errors at once."""

import os
import subprocess
import sys
from pathlib import Path

import pydantic
import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import BUILT_IN, Sample, make_grader, problems, resolve, unreadable_rows
from jaxrl_llm.environments.graders.text import ExactMatch
from jaxrl_llm.errors import UserError

SAMPLE = Sample("<1+1>", "2#", "2#", "eos")


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parent)


def check(values):
    return pydantic.TypeAdapter(RewardConfig).validate_python(values)


def problems_of(*graders):
    return problems(check({"graders": list(graders)}))


def test_every_built_in_name_resolves():
    for name in BUILT_IN:
        assert isinstance(resolve(name), type)
    assert make_grader("exact_match") == make_grader("jaxrl_llm.environments.graders.text:ExactMatch") == ExactMatch()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("exact_mach", ["exact_mach", 'meant "exact_match"', '"module:function"']),
        ("zzz", ["zzz", "exact_match", "gsm8k", "reasoning_gym"]),
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


EXACT = GraderConfig("exact_match")
HALF = GraderConfig("format", 0.5, "form", {"pattern": "a"})


@pytest.mark.parametrize(
    ("values", "want"),
    [
        ({}, RewardConfig()),
        ("my.module:f", RewardConfig((GraderConfig("my.module:f"),))),
        ({"grader": "exact_match"}, RewardConfig((EXACT,))),
        ({"grader": "numeric", "workers": 3}, RewardConfig((GraderConfig("numeric"),), 3)),
        (
            {"grader": "format", "weight": 0.5, "name": "form", "options": {"pattern": "a"}, "deadline_s": 2},
            RewardConfig((HALF,), deadline_s=2.0),
        ),
        (
            {
                "graders": [
                    "exact_match",
                    {"grader": "format", "weight": 0.5, "name": "form", "options": {"pattern": "a"}},
                ]
            },
            RewardConfig((EXACT, HALF)),
        ),
    ],
)
def test_short_forms(values, want):
    assert check(values) == want
    assert check(want) == want


@pytest.mark.parametrize(
    "values",
    [
        {"workers": 0},
        {"deadline_s": 0},
        {"deadline_s": float("inf")},
        {"grader": ""},
        {"deadline": 1},
        {"graders": []},
        {"graders": [3]},
        {"graders": [{"grader": "numeric", "weight": float("nan")}]},
        {"graders": [{"grader": "numeric", "wieght": 1}]},
        {"graders": ["numeric"], "grader": "numeric"},
        7,
    ],
)
def test_config_refuses(values):
    with pytest.raises(pydantic.ValidationError):
        check(values)


def test_label_is_the_given_or_the_default_name():
    assert [g.label for g in check({"graders": ["gsm8k", "a.b:f", {"grader": "a.b:f", "name": "g"}]}).graders] == [
        "gsm8k",
        "f",
        "g",
    ]


def test_valid_options_have_no_problems():
    assert problems(RewardConfig()) == []
    assert (
        problems_of(
            {"grader": "numeric", "options": {"rel_tol": 0.01, "abs_tol": 1, "where": "only"}},
            {"grader": "length", "options": {"limit": 100, "soft": 20, "unit": "words"}},
            {"grader": "reasoning_gym", "options": {"config": {"max_terms": 3}}},
            {"grader": "bad_graders:WithOptions", "options": {"scale": 2}},
            {"grader": "bad_graders:scaled", "options": {"scale": 2}},
        )
        == []
    )


def test_all_errors_are_reported_at_once():
    found = problems_of(
        "exact_mach",
        {"grader": "numeric", "options": {"abs_tol": -1, "rel_tol": "0.1", "tolerance": 1, "where": "last"}},
        {"grader": "numeric", "name": "again", "options": {"where": "lats"}},
        {"grader": "regex", "options": {"pattern": "(a)(b)"}},
        {"grader": "format", "options": {"pattern": "(a"}},
        {"grader": "format", "name": "nothing"},
        {"grader": "length"},
        {"grader": "length", "name": "again", "options": {"limit": 10, "soft": 11}},
        {"grader": "multiple_choice", "options": {"letters": "abc"}},
        {"grader": "bad_graders:scaled"},
        {"grader": "bad_graders:scaled", "name": "more", "options": {"scale": 1, "sclae": 2}},
        {"grader": "bad_graders:WithOptions", "options": {"sclae": 2}},
        {"grader": "own_stages:NotCalled"},
    )
    want = [
        ("graders.0.grader:", 'meant "exact_match"'),
        (
            "graders.1.options.tolerance:",
            'grader "numeric" has no such option, want one of: after, finished, where, abs_tol',
        ),
        ("graders.1.options.abs_tol:", "got -1, want 0 or more"),
        ("graders.1.options.rel_tol:", "got '0.1', want a number"),
        ("graders.2.options.where:", "got 'lats', want 'last', 'first' or 'only'"),
        ("graders.3.options:", 'grader "regex": pattern: got 2 groups, want at most one'),
        ("graders.4.options:", "want a regular expression: missing )"),
        ("graders.5.options.pattern:", 'grader "format" needs this option'),
        ("graders.6.options:", "want exactly one of them"),
        ("graders.7.options:", "soft: got 11, want at most 10 (the limit)"),
        ("graders.7.name:", 'got "again" again'),
        ("graders.8.options:", "letters: got 'abc', want capital letters"),
        ("graders.9.options:", "argument: 'scale'"),
        ("graders.10.options:", "unexpected keyword argument 'sclae'"),
        ("graders.11.options:", '"bad_graders:WithOptions" takes (scale): missing a required argument'),
        ("graders.12.grader:", 'got "own_stages:NotCalled", which has no __call__; want a class whose objects have'),
    ]
    assert len(found) == len(want), "\n".join(found)
    for text, (where, words) in zip(found, want, strict=True):
        assert text.startswith(f"reward.{where}") and words in text, text


def test_an_unprintable_name_is_refused():
    named = GraderConfig("exact_match", name="\x1b[2J\ud800")
    assert problems(RewardConfig((named,))) == [
        r"reward.graders.0.name: got '\x1b[2J\ud800', want printable characters"
    ]


def test_a_missing_library_is_reported_before_training(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    [text] = problems_of("math")
    assert (
        text
        == """reward.graders.0.options: grader "math" needs mpmath, which is not installed: pip install 'jaxrl-llm[tasks]'"""
    )


def test_custom_functions_and_classes_take_options():
    assert make_grader("bad_graders:scaled", {"scale": 3})(SAMPLE) == 6.0
    assert make_grader("bad_graders:WithOptions", {"scale": 3})(SAMPLE) == 6.0


def test_a_custom_grader_may_refuse_rows():
    def refused(*answers, **options):
        config = RewardConfig(
            (GraderConfig("bad_graders:ChecksRows", name="mine", options=options), GraderConfig("exact_match"))
        )
        return unreadable_rows(config, [(f"rows:{i}", SAMPLE._replace(answer=a)) for i, a in enumerate(answers, 1)])

    assert refused("1", "2") == []
    first, last = refused("1", "two")
    assert first.startswith("rows:2 (") and first.endswith("""grader "mine": got 'two', want digits""")
    assert last.startswith('grader "mine" cannot grade 1 of 2 rows: fix or remove them')
    assert "KeyError: 'lost'" in refused("raise")[0] and "OSError: no license" in refused("1", fails=True)[0]


def test_graders_are_imported_from_the_working_directory(tmp_path):
    """As with an installed command, the directory of the program is on the path, and not the user's."""
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "main.py").write_text(
        "from jaxrl_llm.environments.config import GraderConfig, RewardConfig\n"
        "from jaxrl_llm.environments.grader import Sample\n"
        "from jaxrl_llm.environments.grader_pool import GraderPool\n"
        "with GraderPool(RewardConfig((GraderConfig('mine:f'),), workers=1)) as pool:\n"
        "    print(pool.grade([[Sample('', '7', '7', 'eos')]]).reward.tolist())\n"
    )
    (tmp_path / "mine.py").write_text("def f(sample): return 7")
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "program/main.py"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
    )
    assert (done.stdout, done.returncode) == ("[[7.0]]\n", 0), done.stderr


def test_the_package_does_not_import_jax():
    graders = (f"graders.{name}" for name in ("text", "numeric", "multiple_choice", "mathematics", "reasoning_gym"))
    modules = ", ".join(f"jaxrl_llm.environments.{name}" for name in ("grader_pool", "config", "worker", *graders))
    code = f"import sys, {modules}; print('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
