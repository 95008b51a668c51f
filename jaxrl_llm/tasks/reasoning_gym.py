"""Entries of reasoning-gym, by the name and the settings of a dataset."""

import dataclasses
import difflib

import numpy as np

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import ReasoningGymTask
from jaxrl_llm.tasks.records import Record

NAME, SETTINGS = "reasoning_gym", "reasoning_gym_config"
"""Columns that name the dataset and its settings, so that a grader elsewhere can make its scorer anew."""


def draw(cfg: ReasoningGymTask, size: int, seed: tuple[int, ...]) -> list[Record]:
    """Entries with the columns question, answer, metadata, and those two. Raises UserError for a wrong name or setting.

    Entry i of a dataset is drawn with its seed + i, so neighboring seeds share all their entries but one: the seed is hashed.
    """
    try:
        import reasoning_gym
        from reasoning_gym.factory import DATASETS
    except ImportError:
        raise UserError("task.kind: reasoning_gym needs reasoning-gym: pip install 'jaxrl-llm[tasks]'") from None
    if cfg.name not in DATASETS:
        near = ", ".join(difflib.get_close_matches(cfg.name, DATASETS, n=3)) or ", ".join(sorted(DATASETS))
        raise UserError(f"task.name: got {cfg.name!r}, which reasoning-gym does not have, want e.g. {near}")
    _check_settings(cfg, [field.name for field in dataclasses.fields(DATASETS[cfg.name][1])])
    first = int(np.random.SeedSequence(seed).generate_state(1)[0] >> 1)
    try:
        dataset = reasoning_gym.create_dataset(cfg.name, size=size, seed=first, **cfg.config)
        entries = [dataset[i] for i in range(size)]
    except Exception as error:  # a dataset checks its settings with asserts, and some only while they draw
        raise UserError(f"task.config: {cfg.name} refuses {cfg.config}: {type(error).__name__}: {error}") from None
    return [
        Record(f"{cfg.name}[{i}]", {**entry, NAME: cfg.name, SETTINGS: cfg.config}) for i, entry in enumerate(entries)
    ]


def _check_settings(cfg: ReasoningGymTask, known: list[str]) -> None:
    wrong = []
    for name in cfg.config:
        if name in ("size", "seed"):
            wrong.append(f"task.config.{name}: the task's own size and the run's seed say this")
        elif name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"perhaps you meant {near[0]}" if near else f"want some of {', '.join(known)}"
            wrong.append(f"task.config.{name}: {cfg.name} has no such setting, {hint}")
    if wrong:
        raise UserError("\n".join(wrong))
