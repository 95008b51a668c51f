"""What a policy is asked before it has tokens: turns, each with the stretches of its text that come from data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrl_llm.errors import UserError

ROLES = ("system", "developer", "user", "assistant", "tool")
Spans = tuple[tuple[int, int], ...]


class Filled(NamedTuple):
    """A text of which the config wrote the rest, if there is any."""

    text: str
    data: Spans
    """Start and end of what comes from data, in order."""


class Turn(NamedTuple):
    role: str
    content: Filled


Turns = tuple[Turn, ...]


class PromptError(UserError):
    """Prompts that the policy cannot be asked: places among those given, and words."""

    def __init__(self, problems: Sequence[tuple[int, str]]):
        super().__init__(problems[0][1])
        self.problems = problems


def no_unicode(text: str) -> str:
    """What is wrong with a text that no tokenizer can read; nothing for the rest. JSON and YAML can spell half a character."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"got {text[error.start]!r}, half of a character (a lone surrogate), want text"
    return ""


def from_data(text: str) -> Filled:
    return Filled(text, ((0, len(text)),))


def as_turns(prompt: str | Turns) -> Turns:
    """A text is the user's turn, and data."""
    return (Turn("user", from_data(prompt)),) if isinstance(prompt, str) else prompt


def shown(turns: Turns) -> str:
    """For people and graders: the text of a single turn, else each turn behind its role."""
    if len(turns) == 1:
        return turns[0].content.text
    return "\n".join(f"{role}: {content.text}" for role, content in turns)


def are_messages(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(isinstance(entry, Mapping) for entry in value)


def read_messages(messages: Sequence[Mapping[str, Any]]) -> Turns:
    """Raises ValueError in words."""
    return tuple(_read_message(number, message) for number, message in enumerate(messages))


def _read_message(number: int, message: Mapping[str, Any]) -> Turn:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"got message {number} with the role {role!r}, want one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        raise ValueError(f"got message {number} with tool_calls, want messages of text alone")
    if are_messages(content) and all(part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"got message {number} with a content of {type(content).__name__}, want text")
    return Turn(role, from_data(content))


def asked(turns: Turns) -> Turns:
    """The turns without an assistant's last one. Raises ValueError where nothing is asked then."""
    left = turns[:-1] if turns[-1].role == "assistant" else turns
    if not left or left[-1].role == "assistant" or not left[-1].content.text:
        raise ValueError("got messages that ask nothing, want a turn with text before the assistant's")
    return left


def answered(turns: Turns) -> Filled:
    """The assistant's last turn. Raises ValueError where there is none."""
    if turns[-1].role != "assistant":
        raise ValueError(f"got messages whose last turn is the {turns[-1].role}'s, want the assistant's")
    return turns[-1].content
