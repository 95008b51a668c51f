"""The roles stay apart, checked on their syntax: no value holds a whole run, a sampler needs no optimizer, `step` is short."""

import ast
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROLES, TRAIN = ROOT / "jaxrl_llm" / "roles", ROOT / "jaxrl_llm" / "train.py"
MAX_STEP, MAX_TRAIN = 20, 30
# The config may be passed everywhere.
CONFIGS = {"RunConfig", "ReferenceConfig", "ObjectiveConfig", "WarmStartConfig", "UpdateConfig", "RolloutConfig"}
# Plain values and arrays, which say nothing of who is meant.
PLAIN = {"int", "float", "str", "bool", "list", "tuple", "dict", "object", "Any", "Callable", "Sequence", "None"}
PLAIN |= {"Array", "Key", "Float", "Int", "Bool", "np", "jax", "PyTree"}
OF_UPDATES = ("optax", "jaxrl_llm.update", "jaxrl_llm.objective", "jaxrl_llm.distribution.loss_terms")


def functions(source: str) -> list[ast.FunctionDef]:
    """All functions and methods, those inside others too."""
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def parameters(node: ast.FunctionDef) -> list[ast.arg]:
    """Without self and cls."""
    given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
    given += [x for x in (node.args.vararg, node.args.kwarg) if x]
    return [x for x in given if x.arg not in ("self", "cls")]


def taken(node: ast.FunctionDef) -> set[str]:
    """Names of the types that a function's parameters are annotated with, each once."""
    notes = [ast.unparse(x.annotation) for x in parameters(node) if x.annotation]
    found = [
        n for note in notes for n in ast.walk(ast.parse(note.strip("'\""))) if isinstance(n, ast.Name | ast.Attribute)
    ]
    return {n.id if isinstance(n, ast.Name) else n.attr for n in found}


def shares(sources: list[str]) -> dict[str, float]:
    """Fraction of the functions with parameters that take a value of each type."""
    every = [taken(node) for source in sources for node in functions(source) if parameters(node)]
    return {name: n / len(every) for name, n in Counter(name for types in every for name in types).items()}


def of_roles() -> list[str]:
    return [path.read_text() for path in sorted(ROLES.glob("*.py"))]


def test_no_value_but_the_config_is_taken_by_more_than_a_third_of_the_functions():
    found = {name: share for name, share in shares(of_roles()).items() if name not in CONFIGS | PLAIN}
    assert {"Blueprint", "RunState", "Groups", "Task"} <= set(found)
    assert {name: share for name, share in found.items() if share > 1 / 3} == {}


def test_every_parameter_of_the_roles_is_annotated():
    """Else it would not be counted; a lambda's cannot."""
    bare = [
        f"{node.name}({x.arg})" for source in of_roles() for node in functions(source) for x in parameters(node)
        if x.annotation is None
    ]  # fmt: skip
    assert bare == []


def test_the_count_sees_a_value_that_is_handed_everywhere():
    source = (
        "class A:\n"
        "    def f(self, run: Run, x: int): ...\n"
        "    def h(self): ...\n"
        "def g(x: 'Run | None', *, y: dict[str, Task]):\n"
        "    def k(of: Callable[[roles.Run], Task]): ...\n"
        "def m(x: int): ...\n"
    )
    found = shares([source])
    # Of four functions with parameters: f, g, k and m.
    assert (found["Run"], found["Task"], found["int"]) == (0.75, 0.5, 0.5)


def function_of(path: Path, name: str) -> ast.FunctionDef:
    [node] = [
        node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    return node


def lines_of(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    docstring = node.body[0]
    return node.end_lineno - node.lineno + 1 - (docstring.end_lineno - docstring.lineno + 1)


def fields_of(path: Path, name: str) -> list[str]:
    [node] = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef) and n.name == name]
    return [n.target.id for n in node.body if isinstance(n, ast.AnnAssign)]


def test_step_is_short_and_calls_each_stage_once():
    step = function_of(TRAIN, "step")
    assert lines_of(step) <= MAX_STEP and lines_of(function_of(TRAIN, "train")) <= MAX_TRAIN
    named = Counter(
        (node.value.id, node.attr)
        for node in ast.walk(step)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in ("learner", "source")
    )
    *stages, _ = fields_of(ROLES / "learner.py", "Learner")
    assert stages == ["filter", "replay", "score", "entropy", "advantage", "update", "refresh", "publish"]
    want = [
        *(("learner", name) for name in stages),
        *(("source", name) for name in ("use", "take", "observe", "state")),
    ]
    assert named == Counter(want)


def test_the_loop_calls_step_once():
    loop = function_of(TRAIN, "train")
    assert [ast.unparse(n.func) for n in ast.walk(loop) if isinstance(n, ast.Call)].count("step") == 1
    assert not any(isinstance(n, ast.Attribute) and n.attr in ("take", "filter", "replay") for n in ast.walk(loop))


def imported(source: str) -> set[str]:
    """Full names, `from a import b` as a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def beneath(names: set[str], places: tuple[str, ...]) -> set[str]:
    return {name for name in names if any(name == place or name.startswith(f"{place}.") for place in places)}


@pytest.mark.parametrize("name", ["sampler", "asking", "collector", "hinting", "grading", "reusing"])
def test_who_samples_imports_no_optimizer_no_loss_and_no_learner(name):
    """Nor another role, by which these would come in."""
    found = imported((ROLES / f"{name}.py").read_text())
    assert beneath(found, OF_UPDATES) == set()
    others = {x.split(".")[2] for x in beneath(found, ("jaxrl_llm.roles",))}
    assert others <= {"asking", "collector", "hinting", "grading", "reusing"}


@pytest.mark.parametrize("name", ["learner", "updates", "state", "reference"])
def test_who_learns_imports_no_engine_no_task_and_no_sampler(name):
    found = imported((ROLES / f"{name}.py").read_text())
    places = (
        "jaxrl_llm.rollout",
        "jaxrl_llm.tasks",
        "jaxrl_llm.environments",
        "jaxrl_llm.roles.sampler",
        "jaxrl_llm.roles.collector",
    )
    assert beneath(found, places) == set()


def test_no_role_imports_the_loop_or_the_context_around_it():
    found = {
        x for source in of_roles() for x in beneath(imported(source), ("jaxrl_llm.train", "jaxrl_llm.run_context"))
    }
    assert found == set()


def test_the_reader_sees_an_import_that_is_hidden():
    source = "def f():\n    from jaxrl_llm.update.step import jit_update\n    import optax.tree\n"
    assert beneath(imported(source), OF_UPDATES) == {"jaxrl_llm.update.step.jit_update", "optax.tree"}
    assert beneath(imported("import optaxes\nfrom jaxrl_llm.updated import x"), OF_UPDATES) == set()


def test_every_role_is_tested_here():
    tests = {x for path in Path(__file__).parent.glob("test_*.py") for x in imported(path.read_text())}
    roles = {path.stem for path in ROLES.glob("*.py")} - {"__init__"}
    assert {name for name in roles if not beneath(tests, (f"jaxrl_llm.roles.{name}",))} == set()
