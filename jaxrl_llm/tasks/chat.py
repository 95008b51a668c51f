"""Prompts rendered through a tokenizer's chat template, and the checks that a template must pass first."""

import difflib
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.renderer import RENDERER
from jaxrl_llm.tasks.turns import Turns, as_turns, unicode_problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("jaxrl_llm.tasks")
SYSTEM_ROLES = ("system", "developer")
# Probe texts that no template contains by itself.
SYSTEM, QUESTION, ANSWER = "Count to 8642.", "What is 7391 plus 2?", "It is 7393."

ContentFormat = Callable[[str], Any]
Renderer = Callable[[Sequence[Turns], Mapping[str, Any]], list[str | UserError]]
Messages = list[dict[str, Any]]


def text_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


class LimitError(UserError):
    """A template that exceeds a limit of time, memory or output; it is not rendered again."""


class ChatTemplate(NamedTuple):
    """The chat template of a tokenizer and the arguments that the run passes to it."""

    directory: Path
    fast: "PreTrainedTokenizerFast"
    source: str
    arguments: dict[str, Any]

    def render_all(self, turns: Sequence[Messages], prompt: bool = True, **more: Any) -> list[str | UserError]:
        """Render each conversation, or return the error in its place.

        If one conversation exceeds a limit, the result ends with its error.

        Args:
            turns: One list of messages per conversation.
            prompt: Append the generation prompt (the beginning of the assistant's turn).
            **more: Further template arguments.
        """
        arguments = {**self.fast.special_tokens_map, **self.arguments, **more, "add_generation_prompt": prompt}
        found = RENDERER.render(self.source, arguments, turns)
        return [self._read(text, wrong) for text, wrong in found]

    def _read(self, text: str | None, wrong: str) -> str | UserError:
        if text is not None and not unicode_problem(text):
            return text
        kind = LimitError if text is None and not wrong.startswith("raises") else UserError
        return kind(f"{self.directory}: the chat template {wrong or 'writes half of a character, want text'}")

    def render(self, turns: Messages, prompt: bool = True, **more: Any) -> str:
        """Render one conversation. Raises UserError."""
        (found,) = self.render_all([turns], prompt, **more)
        if isinstance(found, UserError):
            raise found
        return found


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"


def make_chat_renderer(
    directory: Path, fast: "PreTrainedTokenizerFast", cfg: PretrainedTokenizer, eos: tuple[int, ...]
) -> tuple[Renderer, frozenset[int], str]:
    """Return a function from conversations to prompt texts, the delimiter tokens of the template, and its source.

    A prompt has the config's system turn, unless the conversation has one, and ends with the generation prompt. Raises UserError
    for a template that leaves out the system turn, the prompt or the generation prompt; other oddities are logged as warnings.

    Args:
        directory: The tokenizer's directory, for messages.
        fast: The tokenizer.
        cfg: Its config: system prompt and template arguments.
        eos: Tokens that end a response.

    Returns:
        The renderer (an error stands in place of a conversation that cannot be rendered; its second argument has further template
        arguments), the ids of added tokens that separate turns without being special, and the source.
    """
    try:
        source = fast.get_chat_template()
    except ValueError:
        raise UserError(
            f"{directory}: got no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "want one, or tokenizer.chat: false for plain prompts"
        ) from None
    if wrong := argument_problems(source, cfg.template, "tokenizer.template"):
        raise UserError("\n".join(wrong))
    template = ChatTemplate(directory, fast, source, cfg.template)
    system, user = _content_formats(template, bool(cfg.system))

    def messages(turns: Turns, start: str = cfg.system) -> Messages:
        before = [{"role": "system", "content": system(start)}] if start and turns[0].role not in SYSTEM_ROLES else []
        formats = ((role, system if role in SYSTEM_ROLES else user, content.text) for role, content in turns)
        return [*before, *({"role": role, "content": as_content(text)} for role, as_content, text in formats)]

    question = messages(as_turns(QUESTION), SYSTEM if cfg.system else "")
    answer = {"role": "assistant", "content": user(ANSWER)}
    _check_answer(template, question, answer, eos)
    _check_clock(template, question)
    # The question again: a template may render an empty <think> block in a final answer, and <think> is no delimiter.
    delimiters = _added_tokens(fast, _render_or_empty(template, [*question, answer, question[-1]]))

    def render(prompts: Sequence[Turns], arguments: Mapping[str, Any]) -> list[str | UserError]:
        own = template._replace(arguments={**template.arguments, **arguments})
        return _check_all_turns(own, prompts, own.render_all([messages(turns) for turns in prompts]))

    return render, delimiters, source


def _added_tokens(fast: "PreTrainedTokenizerFast", text: str) -> frozenset[int]:
    """Added tokens in the text that are not special."""
    backend = fast.backend_tokenizer
    plain = {id for id, token in backend.get_added_tokens_decoder().items() if not token.special}
    return frozenset(plain.intersection(backend.encode(text, add_special_tokens=False).ids))


