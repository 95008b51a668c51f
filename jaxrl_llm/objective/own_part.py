"""A part of the objective that is a function of your own, named in the config."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import MinLen
from pydantic import ConfigDict

from jaxrl_llm import own
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

    arguments: ClassVar[tuple[str, ...]]
    """What the function is called with, beside the options."""

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
        return own.made(self._found(), self.options)

    def problems(self, place: str) -> list[str]:
        """What is wrong with the function and its options, in words; `place`: of this part in the config. Imports its module."""
        try:
            wrong = own.wrong_arguments(self.function, self._found(), self.options, self.arguments)
        except UserError as error:
            return [f"{place}.function: {error}"]
        return [f"{place}.options{text}" for text in wrong]

    def _found(self) -> Callable:
        return own.resolve(self.function, f"a function of {' and '.join(self.arguments)}")
