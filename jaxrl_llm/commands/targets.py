"""What a command is about: a config file, a run directory, a Hugging Face model. To the config that it makes; imports no jax.

What reads a config is imported when one is read: `jaxrl --help` needs none of it.
"""

import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from jaxrl_llm.errors import UserError

if TYPE_CHECKING:
    from jaxrl_llm.config.run_config import RunConfig

Kind = Literal["file", "run", "model", "directory", "name", "nothing"]
POLICY = "a run directory or a Hugging Face model"
NEW_TOKENS = 256
"""Tokens of a response where no config says how many."""
LOOKED_AT, NAMED = 1000, 3
"""Neighbors that are compared with a name that does not exist, and how many are named."""


def kind_of(target: str) -> Kind:
    """`name`: nothing here, and written as a model on the hub is."""
    path = Path(target)
    if target and path.is_dir():
        if (path / "config.json").is_file():
            return "model"
        return "run" if (path / "config.yaml").is_file() else "directory"
    if target and path.exists():
        return "file"
    return "name" if target.count("/") == 1 and all(target.split("/")) and not path.parent.is_dir() else "nothing"


def refusal(target: str, want: str, args: Sequence[str] = (), own: Sequence[str] = ()) -> UserError:
    """For a target that the command cannot take: what it is, which neighbor may be meant, and what is wrong with the flags."""
    from jaxrl_llm.config.run_config import RunConfig
    from jaxrl_llm.config.values import read_flags

    found = {
        "file": "a file",
        "run": "a run directory",
        "model": "a Hugging Face model directory",
        "directory": "a directory without config.yaml",
        "name": "no such file or directory",
        "nothing": "no such file or directory",
    }
    line = f"{target or 'the target'}: got {found[kind_of(target)]}, want {want}{_neighbors(target)}"
    return UserError("\n".join([line, *read_flags(args, RunConfig, own)[1]]))


def _neighbors(target: str) -> str:
    """Which run directory, or config, beside a target that does not exist was meant."""
    path = Path(target)
    if not target or path.exists() or not path.parent.is_dir():
        return ""
    found = {str(p): p for p in itertools.islice(path.parent.iterdir(), LOOKED_AT) if _can_be_named(p)}
    if near := difflib.get_close_matches(str(path), found, n=1, cutoff=0.75):
        return f"; perhaps you meant {near[0]}"
    newest = sorted((p for p in found.values() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)[:NAMED]
    return f"; there is {', '.join(map(str, newest))}" if newest else ""


def _can_be_named(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") or kind_of(str(path)) == "run"


def read_config(target: str, args: Sequence[str], own: Sequence[str] = ()) -> "RunConfig":
    """The config of a YAML file or of a run directory, with flags over it; `own`: flags of the command itself."""
    from jaxrl_llm.config import run_config

    kind, path = kind_of(target), Path(target)
    if kind == "model":
        want = f"a config file or a run directory; a model stands beside one: CONFIG --model.path {target}"
        raise refusal(target, want, args, own)
    if kind == "run":
        return run_config.load(path / "config.yaml", [f"--run_dir={path}", *args], own)
    if kind != "file":
        raise refusal(target, "a config file or a run directory", args, own)
    return run_config.load(path, args, own)


def read_run(target: str, args: Sequence[str], own: Sequence[str]) -> "RunConfig":
    """The config of a run directory alone."""
    if kind_of(target) != "run":
        raise refusal(target, "a run directory", args, own)
    return read_config(target, args, own)


def read_evaluation(
    target: str, task: str | None, args: Sequence[str], own: Sequence[str] = ("--task",)
) -> "RunConfig":
    """A run directory's config, or that of `task` around a run's or a pretrained model."""
    from jaxrl_llm.config import run_config
    from jaxrl_llm.model.config import PretrainedModel

    kind = kind_of(target)
    if kind in ("file", "nothing", "directory"):
        raise refusal(target, POLICY, args, own)
    if kind == "name" and task is None:
        raise UserError(
            f"{target}: got no such directory, want {POLICY}; with a model on the hub, --task too: a config, or reasoning_gym:NAME"
        )
    if kind == "model" and task is None:
        raise UserError(f"--task: got nothing, want what to evaluate {target} on: a config, or reasoning_gym:NAME")
    base = run_config.load(Path(target) / "config.yaml") if kind == "run" else run_config.RunConfig()
    asked = base if task is None else _read_task(task, target)
    if kind != "run":
        compute = {"compute": asked.model.compute} if isinstance(asked.model, PretrainedModel) else {}
        base = dataclasses.replace(base, model=PretrainedModel(target, **compute))
        base = dataclasses.replace(base, tokenizer=run_config.tokenizer_of(asked, target), mesh=asked.mesh)
    found = dataclasses.replace(
        base, run_dir=target, task=asked.task, reward=asked.reward, rollout=asked.rollout, evaluation=asked.evaluation
    )
    return run_config.validate(run_config.to_dict(found), target, args, own)


def _read_task(task: str, target: str) -> "RunConfig":
    from jaxrl_llm.config import run_config

    kind, colon, name = task.partition(":")
    if colon and kind == "reasoning_gym":
        values = {
            "task": {"kind": kind, "name": name, "size": 1, "held_out": 128},
            "reward": kind,
            "rollout": {"max_new_tokens": NEW_TOKENS},
            "model": {"path": target},
        }
        return run_config.validate(values, "--task")
    if not Path(task).is_file():
        raise UserError(f"--task: got {task}, want a config file, or reasoning_gym:NAME")
    return run_config.load(Path(task))


def read_sampled(target: str, task: str | None, args: Sequence[str], own: Sequence[str]) -> "tuple[RunConfig, bool]":
    """What `jaxrl sample` draws from, and whether it has a task: a model by itself has none."""
    from jaxrl_llm.config import run_config

    kind = kind_of(target)
    if task is not None:
        return read_evaluation(target, task, args, own), True
    if kind not in ("model", "name"):
        return read_config(target, args, own), True
    values = {"run_dir": target, "model": {"path": target}, "rollout": {"max_new_tokens": NEW_TOKENS}}
    return run_config.validate(values, target, args, own), False


def list_values(target: str) -> str:
    """Every value of the config, with those of `target` where it has any."""
    from jaxrl_llm.config import run_config
    from jaxrl_llm.config.options import listing

    cfg = read_config(target, []) if kind_of(target) in ("file", "run") else run_config.RunConfig()
    return listing(run_config.to_dict(cfg), run_config.RunConfig)
