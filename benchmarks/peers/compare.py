"""Statistics of the answers: rates, ratios of calls in the same round, agreement of tokens; and their table."""

import statistics

from benchmarks.table import rows_of


def quietest(others: list[float], rounds: int) -> list[int]:
    """Return the `rounds` turns after the first two in which other processes used the machine least."""
    return sorted(sorted(range(2, len(others)), key=others.__getitem__)[:rounds])


def entry(answers: list[dict], chosen: list[int], tokens: int) -> dict:
    """Return the statistics of one generator; `answers` of `processes.in_turns`, `chosen` the turns that count."""
    seconds = [answers[turn]["seconds"] for turn in chosen]
    return {
        "first_call_s": answers[0]["seconds"],
        "second_call_s": answers[1]["seconds"],
        "seconds": seconds,
        "all_seconds": [answer["seconds"] for answer in answers[2:]],
        "others": [answers[turn]["others"] for turn in chosen],
        "median_s": statistics.median(seconds),
        "tokens_per_s": tokens / statistics.median(seconds),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
    }


def ratio(ours: dict, theirs: dict) -> float:
    """Return the speedup of `ours` over `theirs`: the median over rounds of the ratio of seconds in the same round."""
    return statistics.median(t / o for o, t in zip(ours["seconds"], theirs["seconds"], strict=True))


def best(entries: dict[str, dict], peer: str) -> str | None:
    """Return the fastest variant of `peer`, as peer/variant; None if none ran."""
    found = [name for name in entries if name.split("/")[0] == peer]
    return min(found, key=lambda name: entries[name]["median_s"], default=None)


def agreement(ours: list[list[int]], theirs: list[list[int]]) -> float:
    """Return the fraction of greedy tokens before each row's first difference, after which the rows are different texts."""
    same = 0
    for a, b in zip(ours, theirs, strict=True):
        if len(a) != len(b):
            return 0.0
        same += next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))
    return same / sum(map(len, ours))


def ratios(entries: dict[str, dict]) -> dict[str, float]:
    """Return our speedup over the best variant of each peer, by peer/variant."""
    ours = best(entries, "ours")
    peers = sorted({name.split("/")[0] for name in entries} - {"ours"})
    return {name: ratio(entries[ours], entries[name]) for peer in peers if ours and (name := best(entries, peer))}


def table(result: dict) -> list[str]:
    """Return the table of one work. Rates are medians; `others had`: maximum share of the machine that others used in a call."""
    entries, tokens = result["entries"], result["tokens"]
    ours = best(entries, "ours")
    head = [
        "",
        "tokens/s",
        "lowest to highest",
        "ours to it",
        "others had",
        "first call, s",
        "peak, MiB",
        "greedy as ours",
    ]
    lines = [
        [
            name,
            f"{e['tokens_per_s']:,.0f}",
            f"{tokens / max(e['seconds']):,.0f} to {tokens / min(e['seconds']):,.0f}",
            f"{ratio(entries[ours], e):.2f}" if ours else "",
            f"{max(e['others']):.0%}",
            f"{e['first_call_s']:.1f}",
            f"{e['peak_bytes'] / 2**20:,.0f}",
            f"{e['greedy_agreement']:.1%}" if e.get("greedy_agreement") is not None else "",
        ]
        for name, e in entries.items()
    ]
    found = [
        f"{result['name']}, {tokens:,} new tokens per call, the quietest {result['rounds']} of {result['rounds_run']} rounds",
        "",
        *rows_of([head, *lines]),
    ]
    return found + [f"{name} failed: {why.splitlines()[-1] if why else ''}" for name, why in result["failed"].items()]
