"""Mistakes that replays of other libraries have made, put in by hand: a check that the replay passes fails with each of them."""

import numpy as np
import pytest
from random_groups import groups_of

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.experience import replay
from jaxrl_llm.experience.buffer import Buffer, empty_buffer
from jaxrl_llm.experience.config import JoinConfig, ReplayConfig
from jaxrl_llm.experience.draws import UniformDraw
from jaxrl_llm.metrics.guards import RatioAlarm
from jaxrl_llm.objective import group_estimators
from jaxrl_llm.objective.credit import estimator_credit
from jaxrl_llm.objective.group_estimators import Gdpo, Grpo, LeaveOneOut, MeanOnly, Rloo
from jaxrl_llm.types import Groups, select_groups

NOW = 12
"""Version of the policy that samples the last step; those before it were 3 and 7."""
SIZES, SECOND, FRESH = [3, 2, 4], [4, 2], [2, 2, 2]
RIGHT = [0, 1, 0, 1, 0, 1, 1, 0, 1]
STYLE = [1, 0, 0.5, 0, 1, 0.25, 0.75, 1, 0]


def logprobs(tokens: np.ndarray, version: np.ndarray | int) -> np.ndarray:
    """Log-probs of tokens under the policy of a version: no two policies agree on a token."""
    return (-(1 + tokens % 5) / (2 + version)).astype(np.float32)


def sampled(version: int, first: int, size: list[int], right: list[float]) -> Groups:
    """Groups whose rows of the task are first, first + 1, ..., sampled by the policy of a version."""
    total = sum(size)
    groups = groups_of(
        size, right[:total], STYLE[:total], row=first + np.arange(len(size)), version=[version],
        length=2 + np.arange(total) % 4, tokens=1 + np.arange(6 * total),
    )  # fmt: skip
    rollouts = groups.rollouts
    captured = np.where(rollouts.sampled, logprobs(rollouts.tokens, version), 0).astype(np.float32)
    asked = rollouts.prompts.replace(uid=rollouts.prompts.row)
    return groups.replace(rollouts=rollouts.replace(behavior_logprobs=captured, prompts=asked))


def steps() -> list[Groups]:
    """Two steps whose groups are stored, and one that dropped its groups, for which stored ones come back."""
    fresh = sampled(NOW, 200, FRESH, [0] * 9)
    return [sampled(3, 0, SIZES, RIGHT), sampled(7, 100, SECOND, RIGHT[1:]), fresh.replace(keep=fresh.keep & False)]


def trained_on(max_age: int = 100) -> Groups:
    """What the last step trains on: three dropped groups, and five stored ones, all there are, in places of their own."""
    cfg = ReplayConfig(capacity=20, max_age=max_age, groups=8, replace_dropped=False)
    buffer, rng = empty_buffer(20), np.random.default_rng(0)
    for groups in steps():
        buffer, out, _ = replay.exchange(buffer, groups, rng, None, cfg)
    return out


def stored(out: Groups) -> Groups:
    """The groups that came back, ordered by their rows of the task."""
    row, size = out.rollouts.prompts.row, out.rollouts.size
    there = [p for p in np.argsort(row) if size[p] and row[p] < 200]
    assert sorted(row[there]) == [0, 1, 2, 100, 101]
    return select_groups(out, np.array(there))


def survives(check) -> bool:
    try:
        check()
    except AssertionError:
        return True
    return False


def assert_captured():
    """Log-probs of old rows are those of the policy that sampled them, so their ratios have spread, and no alarm rings."""
    out = stored(trained_on())
    old = out.rollouts
    assert set(old.version[old.sampled].tolist()) == {3, 7}
    want = np.where(old.sampled, logprobs(old.tokens, old.version), 0).astype(np.float32)
    ratio = np.exp(logprobs(old.tokens, NOW) - old.behavior_logprobs)[old.sampled]
    alarm, ring = RatioAlarm().observe(ratio.min(), ratio.max(), stale=True)
    assert not alarm.observe(ratio.min(), ratio.max(), stale=True)[1] and not ring
    np.testing.assert_array_equal(old.behavior_logprobs, want)


