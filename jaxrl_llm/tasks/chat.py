"""A chat template: prompts as the user's turn, and all that must be true of a template for them to be what the run is about."""

import difflib
import logging
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks.config import PretrainedTokenizer
from jaxrl_llm.tasks.renderer import RENDERER
from jaxrl_llm.tasks.turns import Turns, as_turns, no_unicode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

log = logging.getLogger("jaxrl_llm.tasks")
SYSTEMS = ("system", "developer")
# Texts that no template holds by itself.
SYSTEM, QUESTION, ANSWER = "Count to 8642.", "What is 7391 plus 2?", "It is 7393."

Content = Callable[[str], Any]
Messages = list[dict[str, Any]]


def as_parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


class LimitError(UserError):
    """A template that writes, holds or takes too much: nothing else is tried with it."""


class Template(NamedTuple):
    """The tokenizer's own, with the arguments that the run passes."""

    directory: Path
    fast: "PreTrainedTokenizerFast"
    source: str
    arguments: dict[str, Any]

    def write_all(self, turns: Sequence[Messages], prompt: bool = True, **more: Any) -> list[str | UserError]:
        """Each conversation as text, or what is wrong with it; `prompt`: with the beginning of the assistant's turn.

        A template that breaks a limit is asked no further: the conversations behind it are left out.
        """
        asked = {**self.fast.special_tokens_map, **self.arguments, **more, "add_generation_prompt": prompt}
        found = RENDERER.render(self.source, asked, turns)
        return [self._read(text, wrong) for text, wrong in found]

    def _read(self, text: str | None, wrong: str) -> str | UserError:
        if text is not None and not no_unicode(text):
            return text
        kind = LimitError if text is None and not wrong.startswith("raises") else UserError
        return kind(f"{self.directory}: the chat template {wrong or 'writes half of a character, want text'}")

    def write(self, turns: Messages, prompt: bool = True, **more: Any) -> str:
        """One of them. Raises UserError."""
        (found,) = self.write_all([turns], prompt, **more)
        if isinstance(found, UserError):
            raise found
        return found


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:500]}"


def chat(
    directory: Path, fast: "PreTrainedTokenizerFast", cfg: PretrainedTokenizer, eos: tuple[int, ...]
) -> tuple[Callable[[Sequence[Turns]], list[str | UserError]], frozenset[int]]:
    """Turns as text, with the config's system turn before those that have none, and the beginning of the assistant's behind; and
    the added tokens that stand between turns without being special.

    Raises UserError for a template whose prompts would lack one of the three, and warns of what it makes of turns beside.
    """
    try:
        source = fast.get_chat_template()
    except ValueError:
        raise UserError(
            f"{directory}: got no chat template (chat_template.jinja, or chat_template in tokenizer_config.json), "
            "want one, or tokenizer.chat: false for plain prompts"
        ) from None
    _check_arguments(source, cfg.template)
    template = Template(directory, fast, source, cfg.template)
    system, user = _forms(template, bool(cfg.system))

    def messages(turns: Turns, start: str = cfg.system) -> Messages:
        before = [{"role": "system", "content": system(start)}] if start and turns[0].role not in SYSTEMS else []
        forms = ((role, system if role in SYSTEMS else user, content.text) for role, content in turns)
        return [*before, *({"role": role, "content": form(text)} for role, form, text in forms)]

    asked = messages(as_turns(QUESTION), SYSTEM if cfg.system else "")
    answer = {"role": "assistant", "content": user(ANSWER)}
    _check_answer(template, asked, answer, eos)
    _check_clock(template, asked)
    # The question again: a template may write the empty thought of a last answer, and <think> is nobody's turn.
    delimiters = _added(fast, _written(template, [*asked, answer, asked[-1]]))
    return lambda prompts: _whole(
        template, prompts, template.write_all([messages(turns) for turns in prompts])
    ), delimiters


