"""Layouts: logical axes to mesh axes, and the differences between TRAIN and DECODE."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from setups import layouts

from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.parallel.layout import DECODE, TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh


def test_sharding_by_hand():
    train, decode = layouts((2, 2, 2))
    assert train.sharding(("rows", None)).spec == PartitionSpec(("data", "fsdp", "expert"), None)
    assert train.sharding(("embed", "heads", None, None)).spec == PartitionSpec("fsdp", "tensor", None, None)
    assert decode.sharding(("embed", "heads", None, None)).spec == PartitionSpec(None, "tensor", None, None)
    assert train.sharding(("vocab", "embed")).spec == PartitionSpec("tensor", "fsdp")
    assert train.sharding(("layers", "mlp")).spec == PartitionSpec(None, "tensor")
    assert train.sharding(("rows_beside_embed", None, "embed")).spec == PartitionSpec(("data", "expert"), None, "fsdp")
    assert decode.sharding(("rows_beside_embed", None, "embed")).spec == decode.sharding(("rows", None, "embed")).spec
    assert train.replicated.spec == PartitionSpec()


def test_train_and_decode_differ_in_embed_and_rows_beside_it():
    assert {name for name in TRAIN if TRAIN[name] != DECODE[name]} == {"embed", "rows_beside_embed"}
    assert TRAIN.keys() == DECODE.keys()
    with pytest.raises(TypeError):
        TRAIN["rows"] = None


def test_layouts_for_decode():
    """Wide: `fsdp` shards the dimensions of `tensor` too, rows are sharded over the rest. Separate axes: the same devices."""
    train, replicated = layouts((2, 2, 2))
    wide, own = train.for_decode("wide"), train.for_decode(MeshConfig(data=1, fsdp=2, tensor=4))
    assert train.for_decode("replicated") == replicated
    assert wide.sharding(("embed", "heads")).spec == PartitionSpec(None, ("tensor", "fsdp"))
    assert wide.sharding(("rows", None)).spec == PartitionSpec(("data", "expert"), None)
    assert (wide.size("rows"), wide.size("vocab"), own.size("rows"), own.size("vocab")) == (2, 4, 2, 4)
    assert list(own.mesh.devices.flat) == list(train.mesh.devices.flat)


def test_an_unknown_axis_is_an_error():
    with pytest.raises(KeyError, match="embde"):
        layouts()[0].sharding(("embde",))


def test_layouts_are_static_arguments():
    """Equal layouts made twice share one compiled program; another layout does not."""
    traces = []

    def f(x, layout):
        traces.append(layout)
        return layout.constrain(x, "rows", None)

    jitted = jax.jit(f, static_argnums=1)
    one, same = (Layout(make_mesh(2, 2, 2), TRAIN) for _ in range(2))
    assert one == same and hash(one) == hash(same) and one != Layout(one.mesh, DECODE)
    x = jnp.arange(8.0).reshape(4, 2)
    for layout in (one, same, Layout(one.mesh, DECODE)):
        y = jitted(x, layout)
        np.testing.assert_array_equal(y, x)
        assert y.sharding.is_equivalent_to(layout.sharding(("rows", None)), 2)
    assert len(traces) == 2
