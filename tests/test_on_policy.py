"""On the first update the ratio is 1 with any truncation: sampled by the engine, scored by the update."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from setups import TINY, engine, layouts, make_params, make_policy, make_prompts, to_batch, to_experience

from jaxrl_llm.distribution.control_tables import ROOM_BITS, STATE_BITS, join_automata
from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import check
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_update

CFG = replace(TINY, layers=1, vocab_size=64)
VOCAB = Vocabulary(size=60, pad=0, eos=(59, 7, 20, 33, 41, 52))
P, G, C, K = 8, 4, 6, 12
OFF = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "min_new_tokens": 0}
TRUNCATIONS = {
    "top-p 0.9": {"top_p": 0.9},
    "top-k 5": {"top_k": 5},
    "min-p 0.05": {"min_p": 0.05},
    "all three, and a minimum length": {"top_p": 0.9, "top_k": 9, "min_p": 0.02, "min_new_tokens": 3},
    # More tokens qualify than fit: the kept tokens are the sampled distribution all the same.
    "max_kept_tokens only": {},
}


@cache
def params():
    return make_params(CFG, layouts()[0], sharpness=2.0)


def rollouts(top_p: float, /, **changes: float | list[float]):
    """Rollouts of an engine configured with `top_p` (truncating if below 1), with the controls `changes`: one number, or one per
    sample of each group."""
    train, decode = layouts()
    of = engine(
        CFG, decode, VOCAB, prompts=P, samples=G, max_new_tokens=C, temperature=1.3, top_p=top_p, max_kept_tokens=K
    )
    controls = of.controls(P * G)
    each = {
        name: np.resize(value, P * G).astype(getattr(controls, name).dtype) for name, value in (OFF | changes).items()
    }
    policy = make_policy(CFG, params(), train, decode)
    return check(of.generate(policy, make_prompts(P, vocab=58), jax.random.key(4), controls.replace(**each)))


@cache
def programs():
    specs, optimizer, train = model_params.specs(CFG), make_optimizer(AdamW()), layouts()[0]
    update = jit_update(specs, make_loss(ObjectiveConfig()), optimizer, Scoring(CFG, train, VOCAB.size))
    return make_init_state(specs, optimizer, train), update


def first_update(batch) -> dict[str, float]:
    start, update = programs()
    train = layouts()[0]
    state = start(jax.tree.map(np.copy, jax.device_get(params())), hosts.put(np.int32(0), train.replicated))
    tables = hosts.put(join_automata([], VOCAB.size, VOCAB.eos, CFG.vocab_size)[0], train.replicated)
    _, metrics = update(state, hosts.put(batch, train.sharding(("rows", None))), None, tables)
    return {name: float(x) for name, x in metrics.items()}


def batch_of(of):
    """Always with `control_state`, so that one program serves all batches without kept tokens."""
    advantage = np.random.default_rng(0).normal(size=P * G).astype(np.float32)
    batch = check(to_batch(to_experience(of, advantage)))
    return batch if of.control_state is not None else batch.replace(control_state=np.zeros_like(batch.tokens))


def check_ratios(metrics: dict[str, float]) -> None:
    assert max(abs(metrics["ratio/max"] - 1), abs(metrics["ratio/min"] - 1)) <= 1e-3
    assert np.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0


@pytest.mark.parametrize("truncation", TRUNCATIONS)
def test_the_ratio_is_1(truncation):
    of = rollouts(0.5, **TRUNCATIONS[truncation])
    metrics = first_update(batch_of(of))
    print({name: metrics[name] for name in ("ratio/max", "ratio/min", "entropy")})
    check_ratios(metrics)
    np.testing.assert_allclose(metrics["entropy"], of.entropy[of.sampled].mean(), rtol=1e-4)
    kept = (of.kept_tokens >= 0).sum(axis=-1)
    assert kept[of.sampled].min() >= 1 and kept.max() <= K and not kept[~of.sampled].any()


def test_each_sample_is_scored_at_its_own_temperature_and_over_its_own_kept_tokens():
    """Samples of a group at 0.7 with everything that fits, 1.6 with top-p 0.8, 1.6 and 0.7 with top-p 0.5.

    The mutants: the group's first temperature for all; the first row's kept tokens for all of the group.
    """
    of = rollouts(0.5, temperature=[0.7, 1.6, 1.6, 0.7], top_p=[1.0, 0.8, 0.5, 0.5])
    np.testing.assert_array_equal(of.temperature, np.tile(np.float32([0.7, 1.6, 1.6, 0.7]), P))
    kept = (of.kept_tokens >= 0).sum(axis=-1)
    assert [int(kept[g::G].max()) == K for g in range(G)] == [True, True, False, False]
    batch = batch_of(of)
    check_ratios(first_update(batch))
    first = np.repeat(of.temperature[::G], G)
    wrong = first_update(batch_of(of.replace(temperature=first)))
    assert wrong["ratio/max"] > 1.1 and wrong["ratio/min"] < 0.9
    all_kept = np.repeat(of.kept_tokens[::G], G, axis=0)
    shared = np.where(of.sampled[..., None] & (all_kept >= 0).any(axis=-1, keepdims=True), all_kept, of.kept_tokens)
    assert first_update(batch_of(of.replace(kept_tokens=shared)))["ratio/min"] < 0.9


def test_without_the_recorded_kept_tokens_it_is_not():
    """The mutant: the scorer takes the whole vocabulary."""
    metrics = first_update(batch_of(rollouts(0.5, top_p=0.9)).replace(kept_tokens=None))
    assert metrics["ratio/min"] < 1 - 1e-2
    with pytest.raises(AssertionError):
        check_ratios(metrics)


def test_a_minimum_length_is_part_of_the_distribution():
    """Untruncated sampling without end tokens in the first three slots; the mutant ignores the mask."""
    of = rollouts(1.0, min_new_tokens=3)
    assert of.kept_tokens is None and of.length.min() >= 3
    ends_masked = of.control_state >> (STATE_BITS + ROOM_BITS) == 1
    np.testing.assert_array_equal(ends_masked, of.sampled & (np.arange(C) < 3))
    batch = batch_of(of)
    check_ratios(first_update(batch))
    assert first_update(batch.replace(control_state=np.zeros_like(batch.tokens)))["ratio/min"] < 1 - 1e-2
    truncated = rollouts(0.5, **TRUNCATIONS["all three, and a minimum length"])
    assert truncated.length.min() >= 3 and not np.isin(truncated.kept_tokens[:, :3], VOCAB.eos).any()
