"""Bugs of ragged groups, put into the package one at a time: the comparison with the oracle must detect each."""

import numpy as np
import pytest
from estimator_inputs import single_tokens
from ragged import WEIGHTS, credit_by_oracle, ragged_groups
from variants import ORACLES

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.objective import advantages, credit, group_estimators, statistics, token_estimators
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.objective.statistics import Grouping

# Equally many rows in all but by group, with and without rows alone in their group, prompts without rows, filler rows.
SIZES = [(1, 4, 2, 1), (3, 3, 3), (0, 5, 1, 6), (2, 0, 2, 4), (1, 1, 1)]
BATCHES = [
    ragged_groups(np.random.default_rng(seed), list(size), seed % 3, dropped)
    for seed, size in enumerate(SIZES * 2)
    for dropped in (0.0, 0.4)
]


def is_detected() -> bool:
    """The package differs from the oracle in a credit, or ends."""
    for cfg, formula in ORACLES.items():
        for groups, scores in BATCHES:
            for over in ("sampled", "kept"):
                want = credit_by_oracle(formula, groups, scores, over)
                try:
                    with np.errstate(all="ignore"):
                        got = credit.estimator_credit(cfg, groups, scores, weights=WEIGHTS, baseline_over=over)
                except (AdvantageError, IndexError, ValueError):
                    return True
                pairs = zip((got.advantage, got.returns), want, strict=True)
                if not all(a is b is None or np.allclose(a, b, rtol=1e-6, atol=1e-6) for a, b in pairs):
                    return True
    return False


own_rows, own_credit, own_of = credit.rows_that_count, credit.estimator_credit, Grouping.of
own_centered, own_mean_of_others = statistics.centered, group_estimators.minus_mean_of_others
own_token_rewards, own_step_ends, own_to_go = (
    token_estimators.token_rewards,
    token_estimators.step_ends,
    token_estimators.to_go,
)
own_rewards, own_deviation = group_estimators.sequence_rewards, statistics.deviation


