"""The rules of the architecture: who may import whom, what never imports jax, how long a file and a function may be, how many
parameters a function may have."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAME = "jaxrl_llm"
PACKAGE = ROOT / NAME

STAGES = {"tasks", "rollout", "environments", "experience", "objective", "update"}
FOUNDATION = {"types", "errors", "parallel"}
# What a package may import beside itself and any `config.py`: other packages, or single modules of them as "package.module". A file
# at the top is a package of its own here.
ALLOWED = {
    # Nothing is imported there but for type checkers: the public names are resolved when they are first used.
    "__init__": FOUNDATION | STAGES | {"config", "control", "distribution", "metrics.estimates", "roles", "train"},
    "errors": set(),
    "types": {"errors"},
    "parallel": {"errors", "types"},
    "model": FOUNDATION,
    "control": {"errors", "config.options"},
    "distribution": FOUNDATION | {"model", "control"},
    "perf": FOUNDATION | {"model"},
    "tasks": {"errors", "types", "config.options"},
    "rollout": FOUNDATION | {"config.options", "config.user_code", "control", "distribution", "model", "perf.work"},
    "environments": {"errors", "config.error_messages", "config.options", "config.user_code", "metrics.terminal"},
    "experience": {"errors", "types", "config.own_part", "config.user_code"},
    "objective": {
        "errors",
        "types",
        "distribution",
        *(f"config.{name}" for name in ("flags", "options", "own_part", "user_code")),
    },
    "update": FOUNDATION | {"distribution", "model", "config.own_part"},
    "config": {"errors", "checkpoint.run_directory", "metrics.recorder", "objective.presets", "objective.rules"},
    "metrics": {"errors"},
    "checkpoint": FOUNDATION,
    "roles": FOUNDATION
    | STAGES
    | {"config", "control", "distribution", "model", "perf", "metrics.estimates", "metrics.guards"},
    "run_context": {"types", "errors", "checkpoint", "environments", "metrics", "roles.state", "tasks"},
    "plan": FOUNDATION | STAGES | {"config", "distribution", "metrics.console", "model", "perf", "roles"},
    "train": FOUNDATION | STAGES | {"checkpoint", "config", "metrics", "roles", "run_context"},
    "commands": FOUNDATION | STAGES | {"config", "control", "metrics", "model", "roles", "run_context"},
    "cli": {"checkpoint", "commands", "config", "errors", "metrics", "parallel", "plan", "roles", "train"},
}
# Who may see a whole run's config.
SEE_RUN_CONFIG = {"roles", "train", "commands", "plan", "config", "cli", "__init__"}
NEVER = {"configs", "tests", "benchmarks", "experiments", "examples", "launch", "docs"}
VAGUE = {"utils", "util", "common", "core", "helpers", "helper", "manager", "misc"}
HEAVY = {"jax", "jaxlib", "flax", "optax", "orbax", "grain", "chex"}
MAX_FILE, MAX_FUNCTION, MAX_TRAIN, MAX_PARAMETERS, MAX_TOP = 400, 60, 30, 7, 6


def files(package: Path) -> list[Path]:
    return sorted(package.rglob("*.py"))


def module_of(package: Path, path: Path) -> str:
    return ".".join(path.relative_to(package.parent).with_suffix("").parts).removesuffix(".__init__")


def imports(package: Path, path: Path, top_level_only: bool = False) -> set[str]:
    """Absolute names of all that a file imports, `from a import b` as a.b."""
    found: set[str] = set()
    base = path.relative_to(package.parent).parts[:-1]
    for node in _nodes(ast.parse(path.read_text()), top_level_only):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = [*base[: len(base) - node.level + 1]] if node.level else []
            origin = ".".join([*start, *([node.module] if node.module else [])])
            found |= {f"{origin}.{alias.name}" for alias in node.names}
    return found


def _nodes(tree: ast.AST, top_level_only: bool):
    """All nodes; or those that run at import: no bodies of functions, nothing under TYPE_CHECKING."""
    for node in ast.iter_child_nodes(tree):
        late = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if top_level_only and (late or typing):
            continue
        yield node
        yield from _nodes(node, top_level_only)


def packages_of(package: Path, path: Path) -> set[str]:
    """Modules "package" or "package.module" that a file imports, outside its own package; a config.py is open to all."""
    found = set()
    for name in imports(package, path):
        parts = name.split(".")
        if parts[0] == package.name and len(parts) > 1 and "config" not in parts[2:]:
            found.add(".".join(parts[1:3]) if (package / parts[1]).is_dir() else parts[1])
    own = path.relative_to(package).parts[0].removesuffix(".py")
    return {name for name in found if name.split(".")[0] != own}


def violations(package: Path) -> list[str]:
    found = []
    for path in files(package):
        where, own = path.relative_to(package), path.relative_to(package).parts[0].removesuffix(".py")
        if own not in ALLOWED:
            found.append(f"{where}: no rule for the package {own}")
            continue
        refused = {name for name in packages_of(package, path) if not {name, name.split(".")[0]} & ALLOWED[own]}
        found += [f"{where}: {own} may not import {other}" for other in sorted(refused)]
        outside = {name.split(".")[0] for name in imports(package, path)} & NEVER
        found += [f"{where}: the package never imports {name}" for name in sorted(outside)]
        found += [f"{where}: {part} is too vague a name" for part in where.with_suffix("").parts if part in VAGUE]
    return found


def who_sees_run_config(package: Path) -> list[str]:
    """Files that name RunConfig and may not: in code, not in comments or docstrings."""
    found = []
    for path in files(package):
        names = {node.id for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Name)}
        names |= {name.rsplit(".", 1)[-1] for name in imports(package, path)}
        where = path.relative_to(package)
        if "RunConfig" in names and where.parts[0].removesuffix(".py") not in SEE_RUN_CONFIG:
            found.append(str(where))
    return found


def shared_class_names(package: Path) -> dict[str, list[str]]:
    """Public class names that several files define."""
    found: dict[str, list[str]] = {}
    for path in files(package):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(package)))
    return {name: where for name, where in found.items() if len(where) > 1}


def too_long(package: Path) -> list[str]:
    found = []
    for path in files(package):
        text, where = path.read_text(), path.relative_to(package)
        if (lines := len(text.splitlines())) > MAX_FILE:
            found.append(f"{where}: {lines} lines > {MAX_FILE}")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                most = MAX_TRAIN if (str(where), node.name) == ("train.py", "train") else MAX_FUNCTION
                if (lines := node.end_lineno - node.lineno + 1) > most:
                    found.append(f"{where}: {node.name} has {lines} lines > {most}")
    return found


def too_many_parameters(package: Path) -> list[str]:
    found = []
    for path in files(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (n := _parameters(node)) > MAX_PARAMETERS:
                found.append(f"{path.relative_to(package)}: {node.name} has {n} parameters > {MAX_PARAMETERS}")
    return found


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Without self and cls; *args and **kwargs are one each."""
    given = [*node.args.posonlyargs, *node.args.args]
    own = bool(given) and given[0].arg in ("self", "cls")
    stars = [x for x in (node.args.vararg, node.args.kwarg) if x is not None]
    return len(given) - own + len(node.args.kwonlyargs) + len(stars)


