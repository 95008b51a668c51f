"""`--regex` and `--json-schema` of `jaxrl sample`, in place of `rollout.control`. Imports no jax."""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from jaxrl_llm.errors import UserError

if TYPE_CHECKING:
    from jaxrl_llm.config.run_config import RunConfig

OPTIONS = ("--regex", "--json-schema")


def controlled(cfg: "RunConfig", given: Mapping[str, Any]) -> "RunConfig":
    """Return the config with the control that an option asks for. Raises UserError if both do."""
    from jaxrl_llm.control import controls

    if all(name in given for name in OPTIONS):
        raise UserError("--regex: got it with --json-schema, want one of the two")
    if "--regex" in given:
        control = controls.regex(given["--regex"])
    elif "--json-schema" in given:
        control = controls.json_schema(given["--json-schema"])
    else:
        return cfg
    return dataclasses.replace(cfg, rollout=dataclasses.replace(cfg.rollout, control=control))


@contextmanager
def named_by_option(given: Mapping[str, Any]) -> Iterator[None]:
    """Errors about `rollout.control` name the option that asked for it."""
    try:
        yield
    except UserError as error:
        for name in OPTIONS:
            if name in given:
                text = re.sub(r"rollout\.control(\.(pattern|path|schema)\b)?", name, str(error))
                raise type(error)(text) from error
        raise
