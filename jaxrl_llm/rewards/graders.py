"""Graders: pure functions of one sample's strings to one number.

They see text and nothing of tokens, groups, policies or devices. They run in worker processes (`pool.py`), so a grader
may raise, hang or die: its group is lost and counted, the run goes on. A grader of your own is any importable function
of a `Sample`.
"""

import difflib
import importlib
from collections.abc import Callable, Iterable
from typing import NamedTuple

from jaxrl_llm.errors import UserError


class Sample(NamedTuple):
    """What a grader may judge."""

    prompt: str
    completion: str
    """The whole response as text, the end token included when it was produced; nothing stripped."""
    answer: str
    """The task row's answer, as the grader of that task reads it."""
    finish: str
    """Why the response ended: "eos", "length" or "control"."""


Grader = Callable[[Sample], float]


def exact_match(sample: Sample) -> float:
    """1 if the whole response is the answer, character for character, else 0.

    With an end token in the answer ("12#") a right number that was cut off, continued or padded earns nothing:
    a policy cannot gain by never ending, nor by saying many things.
    """
    return float(sample.completion == sample.answer)


BUILT_IN: dict[str, Grader] = {"exact_match": exact_match}


def resolve(name: str) -> Grader:
    """The grader called `name`: a built-in, or "module:function", imported.

    Raises:
      UserError: no such built-in, module or function, the import failed, or what was found cannot be called.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon:
        if name not in BUILT_IN:
            known = ", ".join(BUILT_IN)
            raise UserError(f'grader: got "{name}", want one of: {known}; or "module:function".{_hint(name, BUILT_IN)}')
        return BUILT_IN[name]
    if module_name == "__main__":
        raise UserError(
            f'grader: got "{name}"; workers do not run your script: move the function to a module of its own'
        )
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:
        raise UserError(
            f'grader: got "{name}", and importing "{module_name}" failed: {type(error).__name__}: {error}. '
            "If the module is not found, put its directory on PYTHONPATH"
        ) from error
    grader = getattr(module, function_name, None)
    if grader is None:
        hint = _hint(function_name, vars(module))
        raise UserError(f'grader: got "{name}", but "{module_name}" has no "{function_name}".{hint}')
    if not callable(grader):
        raise UserError(f'grader: got "{name}", which is a {type(grader).__name__}; want a function of one Sample')
    return grader


def _hint(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f' Perhaps you meant "{close[0]}"' if close else ""
