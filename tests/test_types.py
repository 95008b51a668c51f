"""`check`: every field has the annotated dtype kind and shape, with one size per dimension."""

import jax
import numpy as np
import pytest

from jaxrl_llm.types import Batch, Finish, Prompts, Rollouts, TrainState, check


def prompts(p=2, s=3) -> Prompts:
    return Prompts(np.zeros((p, s), np.int32), *(np.ones(p, np.int32) for _ in range(3)))


def rollouts(p=2, g=2, c=4) -> Rollouts:
    b = p * g
    return Rollouts(
        prompts=prompts(p), prompt=np.repeat(np.arange(p, dtype=np.int32), g), sample=np.tile(np.arange(g, dtype=np.int32), p),
        tokens=np.zeros((b, c), np.int32), length=np.ones(b, np.int32), sampled=np.ones((b, c), bool),
        behavior_logprobs=np.zeros((b, c), np.float32), entropy=np.zeros((b, c), np.float32), temperature=np.ones(b, np.float32),
        version=np.zeros((b, c), np.int32), finish=np.zeros(b, np.int32),
    )  # fmt: skip


def batch(r=2, t=3, **changes) -> Batch:
    i32, f32 = np.zeros((r, t), np.int32), np.zeros((r, t), np.float32)
    return Batch(i32, i32, i32, i32, i32, i32, np.ones((r, t), bool), f32, f32, f32, f32).replace(**changes)


def test_a_valid_value_is_returned():
    for value in (prompts(), rollouts(), batch(), batch(reference_logprobs=np.zeros((2, 3), np.float32))):
        assert check(value) is value
    on_device = jax.device_put(rollouts())
    assert check(on_device) is on_device
    state = TrainState({"w": np.ones(3)}, (np.ones(2), {}), np.array(3, np.int32))
    assert check(state) is state


@pytest.mark.parametrize(
    "value, words",
    [
        (prompts().replace(length=np.ones(3, np.int32)), ["Prompts.length", "int32[3]"]),
        (prompts().replace(tokens=np.zeros((2, 3), np.float32)), ["Prompts.tokens", "float32[2, 3]"]),
        (prompts().replace(uid=None), ["Prompts.uid", "None"]),
        (rollouts().replace(sampled=np.ones((4, 4), np.int32)), ["Rollouts.sampled", "int32[4, 4]", "Bool"]),
        (
            rollouts().replace(behavior_logprobs=np.zeros((4, 5), np.float32)),
            ["Rollouts.behavior_logprobs", "float32[4, 5]"],
        ),
        (rollouts().replace(prompts=prompts().replace(row=np.ones((2, 1), np.int32))), ["Prompts.row", "int32[2, 1]"]),
        (batch(loss_mask=np.ones((2, 4), bool)), ["Batch.loss_mask", "bool[2, 4]"]),
        (batch(reference_logprobs=np.zeros((2, 4), np.float32)), ["Batch.reference_logprobs", "float32[2, 4]"]),
    ],
)
def test_the_first_mismatched_field_is_named(value, words):
    with pytest.raises(ValueError) as error:
        check(value)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_dimensions_are_bound_per_value():
    check(prompts(2))
    check(prompts(5))


def test_values_are_frozen():
    with pytest.raises(Exception, match="tokens"):
        prompts().tokens = np.zeros((2, 3), np.int32)


def test_finish_reasons_keep_their_numbers():
    """They are stored in checkpoints and in rollouts.jsonl."""
    assert [(f.name, f.value) for f in Finish] == [("EOS", 0), ("LENGTH", 1), ("STOP", 2), ("UNFINISHED", 3)]
