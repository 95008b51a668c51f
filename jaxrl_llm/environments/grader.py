"""Graders: pure functions from one sample's text to one number, or one per step, and the lookup of graders by name.

They see text only: no groups, policies or devices. They run in worker processes (grader_pool.py), so a grader may raise, hang or
die: its group is lost and counted, and the run continues. A custom grader is any importable function of a `Sample`, or a class
that makes one; the built-in graders are frozen dataclasses whose fields are their options.
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


MAX_ROWS_SHOWN = 5
"""Ungradable rows listed per grader; further ones are only counted."""


class Sample(NamedTuple):
    """Input of a grader: one response and its row."""

    prompt: str
    completion: str
    """The whole response as the tokenizer decodes it; nothing stripped."""
    answer: str
    """The reference answer of the task row."""
    finish: str
    """Why the response ended: "eos", "length" (cut off), "stop" (a stop text) or "unfinished" (stopped by a session)."""
    columns: Mapping[str, object] = {}
    """All columns of the data set row."""
    num_tokens: int | None = None
    """Tokens of the completion, end token included; None if not counted."""
    steps: tuple[str, ...] = ()
    """The completion, split behind each `step_end` of the grader; () for a grader without."""
    task: str = ""
    """Name of the row's task in a mixture; "" if there is one task only."""


Grader = Callable[[Sample], float | Sequence[float]]
"""One number; one per step with a `step_end` in the config. A grader may have four optional methods.
`grade_group(samples) -> list of what a call returns` is called with all samples of a prompt that are graded together, in place
of a call each.
`extract(sample) -> str` returns the final answer in canonical form ("" if there is none): the vote in maj@k.
`start()` is called once per worker, before any deadline: the place for slow imports.
`problem(row) -> str` is called with each row (a sample without a response) before the run starts, and returns why the row cannot
be graded, "" if it can."""

BUILT_IN = {
    "exact_match": "jaxrl_llm.environments.graders.text:ExactMatch",
    "regex": "jaxrl_llm.environments.graders.text:Regex",
    "format": "jaxrl_llm.environments.graders.text:Format",
    "length": "jaxrl_llm.environments.graders.text:Length",
    "length_target": "jaxrl_llm.environments.graders.length_rewards:LengthTarget",
    "relative_length": "jaxrl_llm.environments.graders.length_rewards:RelativeLength",
    "cut_off": "jaxrl_llm.environments.graders.length_rewards:CutOff",
    "instructions": "jaxrl_llm.environments.graders.instructions:Instructions",
    "multiple_choice": "jaxrl_llm.environments.graders.multiple_choice:MultipleChoice",
    "numeric": "jaxrl_llm.environments.graders.numeric:Numeric",
    "gsm8k": "jaxrl_llm.environments.graders.numeric:Gsm8k",
    "math": "jaxrl_llm.environments.graders.mathematics:Math",
    "reasoning_gym": "jaxrl_llm.environments.graders.reasoning_gym:ReasoningGym",
}
"""Short names, resolved like any other "module:name"."""


def split_steps(completion: str, step_end: str) -> tuple[str, ...]:
    """Return the steps of a response, one at least, which together are the response. Text behind the last `step_end` is a step
    unless it is empty."""
    *ended, rest = completion.split(step_end)
    steps = (*(step + step_end for step in ended), rest)
    return steps if rest or not ended else steps[:-1]


def make_grader(name: str, options: Mapping[str, Any] = {}) -> Grader:
    """Return the grader `name`, a built-in or "module:function", with its options.

        reward = rl.make_grader("numeric")

    Raises:
        UserError: `name` cannot be found, imported or called.
    """
    return user_code.made(resolve(name), options)