def equal_sizes(number):
    """A reshape to [P G], with the G of all groups together."""
    groups = own_of(number)
    rows, many = len(number), len(groups.size)
    return own_of(np.arange(rows) // (rows // many)) if many and rows % many == 0 else groups


def divided_by_none(score, groups):
    return own_centered(score, groups) * (groups.rows / (groups.rows - 1))


def alone_against_nothing(score, groups):
    """verl's rloo: the reward of a group of one as it is (verl #7581)."""
    return np.where(groups.rows > 1, own_mean_of_others(score, groups), score)


def alone_times_zero(inputs):
    """verl's rloo_vectorized, for estimators that compare with no other row."""
    return own_rewards(inputs) * (inputs.groups.rows > 1)


def alone_without_std(x, groups, ddof):
    """slime's std of one number."""
    return np.where(groups.rows > ddof, own_deviation(x, groups, ddof), np.nan)


def alone_left_out(x, mask, ddof=1, eps=1e-8, beside_std=0.0):
    """Whitened without rows that are 0, as those alone in their group are."""
    return statistics.whiten(x, mask & (x != 0), ddof, eps, beside_std) * (x != 0)


def fillers_are_zeros(estimator, groups, scores, **more):
    """Filler rows as rows of the last prompt with a reward of 0."""
    prompt = groups.rollouts.prompt
    filler = prompt < 0
    rollouts = groups.rollouts.replace(prompt=np.where(filler, prompt.max(), prompt))
    return own_credit(
        estimator,
        groups.replace(
            rollouts=rollouts,
            reward=np.where(filler, np.float32(0), groups.reward),
            components=np.where(filler[:, None], np.float32(0), groups.components),
            keep=groups.keep | filler,
        ),
        scores,
        **more,
    )


def ungraded_is_zero(estimator, groups, scores, **more):
    """TRL #7364."""
    failed = (groups.rollouts.prompt >= 0) & np.isnan(groups.reward)
    reward = np.where(failed, np.float32(0), groups.reward)
    components = np.where(failed[:, None], np.float32(0), groups.components)
    return own_credit(
        estimator, groups.replace(reward=reward, components=components, keep=groups.keep | failed), scores, **more
    )


def group_of_the_last(groups, baseline_over):
    """-1 taken for an index: filler rows belong to the last prompt."""
    return groups.kept[groups.rollouts.prompt] if baseline_over == "sampled" else own_rows(groups, baseline_over)


def counted_twice(inputs):
    """In the reward of the sequence, and at its step."""
    return own_token_rewards(inputs) + own_token_rewards(inputs._replace(step_reward=None, token_reward=None)) * (
        inputs.step_reward is not None
    )


def of_earlier_steps(rewards, mask, gamma):
    return np.cumsum(rewards, axis=1) if gamma == 1 else own_to_go(rewards, mask, gamma)


def later_than_its_own(rewards, mask, gamma):
    """A token is not credited with the step that it ends."""
    return own_to_go(rewards, mask, gamma) - rewards


MUTANTS = {
    "steps counted twice": (token_estimators, "token_rewards", counted_twice),
    "the reward of a sequence in the place of its steps": (
        token_estimators, "token_rewards", lambda inputs: own_token_rewards(inputs._replace(step_reward=None))),
    "steps of each row by themselves": (token_estimators, "_group_numbers", lambda groups: np.arange(groups.size.sum())),
    "steps of the whole batch": (token_estimators, "_group_numbers", lambda groups: np.zeros(groups.size.sum(), int)),
    "only the last step": (
        token_estimators, "step_ends", lambda inputs: own_step_ends(inputs._replace(step_reward=None))),
    "earlier steps for later ones": (token_estimators, "to_go", of_earlier_steps),
    "later steps without one's own": (token_estimators, "to_go", later_than_its_own),
    "statistics over a reshape to [P G]": (Grouping, "of", staticmethod(equal_sizes)),
    "a group of one divided by 0": (group_estimators, "minus_mean_of_others", divided_by_none),
    "a group of one against a baseline of 0": (group_estimators, "minus_mean_of_others", alone_against_nothing),
    "a group of one without a std": (group_estimators, "deviation", alone_without_std),
    "a row alone is worth nothing without a baseline": (group_estimators, "sequence_rewards", alone_times_zero),
    "a row alone is left out of the whitening": (group_estimators, "whiten", alone_left_out),
    "filler rows with a reward of 0": (credit, "estimator_credit", fillers_are_zeros),
    "filler rows in the last group": (credit, "rows_that_count", group_of_the_last),
    "an ungraded group with a reward of 0": (credit, "estimator_credit", ungraded_is_zero),
    "the subset where the pool was asked": (credit, "rows_that_count", lambda groups, over: own_rows(groups, "kept")),
    "the pool where the subset was asked": (credit, "rows_that_count", lambda groups, over: own_rows(groups, "sampled")),
    "all graded rows of all groups": (
        credit, "rows_that_count", lambda groups, over: (groups.rollouts.prompt >= 0) & ~np.isnan(groups.reward)),
    "the batch's mean for the group's": (
        token_estimators, "centered", lambda x, groups: own_centered(x, own_of(np.zeros(len(x), int)))),
    "the credit of the first rows": (
        credit, "_put_back", lambda x, rows: np.concatenate([x, np.zeros((len(rows) - len(x), *x.shape[1:]), x.dtype)])),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_the_bug_is_told(name, monkeypatch):
    # To be detected by the comparison with the oracle, not by the guard before it.
    monkeypatch.setattr(advantages, "bound", lambda cfg, inputs: np.inf)
    monkeypatch.setattr(*MUTANTS[name])
    assert is_detected()


def test_without_a_bug_nothing_is_told():
    assert not is_detected()


def test_a_bound_without_groups_of_one_is_told(monkeypatch):
    """The guard of the bound alone: the raw reward of a group of one is beyond the range of its group, 0."""
    monkeypatch.setattr(group_estimators, "minus_mean_of_others", alone_against_nothing)
    with pytest.raises(AdvantageError, match="got an advantage of 9, want at most 1"):
        advantages.estimate(Rloo(), single_tokens([[1, 0], [9]]))
