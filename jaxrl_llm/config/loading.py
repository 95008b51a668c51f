"""YAML, presets and flags to a checked RunConfig, with every error at once. Imports no jax.

Precedence: defaults < the YAML file < `--section.field value` on the command line.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from jaxrl_llm.config.error_messages import describe_errors, display_name
from jaxrl_llm.config.flags import Flag, apply_flags, read_flags
from jaxrl_llm.config.run_config import RunConfig, tokenizer_for
from jaxrl_llm.config.value_checks import (
    booleans_for_numbers,
    conflicting_values,
    numbers_out_of_range,
    unprintable_text,
)
from jaxrl_llm.config.yaml_text import read_yaml
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.config import PretrainedModel
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.presets import with_preset
from jaxrl_llm.tasks.config import PretrainedTokenizer

MAX_BYTES = 2_000_000


def load(path: str | Path, args: Sequence[str] = (), command_options: Sequence[str] = ()) -> RunConfig:
    """Return the config of a YAML file with the flags `args` over it.

        cfg = rl.load_config("configs/arithmetic.yaml", ["--steps", "20"])
        result = rl.train.train(cfg)

    Args:
        path: of the file.
        args: flags, as on the command line.
        command_options: options of the command itself, as `--resume`, suggested for misspelled flags.

    Raises:
        UserError: everything that is wrong with the file and the flags, one line each.
    """
    flags, errors = read_flags(args, RunConfig, command_options)
    try:
        values, repeated_keys = _read(Path(path))
    except UserError as error:
        raise UserError("\n".join([str(error), *errors])) from None
    return _checked(values, str(path), flags, [*repeated_keys, *errors])


def validate(
    values: dict[str, Any], source: str, args: Sequence[str] = (), command_options: Sequence[str] = ()
) -> RunConfig:
    """Return the config of a mapping of values with flags over it.

    Args:
        values: as a YAML file has them.
        source: name for them in error messages.
        args, command_options: as in `load`.

    Raises:
        UserError: everything that is wrong with the values and the flags, one line each.
    """
    return _checked(values, source, *read_flags(args, RunConfig, command_options))


def _read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Values of a YAML file, and errors about keys that it repeats."""
    try:
        if (size := path.stat().st_size) > MAX_BYTES:
            raise UserError(f"{path}: got {size:,} bytes, want a config of {MAX_BYTES:,} at most")
        text = path.read_text(encoding="utf-8")
        values, repeated_keys = read_yaml(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not YAML: {error}") from None
    if not isinstance(values, dict):
        got = "an empty file" if values is None else type(values).__name__
        is_emptied_run = path.name == "config.yaml" and not text.strip()
        remedy = "; jaxrl train with the run's own CONFIG writes it again" if is_emptied_run else ""
        raise UserError(f"{path}: got {got}, want section: values{remedy}")
    return values, [f"{path}: {line}" for line in repeated_keys]


def _checked(values: dict[str, Any], source: str, flags: Sequence[Flag], errors: Sequence[str]) -> RunConfig:
    # A preset on the command line sets its parts before other flags change them.
    preset = [flag for flag in flags if flag.path == ("objective", "preset")]
    values, _ = apply_flags(_with_preset(values), preset, RunConfig)
    values, misplaced = apply_flags(_with_preset(values), [flag for flag in flags if flag not in preset], RunConfig)
    values, found = _with_preset(values), [*errors, *misplaced]
    try:
        cfg = _type_adapter().validate_python(values)
    except ValidationError as error:
        found += describe_errors(error.errors(), values, RunConfig, source, flags)
    else:
        found += [f"{display_name(path, source, flags)}: {text}" for path, text in numbers_out_of_range(cfg)]
    for path, text in (
        *unprintable_text(values),
        *booleans_for_numbers(values, RunConfig),
        *conflicting_values(values),
    ):
        # A missing value stands nowhere: it is required by the flags of its section.
        beside = [Flag(path, None) for flag in flags if flag.path[:-1] == path[:-1] and text.startswith("got nothing")]
        found.append(f"{display_name(path, source, [*flags, *beside])}: {text}")
    if found:
        raise UserError("\n".join(found))
    if isinstance(cfg.model, PretrainedModel):
        given = cfg if "tokenizer" in values else dataclasses.replace(cfg, tokenizer=PretrainedTokenizer())
        return dataclasses.replace(cfg, tokenizer=tokenizer_for(given, cfg.model.path))
    return cfg


@functools.cache
def _type_adapter() -> TypeAdapter[RunConfig]:
    return TypeAdapter(RunConfig)


def _with_preset(values: dict[str, Any]) -> dict[str, Any]:
    if values.get("objective") is None:
        return values
    return values | {"objective": with_preset(values["objective"], dataclasses.asdict(ObjectiveConfig()))}
