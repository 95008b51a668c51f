"""A whole model over packed rows: scores and gradients equal those of one sequence per row, in every family."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, SMALL, VOCAB, Sequences, layouts, make_params

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.update.batch import fill_batch, to_completions
from jaxrl_llm.update.packing import BatchShape

GROUPS, SAMPLES, S, C = 4, 3, 7, 6
# Rows have room for a whole group, or hold one sequence: one shape, and so one program, for all kinds of packing.
ROWS, SLOTS = GROUPS * SAMPLES, S + SAMPLES * C
CFGS = {"qwen3": SMALL} | FAMILIES


def sequences() -> Sequences:
    """Ragged; prompts longer than all windows but the widest, so that a window ends inside the shared prompt."""
    rng, rows = np.random.default_rng(0), GROUPS * SAMPLES
    prompt_length = np.repeat([S, 5, 1, S], SAMPLES).astype(np.int32)
    length = rng.integers(1, C + 1, rows).astype(np.int32)
    length[:2] = C
    present = np.arange(C) < length[:, None]
    prompt = np.repeat(rng.integers(1, 15, (GROUPS, S)), SAMPLES, axis=0)
    return Sequences(
        prompt=np.where(np.arange(S) < prompt_length[:, None], prompt, VOCAB.pad).astype(np.int32),
        prompt_length=prompt_length,
        tokens=np.where(present, rng.integers(1, 16, (rows, C)), VOCAB.pad).astype(np.int32),
        length=length,
        group=np.repeat(np.arange(GROUPS), SAMPLES).astype(np.int32),
        loss_mask=present & (rng.random((rows, C)) < 0.9),
        temperature=np.repeat([0.7, 1.0, 1.3, 1.0], SAMPLES).astype(np.float32),
        behavior_logprobs=np.zeros((rows, C), np.float32),
        advantage=np.where(present, rng.normal(size=(rows, C)), 0).astype(np.float32),
    )


@cache
def program(name: str):
    cfg, (train, _) = CFGS[name], layouts()

    def loss(params, batch):
        scored = score_tokens(params, batch, Scoring(cfg, train, VOCAB.size))
        terms = scored.logprobs * batch.advantage + 0.3 * scored.entropy
        return jnp.sum(jnp.where(batch.loss_mask, terms, 0.0) * batch.weight), scored

    params = make_params(cfg, train, noise=0.2)
    run = jax.jit(jax.grad(loss, has_aux=True))
    return lambda batch: jax.device_get(run(params, batch))


def results(name: str, kind: str, mutate=lambda batch: batch):
    """Gradients, and log-probs and entropies of the completion tokens in the loss."""
    q = sequences()
    batch, where = fill_batch(q.experience, BatchShape(kind, ROWS, SLOTS, 1), VOCAB.pad, "sequence")
    gradient, scored = program(name)(mutate(batch))
    return gradient, [to_completions(np.asarray(x), where, q)[q.loss_mask] for x in (scored.logprobs, scored.entropy)]


def assert_same(one, other):
    """Tolerance relative to the largest entry: sums in another order."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.abs(a).max() > 0, jax.tree_util.keystr(path)
        worst = np.abs(a - b).max() / np.abs(a).max()
        assert worst <= 1e-5, f"{jax.tree_util.keystr(path)}: {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shared_prefix"])
@pytest.mark.parametrize("name", CFGS)
def test_packed_rows_have_the_same_scores_and_gradients(name, kind):
    assert_same(results(name, "none"), results(name, kind))


MUTANTS = {
    "completions attend to each other": lambda b: b.replace(
        until=np.where(b.segment > 0, np.max(np.where(b.group > 0, b.until, 0), axis=1, keepdims=True), b.until)
    ),
    "completions do not attend to the shared prompt": lambda b: b.replace(
        until=np.where(
            (b.segment == 0) & (b.group > 0), np.sum((b.segment == 0) & (b.group > 0), axis=1, keepdims=True), b.until
        )
    ),
    "the previous slot is the previous token": lambda b: b.replace(
        before=np.maximum(np.broadcast_to(np.arange(SLOTS), b.before.shape) - 1, 0)
    ),
    "positions continue through the row": lambda b: b.replace(
        position=np.broadcast_to(np.arange(SLOTS), b.position.shape)
    ),
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_a_shared_prompt_are_killed(mutate):
    name = "gemma2, window 5"
    with pytest.raises(AssertionError):
        assert_same(results(name, "none"), results(name, "shared_prefix", mutate))
