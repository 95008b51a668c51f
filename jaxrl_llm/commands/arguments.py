"""The options of a command itself, beside the config's flags: `-n 4`, `--out DIR`, `--json`."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jaxrl_llm.errors import UserError

Reader = Callable[[str], Any]
"""What an option makes of its value. Raises ValueError that says what is wanted instead."""
SHOWN = 60


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
    """Values of those `options` that are given, by name, and the arguments that are none of theirs.

    An option without a reader is a switch, True where it stands. Of two values of one option the last counts. Raises UserError
    with everything that is wrong.
    """
    found, others, wrong, rest = {}, [], [], list(args)
    while rest:
        name, value = _split(rest.pop(0), options)
        if name not in options:
            others.append(name if value is None else f"{name}={value}")
            # The value of a flag of the config is not looked at: it may read as an option.
            if value is None and name.startswith("--") and rest and not rest[0].startswith("--"):
                others.append(rest.pop(0))
            continue
        read = options[name]
        try:
            found[name] = _switch(value) if read is None else _value(name, value, rest, read)
        except ValueError as error:
            wrong.append(f"{name}: {error}")
    if wrong:
        raise UserError("\n".join(wrong))
    return found, others


def _split(arg: str, options: Mapping[str, Reader | None]) -> tuple[str, str | None]:
    """`--out=x`, `-n=4` and `-n4` as name and value; dashes of a name may be underscores."""
    name, equals, value = arg.partition("=")
    if name.startswith("--"):
        known = "--" + name[2:].replace("_", "-")
        return known if known in options else name, value if equals else None
    if name[:2] in options and not name.startswith("--") and len(arg) > 2:
        return name[:2], arg[2:].removeprefix("=")
    return name, value if equals else None


def _switch(value: str | None) -> bool:
    if value is not None:
        raise ValueError(f"got {_shown(value)}, want no value: it is on where it stands")
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
    return value if len(value) <= SHOWN else f"{value[:SHOWN]}..."
