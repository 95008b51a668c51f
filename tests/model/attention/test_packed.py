"""A whole model over packed rows: scores and gradients are those of one sequence a row, in every family."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, SMALL, VOCAB, Sequences, layouts, make_params

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.update.batch import make_batch, to_completions
from jaxrl_llm.update.packing import BatchShape

GROUPS, SAMPLES, S, C = 4, 3, 7, 6
# Room for a whole group, or for 12 sequences of one each: the shape is the same for all, and so is the program.
ROWS, SLOTS = GROUPS * SAMPLES, S + SAMPLES * C
CFGS = {"qwen3": SMALL} | FAMILIES


def sequences() -> Sequences:
    """Ragged; the prompts longer than any window but the widest, so that a window ends inside the shared prompt."""
    rng, rows = np.random.default_rng(0), GROUPS * SAMPLES
    prompt_length = np.repeat([S, 5, 1, S], SAMPLES).astype(np.int32)
    length = rng.integers(1, C + 1, rows).astype(np.int32)
    length[:2] = C
    there = np.arange(C) < length[:, None]
    prompt = np.repeat(rng.integers(1, 15, (GROUPS, S)), SAMPLES, axis=0)
    return Sequences(
        prompt=np.where(np.arange(S) < prompt_length[:, None], prompt, VOCAB.pad).astype(np.int32),
        prompt_length=prompt_length,
        tokens=np.where(there, rng.integers(1, 16, (rows, C)), VOCAB.pad).astype(np.int32),
        length=length,
        group=np.repeat(np.arange(GROUPS), SAMPLES).astype(np.int32),
        learn=there & (rng.random((rows, C)) < 0.9),
        temperature=np.repeat([0.7, 1.0, 1.3, 1.0], SAMPLES).astype(np.float32),
        behavior_logprobs=np.zeros((rows, C), np.float32),
        advantage=np.where(there, rng.normal(size=(rows, C)), 0).astype(np.float32),
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


def found(name: str, kind: str, mutate=lambda batch: batch):
    """Gradients, and log-probs and entropies of the completions' tokens that are learned from."""
    q = sequences()
    batch, where = make_batch(q.experience, BatchShape(kind, ROWS, SLOTS, 1), VOCAB.pad, "sequence")
    gradient, scored = program(name)(mutate(batch))
    return gradient, [to_completions(np.asarray(x), where, q)[q.learn] for x in (scored.logprobs, scored.entropy)]


def assert_same(one, other):
    """Relative to the largest entry: sums in another order."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        assert np.abs(a).max() > 0, jax.tree_util.keystr(path)
        worst = np.abs(a - b).max() / np.abs(a).max()
        assert worst <= 1e-5, f"{jax.tree_util.keystr(path)}: {worst:.1e}"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "shared_prefix"])
@pytest.mark.parametrize("name", CFGS)
def test_packed_rows_give_the_same_scores_and_gradients(name, kind):
    assert_same(found(name, "none"), found(name, kind))


MUTANTS = {
    "completions see each other": lambda b: b.replace(
        until=np.where(b.segment > 0, np.max(np.where(b.group > 0, b.until, 0), axis=1, keepdims=True), b.until)
    ),
    "nobody sees the shared prompt": lambda b: b.replace(
        until=np.where(
            (b.segment == 0) & (b.group > 0), np.sum((b.segment == 0) & (b.group > 0), axis=1, keepdims=True), b.until
        )
    ),
    "the slot before is the token before": lambda b: b.replace(
        before=np.maximum(np.broadcast_to(np.arange(SLOTS), b.before.shape) - 1, 0)
    ),
    "positions go on through the row": lambda b: b.replace(
        position=np.broadcast_to(np.arange(SLOTS), b.position.shape)
    ),
}


@pytest.mark.parametrize("mutate", MUTANTS.values(), ids=MUTANTS)
def test_mutants_of_a_shared_prompt_are_killed(mutate):
    name = "gemma2, window 5"
    with pytest.raises(AssertionError):
        assert_same(found(name, "none"), found(name, "shared_prefix", mutate))
