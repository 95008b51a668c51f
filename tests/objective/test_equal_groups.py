"""With equal groups, every estimate is bit for bit that of the estimators that knew no others.

`equal_groups.json` has inputs [P G] and the estimates in float64 of commit 661f305, where rewards were reshaped to [P G] and groups
that do not count were masked. Sums along tokens are of three numbers at most, so they are the same on every processor.
"""

import json
from pathlib import Path

import numpy as np
import pytest
from variants import VARIANTS

from jaxrl_llm.objective.advantages import bound, estimate
from jaxrl_llm.objective.estimator import EstimatorInputs, at_tokens
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.objective.token_estimators import GrpoSteps
from jaxrl_llm.objective.tree_estimators import TreeEstimator

STORED = json.loads((Path(__file__).parent / "equal_groups.json").read_text())


def inputs_of(stored: dict) -> tuple[EstimatorInputs, np.ndarray]:
    """The rows of the groups that count, and which they are."""
    used, shape = np.array(stored["used"]), np.shape(stored["reward"])
    rows = np.repeat(used, shape[1])
    flat = {"reward": np.float32(stored["reward"]).ravel()[rows]}
    flat["reward_components"] = np.float32(stored["reward_components"]).reshape(rows.size, -1)[rows]
    for name in ("mask", "token_reward", "values", "late_reward"):
        flat[name] = None if stored[name] is None else np.array(stored[name])[rows]
    groups = Grouping.of(np.repeat(np.arange(len(used)), shape[1])[rows])
    weights = np.array(stored["component_weights"])
    return EstimatorInputs(**flat, component_weights=weights, groups=groups), rows


# There were no steps then.
@pytest.mark.parametrize("cfg", [cfg for cfg in VARIANTS if not isinstance(cfg, GrpoSteps | TreeEstimator)], ids=repr)
def test_estimates_are_those_from_before(cfg):
    for stored, want in zip(STORED["inputs"], STORED["estimates"][repr(cfg)], strict=True):
        inputs, rows = inputs_of(stored)
        found = estimate(cfg, inputs)
        got = {"advantage": at_tokens(found.advantage, inputs.mask), "returns": found.returns}
        for name, x in got.items():
            if x is None:
                assert want[name] is None
                continue
            full = np.zeros((len(rows), x.shape[1]))
            full[rows] = x
            np.testing.assert_array_equal(full, np.array(want[name]), err_msg=name, strict=True)
        assert bound(cfg, inputs) == want["bound"]
