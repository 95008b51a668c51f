"""Dependencies: each is imported, each is pinned, and a missing optional one is named with its extra."""

import ast
import importlib.util
import re
import sys
import tomllib
from pathlib import Path

import pytest

from jaxrl_llm.config.loading import validate
from jaxrl_llm.environments import grader
from jaxrl_llm.errors import UserError
from jaxrl_llm.plan import command
from jaxrl_llm.tasks import reasoning_gym, records
from jaxrl_llm.tasks.config import ReasoningGymTask

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Packages whose module has another name.
MODULES = {"orbax-checkpoint": "orbax", "pyyaml": "yaml", "tensorboardx": "tensorboardX"}
# Packages that no Python file imports, and what runs them.
TOOLS = {
    "ruff": "make lint",
    "pytest-xdist": "pytest -n",
    "pytest-timeout": "`timeout` in pyproject.toml",
    "sphinx": "make docs",
    "myst-parser": "an extension in docs/conf.py",
    "furo": "the theme in docs/conf.py",
    "jax-cuda12-plugin": "a plugin of jax, which looks for it",
    "nvidia-cuda-nvcc-cu12": "XLA's GPU compiler",
}


def names(requirements: list[str]) -> set[str]:
    return {re.match(r"[A-Za-z0-9._-]+", line)[0].lower() for line in requirements} - {"jaxrl-llm"}


def imported() -> set[str]:
    """Top-level modules that the package, its tests, benchmarks and experiments import."""
    found = set()
    for folder in ("jaxrl_llm", "tests", "benchmarks", "experiments", "docs"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.Import):
                    found |= {alias.name.split(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    found.add(node.module.split(".")[0])
    return found


def test_every_dependency_is_imported():
    """Extras included. An extra of another package (`jax[tpu]`) is a plugin of that package."""
    extras = PROJECT["optional-dependencies"]
    wanted = names(PROJECT["dependencies"]).union(*map(names, extras.values()))
    modules = imported()
    unused = {name for name in wanted if MODULES.get(name, name.replace("-", "_")) not in modules}
    assert unused == set(TOOLS)
    assert {"starlette", "uvicorn", "tokamax", "tyro"}.isdisjoint(wanted) and all(extras.values())


def test_every_dependency_is_pinned():
    """Except plugins of accelerators, whose versions follow jax."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = names(PROJECT["dependencies"]).union(*map(names, PROJECT["optional-dependencies"].values()))
    assert wanted <= pinned


def test_the_quickstart_installs_the_extras_of_its_page():
    makefile = (ROOT / "Makefile").read_text()
    stamp = re.search(r"^quickstart: (\S+)", makefile, re.M)[1]
    recipe = makefile[makefile.index(f"\n{stamp}: ") :].split("\n\n")[0]
    assert "-e '.[track]'" in recipe and names(PROJECT["optional-dependencies"]["track"]) == {"tensorboardx", "wandb"}
    assert "`tensorboard/`" in (ROOT / "docs/quickstart.md").read_text()


def read_parquet(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    records.read(tmp_path / "a.parquet", "train")


def read_saved(tmp_path):
    (tmp_path / "saved").mkdir()
    records.read(tmp_path / "saved", "train")


def draw(tmp_path):
    reasoning_gym.generate(ReasoningGymTask("chain_sum"), 1, (0, 0))


def plan(tmp_path):
    command.prepare(command.Target(topology="v5e:4x4"))


def grade(name):
    def check(tmp_path):
        raise UserError("\n".join(grader.problems(validate({"reward": name}, "test").reward)))

    return check


@pytest.mark.parametrize(
    "missing, extra, use",
    [
        ("pyarrow", "data", read_parquet),
        ("datasets", "data", read_saved),
        ("reasoning_gym", "tasks", draw),
        ("reasoning_gym", "tasks", grade("reasoning_gym")),
        ("mpmath", "tasks", grade("math")),
        ("libtpu", "tpu", plan),
    ],
)
def test_a_missing_optional_package_is_named_with_its_extra(tmp_path, monkeypatch, missing, extra, use):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *more: None if name == missing else found(name, *more)
    )
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(UserError) as error:
        use(tmp_path)
    message = str(error.value)
    assert missing.replace("_", "-") in message.replace("_", "-")
    assert f"pip install 'jaxrl-llm[{extra}]'" in message