def mutated_groups(monkeypatch, change):
    whole = Buffer.groups
    monkeypatch.setattr(Buffer, "groups", lambda self, *more: change(self, whole(self, *more)))


def test_mutant_log_probs_of_old_groups_recomputed(monkeypatch):
    """SPEED's and RePO's: all ratios of old data are 1."""
    assert_captured()

    def recomputed(buffer: Buffer, groups: Groups) -> Groups:
        rollouts = groups.rollouts
        new = np.where(rollouts.sampled, logprobs(rollouts.tokens, NOW), 0).astype(np.float32)
        return groups.replace(rollouts=rollouts.replace(behavior_logprobs=new))

    mutated_groups(monkeypatch, recomputed)
    assert survives(assert_captured)
    alarm, rollouts = RatioAlarm(), stored(trained_on()).rollouts
    for _ in range(2):
        ratio = np.exp(logprobs(rollouts.tokens, NOW) - rollouts.behavior_logprobs)[rollouts.sampled]
        alarm, ring = alarm.observe(ratio.min(), ratio.max(), stale=True)
    assert ring


@pytest.mark.parametrize("of", ["versions", "log-probs", "first row"])
def test_mutant_weights_from_another_policy_than_each_groups_own(monkeypatch, of):
    """One policy for the whole buffer: its newest one, or that of the first row of a draw."""
    assert_captured()

    def of_one(buffer: Buffer, groups: Groups) -> Groups:
        rollouts = groups.rollouts
        newest = int(buffer.known.version.max() if of != "first row" else rollouts.version[0].max())
        if of == "versions":
            version = np.where(rollouts.sampled, newest, 0).astype(np.int32)
            return groups.replace(rollouts=rollouts.replace(version=version))
        new = np.where(rollouts.sampled, logprobs(rollouts.tokens, newest), 0).astype(np.float32)
        return groups.replace(rollouts=rollouts.replace(behavior_logprobs=new))

    mutated_groups(monkeypatch, of_one)
    assert survives(assert_captured)


def assert_components():
    """Each grader's reward comes back, so that advantages per grader and success are those of the step that sampled."""
    out, before = stored(trained_on()), steps()[:2]
    np.testing.assert_array_equal(out.components, np.concatenate([groups.components for groups in before]))
    np.testing.assert_array_equal(out.measure("success"), [*RIGHT, *RIGHT[1:7]])
    # Whitened over the batch, so of one step at a time.
    for rows, groups in ((np.arange(3), before[0]), (np.arange(3, 5), before[1])):
        again, once = (estimator_credit(Gdpo(), x).advantage for x in (select_groups(out, rows), groups))
        np.testing.assert_array_equal(again, once)


@pytest.mark.parametrize("kept", ["the sum", "the first", "none"])
def test_mutant_rewards_of_one_dimension_in_the_buffer(monkeypatch, kept):
    assert_components()

    def one_dimension(buffer: Buffer, groups: Groups) -> Groups:
        one = {"the sum": groups.reward, "the first": groups.components[:, 0], "none": 0 * groups.reward}[kept]
        return groups.replace(components=np.repeat(one[:, None], 2, axis=1))

    mutated_groups(monkeypatch, one_dimension)
    assert survives(assert_components)


