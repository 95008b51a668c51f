"""Commands on the pages of docs: each resolves in a fresh shell, and its flags, files, targets and extras exist."""

import contextlib
import io
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from jaxrl_llm import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "launch/README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
# Pages that are read first, in a fresh shell.
FIRST_PAGES = [ROOT / name for name in ("README.md", "docs/quickstart.md", "docs/install.md", "docs/commands.md")]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"].keys()
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
ACTIVATE = ["source", ".venv/bin/activate"]


def commands(text: str) -> list[list[str]]:
    """Words of each command: lines of `bash` blocks, and lines after `$ ` in others; without environment variables."""
    found = []
    for kind, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if kind != "bash" and not line.startswith("$ "):
                continue
            for part in line.removeprefix("$ ").split(" && "):
                words = shlex.split(part, comments=True)
                while words and re.fullmatch(r"\w+=.*", words[0]):
                    words.pop(0)
                found += [words] if words else []
    return found


def inline(text: str) -> list[list[str]]:
    """Words of each `jaxrl ...` within a sentence or a table."""
    found = re.findall(r"(?<!`)`jaxrl (\w+ [^`\n]+)`", text)
    return [["jaxrl", *shlex.split(words)] for words in found if "..." not in words and "[" not in words]


def problems(words: list[str]) -> list[str]:
    """Errors that the command would have in a fresh clone."""
    program, *args = words
    if program in ("jaxrl", ".venv/bin/jaxrl"):
        return wrong_arguments(args)
    if program == "make":
        return [f"make: no target {a}" for a in args if "=" not in a and a not in TARGETS]
    if program == "pip":
        asked = [extra for a in args for extra in re.findall(r"\[([\w,]+)\]", a)]
        return [f"no extra {extra}" for extra in ",".join(asked).split(",") if extra and extra not in EXTRAS]
    if program == "python" and args[0].endswith(".py"):
        found = [] if (ROOT / args[0]).is_file() else [f"no file {args[0]}"]
        return found + (wrong_arguments(args[args.index("--") + 1 :]) if "--" in args else [])
    known = program in ("git", "cd", "python", "python3", ".venv/bin/ruff", ".ci/run") or words == ACTIVATE
    return [] if known else [f"{program}: command not found"]


def wrong_arguments(args: list[str]) -> list[str]:
    """Error messages about everything but the target, which is replaced by a missing one, so that nothing runs."""
    if args == ["--version"] or "--help" in args:
        return []
    command, target, *rest = args
    stderr = io.StringIO()
    with contextlib.redirect_stderr(stderr):
        assert cli.main([command, "no/such/target", *rest]) == 2
    lines = [line for line in stderr.getvalue().splitlines() if "no/such/target: got no such" not in line]
    return lines + ([f"no file {target}"] if target.startswith("configs/") and not (ROOT / target).is_file() else [])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_on_the_pages_exist(page):
    text = page.read_text(encoding="utf-8")
    found = {shlex.join(words): problems(words) for words in [*commands(text), *inline(text)]}
    assert {command: wrong for command, wrong in found.items() if wrong} == {}


def anchor(heading: str) -> str:
    """Name of a heading in links, as Markdown viewers make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    text, wrong = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL), []
    for target in re.findall(r"\]\(([^)\s:]+)\)", text):
        path, _, name = target.partition("#")
        to = (page.parent / path).resolve() if path else page
        headings = re.findall(r"^#+ (.*)$", to.read_text(encoding="utf-8"), re.MULTILINE) if to.suffix == ".md" else ()
        if not to.exists() or (name and name not in map(anchor, headings)):
            wrong.append(target)
    assert wrong == []


@pytest.mark.parametrize("page", FIRST_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_in_a_fresh_shell_jaxrl_is_found(page):
    """The page activates the environment before `jaxrl`, `pip` or `python`, which a fresh shell lacks or has from elsewhere."""
    shown = commands(page.read_text(encoding="utf-8"))
    first = next((n for n, words in enumerate(shown) if words[0] in ("jaxrl", "pip", "python")), None)
    assert first is not None and ACTIVATE in shown[:first]


def test_the_checker_finds_wrong_commands():
    text = "```bash\nX=1 jaxrl sample runs/a -n 3 --promt x   # a comment\nmake tset && conda activate\n```\n"
    text += "Or `jaxrl eval RUN -q 3`:\n```text\n$ jaxrl eval x\n```\n"
    assert commands(text) == [
        ["jaxrl", "sample", "runs/a", "-n", "3", "--promt", "x"],
        ["make", "tset"],
        ["conda", "activate"],
        ["jaxrl", "eval", "x"],
    ]
    assert problems(commands(text)[0]) == ["--promt: no such flag, perhaps you meant --prompt"]
    assert inline(text) == [["jaxrl", "eval", "RUN", "-q", "3"]]
    assert problems(inline(text)[0])[0].startswith("-q: got a word that belongs to no flag")
    assert problems(["make", "tset"]) == ["make: no target tset"]
    assert problems(["conda", "activate"]) == ["conda: command not found"]
    assert problems(["pip", "install", "-e", ".[cuda13,cudnn]"]) == ["no extra cudnn"]
    assert problems(["jaxrl", "train", "configs/none.yaml"]) == ["no file configs/none.yaml"]
    assert problems(["python", "launch/local.py", "--", "train", "configs/arithmetic.yaml", "--sed", "1"])[
        0
    ].startswith("--sed:")


def test_exit_codes_are_the_same_everywhere():
    from jaxrl_llm import errors

    table = re.findall(r"^\| (\d+) \|", (ROOT / "docs/commands.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert table == ["0", "2", "3", "4", "75", "130", "141"]
    codes = {str(error.exit_code) for error in vars(errors).values() if hasattr(error, "exit_code")}
    assert codes == {"2", "3", "4", "75"}
    assert set(re.findall(r"\b\d+\b", cli.__doc__.split("Exit codes:")[1])) == set(table)


def test_the_pages_show_how_to_install_for_a_gpu_and_a_tpu():
    """The extras are those of the installed jax, whose plugin has the same version."""
    typed = " ".join(word for page in FIRST_PAGES for words in commands(page.read_text()) for word in words)
    asked = set(re.findall(r"\[(\w+)\]", typed))
    assert {"cuda13", "tpu"} <= asked
    text = (ROOT / "docs/install.md").read_text()
    assert "cuda12" in text and "nvidia-smi" in text and "jax.devices()" in text
