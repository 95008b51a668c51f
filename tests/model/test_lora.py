"""Adapters: by hand, against x W + scale (x A) B with gradients, through the whole model on a mesh, and their cost."""

import dataclasses
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import FAMILIES, MESHES, SMALL, TINY, layouts, make_params

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import LoraConfig
from jaxrl_llm.model.critic import critic_specs
from jaxrl_llm.model.linear import contract
from jaxrl_llm.model.lora import Adapted, Adapter
from jaxrl_llm.model.publish import jit_publish, make_empty_policy
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import PolicyGradient, Reinforce
from jaxrl_llm.objective.losses import make_loss
from jaxrl_llm.parallel import hosts
from jaxrl_llm.types import Batch, TrainState
from jaxrl_llm.update.config import EssScaling
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.optimizer.state import make_init_state, state_shardings
from jaxrl_llm.update.optimizer.transform import make_optimizer
from jaxrl_llm.update.step import jit_update

ALL = LoraConfig(rank=3, alpha=6.0)
SPECS = model_params.specs(SMALL)
ADAPTED = lora.adapted_specs(SPECS, SMALL, ALL)
ROWS, SLOTS = 8, 6
merge = jax.jit(partial(lora.merge, dtype=jnp.float32))


@cache
def adapted(sizes=(1, 1, 1)):
    """SMALL with adapters about as large as the base."""
    rng, (train, _) = np.random.default_rng(1), layouts(sizes)
    base = jax.tree.map(np.asarray, make_params(SMALL, train))
    trained, frozen = lora.split(ADAPTED)
    random = model_params.map_specs(lambda s: 0.2 * rng.standard_normal(s.shape).astype(np.float32), trained)
    frozen = jax.tree.structure(frozen, is_leaf=model_params.is_spec).unflatten(jax.tree.leaves(base))
    return hosts.put(lora.join(random, frozen), model_params.shardings(ADAPTED, train))


def dense(params):
    """Parameters with W + scale A B assembled per module, differentiated by JAX: the reference implementation."""
    ab = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))
    layers = dict(params["layers"])
    for leaf, w in layers.items():
        if isinstance(w, Adapted):
            add = {name: w.scale * ab(pair.a, pair.b) for name, pair in w.pairs.items()}
            parts = {
                "qkv": lambda x: jnp.concatenate([x["q"], x["k"], x["v"]], axis=-2),
                "out": lambda x: x["o"],
                "gate_up": lambda x: jnp.concatenate([x["gate"], x["up"]], axis=-2).swapaxes(1, 2),
                "down": lambda x: x["down"],
            }
            layers[leaf] = w.base + parts[leaf](add)
    return {**params, "layers": layers}


def batch():
    rng, shape = np.random.default_rng(0), (ROWS, SLOTS)
    slot = np.broadcast_to(np.arange(SLOTS, dtype=np.int32), shape)
    ones, mask = np.ones(shape, np.int32), slot > 0
    return Batch(
        tokens=rng.integers(0, 16, shape, dtype=np.int32),
        position=slot,
        until=SLOTS * ones,
        before=np.maximum(slot - 1, 0),
        segment=ones,
        group=ones,
        loss_mask=mask,
        weight=(mask / mask.sum()).astype(np.float32),
        behavior_logprobs=np.zeros(shape, np.float32),
        advantage=np.zeros(shape, np.float32),
        temperature=np.ones(shape, np.float32),
    )


def test_by_hand():
    """W + A B / 2 = [[1, 0], [0, 1]] + [[3, 5], [6, 10]] / 2."""
    pair = Adapter(jnp.array([[1.0], [2.0]]), jnp.array([[3.0, 5.0]]))
    w, x = Adapted(jnp.eye(2), {"o": pair}, 0.5), jnp.array([[1.0, 1.0]])
    np.testing.assert_array_equal(contract(x, w), [[5.5, 8.5]])
    dx, dw = jax.grad(lambda x, w: contract(x, w)[0, 0], argnums=(0, 1))(x, w)
    np.testing.assert_array_equal(dx, [[2.5, 3.0]])
    np.testing.assert_array_equal(dw.pairs["o"].a, [[1.5], [1.5]])
    np.testing.assert_array_equal(dw.pairs["o"].b, [[1.5, 0.0]])
    np.testing.assert_array_equal(dw.base, np.zeros((2, 2)))


def test_in_bfloat16_the_product_is_with_the_rounded_sum():
    """Numbers from 1 on are 2^-7 apart: 1 + 2^-9 rounds to 1, in the trainer as in the published policy."""
    pair = Adapter(jnp.array([[1.0]]), jnp.array([[2.0**-9]]))
    x = jnp.ones((1, 1), jnp.bfloat16)
    assert contract(x, Adapted(jnp.ones((1, 1)), {"o": pair}, 1.0))[0, 0] == 1.0
    assert contract(x, Adapted(jnp.ones((1, 1)), {"o": pair}, 3.0))[0, 0] == 1.0 + 2.0**-7