def _added(fast: "PreTrainedTokenizerFast", text: str) -> frozenset[int]:
    """Added tokens in the text that are not special."""
    backend = fast.backend_tokenizer
    plain = {id for id, token in backend.get_added_tokens_decoder().items() if not token.special}
    return frozenset(plain.intersection(backend.encode(text, add_special_tokens=False).ids))


def _whole(template: Template, prompts: Sequence[Turns], texts: list[str | UserError]) -> list[str | UserError]:
    """Templates have been tried with a system's and a user's turn: of others each must be in the text."""
    found = []
    for turns, text in zip(prompts, texts, strict=False):
        asked = [turn for turn in turns if turn.role != "assistant"] if len(turns) > 1 and isinstance(text, str) else []
        lacking = next((role for role, content in asked if content.text.strip() not in text), None)
        lacks = f"{template.directory}: the chat template leaves the {lacking}'s turn out, want messages that it writes"
        found.append(UserError(lacks) if lacking else text)
    return found


def _check_arguments(source: str, arguments: dict[str, Any]) -> None:
    """A template ignores an argument that it does not know, and so nobody would see the slip of the pen."""
    known = set(re.findall(r"[A-Za-z_]\w*", source))
    wrong = []
    for name in arguments:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f", perhaps you meant {near[0]}" if near else ""
            wrong.append(f"tokenizer.template.{name}: the chat template has no such argument{hint}")
    if wrong:
        raise UserError("\n".join(wrong))


def _forms(template: Template, has_system: bool) -> tuple[Content, Content]:
    """How the template wants the contents of the system's and of the user's turn: as text, or as a list of parts."""
    problems = []
    # Lists last: a template that prints any content would print a list as Python does.
    for system, user in ((str, str), (as_parts, str), (str, as_parts), (as_parts, as_parts)):
        start = [{"role": "system", "content": system(SYSTEM)}] if has_system else []
        try:
            text = template.write([*start, {"role": "user", "content": user(QUESTION)}])
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
    template: Template, asked: list[dict[str, Any]], answer: dict[str, Any], eos: tuple[int, ...]
) -> None:
    """The assistant's turn begins with the prompt, and ends with a token that ends a response."""
    prompt = template.write(asked)
    plain, whole = (_written(template, turns) for turns in (asked, [*asked, answer]))
    before, found, after = whole.rpartition(ANSWER)
    if prompt == plain:
        _check_beginning(template, prompt, before, known=bool(found) and before.startswith(prompt))
    if found:
        _check_end(template, after, eos)


def _written(template: Template, turns: list[dict[str, Any]]) -> str:
    """Turns that nothing follows; nothing where the template raises: a run asks for prompts alone."""
    try:
        return template.write(turns, prompt=False)
    except UserError:
        return ""


def _check_beginning(template: Template, prompt: str, before: str, known: bool) -> None:
    """Llama 2 and Mistral need no generation prompt: an answer stands right behind the user's turn there."""
    nothing = "the chat template writes no generation prompt (add_generation_prompt changes nothing)"
    if not known:
        log.warning("%s: %s: prompts may lack the beginning of the assistant's turn", template.directory, nothing)
    elif missing := before[len(prompt) :].strip():
        raise UserError(
            f"{template.directory}: {nothing}, though {missing!r} stands before an answer: every prompt would lack it; want it "
            "written where add_generation_prompt is true, or tokenizer.chat: false for plain prompts"
        )


def _check_end(template: Template, after: str, eos: tuple[int, ...]) -> None:
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


def _check_clock(template: Template, asked: list[dict[str, Any]]) -> None:
    """transformers gives templates a function `strftime_now`: one that calls it cannot be given a text in its place."""
    if "strftime_now" not in template.source:
        return
    try:
        template.write(asked, strftime_now="")
    except UserError:
        log.warning(
            "%s: the chat template writes today's date: a run that is resumed on another day reads other prompts; to pin it, pass "
            "a date in tokenizer.template where the template takes one (Llama 3: date_string), or write it into a copy of the "
            "template",
            template.directory,
        )
