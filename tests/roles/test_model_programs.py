"""Update, publish, score and batches of a `Model`, as a loop of one's own calls them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from fakes import MODEL, groups_of
from hf_cases import equal

from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.advantages import Grpo
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import KlConfig, PolicyGradient
from jaxrl_llm.objective.losses import CROSS_ENTROPY, as_loss, make_loss
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.roles.loaded_model import load_model
from jaxrl_llm.roles.model_programs import make_batch, make_publish, make_score, make_update
from jaxrl_llm.types import Credit, Scores, check

MODEL_ = load_model(ModelConfig(**MODEL), make_mesh(devices=jax.devices()[:1]))
REWARD = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
GROUPS = groups_of(REWARD, length=[2, 1, 1, 2, 2, 2])


def loss(scores, batch):
    return -jnp.exp(scores.logprobs - batch.behavior_logprobs) * batch.advantage


UPDATE = make_update(MODEL_, loss, optax.sgd(0.5), micro_batches=2)
STATE = UPDATE.start(MODEL_.params)


def batch_of(**options):
    return make_batch(GROUPS, Grpo()(GROUPS), **options)


def test_a_batch_has_a_row_per_group_and_its_shape_does_not_depend_on_lengths():
    """Three slots of prompt and two completions of two: T = 7. Six sequences of five in T = 5 are six rows."""
    batch = check(batch_of())
    assert batch.tokens.shape == (3, 7)
    # The longest group first; then group 0: its prompt 9, its rows 0 (token 1, twice) and 1 (token 2, once).
    assert batch.tokens[1].tolist() == [9, 1, 1, 2, 0, 0, 0] and batch.loss_mask[1].sum() == 3
    short = groups_of(REWARD, length=[1] * 6)
    assert make_batch(short, Grpo()(short)).tokens.shape == (3, 7)
    assert batch_of(packing="none").tokens.shape == batch_of(packing="plain").tokens.shape == (6, 5)
    assert batch_of(packing="plain", slots=10).tokens.shape == (3, 10)


def test_weights_are_the_mean_that_the_loss_takes():
    """Ten tokens of six sequences; in group 0 of two tokens and one."""
    assert batch_of().weight[1].tolist() == [0, *[np.float32(0.1)] * 3, 0, 0, 0]
    found = batch_of(loss=as_loss(loss, aggregation="sequence")).weight[1]
    np.testing.assert_allclose(found, [0, 1 / 12, 1 / 12, 1 / 6, 0, 0, 0])


def test_an_advantage_of_ones_own_is_an_array():
    batch = make_batch(GROUPS, np.arange(6.0))
    assert batch.advantage[2].tolist() == [0, 2, 3, 3, 0, 0, 0]
    wide = np.arange(12.0).reshape(6, 2)
    assert make_batch(GROUPS, wide).advantage[2].tolist() == [0, 4, 6, 7, 0, 0, 0]
    with pytest.raises(UserError, match=r"credit: got float64\[3\], want one number per row, \[6\]"):
        make_batch(GROUPS, np.arange(3.0))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"packing": "tight"}, "packing: got 'tight', want one of none, plain, shared_prefix"),
        ({"slots": 4}, "slots: got 4 slots, want at least the 5 of one sequence"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(options, words):
    with pytest.raises(UserError, match=words):
        batch_of(**options)


def test_an_update_changes_the_state_alone_and_its_metrics_are_floats():
    before = jax.device_get(MODEL_.params)
    state, metrics = UPDATE(UPDATE.start(MODEL_.params), batch_of())
    assert equal(MODEL_.params, before) and int(state.step) == 1
    assert all(type(x) is float for x in metrics.values()) and {"loss", "grad_norm", "ratio/max"} <= set(metrics)
    assert not any(name.startswith("zero_gradient") for name in metrics)
    # Stochastic gradient descent moves by its rate times the gradient.
    moved = optax.tree.norm(jax.tree.map(lambda a, b: np.asarray(a) - b, state.params, before))
    np.testing.assert_allclose(moved, 0.5 * metrics["grad_norm"], rtol=1e-5)
    again, other = UPDATE(UPDATE.start(MODEL_.params), batch_of())
    assert equal(again.params, state.params) and other == metrics


def test_a_second_step_compiles_nothing():
    publish = make_publish(MODEL_)
    state, policy = UPDATE.start(MODEL_.params), publish(MODEL_.params)
    for step in range(3):
        counter = CompileCounter()
        state, _ = UPDATE(state, batch_of())
        policy = publish(state.params, state.step, policy)
        assert step == 0 or counter.take()["compiles"] == 0
    assert int(policy.version) == 3


KL = make_loss(ObjectiveConfig(loss=PolicyGradient(kl=KlConfig(weight=0.1))))


def ones(groups, scores):
    return np.ones(groups.rollouts.tokens.shape)


@pytest.mark.parametrize(
    ("of", "batch", "words"),
    [
        (KL, {}, r"batch.reference_logprobs: got None, want .*rl.Scores\(reference_logprobs=...\)"),
        (as_loss(loss, own=[ones]), {}, r"batch.own: got no ones, a column of the loss: want .*loss=loss"),
        (as_loss(loss, "sequence"), {}, "batch.weight: got those of a mean over tokens, want the loss's, sequence"),
        (as_loss(loss, "constant", 7), {}, "batch.weight: got those of a mean over tokens, want the loss's, constant"),
    ],
)
def test_a_batch_that_was_not_made_for_the_loss_is_refused(of, batch, words):
    update = make_update(MODEL_, of, optax.sgd(1.0))
    with pytest.raises(UserError, match=words):
        update(STATE, batch_of())
    update = update.__class__(
        MODEL_, of, update.optimizer, 1, lambda state, batch, reference, tables: (state, {"loss": 1})
    )
    zeros = np.zeros(GROUPS.rollouts.tokens.shape, np.float32)
    assert update(STATE, batch_of(loss=of, scores=Scores(reference_logprobs=zeros)))[1] == {"loss": 1.0}


def test_weights_of_ones_own_and_equal_lengths_are_not_refused():
    update = make_update(MODEL_, as_loss(loss, "sequence"), optax.sgd(1.0), 1)
    update = update.__class__(
        MODEL_, update.loss, update.optimizer, 1, lambda state, batch, reference, tables: (state, {})
    )
    batch = batch_of()
    update(STATE, batch.replace(weight=batch.weight * 2))
    alike = groups_of(REWARD)
    update(STATE, make_batch(alike, Grpo()(alike)))
    update(STATE, make_batch(GROUPS, Credit(np.zeros((6, 2), np.float32), keep=np.zeros(6, bool))))


def test_what_an_update_cannot_train_is_refused():
    with pytest.raises(UserError, match="loss: got one that reads the values of a critic"):
        make_update(MODEL_, Loss(CROSS_ENTROPY.terms, columns=("values", "returns")), optax.sgd(1.0))
    with pytest.raises(UserError, match="micro_batches: got 0, want 1 or more"):
        make_update(MODEL_, loss, optax.sgd(1.0), 0)
    with pytest.raises(UserError, match=r"params: got a tree of another structure, want model.params"):
        make_update(MODEL_, loss, optax.sgd(1.0)).start(make_publish(MODEL_)(MODEL_.params).params)


def test_scores_are_those_that_the_update_sees():
    """With behavior log-probs of the same parameters every ratio is 1."""
    scores = make_score(MODEL_)(MODEL_.params, GROUPS)
    assert scores.logprobs.shape == scores.entropy.shape == (6, 2) and scores.logprobs[1, 1] == 0
    same = GROUPS.replace(rollouts=GROUPS.rollouts.replace(behavior_logprobs=scores.logprobs))
    _, metrics = UPDATE(UPDATE.start(MODEL_.params), make_batch(same, Grpo()(same)))
    np.testing.assert_allclose([metrics["ratio/min"], metrics["ratio/max"]], 1.0, atol=1e-5)  # two programs in f32
    entropy = scores.entropy[GROUPS.rollouts.sampled].mean()
    np.testing.assert_allclose(metrics["entropy"], entropy, rtol=1e-5)
    dropped = make_score(MODEL_, "none", 3)(MODEL_.params, GROUPS.replace(keep=np.arange(6) > 0))
    np.testing.assert_allclose(dropped.logprobs[1:], scores.logprobs[1:], atol=1e-5)
    assert not dropped.logprobs[0].any()


def test_a_batch_without_a_row_to_learn_from_changes_the_step_alone():
    none = GROUPS.replace(keep=np.zeros(6, bool))
    state, metrics = UPDATE(UPDATE.start(MODEL_.params), make_batch(none, Grpo()(none)))
    assert equal(state.params, MODEL_.params) and int(state.step) == 1
    assert np.isnan(list(metrics.values())).all() and "ratio/max" in metrics


def test_a_state_is_used_once():
    """As when a cell of a notebook is run twice."""
    state = UPDATE.start(MODEL_.params)
    UPDATE(state, batch_of())
    with pytest.raises(
        UserError, match="state: got arrays whose buffers update or publish has taken for its result, want that result"
    ):
        UPDATE(state, batch_of())


def test_a_loss_that_asks_for_a_number_is_named():
    def branching(scores, batch):
        return -scores.logprobs if scores.logprobs[0, 0] > 0 else scores.logprobs

    with pytest.raises(UserError, match=r"the loss branching: got an if, .* want jnp.where"):
        make_update(MODEL_, branching, optax.sgd(1.0), 1)(STATE, batch_of())


def test_an_update_starts_from_parameters_that_are_there():
    used_up = UPDATE.start(MODEL_.params)
    UPDATE(used_up, batch_of())
    with pytest.raises(UserError, match="params: got arrays whose buffers update or publish has taken"):
        UPDATE.start(used_up.params)


@pytest.mark.parametrize(
    "call, message",
    [
        (
            lambda state: UPDATE(MODEL_.params, batch_of()),
            r"state: got dict, want what update.start\(model.params\) returns",
        ),
        (lambda state: UPDATE(state, "batch"), r"batch: got str, want what rl.make_batch\(groups, credit\) returns"),
        (lambda state: make_publish(MODEL_)(state), r"params: got TrainState, want model.params or state.params"),
        (
            lambda state: make_batch(np.ones(3), None),
            r"groups: got ndarray, want what rl.grade\(...\), or keep\(groups\) of",
        ),
        (
            lambda state: make_update(MODEL_, lambda s, b: s.logprobs, 1e-3),
            r"optimizer: got 0.001, want a transformation of optax",
        ),
        (
            lambda state: as_loss(len, aggregation="sequences"),
            r"aggregation: got 'sequences', want one of token, sequence",
        ),
        (
            lambda state: as_loss(len, columns=("ref",)),
            r"columns: got 'ref', want some of reference_logprobs, ",
        ),
    ],
)
def test_a_wrong_object_is_named(call, message):
    with pytest.raises(UserError, match=message):
        call(UPDATE.start(MODEL_.params))
