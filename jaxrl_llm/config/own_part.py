"""A section of the config that names a function or class of the user's own."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import ConfigDict

from jaxrl_llm.config import user_code
from jaxrl_llm.errors import UserError


@dataclass(frozen=True)
class OwnPart:
    """A function, or a class that is instantiated once with the options and then called."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    function: Annotated[str, MinLen(1)]
    """ "module:name"."""
    kind: Literal["own"] = "own"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, or of the class."""

    arguments: ClassVar[tuple[str, ...]] = ()
    """Names of the positional arguments that the function is called with."""
    optional_arguments: ClassVar[tuple[str, ...]] = ()
    """Keyword arguments passed if the function has such a parameter."""
    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Methods that instances must have, each with the names of its arguments. Empty: a function will do."""

    @staticmethod
    def written_out(value: Any) -> Any:
        """Return the section with `kind: own` added if it is a bare "module:name" or names a function."""
        if isinstance(value, str) and ":" in value:
            return {"kind": "own", "function": value}
        if isinstance(value, dict) and "function" in value and "kind" not in value:
            return {"kind": "own", **value}
        return value

    def made(self) -> Callable:
        """Return the function with its options, or an instance of the class. Raises UserError as `user_code.resolve` does."""
        return user_code.made(self._found(), self.options)

    def traced(self, section: str) -> Callable:
        """Return `made()` for tracing by JAX: a UserError names the section if the function needs a concrete number."""
        return user_code.traced(self.made(), self.function, f"{section} {self.function}")

    def problems(self, section: str) -> list[str]:
        """Errors about the function and its options. Imports its module. `section`: path of this section in the config."""
        try:
            found = self._found()
        except UserError as error:
            return [f"{section}.function: {error}"]
        if self.methods and not isinstance(found, type):
            return [f'{section}.function: got "{self.function}", which is a {type(found).__name__}; want {self._want}']
        if isinstance(found, type) and (
            wrong := user_code.wrong_methods(self.function, found, self.methods_of(found), self.optional_arguments)
        ):
            return [f"{section}.function: {wrong}"]
        wrong = user_code.wrong_arguments(self.function, found, self.options, self.arguments, self.optional_arguments)
        return [f"{section}.options{text}" for text in wrong]

    def methods_of(self, found: type) -> Mapping[str, tuple[str, ...]]:
        """Methods that instances of the class must have, each with the names of its arguments."""
        return self.methods or {"__call__": self.arguments}

    @property
    def _want(self) -> str:
        if self.methods:
            return f"a class whose objects have {', '.join(self.methods)}"
        return f"a function of {' and '.join(self.arguments)}"

    def _found(self) -> Callable:
        return user_code.resolve(self.function, self._want)


def own_problems(config: Any) -> list[str]:
    """Errors about every function and class of the user's own that a config names. Imports their modules."""
    return [line for path, part in _own_parts(config) for line in part.problems(path)]


def _own_parts(section: Any, prefix: str = "") -> Iterator[tuple[str, OwnPart]]:
    for field_ in dataclasses.fields(section):
        value, path = getattr(section, field_.name), f"{prefix}{field_.name}"
        several = value if isinstance(value, tuple) else ()
        for part, where in [(value, path), *((item, f"{path}.{i}") for i, item in enumerate(several))]:
            if isinstance(part, OwnPart):
                yield where, part
            elif dataclasses.is_dataclass(part):
                yield from _own_parts(part, f"{where}.")
