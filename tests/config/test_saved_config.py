"""Changes between the config.yaml of a run directory and the config of a resumption."""

import dataclasses

from jaxrl_llm.config.run_config import EvaluationConfig, RunConfig, to_dict
from jaxrl_llm.config.saved_config import changes
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import CrossEntropy
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.config import RolloutConfig


def test_changes_that_a_resumption_may_not_make_are_listed():
    saved = to_dict(RunConfig())
    assert changes(saved, to_dict(RunConfig())) == []
    allowed = RunConfig(
        run_dir="b", steps=5, mesh=MeshConfig(2, 2, 2), reward=dataclasses.replace(RunConfig().reward, workers=9)
    )
    assert changes(saved, to_dict(allowed)) == []
    rescored = RunConfig(evaluation=EvaluationConfig(every=5, threshold=0.5))
    assert changes(saved, to_dict(rescored)) == ["evaluation.threshold: 1.0 -> 0.5"]
    now = RunConfig(seed=1, rollout=RolloutConfig(temperature=0.5), objective=ObjectiveConfig(loss=CrossEntropy()))
    found = changes(saved, to_dict(now))
    assert [line for line in found if not line.endswith(" -> None")] == [
        "objective.loss.kind: 'policy_gradient' -> 'cross_entropy'",
        "rollout.temperature: 1.0 -> 0.5",
        "seed: 0 -> 1",
    ]


def test_a_field_that_the_saved_config_lacks_is_a_change():
    saved = to_dict(RunConfig())
    del saved["seed"]
    assert changes(saved, to_dict(RunConfig())) == ["seed: None -> 0"]