def heavy_at_import(package: Path, start: Path) -> list[str]:
    """Ways from a file, through the package, to a heavy library, taken when it is imported."""
    by_module = {module_of(package, path): path for path in files(package)}
    found, seen, todo = [], set(), [(start, [])]
    while todo:
        path, way = todo.pop()
        if path in seen:
            continue
        seen.add(path)
        way = [*way, str(path.relative_to(package))]
        for name in imports(package, path, top_level_only=True):
            if name.split(".")[0] in HEAVY:
                found.append(" -> ".join([*way, name]))
            parents = [".".join(name.split(".")[:i]) for i in range(1, name.count(".") + 2)]
            todo += [(by_module[parent], way) for parent in parents if parent in by_module]
    return found


LIGHT = [
    PACKAGE / "cli.py",
    *sorted(PACKAGE.glob("config/*.py")),
    PACKAGE / "roles" / "inputs.py",
    *sorted(PACKAGE.glob("*/**/config.py")),
    *sorted(path for path in PACKAGE.glob("environments/**/*.py") if path.name != "config.py"),
]


def test_packages_import_only_what_they_may():
    assert violations(PACKAGE) == []


def test_files_and_functions_stay_short():
    assert too_long(PACKAGE) == []


def test_the_top_of_the_package_is_a_handful_of_files():
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_TOP


