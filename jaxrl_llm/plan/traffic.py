"""What a compiled program sends, and how long its compiler thinks it takes, with loops multiplied out."""

import re
from collections import defaultdict
from collections.abc import Iterator
from math import prod
from typing import NamedTuple

from jaxrl_llm.perf.hlo import COLLECTIVES, Instruction, Module

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TILED = re.compile(r"replica_groups=\[\d+,(\d+)\]<=")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_NAMED = re.compile(r"replica_groups=(?:@\w+|mesh)\[(.*?)\] ?\{(.*?)\}")
# Cycles that the TPU compiler states where it has no estimate.
NO_ESTIMATE = 2**63 - 1
# How the TPU compiler names a reduction of which each chip keeps its shard.
SCATTERED = "all-reduce-scatter"

Loops = tuple[int, ...]


class Traffic(NamedTuple):
    """Collectives of one kind and dtype, in one nest of loops."""

    kind: str
    dtype: str
    loops: Loops
    """Turns of the loops around it, the outermost first."""
    count: int
    """Collectives in one turn of the innermost."""
    bytes: int
    """What a chip receives in one run of the program: for an all-gather of n shards (n - 1) / n of the result, and so on."""
    largest: int
    """Bytes of the largest array that one of them makes on a chip."""

    @property
    def times(self) -> int:
        """Collectives in one run."""
        return self.count * prod(self.loops)


class Reading(NamedTuple):
    traffic: tuple[Traffic, ...]
    cycles: int
    """The compiler's estimates added up, of instructions that have one: collectives mostly do not. 0 where it gives none."""
    unknown: int
    """Inner loops whose turns were given, not read."""

    @property
    def received(self) -> int:
        """Bytes a chip in one run."""
        return sum(t.bytes for t in self.traffic)


def read(module: Module, turns: int = 1, inner: int = 1) -> Reading:
    """`turns`, `inner`: of outermost and of other loops whose number of turns is not fixed in the program."""
    collectives: dict[tuple[str, str], tuple[Instruction, Loops]] = {}
    cycles, unknown, fused = 0, set(), module.fused
    for name, loops, guessed in _walk(module, turns, inner):
        unknown |= guessed
        for i in module.computations[name]:
            if name not in fused:
                cycles += prod(loops) * sum(n for n in map(int, _CYCLES.findall(i.line)[:1]) if n != NO_ESTIMATE)
            if i.kind in COLLECTIVES and group_size(i) > 1:
                channel = _CHANNEL.search(i.line)
                key = (i.kind, f"channel {channel[1]}" if channel else i.name)
                # One that runs beside products stands in the text once for each of them, under one channel, and goes on through
                # loops: it starts where fewest are around it.
                if key not in collectives or prod(loops) < prod(collectives[key][1]):
                    collectives[key] = (i, loops)
    return Reading(tuple(_summed(list(collectives.values()))), cycles, len(unknown))


def _summed(collectives: list[tuple[Instruction, Loops]]) -> list[Traffic]:
    """By kind, dtype and loops; what receives most first."""
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


def _walk(module: Module, turns: int, inner: int) -> Iterator[tuple[str, Loops, set[str]]]:
    """Each computation that runs, once for each place that it is called from, with the loops around that place."""
    todo: list[tuple[str, Loops, set[str]]] = [(module.entry, (), set())]
    while todo:
        name, loops, guessed = todo.pop()
        if name not in module.computations:
            continue
        yield name, loops, guessed
        for i in module.computations[name]:
            if i.opcode != "while":
                todo += [(called, loops, guessed) for called in i.calls]
                continue
            fixed = loop_turns(module, i)
            around = (*loops, fixed or (inner if loops else turns))
            more = {i.name} if fixed is None and loops else set()
            todo += [(called, around, guessed | more) for called in i.calls]


def loop_turns(module: Module, loop: Instruction) -> int | None:
    """Of a loop that counts from 0 to a number that stands in the program; None for another."""
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
    """Devices that take part in one such collective; 2 where it says only who sends to whom, or that all do."""
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
    """Bytes that a chip of n receives for a result of `made` bytes (of `all-reduce-scatter`: an operand), as rings do it."""
    return {
        "all-gather": made * (n - 1) // n,
        "all-reduce": 2 * made * (n - 1) // n,
        "reduce-scatter": made * (n - 1),
        SCATTERED: made * (n - 1) // n,
        "collective-permute": made,
    }.get(kind, made * (n - 1) // n)


def _result(i: Instruction) -> tuple:
    """Arrays of the result: the start of an asynchronous collective lists its operands, and flags, as well."""
    if not i.opcode.endswith("-start") or i.kind == "all-reduce":
        return i.arrays
    arrays = tuple(a for a in i.arrays if a.dims or i.kind != "collective-permute")
    return arrays[len(arrays) // 2 :]
