"""Collectives and estimated cycles of a compiled program, multiplied by the trip counts of its loops."""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from jaxrl_llm.perf.hlo import COLLECTIVES, HloModule, Instruction

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_NAMED = re.compile(r"replica_groups=(?:@\w+|mesh)\[(.*?)\] ?\{(.*?)\}")
# The TPU compiler's value for instructions without an estimate.
NO_ESTIMATE = 2**63 - 1
# The TPU compiler's name for a reduction of which each chip keeps one shard.
SCATTERED = "all-reduce-scatter"

Loops = tuple[int, ...]


class Traffic(NamedTuple):
    """Collectives of one kind and dtype in one nest of loops."""

    kind: str
    dtype: str
    loops: Loops
    """Trip counts of the enclosing loops, outermost first."""
    count: int
    """Collectives per iteration of the innermost loop."""
    bytes: int
    """Bytes received per chip in one run of the program, e.g. (n - 1) / n of the result for an all-gather of n shards."""
    largest: int
    """Bytes per chip of the largest array that one of them produces."""

    @property
    def times(self) -> int:
        """Collectives in one run of the program."""
        return self.count * prod(self.loops)


class ProgramCost(NamedTuple):
    """Collectives and estimated cycles of one run of a program."""

    traffic: tuple[Traffic, ...]
    cycles: int
    """Sum of the compiler's estimates; most collectives have none. 0 if it gives none at all."""
    unknown: int
    """Number of inner loops whose trip count was assumed, not read."""

    @property
    def received(self) -> int:
        """Bytes received per chip in one run."""
        return sum(t.bytes for t in self.traffic)


def read_cost(module: HloModule, outer: int = 1, inner: int = 1) -> ProgramCost:
    """Read the cost of a program. `outer`, `inner`: trip counts to assume for outermost and inner loops without a static one."""
    collectives: dict[tuple[str, str], tuple[Instruction, Loops]] = {}
    cycles, unknown, fused = 0, set(), module.fused
    for name, loops, assumed in _walk(module, outer, inner):
        unknown |= assumed
        for i in module.computations[name]:
            if name not in fused:
                cycles += prod(loops) * sum(n for n in map(int, _CYCLES.findall(i.line)[:1]) if n != NO_ESTIMATE)
            if i.kind in COLLECTIVES and group_size(i) > 1:
                channel = _CHANNEL.search(i.line)
                key = (i.kind, f"channel {channel[1]}" if channel else i.name)
                # One that overlaps with matmuls appears once per matmul, under one channel, and continues through loops: it
                # starts in the outermost place.
                if key not in collectives or prod(loops) < prod(collectives[key][1]):
                    collectives[key] = (i, loops)
    return ProgramCost(tuple(_summed(list(collectives.values()))), cycles, len(unknown))


def _summed(collectives: list[tuple[Instruction, Loops]]) -> list[Traffic]:
    """Sums by kind, dtype and loops, largest bytes first."""
    found: dict[tuple[str, str, Loops], list[int]] = defaultdict(lambda: [0, 0, 0])
    for i, loops in collectives:
        scattered = i.computation.startswith(SCATTERED)
        arrays = _result(i)
        made = sum(a.bytes for a in arrays)
        entry = found["reduce-scatter" if scattered else i.kind, arrays[0].dtype, loops]
        entry[0] += 1
        entry[1] += prod(loops) * received(SCATTERED if scattered else i.kind, made, group_size(i))
        entry[2] = max(entry[2], *(a.bytes for a in arrays))
    return sorted((Traffic(*key, *entry) for key, entry in found.items()), key=lambda t: -t.bytes)


def _walk(module: HloModule, outer: int, inner: int) -> Iterator[tuple[str, Loops, set[str]]]:
    """Every call of a computation: its name, the trip counts of the loops around it, and the loops whose count was assumed."""
    todo: list[tuple[str, Loops, set[str]]] = [(module.entry, (), set())]
    while todo:
        name, loops, assumed = todo.pop()
        if name not in module.computations:
            continue
        yield name, loops, assumed
        for i in module.computations[name]:
            if i.opcode != "while":
                todo += [(called, loops, assumed) for called in i.calls]
                continue
            fixed = trip_count(module, i)
            around = (*loops, fixed or (inner if loops else outer))
            more = {i.name} if fixed is None and loops else set()
            todo += [(called, around, assumed | more) for called in i.calls]


def trip_count(module: HloModule, loop: Instruction) -> int | None:
    """Static trip count of a loop, None if it has none."""
    if known := _KNOWN.search(loop.line):
        return int(known[1])
    condition = re.search(r"condition=%?([\w.\-]+)", loop.line)
    if condition is None or condition[1] not in module.computations:
        return None
    compared = _COMPARED.search(module.root(condition[1]).line)
    if compared is None:
        return None
    ends = {i.name: _CONSTANT.search(i.line) for i in module.computations[condition[1]] if i.opcode == "constant"}
    return int(ends[compared[2]][1]) if ends.get(compared[2]) else None


def group_size(collective: Instruction) -> int:
    """Number of devices in each group of a collective; 2 if it only lists pairs, or no groups."""
    if found := _TILED.search(collective.line):
        return int(found[1])
    if found := _LISTED.search(collective.line):
        return len(found[1].split(","))
    if found := _NAMED.search(collective.line):
        sizes = dict(part.replace("'", "").split("=") for part in found[1].split(",") if "=" in part)
        names = [name.strip().strip("'") for name in found[2].split(",") if name.strip()]
        return prod(int(sizes[name]) for name in names if name in sizes)
    return 2


def received(kind: str, made: int, n: int) -> int:
    """Bytes that each chip receives with ring algorithms.

    Args:
        kind: The collective.
        made: Bytes of the result per chip (of the operand for `all-reduce-scatter`).
        n: Number of chips in the group.
    """
    return {
        "all-gather": made * (n - 1) // n,
        "all-reduce": 2 * made * (n - 1) // n,
        "reduce-scatter": made * (n - 1),
        SCATTERED: made * (n - 1) // n,
        "collective-permute": made,
    }.get(kind, made * (n - 1) // n)


def _result(i: Instruction) -> tuple:
    """Arrays of the result. The start of an asynchronous collective also lists operands and flags."""
    if not i.opcode.endswith("-start") or i.kind == "all-reduce":
        return i.arrays
    arrays = tuple(a for a in i.arrays if a.dims or i.kind != "collective-permute")
    return arrays[len(arrays) // 2 :]
