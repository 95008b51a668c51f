"""Controls for scripts, `rl.controls`: what responses may consist of. Imports no jax.

    engine = rl.Engine(model, control=rl.controls.regex("[0-9]+"))
    controls = engine.controls(2, control=[rl.controls.choice("yes", "no"), rl.controls.none()])
    session.add(["Is 7 prime?", "Why?"], controls=controls)

Each function returns a config, as `rollout.control` of a run has it, and raises UserError for wrong arguments. An engine that gets
it checks whether its tokenizer can spell what is asked for.
"""

import json
import os
from collections.abc import Mapping
from typing import Any

from jaxrl_llm.config.options import with_options
from jaxrl_llm.control.config import (
    AllowControl,
    Answer,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    ForbidControl,
    JsonSchemaControl,
    NoControl,
    RegexControl,
    StopControl,
)
from jaxrl_llm.errors import UserError


def none() -> NoControl:
    """Responses are sampled freely.

    rl.controls.none()
    """
    return NoControl()


def regex(pattern: str) -> RegexControl:
    """Responses match a regular expression as a whole, in the syntax of Rust's regex crate.

    rl.controls.regex("-?[1-9][0-9]{0,5}")
    """
    return with_options(RegexControl(), {"pattern": pattern})


def json_schema(schema: Mapping[str, Any] | str | os.PathLike[str], whitespace: str = "[ ]?") -> JsonSchemaControl:
    """Responses are JSON that is valid under a schema.

        rl.controls.json_schema({"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]})
        rl.controls.json_schema("person.json")

    Args:
        schema: the schema, or the path of a file with it; of a pydantic model, `Model.model_json_schema()`.
        whitespace: regular expression of the white space between two JSON tokens.
    """
    if isinstance(schema, str | os.PathLike):
        return with_options(JsonSchemaControl(), {"path": os.fspath(schema), "whitespace": whitespace})
    try:
        json.dumps(schema)
    except (TypeError, ValueError) as error:
        raise UserError(f"schema: got values that are not JSON: {error}; want a JSON schema or a path") from None
    return with_options(JsonSchemaControl(), {"schema": schema, "whitespace": whitespace})


def choice(*texts: str) -> ChoiceControl:
    """Responses are one of some texts.

    rl.controls.choice("yes", "no")
    """
    return with_options(ChoiceControl(), {"texts": texts})


def allow(*tokens: int | str) -> AllowControl:
    """Responses consist of some tokens, and end tokens, only: token ids, or texts of exactly one token each.

    rl.controls.allow("0", "1")
    """
    return with_options(AllowControl(), {"tokens": tokens})


def forbid(*tokens: int | str) -> ForbidControl:
    """Responses have none of some tokens: token ids, or texts of exactly one token each.

    rl.controls.forbid("<think>", 17)
    """
    return with_options(ForbidControl(), {"tokens": tokens})


def stop(*texts: str) -> StopControl:
    """Responses end with the token that completes one of some texts, on the device.

    rl.controls.stop("</answer>")
    """
    return with_options(StopControl(), {"texts": texts})


def budget(
    tokens: int,
    close: str = "</think>",
    closing: str = "",
    waits: int = 0,
    wait: str = "Wait",
    then: Answer | None = None,
) -> BudgetControl:
    """Thinking of a limited number of tokens, then an answer (s1, arXiv 2501.19393).

        rl.controls.budget(256, closing=" So the answer is</think>", then=rl.controls.regex(" -?[0-9]+"))

    Args:
        tokens: completion slots for thinking; in the slot behind them `closing` is forced.
        close: text that ends the thinking.
        closing: text that is forced, which contains `close`; empty: `close` itself.
        waits: number of times that `wait` takes the place of the token that would end the thinking.
        wait: text that makes the policy think on.
        then: control of the answer: `none`, `regex`, `json_schema` or `choice`.
    """
    given = {"tokens": tokens, "close": close, "closing": closing, "waits": waits, "wait": wait}
    return with_options(BudgetControl(), given | {"then": none() if then is None else then})


def begin(text: str, then: Answer | BudgetControl | None = None) -> BeginControl:
    """Responses begin with a text that is forced: context, never trained.

        rl.controls.begin("<think>", then=rl.controls.budget(256))

    Args:
        text: what they begin with.
        then: control of what follows: `none`, `regex`, `json_schema`, `choice` or `budget`, whose tokens count the text too.
    """
    return with_options(BeginControl(), {"text": text, "then": none() if then is None else then})
