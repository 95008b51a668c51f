"""Gates against a second implementation in plain Python, and by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_groups import by_prompt, graded, groups_of, measured, ragged

from jaxrl_llm.experience.gates import AdmitAll, ExcludeSolved, Greso

many = settings(max_examples=60, deadline=None, derandomize=True, database=None)
ROWS = 4


def visits(groups, rng):
    row = rng.integers(0, ROWS, len(groups.failure)).astype(np.int32)
    return groups.replace(rollouts=groups.rollouts.replace(prompts=groups.rollouts.prompts.replace(row=row)))


class PlainGreso:
    """Algorithm 1 of the paper, prompt by prompt."""

    def __init__(self, gate):
        self.gate, self.history, self.p = (
            gate,
            {row: [] for row in range(ROWS)},
            {"easy": gate.start, "hard": gate.start},
        )

    def observe(self, groups):
        sides, again = (
            [],
            any(
                self.history[row] and graded(rows)
                for rows, row in zip(by_prompt(groups), groups.rollouts.prompts.row.tolist(), strict=True)
            ),
        )
        for rows, row in zip(by_prompt(groups), groups.rollouts.prompts.row.tolist(), strict=True):
            if not graded(rows):
                continue
            x = [measured(r, self.gate.by) for r in rows]
            mean, side = sum(x) / len(x), None
            if max(x) == min(x):
                side = "easy" if mean >= self.gate.easy else "hard" if mean <= self.gate.hard else None
            self.history[row].append(side)
            sides.append(side)
        for side, part in (("easy", 1 / 3), ("hard", 2 / 3)):
            if again:
                more = sides.count(side) / len(sides) >= self.gate.target * part
                self.p[side] = min(
                    max(self.p[side] + (-1 if more else 1) * self.gate.rate, self.gate.low), self.gate.high
                )

    def chance(self, row):
        history = self.history[row]
        if not history or history[-1] is None:
            return 1.0
        z = 0
        while z < len(history) and history[-1 - z] == history[-1]:
            z += 1
        return max(self.p[history[-1]] ** z, self.gate.least)


@many
@given(
    st.lists(ragged(binary=True), min_size=1, max_size=6), st.integers(0, 2**31), st.sampled_from(["success", "reward"])
)
def test_greso(steps, seed, by):
    gate, rng = Greso(by=by, rate=0.1), np.random.default_rng(seed)
    state, plain = gate.init(ROWS), PlainGreso(gate)
    for groups in steps:
        groups = visits(groups, rng)
        before = [x.copy() for x in state]
        after = gate.observe(state, groups)
        plain.observe(groups)
        for old, same, new in zip(before, state, after, strict=True):
            np.testing.assert_array_equal(old, same)
            assert (new.shape, new.dtype) == (same.shape, same.dtype)
        state = after
        np.testing.assert_allclose(state.explore, [plain.p["easy"], plain.p["hard"]])
        # Where 2,000 tries of each row are admitted as often as the formula says, within five standard deviations.
        row = np.repeat(np.arange(ROWS), 2000)
        _, admitted = gate.admit(state, np.random.default_rng(1), row)
        want = np.array([plain.chance(r) for r in range(ROWS)])
        got = admitted.reshape(ROWS, -1).mean(axis=1)
        assert (np.abs(got - want) <= 5 * np.sqrt(want * (1 - want) / 2000)).all()


def test_what_could_not_be_graded_changes_nothing():
    gate = Greso()
    state = gate.observe(gate.init(2), groups_of([2, 2], [0, 0, 1, 1]))
    again = gate.observe(state, groups_of([2, 2], [np.nan] * 4))
    assert again.streak.tolist() == [1, 1] and again.explore.tolist() == state.explore.tolist()


def test_in_the_first_epoch_greso_learns_nothing_about_its_chances():
    """The mutant that moves p from the first step had it at its lower bound before anything could be skipped."""
    gate, state = Greso(), Greso().init(60)
    for step in range(30):
        state = gate.observe(state, groups_of([2, 2], [0] * 4, row=[2 * step, 2 * step + 1]))
    assert state.explore.tolist() == [0.5, 0.5] and state.streak.tolist() == [1] * 60
    assert gate.observe(state, groups_of([2], [0, 0], row=[0])).explore.tolist() == [0.51, 0.49]


def test_greso_never_skips_what_has_signal_and_the_hardest_only_almost_always():
    gate, state = Greso(), Greso().init(2)
    for _ in range(60):
        state = gate.observe(state, groups_of([2, 2], [0, 0, 0, 1]))
    _, admitted = gate.admit(state, np.random.default_rng(0), np.repeat([0, 1], 5000))
    assert admitted[5000:].all() and 0 < admitted[:5000].mean() < 0.03


def outcomes(gate, means, start=None):
    """Rows that are admitted after each step; means[t] are those of rows 0, 1, ...; None: not visited."""
    state, found = start or gate.init(len(means[0])), []
    for step in means:
        seen = [row for row, mean in enumerate(step) if mean is not None]
        right = [x for row in seen for x in ([step[row]] * 2 if step[row] in (0, 1) else [0, 1])]
        state = gate.observe(state, groups_of([2] * len(seen), right, row=seen))
        found.append(gate.admit(state, None, np.arange(len(step)))[1].tolist())
    return state, found


def test_solved_and_hopeless_prompts_are_left_out_and_come_back():
    gate = ExcludeSolved(visits=2, returns_after=2)
    _, found = outcomes(
        gate, [[1, 0, 0.5], [1, 0, 0.5], [None, None, 0.5], [None, None, 0.5], [1, 0, 0.5], [1, 0.5, 1]]
    )
    # Twice in a row; then away for two steps; then twice again.
    assert found == [
        [True] * 3,
        [False, False, True],
        [False, False, True],
        [True] * 3,
        [True] * 3,
        [False, True, True],
    ]


def test_one_side_may_stay():
    _, found = outcomes(ExcludeSolved(visits=1, hopeless=None), [[1, 0]])
    assert found == [[False, True]]
    _, found = outcomes(ExcludeSolved(visits=1, solved=None), [[1, 0]])
    assert found == [[True, False]]


@many
@given(st.lists(ragged(binary=True), min_size=1, max_size=8), st.integers(0, 2**31))
def test_no_prompt_is_left_out_for_good(steps, seed):
    """The mutant that deletes hopeless prompts: a fifth of them are solved later."""
    gate, rng = ExcludeSolved(visits=1, returns_after=3), np.random.default_rng(seed)
    state = gate.init(ROWS)
    for groups in steps:
        state = gate.observe(state, visits(groups, rng))
    nobody = groups_of([1], [np.nan])
    for _ in range(3):
        state = gate.observe(state, nobody)
    assert gate.admit(state, None, np.arange(ROWS))[1].all()


def test_no_gate_admits_all():
    gate = AdmitAll()
    assert gate.admit(gate.init(3), None, np.arange(3)) == ((), pytest.approx(np.ones(3, bool)))
