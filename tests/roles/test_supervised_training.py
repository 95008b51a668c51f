"""Supervised training with a fake update: which rows it learns, as which responses, and what it says."""

from functools import partial

import numpy as np
from fakes import sums
from setups import layouts

from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.roles.state import SupervisedState
from jaxrl_llm.roles.supervised import Supervised, right_responses
from jaxrl_llm.tasks.stream import noisy_rows
from jaxrl_llm.types import TrainState
from jaxrl_llm.update.config import WarmStartConfig
from jaxrl_llm.update.packing import batch_shape, equal_groups

TASK = sums()
SLOTS = TASK.target_slots


def order(place):
    return (7 * place + 3) % len(TASK.train)


def make(update, noise=0.0):
    return Supervised(
        cfg=WarmStartConfig(steps=9, rows=2, noise=noise), task=TASK, order=order, seed=5,
        right=partial(right_responses, TASK, SLOTS, 1.0), update=update,
        shape=batch_shape("none", equal_groups(2, 1), (TASK.prompt_slots, SLOTS), 0, 1, 1),
        rows=layouts()[0].sharding(("rows", None)),
    )  # fmt: skip


def run(steps, noise=0.0):
    """Batches, the last state and the metrics of each step."""
    batches, each = [], []

    def update(train, batch):
        batches.append(batch)
        return train.replace(step=train.step + 1), {"loss": np.float32(len(batches)), "zero_gradient/w": np.float32(1)}

    supervised, state = make(update, noise), SupervisedState(np.array(0), TrainState({}, (), np.int32(0)), Guards())
    for _ in range(steps):
        state, metrics = supervised(state)
        each.append(metrics)
    return batches, state, each


def text_of(batch, row):
    length = int((np.asarray(batch.group)[row] > 0).sum())
    return TASK.tokenizer.decode(np.asarray(batch.tokens)[row, :length].tolist())


def test_steps_take_the_next_rows_of_the_stream_with_their_right_responses():
    batches, state, metrics = run(3)
    rows = [TASK.train[order(place)] for place in range(6)]
    assert [text_of(batch, row) for batch in batches for row in range(2)] == [r.prompt + r.response + "#" for r in rows]
    for i, row in enumerate(rows):
        mask = np.asarray(batches[i // 2].loss_mask)[i % 2]
        assert np.flatnonzero(mask).tolist() == list(range(len(row.tokens), len(row.tokens) + len(row.target)))
    assert int(state.step) == 3 and int(state.train.step) == 3 and state.guards == Guards()
    # What is said of gradients is not a metric.
    assert metrics == [{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]


def test_tokens_weigh_the_same_and_the_batch_lies_in_the_layout():
    [batch], *_ = run(1)
    mask = np.asarray(batch.loss_mask)
    np.testing.assert_allclose(np.asarray(batch.weight)[mask], 1 / mask.sum())
    assert batch.tokens.sharding == make(None).rows and batch.tokens.shape == (2, TASK.prompt_slots + SLOTS)


def test_noise_is_a_function_of_seed_and_place():
    batches, *_ = run(4, noise=0.5)
    rows = noisy_rows(TASK, order, range(8), 0.5, 5)
    assert [text_of(batch, row) for batch in batches for row in range(2)] == [r.prompt + r.response + "#" for r in rows]
    wrong = [row.response != TASK.train[order(place)].response for place, row in enumerate(rows)]
    assert 0 < sum(wrong) < 8


def test_right_responses_by_hand():
    rows = list(TASK.held_out[:2])
    found = right_responses(TASK, SLOTS, 0.5, rows)
    rollouts, groups = found.groups.rollouts, found.groups
    for i, row in enumerate(rows):
        n = len(row.target)
        np.testing.assert_array_equal(rollouts.tokens[i], np.pad(row.target, (0, SLOTS - n), constant_values=TASK.pad))
        assert rollouts.length[i] == n and rollouts.sampled[i].tolist() == [True] * n + [False] * (SLOTS - n)
        np.testing.assert_array_equal(rollouts.prompts.tokens[i, : rollouts.prompts.length[i]], row.tokens)
    assert rollouts.temperature.tolist() == [0.5, 0.5] and groups.keep.all() and len(groups.failure) == 2
    assert not found.credit.advantage.any()
