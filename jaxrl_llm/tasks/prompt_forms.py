"""Forms of prompts: the questions of a row in the template, with the system prompt and the chat-template arguments of each form,
and the settings that columns give to single rows."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from jaxrl_llm.tasks.chat import SYSTEM_ROLES, argument_problems
from jaxrl_llm.tasks.config import PromptForm, PromptingConfig
from jaxrl_llm.tasks.records import refuse
from jaxrl_llm.tasks.rows import Question, UntokenizedRow, by_row
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.tasks.turns import FilledText, PromptError, Turn, Turns, as_text, from_data, unicode_problem

WHERE = "task.prompting"
EXAMPLE_RESPONSE = "prompting.examples.response"


def is_active(cfg: PromptingConfig) -> bool:
    """False if every row is asked by the task's `prompt` alone."""
    return cfg != PromptingConfig()


def templates(cfg: PromptingConfig) -> dict[str, str]:
    """Return the templates to fill beside the task's own, by the name of the config field."""
    found = {EXAMPLE_RESPONSE: cfg.examples.response} if cfg.examples.number else {}
    for i, form in enumerate(cfg.forms):
        found |= {_setting(i, "prompt"): form.prompt, _setting(i, "response"): form.response}
    return {name: template for name, template in found.items() if template}


def _setting(form: int, name: str) -> str:
    return f"prompting.forms.{form}.{name}"


def example_of(text: UntokenizedRow, form: str) -> tuple[Turns, FilledText]:
    """Return question and response of a row as an example in a form; an empty response if none is known."""
    number = next(n for n, question in enumerate(text.questions) if question.form == form)
    response = text.more.get(_setting(number - 1, "response")) or text.more.get(EXAMPLE_RESPONSE) or text.response
    return without_system(text.questions[number].turns), response or from_data(text.answer)


def problems(cfg: PromptingConfig, tokenizer: Tokenizer) -> list[str]:
    """Errors that no row is needed for: names, and what needs a chat template or does not fit it."""
    found, names = [], [form.name for form in cfg.forms]
    for i, name in enumerate(names):
        if name in names[:i]:
            found.append(f"{WHERE}.forms.{i}.name: got {name!r} again, want distinct names")
    if cfg.columns.form and not cfg.forms:
        found.append(
            f"{WHERE}.columns.form: got {cfg.columns.form!r}, want it empty, or {WHERE}.forms that it chooses from"
        )
    found += [
        f"{WHERE}.forms.{i}.response: got {form.response!r}, want it empty, or {WHERE}.examples.number above 0"
        for i, form in enumerate(cfg.forms)
        if form.response and not cfg.examples.number
    ]
    needs_chat = {
        **{f"forms.{i}.system": form.system for i, form in enumerate(cfg.forms)},
        **{f"forms.{i}.template": form.template for i, form in enumerate(cfg.forms)},
        "columns.system": cfg.columns.system,
        "columns.template": cfg.columns.template,
        "examples.place": cfg.examples.place if cfg.examples.number and cfg.examples.place == "turns" else "",
    }
    if tokenizer.chat_template is None:
        for name, value in needs_chat.items():
            want = "text" if name == "examples.place" else "it empty"
            if value:
                found.append(f"{WHERE}.{name}: got {value!r}, want {want}, or a tokenizer with a chat template")
        return found
    found += argument_problems(tokenizer.chat_template, cfg.columns.template, f"{WHERE}.columns.template")
    for i, form in enumerate(cfg.forms):
        found += _form_problems(form, f"{WHERE}.forms.{i}", tokenizer)
    return found


def _form_problems(form: PromptForm, where: str, tokenizer: Tokenizer) -> list[str]:
    if unknown := argument_problems(tokenizer.chat_template, form.template, f"{where}.template"):
        return unknown
    if wrong := unicode_problem(form.system):
        return [f"{where}.system: {wrong}"]
    try:
        tokenizer.prompt_batch([_under(form.system, (Turn("user", from_data("1+1")),))], form.template)
    except PromptError as error:
        return [f"{where}: {error}"]
    return []


