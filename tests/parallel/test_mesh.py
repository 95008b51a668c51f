"""The mesh: resolving -1, messages for sizes that do not fit, and the mesh itself."""

import jax
import pytest
from jax.sharding import AxisType

from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel.config import MeshConfig, divisors, resolve
from jaxrl_llm.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "asked, devices, sizes",
    [
        ((1, -1, 1), 8, (1, 8, 1, 1)),
        ((-1, 2, 2), 8, (2, 2, 2, 1)),
        ((2, 2, -1), 8, (2, 2, 2, 1)),
        ((1, 4, -1), 4, (1, 4, 1, 1)),
        ((2, 2, 2), 8, (2, 2, 2, 1)),
        ((1, 2, 1, -1), 8, (1, 2, 1, 4)),
        ((1, -1, 1), 1, (1, 1, 1, 1)),
    ],
)
def test_minus_one_takes_the_remaining_devices(asked, devices, sizes):
    assert resolve(MeshConfig(*asked), devices) == (sizes, [])


@pytest.mark.parametrize(
    "asked, devices, message",
    [
        (
            (3, -1, 1),
            8,
            "mesh: asked for data 3, fsdp -1, tensor 1, expert 1 (a product of 3), found 8 devices; "
            "the product must divide 8, sizes that work on an axis: 1, 2, 4, 8",
        ),
        (
            (2, 2, 3),
            12 // 2,
            "mesh: asked for data 2, fsdp 2, tensor 3, expert 1 (a product of 12), found 6 devices; "
            "the product must be 6, sizes that work on an axis: 1, 2, 3, 6",
        ),
        ((1, 1, 1), 2, "found 2 devices; the product must be 2"),
        ((-1, -1, 2), 8, "mesh: got {'data': -1, 'fsdp': -1, 'tensor': 2, 'expert': 1}, want -1 on one axis at most"),
    ],
)
def test_sizes_that_do_not_fit_are_errors(asked, devices, message):
    sizes, found = resolve(MeshConfig(*asked), devices)
    assert sizes is None and len(found) == 1 and message in found[0]


def test_divisors():
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert divisors(1) == [1]
    assert divisors(7) == [1, 7]


def test_the_mesh_has_four_auto_axes():
    mesh = make_mesh(2, 1, 4)
    assert mesh.axis_names == ("data", "fsdp", "tensor", "expert") and mesh.devices.shape == (2, 1, 4, 1)
    assert mesh.axis_types == (AxisType.Auto,) * 4
    assert make_mesh(devices=jax.devices()[3:5]).devices.ravel().tolist() == jax.devices()[3:5]


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"tensor": 3}, "mesh: asked for data 1, fsdp -1, tensor 3, expert 1 (a product of 3), found 8 devices"),
        (
            {"data": 2, "fsdp": 2},
            "mesh: asked for data 2, fsdp 2, tensor 1, expert 1 (a product of 4), found 8 devices",
        ),
        ({"data": -1}, "want -1 on one axis at most"),
        ({"data": 0}, "mesh.data: got 0, want 1 or more, or -1 for what is left"),
        ({"expert": -2}, "mesh.expert: got -2, want 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(UserError) as error:
        make_mesh(**sizes)
    assert message in str(error.value)


def test_one_axis_takes_the_devices_that_are_left():
    assert make_mesh().devices.shape == make_mesh(fsdp=-1).devices.shape == (1, 8, 1, 1)
    assert make_mesh(tensor=2).devices.shape == (1, 4, 2, 1)
    assert make_mesh(fsdp=2, expert=-1).devices.shape == (1, 2, 1, 4)