def assert_alone(advantage):
    """A stored row that is alone in its group, and one that is compared with no other, teach nothing: 0, and not NaN."""
    alone, fresh = sampled(3, 0, [1, 3], [1, 0, 1, 0]), steps()[2]
    cfg = ReplayConfig(capacity=20, max_age=100, groups=2, replace_dropped=False)
    buffer, rng = empty_buffer(20), np.random.default_rng(0)
    buffer, _, _ = replay.exchange(buffer, alone, rng, None, cfg)
    _, out, _ = replay.exchange(buffer, fresh, rng, None, cfg)
    found = estimator_credit(advantage, out).advantage
    single = out.reused & (out.rollouts.size[out.rollouts.prompt] == 1)
    assert single.sum() == 1 and out.reward[single] == 1.5
    assert np.isfinite(found).all() and (found[single] == 0).all() and (found[out.reused & ~single] != 0).any()
    # The only stored row of a prompt, split from the fresh ones.
    cfg = ReplayConfig(capacity=20, max_age=100, replace_dropped=False, join=JoinConfig(most=1))
    again = sampled(NOW, 0, [3, 1], [0, 1, 0, 0])
    _, out, _ = replay.exchange(buffer, again, rng, None, cfg)
    found = estimator_credit(advantage, out, reused_rows="split").advantage
    assert out.reused.sum() == 2 and np.isfinite(found).all() and (found[out.reused] == 0).all()
    assert (found[out.keep & ~out.reused] != 0).any()


def unbiased(x, groups, ddof):
    """Standard deviations as torch has them: NaN of a single number."""
    with np.errstate(all="ignore"):
        of = [
            np.sqrt(np.square(part - part.mean()).sum() / np.float64(len(part) - ddof)) for part in parts_of(x, groups)
        ]
    return groups.per_row(np.array(of))


def from_zero(x, groups):
    """Distances from the mean, of a single number from 0: as verl has it."""
    return np.concatenate([part - part.mean() * (len(part) > 1) for part in parts_of(x, groups)])


def parts_of(x, groups):
    return np.split(x, groups.start[1:])


@pytest.mark.parametrize(
    "advantage, name, mutant",
    [
        (Grpo(), "deviation", unbiased),
        (Grpo(), "centered", from_zero),
        (MeanOnly(), "centered", from_zero),
        (Rloo(), "centered", from_zero),
        (LeaveOneOut(), "centered", from_zero),
    ],
)
def test_mutant_singleton_groups_in_the_buffer(monkeypatch, advantage, name, mutant):
    assert_alone(advantage)
    monkeypatch.setattr(group_estimators, name, mutant)
    # NaN is refused as soon as it appears.
    with np.errstate(all="ignore"), pytest.raises((AssertionError, AdvantageError)):
        assert_alone(advantage)


def assert_ages(monkeypatch):
    """An age counts updates since the version that sampled: of all groups of a step the same, however long a step took."""
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(
            UniformDraw, "__call__", lambda self, groups: seen.append(groups.age) or np.ones(len(groups.age))
        )
        out = trained_on()
    assert [ages.tolist() for ages in seen] == [[4, 4, 4], [9, 9, 9, 5, 5]]
    assert len(stored(out).failure) == 5
    # Nine updates are too many, five are not.
    rows = trained_on(max_age=8).rollouts.prompts.row
    assert set(rows[rows >= 100].tolist()) == {100, 101, 200, 201, 202} and not np.isin([1, 2], rows).any()


@pytest.mark.parametrize("by", ["insertion", "steps", "clock"])
def test_mutant_ages_by_insertion_or_by_the_clock(monkeypatch, by):
    assert_ages(monkeypatch)
    candidates, added = Buffer.candidates, replay.added
    clock, born = [0.0], {}

    def adding(buffer, groups, *more):
        clock[0] += 2.5
        after = added(buffer, groups, *more)
        born.update({n: clock[0] for n in after.stored.tolist() if n not in born})
        return after

    def aged(self, version):
        now = {"insertion": int(self.next) - 1, "steps": 3, "clock": clock[0]}[by]
        old = self.stored if by == "insertion" else np.array([born[n] for n in self.stored.tolist()])
        return candidates(self, version)._replace(age=(now - old).astype(int))

    monkeypatch.setattr(replay, "added", adding)
    monkeypatch.setattr(Buffer, "candidates", aged)
    assert survives(lambda: assert_ages(monkeypatch))
