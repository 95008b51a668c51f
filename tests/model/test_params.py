"""Parameter descriptions: shapes, initial values, shardings."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from setups import SMALL, layouts

from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.params import ParamSpec, abstract, count, init, is_spec, map_specs, shardings, specs, unstack

CFG = ModelConfig(vocab_size=16, layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, d_mlp=256)


def test_count_by_hand():
    """A layer: norms 2 * 64, queries 64 * 4 * 16, keys and values 64 * 2 * 2 * 16, out 64 * 64, mlp 3 * 64 * 256 = 61,568."""
    layer = 128 + 4096 + 4096 + 4096 + 49152
    assert count(specs(CFG)) == 16 * 64 + 2 * layer + 64 == 124224
    untied = dataclasses.replace(CFG, tied_head=False, qkv_bias=True, qk_norm=True)
    assert count(specs(untied)) == 124224 + 64 * 16 + 2 * (8 * 16 + 2 * 16)


def test_every_axis_of_every_parameter_is_named():
    for cfg in (CFG, dataclasses.replace(CFG, tied_head=False, qkv_bias=True, qk_norm=True)):
        for spec in jax.tree.leaves(specs(cfg), is_leaf=is_spec):
            assert len(spec.shape) == len(spec.axes)
        for spec in jax.tree.leaves(specs(cfg)["layers"], is_leaf=is_spec):
            assert spec.shape[0] == cfg.layers and spec.axes[0] == "layers"


@pytest.fixture(scope="module")
def params():
    cfg = dataclasses.replace(CFG, qkv_bias=True)
    return cfg, init(specs(cfg), jax.random.key(3), layouts()[0])


@pytest.mark.slow
def test_init_follows_the_specs(params):
    cfg, values = params
    spec_leaves = jax.tree.leaves(specs(cfg), is_leaf=is_spec)
    for spec, x in zip(spec_leaves, jax.tree.leaves(values), strict=True):
        assert x.shape == spec.shape and x.dtype == jnp.float32
        if spec.std is None:
            np.testing.assert_array_equal(x, 1.0)
        elif spec.std == 0:
            np.testing.assert_array_equal(x, 0.0)
        else:
            # The sample standard deviation of n numbers has relative error 1 / sqrt(2 n); five times that.
            np.testing.assert_allclose(np.std(x), spec.std, rtol=5 / np.sqrt(2 * x.size))
    assert specs(cfg)["embed"].std == 64**-0.5
    # Outputs into the residual stream shrink with the number of layers: (2 L)^-1/2.
    assert specs(cfg)["layers"]["down"].std == pytest.approx(0.5 * 256**-0.5)
    samples = [
        np.asarray(x).ravel()[:8] / s.std for s, x in zip(spec_leaves, jax.tree.leaves(values), strict=True) if s.std
    ]
    assert len(np.unique(np.round(samples, 6), axis=0)) == len(samples)


@pytest.mark.slow
def test_init_is_the_same_on_every_mesh(params):
    cfg, values = params
    train, _ = layouts((2, 2, 2))
    split = init(specs(cfg), jax.random.key(3), train)
    jax.tree.map(np.testing.assert_array_equal, values, split)
    jax.tree.map(
        lambda x, s: x.sharding.is_equivalent_to(s, x.ndim) or pytest.fail(str(s)), split, shardings(specs(cfg), train)
    )


def test_shardings_of_parameters():
    train, decode = layouts((2, 2, 2))
    tree = specs(dataclasses.replace(CFG, tied_head=False))
    found = jax.tree.map(lambda s: s.spec, shardings(tree, train))
    assert found["embed"] == found["head"] == PartitionSpec("tensor", "fsdp")
    assert found["layers"]["qkv"] == PartitionSpec(None, "fsdp", "tensor", None, None)
    assert found["layers"]["down"] == PartitionSpec(None, "tensor", "fsdp")
    for s in jax.tree.leaves(shardings(tree, decode)):
        assert "fsdp" not in s.spec and "data" not in s.spec


def test_unstack_splits_layers_of_arrays_and_of_specs(params):
    cfg, values = params
    layered, described = unstack(values, cfg.layers), unstack(specs(cfg), cfg.layers)
    assert isinstance(layered["layers"], tuple) and len(layered["layers"]) == len(described["layers"]) == 2
    for i in range(2):
        layer, spec = dict(layered["layers"][i]), dict(described["layers"][i])
        for side, name in enumerate(("gate", "up")):
            np.testing.assert_array_equal(layer.pop(name), values["layers"]["gate_up"][i, side])
            assert spec.pop(name) == ParamSpec((cfg.d_model, cfg.d_mlp), ("embed", "mlp"), cfg.d_model**-0.5)
        assert layer.keys() == spec.keys() == values["layers"].keys() - {"gate_up"}
        for name, x in layer.items():
            np.testing.assert_array_equal(x, values["layers"][name][i])
            assert spec[name].shape == x.shape
            assert spec[name].axes == specs(cfg)["layers"][name].axes[1:]
    assert layered["embed"] is values["embed"]
    assert count(described) == count(specs(cfg))


def test_abstract_has_shapes_and_shardings_but_no_arrays():
    train, _ = layouts((1, 4, 2))
    leaves = jax.tree.leaves(abstract(specs(SMALL), train, jnp.bfloat16))
    assert all(isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.bfloat16 for x in leaves)
    assert [x.shape for x in leaves] == [s.shape for s in jax.tree.leaves(specs(SMALL), is_leaf=is_spec)]
    assert abstract(specs(SMALL), train)["embed"].sharding == train.sharding(("vocab", "embed"))


def test_map_specs_passes_whole_specs():
    assert map_specs(lambda s: s.std, {"a": ParamSpec((2,), (None,), 0.5)}) == {"a": 0.5}
