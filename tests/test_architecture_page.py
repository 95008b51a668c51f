"""docs/architecture.md: the tables of one sample are what the script prints today, and every package is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")


CODE = "import life_of_a_sample as it; print(it.BEGIN, it.life(), it.END, sep='\\n')"


def printed() -> str:
    """Output of the script, on one device."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "1",
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "docs" / "experiments"))),
    }
    done = subprocess.run([sys.executable, "-c", CODE], env=env, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(text: str) -> str:
    return text.partition("<!-- life of a sample: begin -->")[2].partition("<!-- life of a sample: end -->")[0]


def is_fraction(word: str) -> bool:
    return word.strip("-`").replace(".", "", 1).isdigit() and "." in word


def differences(page: str, now: str) -> list[tuple[str, str]]:
    """Words that differ. Fractions may differ by rounding between processors: an entropy of 1 nat by 1e-3."""
    old, new = page.split(), now.split()
    assert len(old) == len(new)
    return [
        (a, b)
        for a, b in zip(old, new, strict=True)
        if a != b and not (is_fraction(a) and is_fraction(b) and abs(float(a.strip("`")) - float(b.strip("`"))) <= 2e-3)
    ]


@pytest.mark.soak
def test_the_tables_are_what_the_script_prints():
    shown = tables(PAGE)
    assert "behavior_logprobs" in shown and differences(shown, tables(printed())) == []


def test_the_comparison_sees_another_token_and_another_number():
    assert differences("`2 5` 0.1000", "`2 5` 0.1010") == []
    assert differences("`2 5` 0.1000", "`2 6` 0.1100") == [("5`", "6`"), ("0.1000", "0.1100")]


def test_every_package_and_every_file_at_the_top_is_on_the_page():
    package = ROOT / "jaxrl_llm"
    names = [f"`{path.name}/`" for path in package.iterdir() if (path / "__init__.py").exists()]
    names += [f"`{path.name}`" for path in package.glob("*.py")]
    assert [name for name in names if name not in PAGE] == []