def test_merge_puts_each_module_in_its_place():
    merged = merge(adapted())
    for name, want in jax.jit(dense)(adapted())["layers"].items():
        np.testing.assert_allclose(merged["layers"][name], want, atol=1e-5, err_msg=name)
        assert (name in ("qkv", "out", "gate_up", "down")) == (np.abs(want - base(name)).max() > 0.1)
    np.testing.assert_array_equal(merged["embed"], adapted()["embed"])


def base(name):
    return np.asarray(lora.without_adapters(adapted())["layers"][name])


def loss_of(params, data, layout):
    return -jnp.sum(data.weight * score_tokens(params, data, Scoring(SMALL, layout, 16)).logprobs)


@cache
def plain_gradient():
    """Loss and gradient of the adapters through `dense`."""
    train, _ = layouts()
    trained, frozen = lora.split(adapted())
    loss = lambda trained, data: loss_of(dense(lora.join(trained, frozen)), data, train)  # noqa: E731
    return jax.device_get(jax.jit(jax.value_and_grad(loss))(trained, batch()))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [MESHES[0], (2, 2, 2)], ids=str)
def test_gradient_through_the_model_is_the_plain_one(sizes):
    train, _ = layouts(sizes)
    trained, frozen = lora.split(adapted(sizes))
    loss = lambda trained, data: loss_of(lora.join(trained, frozen), data, train)  # noqa: E731
    placed = hosts.put(batch(), train.sharding(("rows", None)))
    value, grads = jax.jit(jax.value_and_grad(loss))(trained, placed)
    want_value, wanted = plain_gradient()
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    for (path, got), want in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(wanted), strict=True):
        # f32, sums of thousands of products in a different order.
        np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max(), err_msg=jax.tree_util.keystr(path))


def test_the_gradient_of_the_base_is_never_computed():
    """Two products of the size of x W, forward and dx; dW would be a third. The rest is a sixth of one."""
    n, d, f = 128, 256, 512
    pair = Adapter(jnp.ones((d, 4)), jnp.ones((4, f)))
    w, x = Adapted(jnp.ones((d, f)), {"down": pair}, 1.0), jnp.ones((n, d))

    def loss(x, trained, frozen):
        return jnp.sum(jnp.sin(contract(x, lora.join({"w": trained}, {"w": frozen})["w"])))

    trained, frozen = w.replace(base=None), w.replace(pairs={"down": Adapter(None, None)})
    work = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(x, trained, frozen).compile().cost_analysis()
    product = 2 * n * d * f
    assert 1.99 * product < work["flops"] < 2.3 * product


@pytest.mark.slow
def test_only_adapters_change_and_have_optimizer_state():
    """One update on a mesh: the frozen parameters keep their bits and their buffers."""
    train, _ = layouts((2, 2, 2))
    optimizer, params = AdamW(lr=1e-2), adapted((2, 2, 2))
    before = jax.tree.map(np.array, params)
    state = make_init_state(ADAPTED, make_optimizer(optimizer), train)(
        jax.tree.map(jnp.copy, params), hosts.put(np.int32(0), train.replicated)
    )
    at = [x.unsafe_buffer_pointer() for x in pieces(lora.split(state.params)[1])]
    trained = sum(x.size for x in jax.tree.leaves(lora.split(params)[0]))
    assert trained == model_params.count(lora.split(ADAPTED)[0]) == 4800
    assert sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim) == 2 * trained
    wanted = state_shardings(ADAPTED, make_optimizer(optimizer), train)
    for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert got.sharding.is_equivalent_to(want, got.ndim)
    loss, scoring = make_loss(ObjectiveConfig(loss=PolicyGradient(surrogate=Reinforce()))), Scoring(SMALL, train, 16)
    update = jit_update(ADAPTED, loss, make_optimizer(optimizer), scoring, ess_scaling=EssScaling())
    data = batch()
    data = data.replace(advantage=data.loss_mask.astype(np.float32))
    new, metrics = update(state, hosts.put(data, train.sharding(("rows", None))))
    assert isinstance(new, TrainState) and metrics["nonfinite"] == 0
    (old_trained, old_frozen), (new_trained, new_frozen) = lora.split(before), lora.split(new.params)
    assert [x.unsafe_buffer_pointer() for x in pieces(new_frozen)] == at
    for old, x in zip(jax.tree.leaves(old_frozen), jax.tree.leaves(new_frozen), strict=True):
        np.testing.assert_array_equal(old, x)
    # Adam's first step changes each entry with a gradient by the learning rate, here times the scale.
    assert 0.1 < metrics["lr/ess_scale"] < 0.9
    for old, x in zip(jax.tree.leaves(old_trained), jax.tree.leaves(new_trained), strict=True):
        np.testing.assert_allclose(np.median(np.abs(old - x)), 1e-2 * metrics["lr/ess_scale"], rtol=1e-2)


def pieces(tree):
    return [shard.data for x in jax.tree.leaves(tree) for shard in x.addressable_shards]


