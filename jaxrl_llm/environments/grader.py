"""Graders: pure functions of one sample's strings to one number, and how a config's names become such functions.

They see text and nothing of groups, policies or devices. They run in worker processes (`pool.py`), so a grader may
raise, hang or die: its group is lost and counted, the run goes on. A grader of your own is any importable function of a
`Sample`, or a class that makes one; the built-in ones are frozen dataclasses whose fields are their options.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_type_hints

from jaxrl_llm.config import user_code
from jaxrl_llm.errors import UserError

# Workers import this module, and start sooner without pydantic.
if TYPE_CHECKING:
    from jaxrl_llm.environments.config import RewardConfig


SHOWN = 5
"""Rows of a grader that are told one by one."""


class Sample(NamedTuple):
    """What a grader may judge."""

    prompt: str
    completion: str
    """The whole response as the tokenizer decodes it; nothing stripped."""
    answer: str
    """The task row's answer, as the grader of that task reads it."""
    finish: str
    """Why the response ended: "eos", "length" (cut off) or "control"."""
    columns: Mapping[str, object] = {}
    """The whole row of the data set."""
    num_tokens: int | None = None
    """Tokens of the completion, the end token included; None where nobody counted."""


Grader = Callable[[Sample], float]
"""It may offer `extract(sample) -> str`, the final answer in one spelling ("" if there is none): the vote in maj@k.
It may offer `start()`, called once in a worker before any deadline: the place for slow imports.
It may offer `problem(row) -> str`, asked of each row (a sample without a response) before the run starts: why it cannot grade it,
"" if it can."""

BUILT_IN = {
    "exact_match": "jaxrl_llm.environments.graders.text:ExactMatch",
    "regex": "jaxrl_llm.environments.graders.text:Regex",
    "format": "jaxrl_llm.environments.graders.text:Format",
    "length": "jaxrl_llm.environments.graders.text:Length",
    "multiple_choice": "jaxrl_llm.environments.graders.choice:MultipleChoice",
    "numeric": "jaxrl_llm.environments.graders.numeric:Numeric",
    "gsm8k": "jaxrl_llm.environments.graders.numeric:Gsm8k",
    "math": "jaxrl_llm.environments.graders.mathematics:Math",
    "reasoning_gym": "jaxrl_llm.environments.graders.reasoning_gym:ReasoningGym",
}
"""Short names. What they stand for is found as any other grader is."""


def make(name: str, options: Mapping[str, Any] = {}) -> Grader:
    """The grader called `name`, a built-in or "module:function", with its options.

    Raises:
      UserError: what `name` means cannot be found, imported or called.
    """
    return user_code.made(resolve(name), options)


def problems(config: "RewardConfig") -> list[str]:
    """Everything that is wrong with the graders of a config, in words. Imports users' modules, but no library of a built-in."""
    found, labels = [], [grader.label for grader in config.graders]
    for index, grader in enumerate(config.graders):
        where = f"reward.graders.{index}"
        try:
            found += [f"{where}.options{text}" for text in _wrong_options(grader.grader, grader.options)]
        except UserError as error:
            found.append(f"{where}.grader: {error}")
        if grader.label in labels[:index]:
            found.append(f'{where}.name: got "{grader.label}" again, want another name: it is the name in the metrics')
        if not grader.label.isprintable():
            found.append(f"{where}.name: got {grader.label!a}, want characters that can be printed")
    return found


def unreadable_rows(config: "RewardConfig", rows: Sequence[tuple[str, Sample]]) -> list[str]:
    """Rows with an answer that a grader cannot read: for each grader the first few, and how many there are. Each row is where it
    stands, and a sample without a response. The graders have no `problems`."""
    found = []
    for grader in config.graders:
        if not hasattr(resolve(grader.grader), "problem"):
            continue
        try:
            problem = make(grader.grader, grader.options).problem
            wrong = [(where, row, why) for where, row in rows if (why := problem(row))]
        except Exception as error:
            found.append(
                f'grader "{grader.label}": asking it for problems of rows failed: {type(error).__name__}: {error}'
            )
            continue
        for where, row, why in wrong[:SHOWN]:
            found.append(f'{where or "a row"} ({row.prompt[:60]!r}): grader "{grader.label}": {why}')
        if wrong:
            what = f'grader "{grader.label}" cannot grade {len(wrong)} of {len(rows)} rows'
            found.append(f"{what}: mend them, leave them out, or choose another grader")
    return found


def resolve(name: str) -> Callable:
    """What `name` stands for: a class that makes a grader, or a function that is one. Raises UserError as `own.resolve` does."""
    return user_code.resolve(name, "a function of one Sample", BUILT_IN)


def _wrong_options(name: str, options: Mapping[str, Any]) -> list[str]:
    """What is wrong with the options of a grader, each as ".option: why" or ": why"."""
    found = resolve(name)
    if name not in BUILT_IN:
        if isinstance(found, type) and (wrong := user_code.wrong_methods(name, found, {"__call__": ("sample",)})):
            raise UserError(wrong)
        return user_code.wrong_arguments(name, found, options, (Sample("", "", "", ""),))
    known = [field.name for field in dataclasses.fields(found)]
    wrong = [
        f'.{option}: grader "{name}" has no such option, want some of: {", ".join(known)}.{user_code.hint(option, known)}'
        for option in options
        if option not in known
    ]
    wrong += _wrong_values(name, found, {option: options[option] for option in options if option in known})
    library = getattr(found, "needs", None)
    if library and importlib.util.find_spec(library) is None:
        wrong.append(f""": grader "{name}" needs {library}, which is not installed: pip install 'jaxrl-llm[tasks]'""")
    return wrong


def _wrong_values(name: str, kind: type, options: dict[str, Any]) -> list[str]:
    """Values of the wrong type or out of range; if there are none, what only all options together can tell."""
    from pydantic import TypeAdapter, ValidationError

    from jaxrl_llm.config.messages import got_and_want

    types, wrong = get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        if field.name in options:
            try:
                TypeAdapter(types[field.name]).validate_python(options[field.name], strict=True)
            except ValidationError as error:
                wrong.append(f'.{field.name}: grader "{name}": {got_and_want(error.errors())}')
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wrong.append(f'.{field.name}: grader "{name}" needs this option')
    if not wrong:
        try:
            kind(**options)
        except ValueError as error:
            wrong.append(f': grader "{name}": {error}')
    return wrong
