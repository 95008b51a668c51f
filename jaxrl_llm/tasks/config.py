"""What the run is about: where prompts and answers come from, and how text becomes tokens."""

import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from annotated_types import Ge, Le
from pydantic import AfterValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

ARITHMETIC_ALPHABET = "0123456789+<> #"


def check_template(template: str) -> str:
    """A format template over a row's columns: `{question}`, `{meta[level]}`; braces themselves are `{{` and `}}`."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        names = [""]
    if any(not name or name[0] in "[." or name[0].isdigit() for name in names):
        want = "fields that name a column, as in {question}, and {{ }} for braces themselves, as in \\boxed{{}}"
        raise PydanticCustomError("template", "{want}", {"want": want})
    return template


Template = Annotated[str, AfterValidator(check_template)]
Count = Annotated[int, Ge(0)]


@dataclass(frozen=True)
class CharacterTokenizer:
    """Token 0 is padding, then one token for each character of the alphabet."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    alphabet: str = ARITHMETIC_ALPHABET
    """Every character that prompts and responses may hold; the last one is the end token. Another character is an error."""


@dataclass(frozen=True)
class PretrainedTokenizer:
    """The tokenizer of a Hugging Face model, through transformers' AutoTokenizer."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = ""
    """Directory with tokenizer.json, or a name on the Hugging Face hub. Empty: the model's own directory."""
    chat: bool = True
    """Prompts are the user's turn in the tokenizer's chat template, with the generation prompt behind it. False: plain text."""
    system: str = ""
    """The system's turn. Empty: none is passed, and the template decides."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, e.g. enable_thinking: false."""
    stop: tuple[str, ...] = ()
    """Texts of one token each that end a response, beside the end tokens of the tokenizer and of generation_config.json."""
    special_in_data: Literal["split", "keep"] = "split"
    """What becomes of special tokens' names in columns of the data, as <|im_end|>: split, they are text and no row can close its
    own turn; kept, they are those tokens. Names that the config writes are those tokens always."""


def _kind(value: Any) -> str:
    has_alphabet = "alphabet" in value if isinstance(value, dict) else isinstance(value, CharacterTokenizer)
    return "character" if has_alphabet else "pretrained"


TokenizerConfig = Annotated[
    Annotated[CharacterTokenizer, Tag("character")] | Annotated[PretrainedTokenizer, Tag("pretrained")],
    Discriminator(_kind),
]


@dataclass(frozen=True)
class ArithmeticTask:
    """`<3+4+5>` asks for `12#`; all sums of `terms` digits, some of them held out."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["arithmetic"] = "arithmetic"
    terms: Annotated[int, Ge(2), Le(6)] = 3
    """Six have a million sums, all of which are written down."""
    held_out: Annotated[int, Ge(1)] = 128
    """Prompts kept for evaluation, drawn with the run's seed; never trained on."""

    @staticmethod
    def prompt(digits: Sequence[str]) -> str:
        """That asks for the sum of these."""
        return f"<{'+'.join(digits)}>"


@dataclass(frozen=True)
class FileTask:
    """Rows of a .jsonl or .parquet file, or of a directory written by `datasets.save_to_disk`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    kind: Literal["file"] = "file"
    split: str = "train"
    """Which part of a saved DatasetDict. Files have no parts."""
    held_out: Count = 0
    """Rows kept for evaluation, drawn with the run's seed; no prompt of theirs is trained on."""
    held_out_path: str = ""
    """Or: where the held-out rows lie. Empty with a `held_out_split`: in the same directory."""
    held_out_split: str = ""
    """Which part of a saved DatasetDict is held out. Empty: `split`."""
    prompt: Template = "{prompt}"
    """Format template over the row's columns."""
    answer: Template = "{answer}"
    """What the graders compare with. Empty: no answer."""
    response: Template = ""
    """The whole right response without the end token, for a supervised warm start and the exact evaluation. Empty: unknown."""
    max_prompt_tokens: Count = 0
    """Longest prompt, chat template included. 0: no limit."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """What is done about longer ones."""


@dataclass(frozen=True)
class ReasoningGymTask:
    """Entries that reasoning-gym makes: question, answer, metadata."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    """Of the dataset, e.g. chain_sum."""
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    config: dict[str, Any] = field(default_factory=dict)
    """The dataset's own settings, e.g. max_terms: 4."""
    size: Annotated[int, Ge(1), Le(10**6)] = 2000
    """Entries drawn for training."""
    held_out: Annotated[int, Ge(1), Le(10**6)] = 128
    """Entries drawn for evaluation; no prompt of theirs is trained on."""
    prompt: Template = "{question}"
    response: Template = ""
    """The whole right response without the end token, e.g. "{answer}". Empty: unknown."""
    max_prompt_tokens: Count = 0
    """Longest prompt, chat template included. 0: no limit."""
    too_long: Literal["refuse", "drop"] = "refuse"


TaskConfig = Annotated[ArithmeticTask | FileTask | ReasoningGymTask, Field(discriminator="kind")]
