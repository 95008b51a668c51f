"""Collectives and estimated cycles of a compiled program, multiplied by the trip counts of its loops."""

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from math import prod
from typing import NamedTuple

import numpy as np

from jaxrl_llm.perf.chips import Chip
from jaxrl_llm.perf.hlo import COLLECTIVES, HloModule, Instruction

_KNOWN = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_COMPARED = re.compile(r"compare\(%?([\w.\-]+), %?([\w.\-]+)\), direction=LT")
_CONSTANT = re.compile(r"constant\((\d+)\)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_CHANNEL = re.compile(r"channel_id=(\d+)")
_TILED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,]+\}(?:,\{[\d,]+\})*)\}")
_NAMED = re.compile(
    r"replica_groups=(?:@\w+|mesh)\[(.*?)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? ?\{(.*?)\}"
)
_PAIRS = re.compile(r"source_target_pairs=\{(\{\d+,\d+\}(?:,\{\d+,\d+\})*)\}")
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
    network: int = 0
    """Bytes among those received that come from other hosts, per chip; each is sent to a host once, whose devices pass it on."""

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

    def wire_seconds(self, chip: Chip) -> float:
        """Seconds that the collectives take at the chip's published rates, one after another; an unknown rate counts nothing."""
        network = sum(t.network for t in self.traffic)
        return self.received / chip.wire + (network / chip.network if chip.network else 0.0)


def read_cost(module: HloModule, outer: int = 1, inner: int = 1, hosts: Sequence[int] = ()) -> ProgramCost:
    """Read the cost of a program.

    Args:
        module: the program.
        outer, inner: trip counts to assume for outermost and inner loops without a static one.
        hosts: number of the host of each device, in the order of the mesh; none: all are on one network.
    """
    collectives: dict[tuple[str, str], tuple[Instruction, Loops]] = {}
    cycles, unknown, fused = 0, set(), module.fused
    overlapped = {_channel(i) for i in module.all if i.kind in COLLECTIVES and i.computation in fused}
    for name, loops, assumed in _walk(module, outer, inner):
        unknown |= assumed
        for i in module.computations[name]:
            if name not in fused:
                cycles += prod(loops) * sum(n for n in map(int, _CYCLES.findall(i.line)[:1]) if n != NO_ESTIMATE)
            if i.kind in COLLECTIVES and group_size(i) > 1:
                channel = _channel(i)
                key = (i.kind, f"channel {channel}" if channel and channel in overlapped else i.name)
                # One that overlaps with matmuls appears once per matmul, inside a fusion, under one channel, and continues through
                # loops: it starts in the outermost place. Others may share a channel: all of a `shard_map` on GPUs.
                if key not in collectives or prod(loops) < prod(collectives[key][1]):
                    collectives[key] = (i, loops)
    return ProgramCost(tuple(_summed(list(collectives.values()), hosts)), cycles, len(unknown))


def _channel(i: Instruction) -> str | None:
    found = _CHANNEL.search(i.line)
    return found and found[1]


def _summed(collectives: list[tuple[Instruction, Loops]], hosts: Sequence[int]) -> list[Traffic]:
    """Sums by kind, dtype and loops, largest bytes first."""
    found: dict[tuple[str, str, Loops], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for i, loops in collectives:
        scattered = i.computation.startswith(SCATTERED)
        kind, of, n = SCATTERED if scattered else i.kind, groups(i), group_size(i)
        # A compiler combines collectives, also of several dtypes.
        for dtype in dict.fromkeys(a.dtype for a in i.results):
            arrays = [a for a in i.results if a.dtype == dtype]
            made = sum(a.bytes for a in arrays)
            entry = found["reduce-scatter" if scattered else i.kind, dtype, loops]
            entry[0] += 1
            entry[1] += prod(loops) * received(kind, made, n)
            entry[2] = max(entry[2], *(a.bytes for a in arrays))
            entry[3] += prod(loops) * received_from_hosts(kind, made, of, hosts)
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


def groups(collective: Instruction) -> np.ndarray | None:
    """Return the devices of a collective as positions in the mesh, one group per row, or the pairs of a permutation.

    None if it lists none.
    """
    if found := _TILED.search(collective.line):
        rows, columns, *iota = found.groups()
        return _places(*iota).reshape(int(rows), int(columns))
    if found := _LISTED.search(collective.line) or _PAIRS.search(collective.line):
        return np.array([_numbers(group) for group in found[1].strip("{}").split("},{")])
    if found := _NAMED.search(collective.line):
        axes, *iota, chosen = found.groups()
        sizes = {name.strip("'"): int(size) for name, size in (axis.split("=") for axis in axes.split(",") if axis)}
        names = [name.strip().strip("'") for name in chosen.split(",") if name.strip()]
        places = _places(*iota) if iota[0] else np.arange(prod(sizes.values()))
        last = [place for place, name in enumerate(sizes) if name in names]
        ordered = np.moveaxis(places.reshape(list(sizes.values())), last, range(-len(last), 0))
        return ordered.reshape(-1, prod(sizes[name] for name in sizes if name in names))
    return None


def _places(dims: str, order: str | None) -> np.ndarray:
    """Positions in the mesh in XLA's iota form: 0, 1, ... in these dimensions, transposed."""
    places = np.arange(prod(_numbers(dims))).reshape(_numbers(dims))
    return places.transpose(_numbers(order) if order else None).reshape(-1)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def group_size(collective: Instruction) -> int:
    """Number of devices in each group of a collective; 2 if it only lists pairs, or no groups."""
    found = groups(collective)
    return 2 if found is None else found.shape[1]


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


def received_from_hosts(kind: str, made: int, groups: np.ndarray | None, hosts: Sequence[int]) -> int:
    """Bytes that each chip receives from other hosts, if every host receives what it lacks once, through the adapters of all its
    chips in the group; each chip for itself in an all-to-all or a permutation.

    Args:
        kind, made: as in `received`.
        groups: as of `groups`.
        hosts: number of the host of each device, in the order of the mesh.
    """
    if groups is None or not len(hosts):
        return 0
    most = 0
    for group in np.asarray(hosts)[groups]:
        # The host with the fewest chips of the group lacks most, and has the fewest adapters for it.
        n, fewest = len(group), min(Counter(group.tolist()).values())
        others = made * (n - fewest) / n
        lacks = {
            "all-gather": others / fewest,
            "all-reduce": 2 * others / fewest,
            "reduce-scatter": n * others / fewest,
            SCATTERED: others / fewest,
            "collective-permute": made if fewest < n else 0,
        }.get(kind, others)
        most = max(most, int(lacks))
    return most
