"""What the run is about: where prompts and answers come from."""

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge
from pydantic import ConfigDict, Field


@dataclass(frozen=True)
class ArithmeticTask:
    """`<3+4+5>` asks for `12#`; all sums of `terms` digits, some of them held out."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["arithmetic"] = "arithmetic"
    terms: Annotated[int, Ge(2)] = 3
    held_out: Annotated[int, Ge(1)] = 128
    """Prompts kept for evaluation, drawn with the run's seed; never trained on."""


@dataclass(frozen=True)
class JsonlTask:
    """Files of one JSON object a line with a "prompt" and an "answer", spelled in the alphabet below."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    held_out_path: str
    kind: Literal["jsonl"] = "jsonl"
    alphabet: str = "0123456789+<> #"
    """Every character that prompts and responses may hold; the last one is the end token."""


TaskConfig = Annotated[ArithmeticTask | JsonlTask, Field(discriminator="kind")]
