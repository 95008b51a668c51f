"""The target of a command (a config file, a run directory or a Hugging Face model), and the config that it makes. Imports no jax.

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

TargetKind = Literal["file", "run", "model", "directory", "name", "nothing"]
POLICY = "a run directory or a Hugging Face model"
NEW_TOKENS = 256
"""Maximum length of a response in tokens, if no config sets it."""
MAX_NEIGHBORS, MAX_NAMED = 1000, 3
"""Neighbors compared with the name of a missing target, and how many of them a message lists."""


def kind_of(target: str) -> TargetKind:
    """`name`: no such path, but it has the form of a model's name on the hub."""
    path = Path(target)
    if target and path.is_dir():
        if (path / "config.json").is_file():
            return "model"
        return "run" if (path / "config.yaml").is_file() else "directory"
    if target and path.exists():
        return "file"
    return "name" if target.count("/") == 1 and all(target.split("/")) and not path.parent.is_dir() else "nothing"


def target_error(target: str, want: str, args: Sequence[str] = (), command_options: Sequence[str] = ()) -> UserError:
    """Return the error for a target that the command cannot take, with a hint at a similar neighbor.

    Args:
        want: description of a right target.
        args: flags over the config, whose errors are added.
        command_options: options of the command itself, suggested for misspelled flags.
    """
    from jaxrl_llm.config.flags import read_flags
    from jaxrl_llm.config.run_config import RunConfig

    found = {
        "file": "a file",
        "run": "a run directory",
        "model": "a Hugging Face model directory",
        "directory": "a directory without config.yaml",
        "name": "no such file or directory",
        "nothing": "no such file or directory",
    }
    line = f"{target or 'the target'}: got {found[kind_of(target)]}, want {want}{_neighbors(target)}"
    return UserError("\n".join([line, *read_flags(args, RunConfig, command_options)[1]]))


def _neighbors(target: str) -> str:
    """Hint at a similar run directory or config beside a target that does not exist, or at the newest run directories there."""
    path = Path(target)
    if not target or path.exists() or not path.parent.is_dir():
        return ""
    found = {str(p): p for p in itertools.islice(path.parent.iterdir(), MAX_NEIGHBORS) if _is_target(p)}
    if near := difflib.get_close_matches(str(path), found, n=1, cutoff=0.75):
        return f"; perhaps you meant {near[0]}"
    runs = sorted((p for p in found.values() if p.is_dir()), key=lambda p: p.stat().st_mtime, reverse=True)
    return f"; there is {', '.join(map(str, runs[:MAX_NAMED]))}" if runs else ""


def _is_target(path: Path) -> bool:
    return path.suffix in (".yaml", ".yml") or kind_of(str(path)) == "run"


def read_config(target: str, args: Sequence[str], command_options: Sequence[str] = ()) -> "RunConfig":
    """Return the config of a YAML file or of a run directory, with the flags `args` over it.

    `command_options`, here and below: options of the command itself, suggested for misspelled flags.
    """
    from jaxrl_llm.config import loading

    kind, path = kind_of(target), Path(target)
    if kind == "model":
        want = f"a config file or a run directory; a model is given as CONFIG --model.path {target}"
        raise target_error(target, want, args, command_options)
    if kind == "run":
        return loading.load(path / "config.yaml", [f"--run_dir={path}", *args], command_options)
    if kind != "file":
        raise target_error(target, "a config file or a run directory", args, command_options)
    return loading.load(path, args, command_options)


def read_run(target: str, args: Sequence[str], command_options: Sequence[str]) -> "RunConfig":
    """Return the config of a run directory; no other target is accepted."""
    if kind_of(target) != "run":
        raise target_error(target, "a run directory", args, command_options)
    return read_config(target, args, command_options)


def read_evaluation(
    target: str, task: str | None, args: Sequence[str], command_options: Sequence[str] = ("--task",)
) -> "RunConfig":
    """Return the config to evaluate a run's policy or a pretrained model with.

    Args:
        task: a config file or reasoning_gym:NAME, for task, reward, rollout and evaluation; None: those of the run.
        args: flags over it.
    """
    from jaxrl_llm.config import loading, run_config
    from jaxrl_llm.model.config import PretrainedModel

    kind = kind_of(target)
    if kind in ("file", "nothing", "directory"):
        raise target_error(target, POLICY, args, command_options)
    if kind == "name" and task is None:
        raise UserError(
            f"{target}: got no such directory, want {POLICY}; with a model on the hub, --task too: a config, or reasoning_gym:NAME"
        )
    if kind == "model" and task is None:
        raise UserError(f"--task: got nothing, want what to evaluate {target} on: a config, or reasoning_gym:NAME")
    base = loading.load(Path(target) / "config.yaml") if kind == "run" else run_config.RunConfig()
    asked = base if task is None else _read_task(task, target)
    if kind != "run":
        compute = {"compute": asked.model.compute} if isinstance(asked.model, PretrainedModel) else {}
        base = dataclasses.replace(base, model=PretrainedModel(target, **compute))
        base = dataclasses.replace(base, tokenizer=run_config.tokenizer_for(asked, target), mesh=asked.mesh)
    found = dataclasses.replace(
        base, run_dir=target, task=asked.task, reward=asked.reward, rollout=asked.rollout, evaluation=asked.evaluation
    )
    return loading.validate(run_config.to_dict(found), target, args, command_options)


def _read_task(task: str, target: str) -> "RunConfig":
    """The config that `--task` names, for the model `target`."""
    from jaxrl_llm.config import loading

    kind, colon, name = task.partition(":")
    if colon and kind == "reasoning_gym":
        values = {
            "task": {"kind": kind, "name": name, "size": 1, "held_out": 128},
            "reward": kind,
            "rollout": {"max_new_tokens": NEW_TOKENS},
            "model": {"path": target},
        }
        return loading.validate(values, "--task")
    if not Path(task).is_file():
        raise UserError(f"--task: got {task}, want a config file, or reasoning_gym:NAME")
    return loading.load(Path(task))


def read_sampled(
    target: str, task: str | None, args: Sequence[str], command_options: Sequence[str]
) -> "tuple[RunConfig, bool]":
    """Return the config for `jaxrl sample`, and whether it has a task: a model by itself has none.

    Args:
        task: as in `read_evaluation`.
        args: flags over the config.
    """
    from jaxrl_llm.config import loading

    kind = kind_of(target)
    if task is not None:
        return read_evaluation(target, task, args, command_options), True
    if kind not in ("model", "name"):
        return read_config(target, args, command_options), True
    values = {"run_dir": target, "model": {"path": target}, "rollout": {"max_new_tokens": NEW_TOKENS}}
    return loading.validate(values, target, args, command_options), False


def list_values(target: str) -> str:
    """Return every key of the config with its value in `target`, or its default if the target has no config."""
    from jaxrl_llm.config import run_config
    from jaxrl_llm.config.help_text import help_text

    cfg = read_config(target, []) if kind_of(target) in ("file", "run") else run_config.RunConfig()
    return help_text(run_config.to_dict(cfg), run_config.RunConfig)
