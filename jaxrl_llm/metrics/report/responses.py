"""Recorded responses of the last steps, token by token."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from jaxrl_llm.metrics.report.tree import Branch, depth_first
from jaxrl_llm.metrics.terminal import printable, printable_lines

STEPS, ROWS = 3, 64
"""Rollouts are shown for this many of the last recorded steps, and at most this many rows of each."""
FAINTEST_LOGPROB = -6.0
"""Nats at which a token's color is strongest: p = 0.0025."""
PER_TOKEN = ("logprobs", "entropy", "sampled", "num_allowed", "allowed")

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Token:
    """A piece of a completion; level "0" (certain) to "9" (log-prob FAINTEST_LOGPROB or less), "none" if unknown."""

    text: str
    level: str
    title: str
    mark: str
    """`forced`: not sampled; `single`: no other token was allowed; `left`: other responses left before it; "": none of these."""


def last_steps(rows: Iterable[Row]) -> list[dict[str, Any]]:
    """Return the last recorded steps, newest first: step, groups (prompt, samples), left_out (rows not shown)."""
    kept: dict[int, list[Row]] = {}
    for row in rows:
        kept.setdefault(row["step"], []).append(row)
        if len(kept) > STEPS:
            del kept[min(kept)]
    steps = []
    for step, rows in sorted(kept.items(), reverse=True):
        groups: dict[Any, list[Row]] = {}
        for row in rows[:ROWS]:
            groups.setdefault(row.get("uid"), []).append(row)
        shown = [
            {
                "prompt": printable_lines(group[0].get("prompt", "")),
                "samples": [_sample(branch) for branch in depth_first(group)],
            }
            for group in groups.values()
        ]
        steps.append({"step": step, "groups": shown, "left_out": len(rows[ROWS:])})
    return steps


def _sample(branch: Branch) -> dict[str, Any]:
    row, begin = branch.row, branch.row["fork"] if branch.depth else 0
    tokens, logprobs = row.get("tokens"), row["logprobs"]
    if tokens is None:
        tokens = [row.get("completion", "")]
    known = [logprob for logprob in logprobs if logprob is not None]
    numbers = {name: row[name] for name in ("reward", "advantage")} | {"logprob": sum(known) if known else None}
    columns = ((row.get(name) or ())[: len(tokens)] for name in PER_TOKEN)
    shown = list(enumerate(zip_longest(tokens, *columns)))[begin if row.get("tokens") else 0 :]
    return {
        "sample": "↳ " * branch.depth + printable(str(row.get("sample", ""))),
        "shared": f"{begin} {'tokens' if begin > 1 else 'token'} of sample {row['trunk']}" if begin else "",
        "finish": printable(row.get("finish", "")),
        "length": len(logprobs),
        "tokens": [
            _token(text, dict(zip(PER_TOKEN, of, strict=True)), branch.left.get(slot, ""))
            for slot, (text, *of) in shown
        ],
        "gain": (row["advantage"] or 0.0) > 0,
    } | {name: "-" if number is None else _decimals(number) for name, number in numbers.items()}


def _decimals(number: float) -> str:
    return f"{number:.3f}" if abs(number) < 1e6 else f"{number:.3g}"


def _token(text: str, of: Row, left: str) -> Token:
    """`of`: the token's entry of each column; None: not recorded. `left`: what is to be said of responses that left before it."""
    title, logprob, forced = [f"token “{printable(text)}”"], of["logprobs"], of["sampled"] is False
    if forced:
        title.append("forced, not sampled")
    elif logprob is not None:
        title.append(f"log-prob {logprob:.3f} (p {math.exp(min(logprob, 0.0)):.3g})")
    if of["entropy"] is not None and not forced:
        title.append(f"entropy {of['entropy'] + 0:.3f}")
    if of["num_allowed"] is not None:
        title.append(_allowed(int(of["num_allowed"]), of["allowed"] or ()))
    if left:
        title.append(left)
    level = "none" if logprob is None or forced else str(min(9, max(0, round(9 * logprob / FAINTEST_LOGPROB))))
    mark = "left" if left else "forced" if forced else "single" if of["num_allowed"] == 1 else ""
    return Token("↵\n".join(map(printable, text.split("\n"))), level, "\n".join(title), mark)


def _allowed(number: int, first: Sequence[str]) -> str:
    named = " ".join(f"“{printable(text)}”" for text in first)
    more = " ..." if number > len(first) else ""
    return f"{number:,} allowed: {named}{more}" if first else f"{number:,} allowed"
