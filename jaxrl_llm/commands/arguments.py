"""Options of a command itself, as `-n 4`, `--out DIR` and `--json`, apart from the flags of the config."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrl_llm.errors import UserError

Reader = Callable[[str], Any]
"""Parser of an option's value. Raises ValueError with a description of a right value."""
MAX_SHOWN = 60
"""Characters of a wrong value in a message."""


def path(given: str) -> str:
    if not given:
        raise ValueError("a path")
    return given


def text(given: str) -> str:
    if not given.strip():
        raise ValueError("some text")
    try:
        given.encode()
    except UnicodeEncodeError:
        raise ValueError("text in UTF-8") from None
    return given


def whole_number(least: int) -> Reader:
    def read(given: str) -> int:
        try:
            number = int(given)
        except ValueError:
            raise ValueError("a whole number") from None
        if number < least:
            raise ValueError(f"{least} or more")
        if number >= 2**31:
            raise ValueError("less than 2^31")
        return number

    return read


def one_of(*words: str) -> Reader:
    def read(given: str) -> str:
        if given not in words:
            raise ValueError(f"one of {', '.join(words)}")
        return given

    return read


def take(args: Sequence[str], options: Mapping[str, Reader | None]) -> tuple[dict[str, Any], list[str]]:
    """Return the given options by name, and the arguments that belong to none of them.

    Args:
        options: a reader per option; None for a switch, which is True if given. Of two values of one option the last counts.

    Raises:
        UserError: everything that is wrong with the options, one line each.
    """
    found, others, errors, rest = {}, [], [], list(args)
    while rest:
        name, value = _split(rest.pop(0), options)
        if name not in options:
            others.append(name if value is None else f"{name}={value}")
            # The value of a flag of the config is passed on unread: it may look like an option.
            if value is None and name.startswith("--") and rest and not rest[0].startswith("--"):
                others.append(rest.pop(0))
            continue
        read = options[name]
        try:
            found[name] = _switch(value) if read is None else _value(name, value, rest, read)
        except ValueError as error:
            errors.append(f"{name}: {error}")
    if errors:
        raise UserError("\n".join(errors))
    return found, others


def _split(arg: str, options: Mapping[str, Reader | None]) -> tuple[str, str | None]:
    """Split `--out=x`, `-n=4` and `-n4` into name and value; a name may have underscores for dashes."""
    name, equals, value = arg.partition("=")
    if name.startswith("--"):
        known = "--" + name[2:].replace("_", "-")
        return known if known in options else name, value if equals else None
    if name[:2] in options and not name.startswith("--") and len(arg) > 2:
        return name[:2], arg[2:].removeprefix("=")
    return name, value if equals else None


def _switch(value: str | None) -> bool:
    if value is not None:
        raise ValueError(f"got {_shown(value)}, want no value: it is a switch")
    return True


def _value(name: str, value: str | None, rest: list[str], read: Reader) -> Any:
    if value is None:
        if not rest or rest[0].startswith("--"):
            raise ValueError(f"got no value, want {name} VALUE; {name}=VALUE where it begins with --")
        value = rest.pop(0)
    try:
        return read(value)
    except ValueError as error:
        raise ValueError(f"got {_shown(value)}, want {error}") from None


def _shown(value: str) -> str:
    if not value:
        return "nothing"
    return value if len(value) <= MAX_SHOWN else f"{value[:MAX_SHOWN]}..."


def check_out(given: Mapping[str, Any]) -> None:
    """Raise UserError if `jaxrl sample` cannot write `--out`, or has options that do not go together."""
    if "--out" not in given:
        if alone := [name for name in ("--prompts", "--split") if name in given]:
            raise UserError(
                f"{alone[0]}: got it without --out, want --out FILE: only a file has the responses to many prompts"
            )
        return
    if wrong := [name for name in ("--prompts", "--split") if name in given and "--prompt" in given]:
        raise UserError(
            f"{wrong[0]}: got it with --prompt, want one of the two: a prompt of its own, or those of the task"
        )
    if "--benchmark" in given:
        raise UserError("--benchmark: got it with --out, want one of the two: a benchmark writes no responses")
    from jaxrl_llm.tasks.trajectory_writer import check_target

    check_target(Path(given["--out"]), "--out")
