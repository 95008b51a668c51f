"""A step's groups on their way through the stages, as the lines of a table."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple


class StageLine(NamedTuple):
    """What is left after a stage."""

    stage: str
    groups: str
    rows: str
    dropped: str
    """What this stage left out."""
    share: float
    """Share of the sampled groups, or of the rows where groups are not known: the length of a bar, from 0 to 1."""


NAMES = frozenset(
    ("groups/sampled", "groups/graded", "groups/kept", "groups/replayed", "rollout/samples", "kept/rows", "dropped/rows",
     "gate/skipped", "refill/missing", "refill/prompts", "groups/effective_size", "refill/accepted", "replay/groups", "replay/age",
     "replay/uses", "replay/rows")
)  # fmt: skip
FILTER, DROPPED = "filter/", "/dropped"


def stage_lines(row: Mapping[str, float | None]) -> list[StageLine]:
    """Return the lines of the table for a step's metrics; none for a step before RL."""
    return list(_lines({name: value for name, value in row.items() if isinstance(value, int | float)}))


def _lines(row: Mapping[str, float]) -> Iterator[StageLine]:
    sampled, graded, kept = (row.get(f"groups/{name}") for name in ("sampled", "graded", "kept"))
    if not sampled or graded is None or kept is None:
        return
    whole = row.get("rollout/samples", 0)
    skipped = row.get("gate/skipped", 0)
    yield StageLine(
        "sampled", _number(sampled), _number(whole), f"{_number(skipped)} prompts by the gate" if skipped else "", 1.0
    )
    lost = sampled - graded
    yield StageLine("graded", _number(graded), "", f"{_number(lost)} groups" if lost else "", graded / sampled)
    if "refill/prompts" in row:
        accepted = sampled * row.get("refill/accepted", 0)
        missing = row.get("refill/missing", 0)
        why = f"{_number(graded - accepted)} groups" + (f"; {_number(missing)} too few" if missing else "")
        yield StageLine("accepted by refill", _number(accepted), "", why, accepted / sampled)
    for name, value in row.items():
        if name.startswith(FILTER) and name.endswith(DROPPED):
            label = name.removeprefix(FILTER).removesuffix(DROPPED)
            yield StageLine(f"filter {label}", "", "", f"{_number(value)} rows", 1 - value / whole if whole else 0.0)
    rows = row.get("kept/rows", 0)
    yield StageLine("kept", _number(kept), _number(rows), "", kept / sampled)
    about = f"{row['replay/age']:.1f} updates old, used {row['replay/uses']:.1f} times" if "replay/age" in row else ""
    if row.get("groups/replayed"):
        share = min(row["groups/replayed"] / sampled, 1.0)
        yield StageLine("from the replay", _number(row["groups/replayed"]), "", about, share)
    if row.get("replay/rows"):
        joined = row["replay/rows"]
        yield StageLine(
            "stored among fresh ones", "", _number(joined), about, min(joined / whole, 1.0) if whole else 0.0
        )


def _number(value: float) -> str:
    return f"{value:,.0f}"
