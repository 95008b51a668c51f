"""Scripts outside the package, which no test runs: the names that they import exist. Nothing is imported here."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OWN = ("jaxrl_llm", "benchmarks", "experiments")
SCRIPTS = sorted(
    [*ROOT.glob("docs/experiments/*.py"), *ROOT.glob("benchmarks/**/*.py"), *ROOT.glob("experiments/*.py")]
)


def names_in(module: str) -> set[str]:
    """Names that a module defines or imports at its top, and the modules of a package; empty if there is no such module."""
    path = ROOT.joinpath(*module.split("."))
    found = {p.stem for p in path.glob("*.py")} | {p.name for p in path.glob("*/")}
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    for node in ast.parse(source.read_text()).body if source.exists() else []:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
        else:
            found |= {n.id for n in ast.walk(node) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    return found


def missing(source: str) -> list[str]:
    """Missing names among the imports from OWN packages, at the top or in a function."""
    return [
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in OWN
        for alias in node.names
        if alias.name not in names_in(node.module)
    ]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_the_imports_of_a_script_exist(path):
    assert missing(path.read_text()) == []


def test_the_checker_finds_a_missing_name():
    assert missing("def f():\n    from jaxrl_llm.roles.build import make_learner, gone") == [
        "jaxrl_llm.roles.build.gone"
    ]
    assert missing("from experiments.arithmetic import Arm, gone") == ["experiments.arithmetic.gone"]
    assert missing("from jaxrl_llm.gone import make_learner") == ["jaxrl_llm.gone.make_learner"]
