"""Conversations before tokenization: turns whose text records which spans come from data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
Spans = tuple[tuple[int, int], ...]


class FilledText(NamedTuple):
    """A filled-in template. Text outside the `data` spans was written in the config."""

    text: str
    data: Spans
    """Start and end of each span that comes from data, in order."""


class Turn(NamedTuple):
    role: str
    content: FilledText


Turns = tuple[Turn, ...]


class PromptError(UserError):
    """Prompts that cannot be tokenized, as (index among the given prompts, message)."""

    def __init__(self, problems: Sequence[tuple[int, str]]):
        super().__init__(problems[0][1])
        self.problems = problems


def unicode_problem(text: str) -> str:
    """Error message for a text that no tokenizer can read, "" if it is valid. JSON and YAML can spell lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"got {text[error.start]!r}, half of a character (a lone surrogate), want text"
    return ""


def from_data(text: str) -> FilledText:
    """A text that comes from data entirely."""
    return FilledText(text, ((0, len(text)),))


def as_turns(prompt: str | Turns) -> Turns:
    """The prompt as turns; a plain string becomes one user turn whose text is data."""
    return (Turn("user", from_data(prompt)),) if isinstance(prompt, str) else prompt


def as_text(turns: Turns) -> str:
    """The turns as graders and logs show them: the text of a single turn, else each turn prefixed with its role."""
    if len(turns) == 1:
        return turns[0].content.text
    return "\n".join(f"{role}: {content.text}" for role, content in turns)


def are_messages(value: Any) -> bool:
    """True for a non-empty list of mappings."""
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Turns:
    """Convert chat messages to turns. Raises ValueError with a message for the user."""
    return tuple(_read_message(number, message) for number, message in enumerate(messages))


def _read_message(number: int, message: Mapping[str, Any]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"got message {number} with the role {role!r}, want one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise ValueError(f"got message {number} with tool_calls, want text-only messages")
    if are_messages(content) and all(part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"got message {number} with a content of {type(content).__name__}, want text")
    return Turn(role, from_data(content))


def prompt_turns(turns: Turns) -> Turns:
    """The turns without a final assistant turn. Raises ValueError if no question is left."""
    left = turns[:-1] if turns[-1].role == "assistant" else turns
    if not left or left[-1].role == "assistant" or not left[-1].content.text:
        raise ValueError("got messages without a question, want a turn with text before the assistant's")
    return left


def answer_text(turns: Turns) -> FilledText:
    """The text of the final assistant turn. Raises ValueError if the last turn is another role's."""
    if turns[-1].role != "assistant":
        raise ValueError(f"got messages whose last turn is the {turns[-1].role}'s, want the assistant's")
    return turns[-1].content
