"""Behind a hint the ratio is 1, and its tokens are in no loss but LUFFY's: sampled by the engine, scored by the update."""

from functools import cache

import jax
import numpy as np
from setups import engine, layouts, make_params, make_policy, make_prompts
from test_on_policy import CFG, VOCAB, C, G, P, check_ratios, params

from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.model import params as model_params
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import PolicyGradient
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.model_programs import make_batch
from jaxrl_llm.types import Groups, check
from jaxrl_llm.update.batch import ungraded
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_score, jit_update

SLOTS, ADVANTAGE = np.arange(C), np.random.default_rng(0).normal(size=P * G).astype(np.float32)
LOSS = make_loss(ObjectiveConfig(loss=PolicyGradient(shaping=0.1)))


@cache
def sampled(sizes: tuple[int, ...] = (1, 1, 1)) -> Groups:
    """Rows that begin with 0 to 4 tokens of which the policy knows nothing."""
    train, decode = layouts(sizes)
    of = engine(CFG, decode, VOCAB, prompts=P, samples=G, max_new_tokens=C, temperature=1.3)
    weights = params() if sizes == (1, 1, 1) else make_params(CFG, train, sharpness=2.0)
    session, rng = of.session(make_policy(CFG, weights, train, decode), jax.random.key(4)), np.random.default_rng(1)
    hint = rng.integers(0, 5, P * G).astype(np.int32)
    ids = session.add(make_prompts(P, vocab=58), known=[rng.integers(1, 7, n).tolist() for n in hint])
    while session.pending:
        session.advance()
    return check(ungraded(session.take(ids)).replace(hint=hint))


@cache
def programs():
    specs, optimizer, train = model_params.specs(CFG), make_optimizer(AdamW()), layouts()[0]
    scoring = Scoring(CFG, train, VOCAB.size)
    return make_init_state(specs, optimizer, train), jit_update(specs, LOSS, optimizer, scoring), jit_score(scoring)


def put(batch):
    return hosts.put(batch, layouts()[0].sharding(("rows", None)))


def first_update(batch) -> dict[str, float]:
    start, update, _ = programs()
    state = start(jax.tree.map(np.copy, jax.device_get(params())), hosts.put(np.int32(0), layouts()[0].replicated))
    return {name: float(x) for name, x in update(state, put(batch))[1].items()}


def batch_of(groups: Groups):
    return check(make_batch(groups, ADVANTAGE, loss=LOSS, packing="none"))


def hint_tokens(groups: Groups) -> np.ndarray:
    return SLOTS < groups.hint[:, None]


def test_behind_a_hint_the_ratio_is_1_and_the_hint_is_context():
    groups = sampled()
    rollouts = groups.rollouts
    assert set(groups.hint) == {0, 1, 2, 3, 4} and rollouts.length.min() >= 1
    np.testing.assert_array_equal(rollouts.sampled, (SLOTS < rollouts.length[:, None]) & ~hint_tokens(groups))
    batch = batch_of(groups)
    assert batch.loss_mask.sum() == rollouts.sampled.sum() and not batch.own["shaped"].any()
    check_ratios(first_update(batch))


def test_a_hint_that_counts_as_sampled_is_seen():
    """The mutant: forced tokens enter the loss as the policy's own, with a log-prob of 0."""
    groups = sampled()
    rollouts = groups.rollouts
    mutant = groups.replace(rollouts=rollouts.replace(sampled=rollouts.sampled | hint_tokens(groups)))
    batch = batch_of(mutant)
    assert batch.loss_mask.sum() == rollouts.length.sum() > rollouts.sampled.sum()
    assert first_update(batch)["ratio/min"] < 0.5


def test_the_same_tokens_on_another_mesh():
    one, other = sampled().rollouts, sampled((2, 2, 2)).rollouts
    for name in ("tokens", "sampled", "length", "finish"):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    np.testing.assert_allclose(one.behavior_logprobs, other.behavior_logprobs, atol=1e-5)


def test_hints_that_are_trained_on_have_the_term_of_luffy():
    """The mean over all trained tokens of -A for sampled ones, whose ratio is 1, and of -A p / (p + 0.1) for those of hints.

    The mutant: they have the clipped ratio p / 1, and rare tokens no more weight than their probability.
    """
    groups = sampled()
    taught = groups.replace(taught=hint_tokens(groups))
    batch = batch_of(taught)
    assert batch.loss_mask.sum() == groups.rollouts.length.sum()
    assert batch.own["shaped"].sum() == groups.hint.sum() and not batch.behavior_logprobs[batch.own["shaped"]].any()
    p = np.exp(np.asarray(programs()[2](params(), put(batch)).logprobs, np.float64))
    term = np.where(batch.own["shaped"], p / (p + 0.1), 1.0)
    metrics = first_update(batch)
    np.testing.assert_allclose(metrics["loss"], -np.mean((batch.advantage * term)[batch.loss_mask]), rtol=1e-4)
    unshaped = first_update(batch.replace(own={"shaped": np.zeros_like(batch.own["shaped"])}))
    assert abs(unshaped["loss"] / metrics["loss"] - 1) > 0.05
