"""A part of the config that is a function or a class of your own, named in it."""

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
    """A function, or a class that is made once with the options and then called."""

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    function: Annotated[str, MinLen(1)]
    """ "module:name"."""
    kind: Literal["own"] = "own"
    options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of the function, or of the class."""

    arguments: ClassVar[tuple[str, ...]] = ()
    """What the function is called with, beside the options."""
    named: ClassVar[tuple[str, ...]] = ()
    """What it is called with by name, if it has such a parameter."""
    methods: ClassVar[Mapping[str, tuple[str, ...]]] = MappingProxyType({})
    """Where it must be a class: what its objects can do, and what each is called with."""

    @staticmethod
    def written_out(value: Any) -> Any:
        """A bare "module:name", or a section that names a function, is of kind own."""
        if isinstance(value, str) and ":" in value:
            return {"kind": "own", "function": value}
        if isinstance(value, dict) and "function" in value and "kind" not in value:
            return {"kind": "own", **value}
        return value

    def made(self) -> Callable:
        """What is called with the arguments. Raises UserError as `own.resolve` does."""
        return user_code.made(self._found(), self.options)

    def traced(self, place: str) -> Callable:
        """As `made`, for what JAX traces: a UserError names the part that asks for a number while it compiles."""
        function = self.made()

        def call(*args: Any) -> Any:
            from jax.errors import ConcretizationTypeError

            try:
                return function(*args)
            except ConcretizationTypeError as error:
                raise UserError(
                    f"{place} {self.function}: got an if, a loop or a float() that asks for a number, which JAX does not know "
                    "while it compiles; want jnp.where, and jax.numpy throughout"
                ) from error

        call.__name__ = getattr(function, "__name__", self.function)
        return call

    def problems(self, place: str) -> list[str]:
        """What is wrong with the function and its options, in words; `place`: of this part in the config. Imports its module."""
        try:
            found = self._found()
        except UserError as error:
            return [f"{place}.function: {error}"]
        if self.methods and not isinstance(found, type):
            return [f'{place}.function: got "{self.function}", which is a {type(found).__name__}; want {self._want}']
        if isinstance(found, type) and (
            wrong := user_code.wrong_methods(self.function, found, self.methods_of(found), self.named)
        ):
            return [f"{place}.function: {wrong}"]
        wrong = user_code.wrong_arguments(self.function, found, self.options, self.arguments, self.named)
        return [f"{place}.options{text}" for text in wrong]

    def methods_of(self, found: type) -> Mapping[str, tuple[str, ...]]:
        return self.methods or {"__call__": self.arguments}

    @property
    def _want(self) -> str:
        if self.methods:
            return f"a class whose objects have {', '.join(self.methods)}"
        return f"a function of {' and '.join(self.arguments)}"

    def _found(self) -> Callable:
        return user_code.resolve(self.function, self._want)


def own_problems(config: Any) -> list[str]:
    """What is wrong with the parts of your own in a config, in words. Imports their modules."""
    return [line for place, part in _parts(config) for line in part.problems(place)]


def _parts(section: Any, place: str = "") -> Iterator[tuple[str, OwnPart]]:
    for field_ in dataclasses.fields(section):
        value, inner = getattr(section, field_.name), f"{place}{field_.name}"
        if isinstance(value, OwnPart):
            yield inner, value
        elif dataclasses.is_dataclass(value):
            yield from _parts(value, f"{inner}.")
