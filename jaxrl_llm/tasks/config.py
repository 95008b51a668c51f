"""Config of the task (where prompts and answers come from) and of the tokenizer."""

import re
import string
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, MinLen
from pydantic import AfterValidator, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

ARITHMETIC_ALPHABET = "0123456789+<> #"


def check_template(template: str) -> str:
    """Validate a format template over a row's columns: `{question}`, `{meta[level]}`; literal braces are `{{` and `}}`."""
    try:
        names = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
    except ValueError:
        names = [""]
    if any(not name or name[0] in "[." or name[0].isdigit() for name in names):
        want = "fields that name a column, as in {question}, and {{ }} for literal braces, as in \\boxed{{}}"
        raise PydanticCustomError("template", "{want}", {"want": want})
    return template


Template = Annotated[str, AfterValidator(check_template)]
Count = Annotated[int, Ge(0)]


def check_name(name: str) -> str:
    """Validate the name of a task in a mixture, or of a form of prompts."""
    if not re.fullmatch(r"[\w.-]+", name, re.ASCII):
        want = "letters, digits, . _ and -: it is part of metric names"
        raise PydanticCustomError("name", "{want}", {"want": want})
    return name


def check_example(template: str) -> str:
    """Validate the template of a few-shot example: text around {prompt} and {response}, each once."""
    fields = [parts[1:] for parts in string.Formatter().parse(check_template(template)) if parts[1] is not None]
    if sorted(fields) != [("prompt", "", None), ("response", "", None)]:
        want = "{prompt} and {response}, each once, and no other field"
        raise PydanticCustomError("example", "{want}", {"want": want})
    return template


Name = Annotated[str, AfterValidator(check_name)]


@dataclass(frozen=True)
class PromptForm:
    """A form in which training rows are asked. What is empty is as the task and the tokenizer have it."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Name
    """Name in metrics, and in the column that chooses a row's form."""
    prompt: Template = ""
    """Template of the prompt."""
    system: str = ""
    """System prompt."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, beside those of `tokenizer.template`."""
    response: Template = ""
    """Template of an example's response in this form. Empty: that of `examples`."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the visits or rows, relative to the other weights."""


@dataclass(frozen=True)
class ExamplesConfig:
    """Few-shot examples before each question: training rows with their responses."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    number: Annotated[int, Ge(0), Le(64)] = 0
    """Examples per prompt; fewer where they do not fit into `max_prompt_tokens`."""
    by: Literal["row", "visit"] = "row"
    """row: a row keeps its examples; visit: drawn at each visit. Those of held-out rows never change."""
    same: str = ""
    """Column in which examples have the row's value. Empty: any training row."""
    response: Template = ""
    """Template of an example's response. Empty: the task's `response`, or else its `answer`."""
    place: Literal["turns", "text"] = "turns"
    """turns: user and assistant turns before the question; text: in one text with the question."""
    text: Annotated[str, AfterValidator(check_example)] = "{prompt}\n{response}\n\n"
    """Template of an example in the text."""


@dataclass(frozen=True)
class PromptColumns:
    """Columns of the data with settings of single rows. Where a row's value is missing or null, the config's setting holds."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    form: str = ""
    """Column with the name of the row's form, in the evaluation too."""
    system: str = ""
    """Column with the row's system prompt, in every form."""
    template: dict[str, str] = field(default_factory=dict)
    """Columns by the argument of the chat template that they set, in every form."""
    max_new_tokens: str = ""
    """Column with the row's maximum of completion tokens."""


@dataclass(frozen=True)
class PromptingConfig:
    """How rows are asked. The evaluation asks in one form: that of the task's `prompt` and of the tokenizer's settings."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    forms: tuple[PromptForm, ...] = ()
    """Forms of the training prompts. Empty: that of the evaluation."""
    by: Literal["visit", "row"] = "visit"
    """visit: each visit of a row draws a form; row: a row keeps one."""
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    columns: PromptColumns = field(default_factory=PromptColumns)


@dataclass(frozen=True)
class CharacterTokenizer:
    """Character-level tokenizer: token 0 is padding, followed by one token per character of the alphabet."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    alphabet: str = ARITHMETIC_ALPHABET
    """All characters that prompts and responses may contain; the last one is the end token. Any other character is an error."""


@dataclass(frozen=True)
class PretrainedTokenizer:
    """Tokenizer of a Hugging Face model, loaded with transformers' AutoTokenizer."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str = ""
    """Directory with tokenizer.json, or a repository on the Hugging Face hub. Empty: the model's directory."""
    chat: bool = True
    """Render each prompt as a user turn of the chat template, followed by the generation prompt. False: plain text."""
    system: str = ""
    """System prompt. Empty: none is passed, and the template uses its default."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template, e.g. `enable_thinking: false`."""
    stop: tuple[str, ...] = ()
    """Further end tokens, each a text of exactly one token, besides those of the tokenizer and of generation_config.json."""
    special_in_data: Literal["split", "keep"] = "split"
    """Encoding of names of special tokens, such as <|im_end|>, in data columns. split: as ordinary text, so that no row can
    close its own turn; keep: as the special tokens. Names written in the config always become special tokens."""


def _kind(value: Any) -> str:
    has_alphabet = "alphabet" in value if isinstance(value, dict) else isinstance(value, CharacterTokenizer)
    return "character" if has_alphabet else "pretrained"


TokenizerConfig = Annotated[
    Annotated[CharacterTokenizer, Tag("character")] | Annotated[PretrainedTokenizer, Tag("pretrained")],
    Discriminator(_kind),
]