def _under(system: str | FilledText, turns: Turns) -> Turns:
    """The turns after a system prompt; a string is text of the config."""
    start = FilledText(system, ()) if isinstance(system, str) else system
    return (Turn("system", start), *turns) if start.text else turns


def without_system(turns: Turns) -> Turns:
    return tuple(turn for turn in turns if turn.role not in SYSTEM_ROLES)


def with_questions(cfg: PromptingConfig, texts: Sequence[UntokenizedRow]) -> list[UntokenizedRow]:
    """Return the rows with the question of each form, and with the settings of their columns.

    Raises:
        UserError: names a column that the data do not have, or the first few rows that do not fit.
    """
    if not is_active(cfg):
        return list(texts)
    known = dict.fromkeys(name for text in texts for name in text.columns)
    wanted = {
        "columns.form": cfg.columns.form, "columns.system": cfg.columns.system,
        **{f"columns.template.{name}": column for name, column in cfg.columns.template.items()},
        "columns.max_new_tokens": cfg.columns.max_new_tokens, "examples.same": cfg.examples.same,
    }  # fmt: skip
    refuse(
        [
            f"{WHERE}.{name}: got {column!r}, want one of the data's columns: {', '.join(known)}"
            for name, column in wanted.items()
            if column and column not in known
        ]
    )
    found, bad = [], []
    for text in texts:
        try:
            found.append(_with_questions(cfg, text))
        except ValueError as error:
            bad.append((text.where, f"{WHERE}.{error}"))
    refuse(by_row(bad, len(texts)))
    return found


def _with_questions(cfg: PromptingConfig, text: UntokenizedRow) -> UntokenizedRow:
    """Raises ValueError with a message that begins with the name of the setting."""
    columns, names = cfg.columns, [form.name for form in cfg.forms]
    form, limit = (_one(text.columns, getattr(columns, name), name) for name in ("form", "max_new_tokens"))
    system = _one(text.columns, columns.system, "system")
    given = {name: text.columns.get(column) for name, column in columns.template.items()}
    arguments = {name: value for name, value in given.items() if value is not None}
    if form is not None and form not in names:
        raise ValueError(f"columns.form: got {form!r} in the column {columns.form}, want one of {', '.join(names)}")
    if system is not None and (wrong := unicode_problem(system)):
        raise ValueError(f"columns.system: {wrong}")

    def question(name: str, turns: Turns, of_form: str, template: Mapping[str, Any]) -> Question:
        start = of_form if system is None else from_data(system)
        if start and turns[0].role in SYSTEM_ROLES:
            raise ValueError(
                f"{_origin(system, name, names)}: got messages with a system turn of their own, want none in them"
            )
        if cfg.examples.number and cfg.examples.place == "text" and len(without_system(turns)) > 1:
            raise ValueError("examples.place: got text for messages of several turns, want turns")
        return Question(name, as_text(turns), _under(start, turns), {**template, **arguments})

    stated = question("", text.turns, "", {})
    forms = [
        question(each.name, text.more.get(_setting(i, "prompt"), text.turns), each.system, each.template)
        for i, each in enumerate(cfg.forms)
    ]
    own = None if form is None else 1 + names.index(form)
    return replace(text, questions=(stated, *forms), own=own, max_new_tokens=limit)


def _origin(system: str | None, name: str, names: Sequence[str]) -> str:
    """The setting that gives a question's system prompt."""
    return f"forms.{names.index(name)}.system" if system is None else "columns.system"


def _one(columns: Mapping[str, Any], column: str, name: str) -> Any:
    """The row's value of a setting; None if there is none. Raises ValueError if it is of another kind."""
    value = columns.get(column) if column else None
    if value is None:
        return None
    if name == "max_new_tokens":
        if type(value) is not int or value < 1:
            raise ValueError(f"columns.{name}: got {value!r} in the column {column}, want a whole number, 1 or more")
    elif not isinstance(value, str) or not value:
        raise ValueError(f"columns.{name}: got {value!r} in the column {column}, want text")
    return value