def test_only_those_who_build_a_run_see_its_whole_config():
    assert who_sees_run_config(PACKAGE) == []


def test_public_class_names_are_unique():
    assert shared_class_names(PACKAGE) == {}


def test_functions_take_few_parameters():
    assert too_many_parameters(PACKAGE) == []


def test_experiments_keep_the_limits():
    assert too_long(ROOT / "experiments") == [] and too_many_parameters(ROOT / "experiments") == []


@pytest.mark.parametrize("path", LIGHT, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_config_command_line_and_graders_load_without_jax(path):
    assert path.exists() and heavy_at_import(PACKAGE, path) == []


def test_light_modules_load_without_jax_when_imported():
    modules = ", ".join(module_of(PACKAGE, path) for path in [*LIGHT, *PACKAGE.glob("*/__init__.py")])
    code = f"import sys, {modules}; print(sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


def test_every_rule_is_about_a_package_that_exists():
    there = {path for path in PACKAGE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()}
    assert {path.name.removesuffix(".py") for path in there} == set(ALLOWED)


def test_no_rule_allows_an_unused_import():
    """A right that no file uses would let a wrong import pass unseen. Foundations and stages are open to those above them."""
    used: dict[str, set[str]] = {}
    for path in files(PACKAGE):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        used.setdefault(own, set()).update(x for name in packages_of(PACKAGE, path) for x in (name, name.split(".")[0]))
    unused = {own: others - used[own] - FOUNDATION - STAGES for own, others in ALLOWED.items()}
    assert {own: others for own, others in unused.items() if others} == {}


def test_every_package_holds_code():
    assert [
        str(where.relative_to(PACKAGE))
        for where in PACKAGE.rglob("*")
        if where.is_dir() and where.name != "__pycache__" and {p.name for p in where.glob("*.py")} <= {"__init__.py"}
    ] == []


def test_the_table_follows_the_design():
    for stage in STAGES:
        assert not {name.split(".")[0] for name in ALLOWED[stage]} & (STAGES - {stage})
        assert ("distribution" in ALLOWED[stage]) == (stage in {"rollout", "objective", "update"})
    assert "checkpoint" not in ALLOWED["roles"]
    for top in ("train", "commands", "plan"):
        above = [own for own, others in ALLOWED.items() if top in {name.split(".")[0] for name in others}]
        assert above == (["__init__", "cli"] if top == "train" else ["cli"])
    assert not any("cli" in others for others in ALLOWED.values())


def test_tests_mirror_the_package():
    """A folder of tests has the name of a package."""
    extra = {"golden", "aot", "gpu", "peers", "__pycache__"}
    assert {path.name for path in (ROOT / "tests").iterdir() if path.is_dir()} - extra <= set(ALLOWED)


FAKE = {
    "tasks/a.py": ("from jaxrl_llm.environments.grader_pool import Pool", "tasks may not import environments"),
    "rollout/a.py": ("from ..update import step", "rollout may not import update"),
    "perf/a.py": ("from experiments import arithmetic", "the package never imports experiments"),
    "model/a.py": ("def f():\n    import jaxrl_llm.rollout.decode", "model may not import rollout"),
    "experience/a.py": ("from jaxrl_llm import train", "experience may not import train"),
    "update/a.py": ("from tests import setups", "the package never imports tests"),
    "utils.py": ("", "no rule for the package utils"),
    "environments/helpers.py": ("", "helpers is too vague a name"),
}


@pytest.mark.parametrize("where", FAKE)
def test_the_checker_sees_a_wrong_import(where, tmp_path):
    source, message = FAKE[where]
    path = tmp_path / NAME / where
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    assert violations(tmp_path / NAME) == [f"{where}: {message}"]
    # A package may import itself and another's config.
    path.unlink()
    good = tmp_path / NAME / "rollout" / "b.py"
    good.parent.mkdir(exist_ok=True)
    good.write_text(
        "from jaxrl_llm.rollout.a import x\nfrom jaxrl_llm.update.config import UpdateConfig\nfrom .a import y\n"
    )
    assert violations(tmp_path / NAME) == []


def test_the_checker_sees_what_is_too_long(tmp_path):
    package = tmp_path / NAME
    package.mkdir()
    (package / "train.py").write_text("def train():\n" + "    x = 1\n" * 30 + "def f():\n" + "    x = 1\n" * 60)
    (package / "config.py").write_text("x = 1\n" * 401)
    assert too_long(package) == [
        "config.py: 401 lines > 400", "train.py: train has 31 lines > 30", "train.py: f has 61 lines > 60",
    ]  # fmt: skip


def test_the_checker_sees_too_many_parameters(tmp_path):
    """Parameters of each kind; of functions, methods and functions inside others."""
    package = tmp_path / NAME
    package.mkdir()
    (package / "config.py").write_text(
        "def f(a, b, c, d, e, f, g): ...\n"
        "def g(a, /, b, c, d, *args, e, f, **kwargs): ...\n"
        "class C:\n"
        "    def h(self, a, b, c, d, e, f, g): ...\n"
        "    @classmethod\n"
        "    def i(cls, a, b, c, d, e, f, g): ...\n"
        "    async def j(self, a, b, c, d, e, f, g, *, h):\n"
        "        def k(a, b, c, d, e, f, g, self): ...\n"
    )
    assert too_many_parameters(package) == [f"config.py: {name} has 8 parameters > 7" for name in "gjk"]


def test_the_checker_sees_a_way_to_jax(tmp_path):
    package = tmp_path / NAME
    package.mkdir()
    (package / "cli.py").write_text("from jaxrl_llm.metrics.recorder import x\ndef f():\n    import jax\n")
    (package / "metrics.py").write_text("import jax.numpy as jnp\n")
    assert heavy_at_import(package, package / "cli.py") == ["cli.py -> metrics.py -> jax.numpy"]
    (package / "metrics.py").write_text("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import jax\n")
    assert heavy_at_import(package, package / "cli.py") == []


def test_the_checker_sees_who_may_not_see_the_whole_config(tmp_path):
    package = tmp_path / NAME
    for where in ("roles", "update"):
        (package / where).mkdir(parents=True)
        (package / where / "a.py").write_text("from jaxrl_llm.config.run_config import RunConfig\n")
    (package / "rollout").mkdir()
    (package / "rollout" / "a.py").write_text('def f(cfg: RunConfig):\n    """A RunConfig."""\n')
    (package / "rollout" / "b.py").write_text('"""A RunConfig."""\n')
    assert who_sees_run_config(package) == ["rollout/a.py", "update/a.py"]


def test_the_checker_sees_a_class_name_that_two_files_have(tmp_path):
    package = tmp_path / NAME
    package.mkdir()
    (package / "a.py").write_text("class Same: ...\nclass _Own: ...\nclass A: ...\n")
    (package / "b.py").write_text("class Same: ...\nclass _Own: ...\ndef f():\n    class A: ...\n")
    assert shared_class_names(package) == {"Same": ["a.py", "b.py"]}