@dataclass(frozen=True)
class ArithmeticTask:
    """Sums of `terms` digits: the prompt `<3+4+5>` has the answer `12#`. Some of the sums are held out."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    kind: Literal["arithmetic"] = "arithmetic"
    terms: Annotated[int, Ge(2), Le(6)] = 3
    """Digits per sum. All 10 ** terms sums are generated."""
    held_out: Annotated[int, Ge(1)] = 128
    """Number of prompts held out for evaluation, chosen with the run's seed; never trained on."""

    @staticmethod
    def prompt(digits: Sequence[str]) -> str:
        """Return the prompt for the sum of these digits."""
        return f"<{'+'.join(digits)}>"


@dataclass(frozen=True)
class FileTask:
    """Rows of a .jsonl or .parquet file, or of a directory written by `datasets.save_to_disk`."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    kind: Literal["file"] = "file"
    split: str = "train"
    """Split of a saved DatasetDict. Files have no splits."""
    held_out: Count = 0
    """Number of rows held out for evaluation, chosen with the run's seed; their prompts are never trained on."""
    held_out_path: str = ""
    """Alternative to `held_out`: path of the held-out rows. Empty with a `held_out_split`: the same directory."""
    held_out_split: str = ""
    """Split of a saved DatasetDict that is held out. Empty: `split`."""
    prompt: Template = "{prompt}"
    """Format template over the row's columns, e.g. `{question}`."""
    answer: Template = "{answer}"
    """Template of the reference answer for graders. Empty: no answer."""
    response: Template = ""
    """Template of a complete correct response without the end token, for supervised training and exact evaluation. Empty: none."""
    max_prompt_tokens: Count = 0
    """Maximum prompt length in tokens, chat template included. 0: no limit."""
    too_long: Literal["refuse", "drop"] = "refuse"
    """refuse: a longer prompt is an error; drop: it is dropped with a warning."""
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    """Further forms of the prompts, few-shot examples, and settings of single rows."""


@dataclass(frozen=True)
class ReasoningGymTask:
    """Rows generated by reasoning-gym, with the columns question, answer and metadata."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: str
    """Name of the reasoning-gym dataset, e.g. chain_sum."""
    kind: Literal["reasoning_gym"] = "reasoning_gym"
    config: dict[str, Any] = field(default_factory=dict)
    """Settings of the dataset, e.g. `max_terms: 4`."""
    size: Annotated[int, Ge(1), Le(10**6)] = 2000
    """Number of rows generated for training."""
    held_out: Annotated[int, Ge(1), Le(10**6)] = 128
    """Number of rows generated for evaluation; their prompts are never trained on."""
    prompt: Template = "{question}"
    response: Template = ""
    """Template of a complete correct response without the end token, e.g. "{answer}". Empty: unknown."""
    max_prompt_tokens: Count = 0
    """Maximum prompt length in tokens, chat template included. 0: no limit."""
    too_long: Literal["refuse", "drop"] = "refuse"
    prompting: PromptingConfig = field(default_factory=PromptingConfig)
    """Further forms of the prompts, few-shot examples, and settings of single rows."""


@dataclass(frozen=True)
class RolloutsTask:
    """Stored responses, for supervised training: a file of `jaxrl sample --out`, a run's rollouts.jsonl, or texts of others. Each
    response is a row; its tokens are those of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    path: str
    """A .jsonl or .parquet file."""
    kind: Literal["rollouts"] = "rollouts"
    keep: Literal["success", "all"] = "success"
    """success: responses that the first grader found right; all: every response."""
    distinct: bool = True
    """Take equal responses to a prompt once."""
    best: Count = 0
    """Maximum number of responses per prompt, those of the highest rewards. 0: no limit."""
    held_out: Annotated[int, Ge(1)] = 128
    """Number of prompts held out for evaluation, chosen with the run's seed; none of their responses is trained on."""
    max_prompt_tokens: Count = 0
    """Maximum prompt length in tokens. 0: no limit."""
    too_long: Literal["refuse", "drop"] = "refuse"


SingleTask = ArithmeticTask | FileTask | ReasoningGymTask | RolloutsTask


@dataclass(frozen=True)
class TaskPart:
    """One task of a mixture."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    name: Name
    """Name in metrics and in `reward.graders[i].tasks`, and the value of the column `task` in its rows."""
    task: Annotated[SingleTask, Field(discriminator="kind")] = field(default_factory=ArithmeticTask)
    """Rows, templates of prompt and answer, and held-out rows."""
    weight: Annotated[float, Gt(0)] = 1.0
    """Share of the prompts, relative to the other weights."""
    max_new_tokens: Annotated[int, Ge(1)] | None = None
    """Maximum completion tokens per row. None: that of `rollout`."""
    system: str = ""
    """System prompt of this task's prompts. Empty: that of `tokenizer`."""
    template: dict[str, Any] = field(default_factory=dict)
    """Arguments of the chat template for this task's prompts, beside those of `tokenizer.template`."""


@dataclass(frozen=True)
class MixtureTask:
    """Several tasks, from which a step's prompts are drawn by weight. A bare list is a mixture of these tasks."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    tasks: Annotated[tuple[TaskPart, ...], MinLen(1)]
    """The tasks, with distinct names."""
    kind: Literal["mixture"] = "mixture"
    listed: ClassVar[str] = "tasks"
    """Field that a short form gives: `config.schema.types_as_written`."""

    @staticmethod
    def written_out(value: Any) -> Any:
        """Expand the short form, a list of tasks."""
        return {"kind": "mixture", "tasks": value} if isinstance(value, list | tuple) else value


TaskConfig = Annotated[
    Annotated[SingleTask | MixtureTask, Field(discriminator="kind")], BeforeValidator(MixtureTask.written_out)
]