def _check_all_turns(
    template: ChatTemplate, prompts: Sequence[Turns], texts: list[str | UserError]
) -> list[str | UserError]:
    """Replace texts that lack a turn by errors: `make_chat_renderer` has tried one system and one user turn only."""
    found = []
    for turns, text in zip(prompts, texts, strict=False):
        expected = (
            [turn for turn in turns if turn.role != "assistant"] if len(turns) > 1 and isinstance(text, str) else []
        )
        missing = next((role for role, content in expected if content.text.strip() not in text), None)
        error = f"{template.directory}: the chat template leaves the {missing}'s turn out, want messages that it writes"
        found.append(UserError(error) if missing else text)
    return found


def argument_problems(source: str, arguments: Iterable[str], where: str) -> list[str]:
    """Errors for arguments that a chat template does not use: it would silently ignore a typo. `where`: their setting."""
    known = set(re.findall(r"[A-Za-z_]\w*", source))
    wrong = []
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", perhaps you meant {near[0]}" if near else ""
            wrong.append(f"{where}.{name}: the chat template has no such argument{hint}")
    return wrong


def _content_formats(template: ChatTemplate, has_system: bool) -> tuple[ContentFormat, ContentFormat]:
    """Content formats of system and user turns that the template renders: plain text or a list of parts."""
    problems = []
    # Lists last: a template that prints any content would print the repr of a list.
    for system, user in ((str, str), (text_parts, str), (str, text_parts), (text_parts, text_parts)):
        start = [{"role": "system", "content": system(SYSTEM)}] if has_system else []
        try:
            text = template.render([*start, {"role": "user", "content": user(QUESTION)}])
        except LimitError:
            raise
        except UserError as error:
            problems.append(error)
            continue
        if QUESTION in text and (SYSTEM in text or not has_system):
            return system, user
        lacks = "tokenizer.system: the chat template leaves the system prompt out, want it empty"
        if QUESTION not in text:
            lacks = "the chat template leaves the prompt out, as text and as a list of parts: want one that writes the user's turn"
        problems.append(UserError(f"{template.directory}: {lacks}"))
    raise problems[0]


def _check_answer(
    template: ChatTemplate, question: list[dict[str, Any]], answer: dict[str, Any], eos: tuple[int, ...]
) -> None:
    """Check that the assistant's turn begins with the generation prompt and ends with an end token."""
    prompt = template.render(question)
    plain, whole = (_render_or_empty(template, turns) for turns in (question, [*question, answer]))
    before, found, after = whole.rpartition(ANSWER)
    if prompt == plain:
        _check_beginning(template, prompt, before, known=bool(found) and before.startswith(prompt))
    if found:
        _check_end(template, after, eos)


def _render_or_empty(template: ChatTemplate, turns: list[dict[str, Any]]) -> str:
    """The conversation without generation prompt; "" if the template raises, since runs only need prompts."""
    try:
        return template.render(turns, prompt=False)
    except UserError:
        return ""


def _check_beginning(template: ChatTemplate, prompt: str, before: str, known: bool) -> None:
    """Check for a generation prompt. Llama 2 and Mistral need none: the answer directly follows the user's turn."""
    nothing = "the chat template writes no generation prompt (add_generation_prompt changes nothing)"
    if not known:
        log.warning("%s: %s: prompts may lack the beginning of the assistant's turn", template.directory, nothing)
    elif missing := before[len(prompt) :].strip():
        raise UserError(
            f"{template.directory}: {nothing}, though {missing!r} stands before an answer: every prompt would lack it; want it "
            "rendered where add_generation_prompt is true, or tokenizer.chat: false for plain prompts"
        )


def _check_end(template: ChatTemplate, after: str, eos: tuple[int, ...]) -> None:
    backend = template.fast.backend_tokenizer
    added = backend.get_added_tokens_decoder()
    ids = [id for id in backend.encode(after, add_special_tokens=False).ids if id in added]
    end = next((id for id in ids if added[id].special), ids[0] if ids else None)
    text = after.strip() if end is None else added[end].content
    if text and end not in eos:
        setting = "rollout.stop" if end is None else "tokenizer.stop"
        log.warning(
            "%s: the chat template ends the assistant's turn with %r, which ends no response here: want it in %s",
            template.directory, text, setting,
        )  # fmt: skip


def _check_clock(template: ChatTemplate, question: list[dict[str, Any]]) -> None:
    """Warn if the template renders today's date: it calls `strftime_now`, and fails when given a string in its place."""
    if "strftime_now" not in template.source:
        return
    try:
        template.render(question, strftime_now="")
    except UserError:
        log.warning(
            "%s: the chat template writes today's date: a run that is resumed on another day reads other prompts; to pin it, pass "
            "a date in tokenizer.template where the template takes one (Llama 3: date_string), or write it into a copy of the "
            "template",
            template.directory,
        )
