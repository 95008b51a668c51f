"""Random graded groups of any size, for rules and their second implementations; and the second implementations' view of them."""

from typing import NamedTuple

import numpy as np
from hypothesis import strategies as st

from jaxrl_llm.experience.replay import blank_groups
from jaxrl_llm.types import Groups, number_rows

NAMES = ("right", "style")
SLOTS = 6


class Row(NamedTuple):
    """One row, as plain numbers."""

    index: int
    sample: int
    right: float
    style: float
    reward: float
    length: int
    tokens: tuple
    finish: int
    oldest: int


def groups_of(size, right, style=None, rows=None, **more) -> Groups:
    """Graded groups of these sizes. `right`, `style`: per row; NaN throughout a group that could not be graded."""
    size = np.asarray(size)
    num, total = len(size), int(size.sum())
    prompt, sample = number_rows(size, rows)
    blank = blank_groups(len(prompt), 1, (1, SLOTS), 2, (), 0)
    part = lambda x, fill: np.float32([*x, *[fill] * (len(prompt) - total)])  # noqa: E731
    right = part(right, np.nan)
    style = part(np.zeros(total) if style is None else style, np.nan)
    style = np.where(np.isnan(right), np.float32(np.nan), style)
    reward = right + np.float32(0.5) * style
    failure = np.array([int(np.isnan(right[prompt == p]).any()) for p in range(num)], np.int32)
    length = np.int32(part(more.get("length", np.full(total, 2)), 0))
    asked = blank.rollouts.prompts
    row = np.asarray(more.get("row", np.arange(num)), np.int32)
    asked = asked.replace(
        tokens=asked.tokens[:num], length=np.ones(num, np.int32), uid=np.arange(num, dtype=np.int32), row=row
    )
    sampled = np.arange(SLOTS) < length[:, None]
    rollouts = blank.rollouts.replace(
        prompts=asked, prompt=prompt, sample=sample, length=length, sampled=sampled,
        tokens=np.where(sampled, np.resize(np.int32(more.get("tokens", np.arange(SLOTS))), sampled.shape), 0),
        finish=np.int32(part(more.get("finish", np.zeros(total)), 0)),
        version=np.where(sampled, np.resize(np.int32(more.get("version", [3])), len(prompt))[:, None], 0).astype(np.int32),
    )  # fmt: skip
    return blank.replace(
        rollouts=rollouts, reward=reward, components=np.stack([right, style], axis=1), failure=failure,
        failed_by=np.where(failure, 0, -1).astype(np.int32), keep=~np.isnan(right), vote=np.zeros(len(prompt), np.int32),
        graders=NAMES, threshold=1.0,
    )  # fmt: skip


@st.composite
def ragged(draw, binary=False) -> Groups:
    """Groups of 0 to 7 rows, some not graded, some rows dropped before, and filler rows."""
    size = draw(st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    total = sum(size)
    right = rng.integers(0, 2, total) * 1.0 if binary else rng.choice([0.0, 0.25, 0.5, 1.0], total)
    lost = np.repeat(rng.random(len(size)) < 0.2, size)
    groups = groups_of(
        size, np.where(lost, np.nan, right), rng.choice([0.0, 0.1, 1.0], total), total + draw(st.integers(0, 3)),
        length=rng.integers(1, SLOTS + 1, total), tokens=rng.integers(0, 3, 400), finish=rng.integers(0, 3, total),
        version=rng.integers(0, 9, 60),
    )  # fmt: skip
    return groups.replace(keep=groups.keep & (rng.random(len(groups.keep)) < 0.9))


def by_prompt(groups: Groups) -> list[list[Row]]:
    """Rows of each prompt in plain Python."""
    r, found = groups.rollouts, [[] for _ in groups.failure]
    for b in range(len(r.prompt)):
        if r.prompt[b] < 0:
            continue
        n = int(r.length[b])
        found[r.prompt[b]].append(
            Row(
                b, int(r.sample[b]), float(groups.components[b, 0]), float(groups.components[b, 1]), float(groups.reward[b]), n,
                tuple(r.tokens[b, :n].tolist()), int(r.finish[b]), min(int(v) for v in r.version[b, :n]),
            )
        )  # fmt: skip
    return found


def measured(row: Row, by: str) -> float:
    """NaN stays NaN."""
    if by == "success":
        return row.right if row.right != row.right else float(row.right >= 1.0)
    return {"reward": row.reward, "right": row.right, "style": row.style}[by]


def graded(rows: list[Row]) -> bool:
    return bool(rows) and not any(row.right != row.right for row in rows)