@pytest.mark.slow
def test_fresh_adapters_change_nothing():
    train, _ = layouts()
    params = make_params(SMALL, train)
    fresh = lora.adapt(params, lora.adapted_specs(SPECS, SMALL, LoraConfig(rank=64)), jax.random.key(0), train)
    for pair in (pair for w in fresh["layers"].values() if isinstance(w, Adapted) for pair in w.pairs.values()):
        assert not np.any(pair.b)
        inputs = np.prod(pair.a.shape[1:-1])
        # At least 2 * 32 * 64 samples: the standard deviation of a standard deviation is 1 / sqrt(2 n), 1.1 %.
        np.testing.assert_allclose(np.std(pair.a), (3 * inputs) ** -0.5, rtol=0.05)
    merged = merge(fresh)
    for x, want in zip(jax.tree.leaves(merged), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(x, want)
    assert lora.adapt(params, SPECS, jax.random.key(0), train) is params
    assert jax.tree.leaves(lora.without_adapters(fresh))[0] is jax.tree.leaves(fresh)[0]


@pytest.mark.parametrize("weights", ["compute", "int8"])
def test_publish_merges(weights):
    """As for merged parameters; in int8 a number halfway between two may round to either."""
    train, decode = layouts()
    publish, blank = jit_publish(SMALL, train, decode, weights), make_empty_policy(SMALL, decode, weights)
    whole = hosts.put(jax.device_get(jax.jit(dense)(adapted())), model_params.shardings(SPECS, train))
    policy, want = publish(adapted(), np.int32(3), blank()), publish(whole, np.int32(3), blank())
    assert jax.tree.structure(policy) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(policy), jax.tree.leaves(want), strict=True):
        x, y, off = np.float32(x), np.float32(y), 1 if x.dtype == jnp.int8 else 1e-5
        np.testing.assert_allclose(x, y, atol=off, err_msg=jax.tree_util.keystr(path))
        assert (x != y).mean() < 0.01 or off < 1


def test_specs_of_some_targets_in_bfloat16():
    """TINY: D 16, K 2, G 2, H 8, F 16, two layers; rank 5."""
    cfg = dataclasses.replace(TINY, compute="bfloat16")
    tree = lora.adapted_specs(
        model_params.specs(cfg), cfg, LoraConfig(rank=5, alpha=10.0, targets=("v", "q", "up", "o"))
    )
    layers = tree["layers"]
    assert {spec.dtype for spec in jax.tree.leaves(lora.split(tree)[0], is_leaf=model_params.is_spec)} == {"float32"}
    assert {spec.dtype for spec in jax.tree.leaves(lora.split(tree)[1], is_leaf=model_params.is_spec)} == {"bfloat16"}
    assert not isinstance(layers["down"], Adapted) and layers["qkv"].scale == 2.0
    assert set(layers["qkv"].pairs) == {"q", "v"} and set(layers["gate_up"].pairs) == {"up"}
    shape = lambda leaf, name: (layers[leaf].pairs[name].a.shape, layers[leaf].pairs[name].b.shape)  # noqa: E731
    assert shape("qkv", "q") == ((2, 16, 5), (2, 5, 2, 2, 8))
    assert shape("qkv", "v") == ((2, 16, 5), (2, 5, 2, 1, 8))
    assert shape("gate_up", "up") == ((2, 16, 5), (2, 5, 1, 16))
    assert shape("out", "o") == ((2, 2, 2, 8, 5), (2, 5, 16))
    out = layers["out"].pairs["o"]
    assert out.a.axes == ("layers", "heads", None, None, None) and out.b.axes == ("layers", None, "embed")
    assert lora.adapted_specs(SPECS, SMALL, LoraConfig()) is SPECS


def test_join_is_the_inverse_of_split_with_a_critic():
    tree = ADAPTED | critic_specs(SMALL, "separate")
    trained, frozen = lora.split(tree)
    assert lora.join(trained, frozen) == tree
    leaves = lambda tree: jax.tree.leaves(tree, is_leaf=model_params.is_spec)  # noqa: E731
    assert len(leaves(trained)) + len(leaves(frozen)) == len(leaves(tree))
    assert trained["critic"] == tree["critic"] and leaves(frozen["critic"]) == []
    assert leaves(trained["embed"]) == [] and frozen["embed"] == SPECS["embed"]
    # Without adapters everything is trained, and join returns it unchanged: a reference that is another model.
    assert lora.split(SPECS)[0] is SPECS and lora.join(SPECS, frozen) is SPECS


@pytest.mark.parametrize(
    "cfg, given, message",
    [
        (SMALL, LoraConfig(rank=2, targets=()), "lora.targets: got [], want one or more of q, k, v, o, gate, up, down, each once"),
        (SMALL, LoraConfig(rank=2, targets=("q", "q")), "lora.targets: got [q, q], want one or more of"),
        (
            FAMILIES["qwen3-moe"],
            LoraConfig(rank=2, targets=("q", "down")),
            "lora.targets: got down for a model with experts (4), want some of q, k, v, o: experts have no adapters",
        ),
    ],
)  # fmt: skip
def test_unsupported_targets_are_refused(cfg, given, message):
    (found,) = lora.problems(cfg, given)
    assert found.startswith(message)
    assert lora.problems(cfg, dataclasses.replace(given, rank=0)) == []
    assert lora.problems(cfg, LoraConfig(rank=2, targets=("q", "k", "v", "o"))) == []
