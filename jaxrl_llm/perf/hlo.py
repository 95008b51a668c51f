"""Parser of an optimized HLO module: computations, their calls, the arrays their instructions produce, and collectives.

The text is that of `compiled.as_text()`: one instruction per line, `name = shape opcode(operands), attributes`.
"""

import math
import re
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "ragged-all-to-all", "reduce-scatter")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8}

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*-> .*\{$")
_INSTRUCTION = re.compile(r"(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b(pred|bf16|[fsu]\d+)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:calls|to_apply|body|condition|branch_computations|called_computations)=\{?(%[\w.\-]+(?:, ?%[\w.\-]+)*)"
)


@dataclass(frozen=True)
class ArrayShape:
    """An array on one device."""

    dtype: str
    dims: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.dims)

    @property
    def bytes(self) -> int:
        return self.size * BYTES.get(self.dtype, 4)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


@dataclass(frozen=True)
class Instruction:
    computation: str
    name: str
    opcode: str
    arrays: tuple[ArrayShape, ...]
    """The result's: one, or those of a tuple."""
    calls: tuple[str, ...]
    root: bool
    line: str

    @property
    def results(self) -> tuple[ArrayShape, ...]:
        """`arrays`; of the start of an asynchronous collective those that it will produce, without its operands and flags."""
        given = re.search(rf" {re.escape(self.opcode)}\((.*?)\)", self.line)
        operands = given[1].count("%") if given and self.opcode.endswith("-start") else 0
        # XLA:GPU of jax 0.10 lists the results of an all-reduce alone.
        return self.arrays[operands : 2 * operands] if 0 < 2 * operands <= len(self.arrays) else self.arrays

    @property
    def kind(self) -> str:
        """`opcode`; for the start of an asynchronous collective the collective's name."""
        return self.opcode.removesuffix("-start") if self.opcode.removesuffix("-start") in COLLECTIVES else self.opcode

    def __str__(self) -> str:
        return f"{self.opcode} {' '.join(map(str, self.arrays))} in {self.computation}"


class HloModule:
    """The computations of a module by name, `entry` among them."""

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        self.entry = ""
        name = ""
        for line in text.splitlines():
            if found := _COMPUTATION.match(line):
                name = found[1]
                self.computations[name] = []
                self.entry = name if line.startswith("ENTRY") else self.entry
            elif name and (found := _INSTRUCTION.match(line.strip())):
                self.computations[name].append(_instruction(name, found, line.strip()))

    @cached_property
    def all(self) -> list[Instruction]:
        return [i for instructions in self.computations.values() for i in instructions]

    @cached_property
    def loops(self) -> dict[str, int]:
        """Number of loops around each computation that runs."""
        depth: dict[str, int] = {}
        todo = [(self.entry, 0)]
        while todo:
            name, d = todo.pop()
            if depth.get(name, -1) >= d:
                continue
            depth[name] = d
            for i in self.computations.get(name, ()):
                todo += [(called, d + (i.opcode == "while")) for called in i.calls]
        return depth

    @cached_property
    def fused(self) -> set[str]:
        """Computations inside a fusion: of their results only the root's is in memory."""
        return {name for i in self.all if i.opcode == "fusion" for name in i.calls}

    def root(self, computation: str) -> Instruction:
        return next(i for i in self.computations[computation] if i.root)

    def inside(self, *computations: str) -> list[Instruction]:
        """Return the instructions of these computations and of all that they call."""
        seen: list[str] = []
        todo = list(computations)
        while todo:
            name = todo.pop()
            if name not in seen and name in self.computations:
                seen.append(name)
                todo += [called for i in self.computations[name] for called in i.calls]
        return [i for name in seen for i in self.computations[name]]


def collectives(instructions: list[Instruction]) -> list[Instruction]:
    """Return those of `instructions` that are collectives."""
    return [i for i in instructions if i.kind in COLLECTIVES]


def _instruction(computation: str, found: re.Match, line: str) -> Instruction:
    arrays = tuple(ArrayShape(d, tuple(int(n) for n in dims.split(",") if n)) for d, dims in _ARRAY.findall(found[3]))
    calls = tuple(name.strip().lstrip("%") for group in _CALLED.findall(line) for name in group.split(","))
    return Instruction(computation, found[2], found[4], arrays, calls, bool(found[1]), line)
