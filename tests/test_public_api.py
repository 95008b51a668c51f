"""The public names of `import jaxrl_llm as rl`: which there are and how they are called, that they come late, and their types.

`tests/public_api.txt` is the promise. After a change on purpose, `PYTHONPATH=. python tests/test_public_api.py` prints the file;
`MEMBERS` names what is promised of a module.
"""

import ast
import enum
import inspect
import pkgutil
import subprocess
import sys
import types
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import jaxrl_llm as rl

ROOT = Path(__file__).parents[1]
PROMISE = Path(__file__).with_name("public_api.txt")
# Other classes are values, or configs: what they hold is their signature.
WITH_METHODS = ("Engine", "Session", "GraderPool", "curricula.Uniform")
PLAIN = (type(None), str, int, float, bool)


def signature(found: object) -> str:
    """`(a, b=1, **c)`, without self; a default that is no plain value is "..."."""
    if isinstance(found, type) and issubclass(found, Exception):
        return ""
    parts = []
    for p in inspect.signature(found).parameters.values():
        if p.name == "self":
            continue
        default = repr(p.default) if isinstance(p.default, PLAIN) else "..."
        star = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        parts.append(f"{star}{p.name}" + ("" if p.default is p.empty else f"={default}"))
    return f"({', '.join(parts)})"


def line(name: str) -> str:
    """The promise about `rl.<name>`."""
    found = rl
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, types.ModuleType):
        return f"{name}: module {found.__name__}"
    if isinstance(found, type) and issubclass(found, enum.Enum):
        return f"{name}: {' '.join(found.__members__)}"
    if not callable(found):
        return f"{name}: {type(found).__name__}"
    own = vars(found) if name in WITH_METHODS else {}
    of_object = [f"  .{x}{signature(own[x])}" for x in sorted(own) if inspect.isfunction(own[x]) and x[0] != "_"]
    return "\n".join([name + signature(found), *of_object])


def promised() -> list[str]:
    """Names in the file, also of members of modules."""
    text = [x for x in PROMISE.read_text().splitlines() if x and not x.startswith(("#", " "))]
    return [x.partition("(")[0].partition(":")[0] for x in text]


def written(names: list[str]) -> str:
    return "".join(f"{line(name)}\n" for name in names)


def test_names_and_signatures_are_those_promised():
    text = "".join(x for x in PROMISE.read_text().splitlines(keepends=True) if not x.startswith("#"))
    assert [name for name in promised() if "." not in name] == rl.__all__
    assert written(promised()) == text


def test_every_public_name_has_a_docstring_and_its_main_functions_an_example():
    found = {name: getattr(rl, name) for name in rl.__all__ if name != "__version__"}
    assert [name for name, x in found.items() if not (x.__doc__ or "").strip()] == []
    calls = [name for name, x in found.items() if inspect.isfunction(x) and name != "check"]
    assert [name for name in calls if f"rl.{name}(" not in found[name].__doc__] == []


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_import_is_instant_and_brings_no_jax():
    """At most 0.2 s of CPU time beyond Python's own start, the best of five; listing the names imports nothing either."""
    code = (
        "import time, sys; t = time.process_time(); import jaxrl_llm as rl; dir(rl), rl.__all__, rl.__version__; "
        "print(time.process_time() - t, *{m.split('.')[0] for m in sys.modules})"
    )
    runs = [python(code).split() for _ in range(5)]
    assert min(float(seconds) for seconds, *_ in runs) <= 0.2
    assert {"jax", "jaxlib", "numpy", "flax", "optax", "grain", "pydantic", "transformers"}.isdisjoint(runs[0][1:])


@pytest.mark.parametrize(
    "first", ["import jaxrl_llm.train", "import jaxrl_llm as rl; rl.train", "import jaxrl_llm.errors"]
)
def test_a_name_is_the_same_object_in_whatever_order_things_are_imported(first):
    code = (
        f"{first}\nimport jaxrl_llm as rl\nimport jaxrl_llm.train, jaxrl_llm.errors, sys\n"
        "from jaxrl_llm import train\n"
        "assert rl.train is train is sys.modules['jaxrl_llm.train'] and callable(rl.train.train)\n"
        "assert rl.errors is sys.modules['jaxrl_llm.errors'] and rl.UserError is rl.errors.UserError\n"
    )
    assert python(code) == ""


def test_no_name_is_hidden_by_a_module_of_the_package():
    modules = {module.name for module in pkgutil.iter_modules(rl.__path__)}
    assert {name for name in modules & set(rl.__all__) if rl._PLACES[name] != name} == set()


def test_another_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'jaxrl_llm' has no attribute 'genrate'"):
        rl.genrate  # noqa: B018
    assert set(rl.__all__) <= set(dir(rl))


def typed_imports() -> dict[str, str]:
    """Public name -> place, as type checkers see it."""
    found = {}
    tree = ast.parse((ROOT / "jaxrl_llm" / "__init__.py").read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in block.body:
        package = f"{node.module}.".removeprefix("jaxrl_llm").strip(".")
        for alias in node.names:
            found[alias.asname] = (package, alias.name)
    return found


def test_type_checkers_see_the_names_and_their_places():
    want = {}
    for name, place in rl._PLACES.items():
        module, _, member = place.partition(":")
        package, _, last = module.rpartition(".")
        want[name] = (module, member) if member else (package, last)
    assert typed_imports() == want


def test_the_wheel_says_that_it_is_typed(tmp_path):
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = zipfile.ZipFile(wheel).namelist()
    assert {"jaxrl_llm/py.typed", "jaxrl_llm/__init__.py", "jaxrl_llm/train.py"} <= set(names)
    assert Path(wheel).name.startswith(f"jaxrl_llm-{rl.__version__}-")
    assert not any(name.startswith(("examples", "tests", "configs")) for name in names)


MEMBERS = {
    "advantages": "Grpo MeanOnly Rloo LeaveOneOut MaxRl PassAtK Opo Gpg Gdpo Raw BestWorst ReinforcePlusPlus GrpoSteps "
    "TreeRl TreePo Spo TreeRpo",
    "controls": "none regex json_schema choice allow forbid stop budget begin",
    "curricula": "Uniform counted Curriculum",
    "estimates": "correct avg_at_k pass_at_k maj_at_k",
    "filters": "chain all_of any_of of has_signal Filter Signal DifficultyBand MaxVariance FirstSamples BestBy NotCutOff "
    "RewardBetween NoDuplicates NoRepetition NotStale",
    "losses": "make_loss as_loss",
    "train": "train sft open_run start step",
    "trees": "none points segments",
}

if __name__ == "__main__":
    names = []
    for name in rl.__all__:
        names += [name, *(f"{name}.{x}" for x in MEMBERS.get(name, "").split())]
    print("# The public names of jaxrl_llm and how they are called; tests/test_public_api.py holds them.")
    print(written(names), end="")
