"""Configs made in a script: values of single fields as keyword arguments, checked like those of a YAML file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from jaxrl_llm.config.error_messages import errors_by_path, got_and_want
from jaxrl_llm.config.user_code import hint
from jaxrl_llm.errors import UserError

Config = TypeVar("Config")


def with_options(cfg: Config, options: Mapping[str, Any]) -> Config:
    """Return the config, a frozen dataclass, with other values of some fields.

        with_options(RolloutConfig(), {"samples": 4})

    Raises:
        UserError: names every unknown field and every wrong value.
    """
    known = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    wrong = [
        f"{name}: got an unknown option, want one of: {', '.join(known)}.{_nested(name, known) or hint(name, known)}"
        for name in options
        if name not in known
    ]
    values = known | {k: v for k, v in options.items() if k in known}
    try:
        made = TypeAdapter(type(cfg)).validate_python(values)
    except ValidationError as error:
        by_path = errors_by_path(error.errors(), values)
        wrong += [f"{'.'.join(path)}: {_described(errors)}" for path, errors in by_path.items()]
    if wrong:
        raise UserError("\n".join(wrong))
    return made


def _nested(name: str, known: Mapping[str, Any]) -> str:
    """Where an option belongs, if it is one of a part of the config."""
    parts = (part for part, value in known.items() if name in getattr(value, "__dataclass_fields__", ()))
    return next((f" It belongs into {part}={{...}}" for part in parts), "")


def _described(errors: list) -> str:
    unknown = errors[0]["type"] == "unexpected_keyword_argument"
    return "got an unknown option" if unknown else got_and_want(errors)
