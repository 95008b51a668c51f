"""The reference: a running mean or a copy every so often, in place and where it lay."""

import jax
import numpy as np
import pytest
from setups import SMALL, layouts, make_params

from jaxrl_llm.objective.config import ReferenceConfig
from jaxrl_llm.roles.reference import refresh


def trees(sizes=(1, 4, 2)):
    train, _ = layouts(sizes)
    return make_params(SMALL, train, seed=1), make_params(SMALL, train, seed=2)


def follow(cfg, steps):
    """The followed parameter of the reference after each step, and the policy's."""
    reference, params = trees()
    start, own, found = np.array(reference["embed"]), np.array(params["embed"]), []
    for step in range(1, steps + 1):
        reference = refresh(cfg, reference, params, step)
        found.append(np.array(reference["embed"]))
    return start, own, found


def test_a_running_mean_by_hand():
    start, own, found = follow(ReferenceConfig("ema", decay=0.75), 2)
    np.testing.assert_allclose(found[0], 0.75 * start + 0.25 * own, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1], 0.5625 * start + 0.4375 * own, rtol=1e-6, atol=1e-7)


def test_a_copy_every_third_step_is_exact():
    start, own, found = follow(ReferenceConfig("periodic", every=3), 4)
    assert not np.array_equal(start, own)
    for step, expected in enumerate((start, start, own, own), 1):
        np.testing.assert_array_equal(found[step - 1], expected, err_msg=str(step))


@pytest.mark.parametrize("kind", ["ema", "periodic"])
def test_the_reference_is_donated_and_the_policy_is_not(kind):
    reference, params = trees()
    placed = [x.sharding for x in jax.tree.leaves(reference)]
    after = refresh(ReferenceConfig(kind, every=1), reference, params, 1)
    assert all(x.is_deleted() for x in jax.tree.leaves(reference))
    assert not any(x.is_deleted() for x in jax.tree.leaves(params))
    assert all(x.sharding.is_equivalent_to(to, x.ndim) for x, to in zip(jax.tree.leaves(after), placed, strict=True))


def test_a_fixed_reference_is_the_same_arrays():
    reference, params = trees()
    for kind in ("initial", "pretrained"):
        assert refresh(ReferenceConfig(kind), reference, params, 100) is reference
    assert refresh(ReferenceConfig("ema"), None, params, 1) is None
