"""Changes between the config.yaml of a run directory and the config of a resumption."""

import dataclasses

from jaxrl_llm.config.run_config import EvaluationConfig, RunConfig, to_dict, with_absolute_paths
from jaxrl_llm.config.saved_config import changes, differences, to_yaml
from jaxrl_llm.control.config import BeginControl, BudgetControl, JsonSchemaControl
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


def test_a_run_that_began_before_there_were_controls_resumes_without_one(tmp_path):
    path, text = tmp_path / "config.yaml", to_yaml(RunConfig())
    assert "  control:\n    kind: none\n" in text
    path.write_text(text.replace("  control:\n    kind: none\n", ""))
    assert differences(path, RunConfig()) == []
    now = RunConfig(rollout=RolloutConfig(control=BudgetControl(tokens=9)))
    assert "rollout.control.kind: 'none' -> 'budget'" in differences(path, now)


def test_a_schema_is_found_from_any_directory():
    schema = JsonSchemaControl(path="s.json")
    control = BeginControl(text="<", then=BudgetControl(then=schema))
    cfg = with_absolute_paths(RunConfig(rollout=RolloutConfig(control=control)), lambda path: f"/at/{path}")
    assert cfg.rollout.control.then.then == JsonSchemaControl(path="/at/s.json") and cfg.rollout.control.text == "<"


def test_a_field_that_the_saved_config_lacks_is_a_change():
    saved = to_dict(RunConfig())
    del saved["seed"]
    assert changes(saved, to_dict(RunConfig())) == ["seed: None -> 0"]