def problems(config: "RewardConfig") -> list[str]:
    """Return every error in the graders of a config. Imports users' modules, but no library of a built-in."""
    found, labels = [], [grader.label for grader in config.graders]
    for index, grader in enumerate(config.graders):
        where = f"reward.graders.{index}"
        try:
            found += [f"{where}.options{text}" for text in _wrong_options(grader.grader, grader.options)]
        except UserError as error:
            found.append(f"{where}.grader: {error}")
        if grader.label in labels[:index]:
            found.append(f'{where}.name: got "{grader.label}" again, want distinct names: they name the metrics')
        if grader.step_end and grader.grader in BUILT_IN:
            found.append(
                f"{where}.step_end: got {grader.step_end!r} with {grader.grader}, want a grader of your own: the built-in ones "
                "return one number per response"
            )
        if not grader.label.isprintable():
            found.append(f"{where}.name: got {grader.label!a}, want printable characters")
    return found


def unreadable_rows(config: "RewardConfig", rows: Sequence[tuple[str, Sample]]) -> list[str]:
    """Return messages on rows with an answer that a grader cannot read: the first few per grader, and their number.

    Args:
        config: has no `problems`.
        rows: (file and line, sample without a response) per row.
    """
    found = []
    for grader in config.graders:
        if not hasattr(resolve(grader.grader), "problem"):
            continue
        try:
            problem = make_grader(grader.grader, grader.options).problem
            mine = [(where, row) for where, row in rows if grader.grades(row.task)]
            wrong = [(where, row, why) for where, row in mine if (why := problem(row))]
        except Exception as error:
            found.append(
                f'grader "{grader.label}": checking the rows with its `problem` failed: {type(error).__name__}: {error}'
            )
            continue
        for where, row, why in wrong[:MAX_ROWS_SHOWN]:
            found.append(f'{where or "a row"} ({row.prompt[:60]!r}): grader "{grader.label}": {why}')
        if wrong:
            what = f'grader "{grader.label}" cannot grade {len(wrong)} of {len(mine)} rows'
            found.append(f"{what}: fix or remove them, or choose another grader")
    return found


def resolve(name: str) -> Callable:
    """Return the grader function, or the class that makes one. Raises UserError as `user_code.resolve` does."""
    return user_code.resolve(name, "a function of one Sample", BUILT_IN)


def _wrong_options(name: str, options: Mapping[str, Any]) -> list[str]:
    """Errors in the options of a grader, each as ".option: why" or ": why"."""
    found = resolve(name)
    if name not in BUILT_IN:
        if isinstance(found, type) and (wrong := user_code.wrong_methods(name, found, {"__call__": ("sample",)})):
            raise UserError(wrong)
        return user_code.wrong_arguments(name, found, options, (Sample("", "", "", ""),))
    known = [field.name for field in dataclasses.fields(found)]
    wrong = [
        f'.{option}: grader "{name}" has no such option, want one of: {", ".join(known)}.{user_code.hint(option, known)}'
        for option in options
        if option not in known
    ]
    wrong += _wrong_values(name, found, {option: options[option] for option in options if option in known})
    library = getattr(found, "needs", None)
    if library and importlib.util.find_spec(library) is None:
        wrong.append(f""": grader "{name}" needs {library}, which is not installed: pip install 'jaxrl-llm[tasks]'""")
    return wrong


def _wrong_values(name: str, grader_class: type, options: dict[str, Any]) -> list[str]:
    """Errors in values by type and range; if there are none, the error of the combination, if any."""
    from pydantic import TypeAdapter, ValidationError

    from jaxrl_llm.config.error_messages import got_and_want

    types, wrong = get_type_hints(grader_class, include_extras=True), []
    for field in dataclasses.fields(grader_class):
        if field.name in options:
            try:
                TypeAdapter(types[field.name]).validate_python(options[field.name], strict=True)
            except ValidationError as error:
                wrong.append(f'.{field.name}: grader "{name}": {got_and_want(error.errors())}')
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            wrong.append(f'.{field.name}: grader "{name}" needs this option')
    if not wrong:
        try:
            grader_class(**options)
        except ValueError as error:
            wrong.append(f': grader "{name}": {error}')
    return wrong
