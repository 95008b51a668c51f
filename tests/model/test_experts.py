"""Experts: routing by hand, the sorted product and its gradient against a loop over experts, on one device and on meshes."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from setups import TINY, layouts

from jaxrl_llm.model.experts import assign, mixture, route
from jaxrl_llm.parallel import hosts

CFG = dataclasses.replace(TINY, experts=4, experts_per_token=2)
AXES = {"router": ("embed", None), "gate_up": (None, "expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}


def random_layer(dtype=np.float32):
    rng = np.random.default_rng(0)
    d, e, f = CFG.d_model, CFG.experts, CFG.d_mlp
    shapes = {"router": (d, e), "gate_up": (2, e, d, f), "down": (e, f, d)}
    layer = {name: (0.4 * rng.normal(size=shape)).astype(dtype) for name, shape in shapes.items()}
    return layer, rng.normal(size=(8, 3, d)).astype(dtype)


def loop(layer, h, cfg=CFG):
    """Every expert computes every token; a mask from argsort selects."""
    probability = jax.nn.softmax(h @ layer["router"], axis=-1)
    rank = jnp.argsort(jnp.argsort(-probability, axis=-1, stable=True), axis=-1)
    weight = jnp.where(rank < cfg.experts_per_token, probability, 0.0)
    if cfg.norm_top_k:
        weight = weight / weight.sum(axis=-1, keepdims=True)
    out = 0.0
    for e in range(cfg.experts):
        gate, up = h @ layer["gate_up"][0, e], h @ layer["gate_up"][1, e]
        out = out + weight[..., e, None] * ((gate * jax.nn.sigmoid(gate) * up) @ layer["down"][e])
    return out


def value_and_gradients(f):
    """Value and gradients of a sum that weights every output differently, with rematerialization as in training."""
    return jax.jit(
        jax.value_and_grad(lambda layer, h: jnp.sum(jnp.sin(3 * jax.checkpoint(f)(layer, h))), argnums=(0, 1))
    )


def close(got, want):
    """f32 sums of some hundred terms in another order: a few 1e-6 of the largest entry."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5 * np.abs(b).max()), got, want)


def test_route_by_hand():
    """exp(scores) = 1, 2, 4, 1 of 8: the most probable are 2 and 1, with 1/2 and 1/4, normalized to 2/3 and 1/3."""
    scores = jnp.log(jnp.array([[1.0, 2.0, 4.0, 1.0]]))
    weight, expert = route(scores, CFG)
    np.testing.assert_array_equal(expert, [[2, 1]])
    np.testing.assert_allclose(weight, [[2 / 3, 1 / 3]], rtol=1e-6)
    bare, _ = route(scores, dataclasses.replace(CFG, norm_top_k=False))
    np.testing.assert_allclose(bare, [[1 / 2, 1 / 4]], rtol=1e-6)


def test_ties_go_to_the_lower_index():
    weight, expert = route(jnp.array([[0.0, 0.0, 0.0, 0.0], [0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]]), CFG)
    np.testing.assert_array_equal(expert, [[0, 1], [1, 3], [1, 0]])
    np.testing.assert_allclose(weight[:2], 0.5, rtol=1e-6)


def test_assign_by_hand():
    """Three rows, two choices per row. Shard 1 has experts 2 and 3: assignments 0 and 3 go to 2, 4 to 3, the others elsewhere."""
    expert = jnp.array([[2, 0], [1, 2], [3, 0]])
    whole, part = assign(expert, 4, 0), assign(expert, 2, 1)
    np.testing.assert_array_equal(whole.order, [1, 5, 2, 0, 3, 4])
    np.testing.assert_array_equal(whole.counts, [2, 1, 2, 1])
    np.testing.assert_array_equal(part.order, [0, 3, 4, 1, 2, 5])
    np.testing.assert_array_equal(part.counts, [2, 1])
    np.testing.assert_array_equal(part.order[part.position], np.arange(6))


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 2, 4), (2, 2, 1, 2)])
def test_value_and_gradients_equal_a_loop_over_experts(sizes):
    layer, h = random_layer()
    want = value_and_gradients(loop)(layer, h)
    train, _ = layouts(sizes)
    placed = {name: hosts.put(x, train.sharding(AXES[name])) for name, x in layer.items()}
    ours = value_and_gradients(lambda layer, h: mixture(layer, h, CFG, train))
    got = ours(placed, hosts.put(h, train.sharding(("rows", None, None))))
    close(got, want)
    if sizes == (1, 1, 1, 1):
        # The router has a gradient through the weights only, and each of the four experts has tokens.
        assert all(np.abs(x).max(axis=-1).min() > 1e-4 for x in jax.tree.leaves(want[1]))


def test_unnormalized_weights_and_ties():
    """Two pairs of experts with equal routers, so that every choice is a tie."""
    cfg, (layer, h) = dataclasses.replace(CFG, norm_top_k=False, experts_per_token=1), random_layer()
    layer["router"][:, 1], layer["router"][:, 3] = layer["router"][:, 0], layer["router"][:, 2]
    got = jax.jit(lambda layer, h: mixture(layer, h, cfg, layouts()[0]))(layer, h)
    np.testing.assert_allclose(got, loop(layer, h, cfg), atol=1e-5)
    without = {**layer, "down": layer["down"] * np.array([1, 0, 1, 0], np.float32)[:, None, None]}
    np.testing.assert_allclose(got, loop(without, h, cfg), atol=1e-5)


def test_in_bfloat16_no_product_is_mixed_and_master_gradients_are_f32():
    layer, h = random_layer()
    half = jnp.asarray(h, jnp.bfloat16)
    ours = jax.value_and_grad(
        lambda layer, h: jnp.sum(mixture(layer, h, CFG, layouts()[0]).astype(jnp.float32) ** 2), (0, 1)
    )
    program = jax.jit(ours).lower(layer, half)
    assert {x.dtype for x in jax.tree.leaves(program.out_info[1][0])} == {jnp.dtype("float32")}
    assert program.out_info[1][1].dtype == jnp.bfloat16
    products = [line for line in program.as_text().splitlines() if "dot_general" in line and "ragged" not in line]
    assert products and not any("xf32>, tensor<" in line.split(") ->")[0] for line in products)
