"""What does not fit between the tasks of a mixture, their graders and the stages: one message each, before the run."""

import pytest

from jaxrl_llm.config import mixtures
from jaxrl_llm.config.consistency import cautions, training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.run_config import to_dict, with_absolute_paths
from jaxrl_llm.config.saved_config import changes
from jaxrl_llm.errors import UserError
from jaxrl_llm.plan.command import Target, prompt_slots
from jaxrl_llm.roles import inputs

SUMS = {"kind": "arithmetic", "terms": 2, "held_out": 8}
TASKS = [{"name": "easy", "task": SUMS}, {"name": "hard", "task": SUMS | {"terms": 3}}]
GRADERS = {
    "graders": [
        {"grader": "exact_match", "tasks": ["easy"]},
        {"grader": "numeric", "tasks": ["hard"]},
        {"grader": "cut_off", "weight": 0.2},
    ]
}


def config(**values):
    return validate({"task": TASKS, "reward": GRADERS} | values, "c.yaml")


def test_what_fits():
    cfg = config()
    assert mixtures.problems(cfg) == training_problems(cfg) == []
    assert mixtures.task_names(cfg) == ["easy", "hard"] and mixtures.most_graders(cfg) == 2
    assert [mixtures.grades_all(cfg, grader) for grader in cfg.reward.graders] == [False, False, True]
    single = validate({}, "c.yaml")
    assert mixtures.task_names(single) == [""] and mixtures.most_graders(single) == 1
    assert validate(to_dict(cfg), "config.yaml") == cfg == config(task={"kind": "mixture", "tasks": TASKS})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"task": [TASKS[0], TASKS[0]]}, "task.tasks.1.name: got 'easy' again, want distinct names"),
        (
            {"task": [TASKS[0] | {"max_new_tokens": 99}, TASKS[1]]},
            "task.tasks.0.max_new_tokens: got 99, want at most rollout.max_new_tokens (8)",
        ),
        (
            {"reward": {"grader": "numeric", "tasks": ["easy"]}},
            "task.tasks.1: got no grader for the task 'hard', want it in reward.graders.0.tasks, say",
        ),
        (
            {"reward": {"graders": [{"grader": "numeric"}, {"grader": "cut_off", "tasks": ["hrad"]}]}},
            "reward.graders.1.tasks: got 'hrad', want some of easy, hard",
        ),
        (
            {"task": SUMS, "reward": {"grader": "numeric", "tasks": ["easy"]}},
            "reward.graders.0.tasks: got 'easy', want none: task is no mixture",
        ),
    ],
)
def test_what_does_not_fit(values, message):
    assert message in mixtures.problems(config(**values))


@pytest.mark.parametrize("curriculum", ["unsolved", {"kind": "sec", "column": "task"}])
def test_weights_are_the_shuffled_curriculums_alone(curriculum):
    weighted = [TASKS[0] | {"weight": 3}, TASKS[1]]
    [found] = training_problems(config(task=weighted, experience={"curriculum": curriculum}))
    assert found.startswith("experience.curriculum: got ") and "shares: {easy: 3, hard: 1}}" in found
    assert training_problems(config(experience={"curriculum": curriculum})) == []
    assert training_problems(config(task=weighted)) == []


@pytest.mark.parametrize(
    ("experience", "where"),
    [
        ({"filter": "numeric"}, "experience.filter.by"),
        ({"filter": ["success", {"kind": "between", "by": "numeric"}]}, "experience.filter.filters.1.by"),
        ({"refill": "numeric"}, "experience.refill.filter.by"),
        ({"gate": {"kind": "greso", "by": "numeric"}}, "experience.gate.by"),
        ({"budget": {"kind": "vip", "by": "numeric"}}, "experience.budget.by"),
        ({"curriculum": {"kind": "unsolved", "by": "numeric"}}, "experience.curriculum.by"),
    ],
)
def test_a_stage_that_judges_all_tasks_by_a_grader_of_one_is_refused(experience, where):
    """It would drop every group of the others without a word: they have no number."""
    want = "got 'numeric', which grades hard alone, want success, reward, or a grader of every task"
    assert f"{where}: {want}" in training_problems(config(experience=experience))
    everywhere = {"graders": [{"grader": "numeric"}]}
    assert training_problems(config(experience=experience, reward=everywhere)) == []


def test_a_filter_by_a_reward_of_one_grader_per_task_is_by_no_sum():
    by_reward = {"experience": {"filter": "reward"}}
    one_each = {"graders": GRADERS["graders"][:2]}
    assert not any("weighted sum" in line for line in cautions(config(**by_reward, reward=one_each)))
    assert any("weighted sum of 2 graders" in line for line in cautions(config(**by_reward)))


@pytest.mark.parametrize(
    ("task", "lines"),
    [
        ([], ["task: got [], want 1 entries or more"]),
        ([{"name": "a b"}], ["task.0.name: got 'a b', want letters, digits, . _ and -: it is part of metric names"]),
        ([{"name": "a", "weight": 0}, {"name": "b", "weight": -1}],
         ["task.0.weight: got 0, want more than 0", "task.1.weight: got -1, want more than 0"]),
        ([{"name": "a", "weight": True}], ["task.0.weight: got True, want a number"]),
        ([{"task": SUMS}], ["task.0.name: got nothing, want a value"]),
        ([{"name": "a", "task": {"kind": "fil"}}],
         ["task.0.task.kind: got 'fil', want one of arithmetic, file, reasoning_gym, rollouts; perhaps you meant file"]),
        ([{"name": "a", "task": SUMS | {"term": 2}}], ["task.0.task.term: no such key, perhaps you meant task.0.task.terms"]),
        ([3], ["task.0: got 3, want a section, as {key: value}"]),
        ({"kind": "mixture"}, ["task.tasks: got nothing, want a value"]),
    ],
)  # fmt: skip
def test_errors_name_the_entry_of_the_list(task, lines):
    with pytest.raises(UserError) as error:
        validate({"task": task}, "c.yaml")
    assert str(error.value).replace("c.yaml: ", "").splitlines() == lines


def test_flags_reach_the_tasks_of_a_short_form():
    cfg = validate({"task": TASKS}, "c.yaml", ["--task.tasks.1.task.terms", "4", "--task.tasks.0.weight", "2"])
    assert cfg.task.tasks[1].task.terms == 4 and cfg.task.tasks[0].weight == 2 and cfg.task.tasks[0].task.terms == 2
    one = validate({"task": TASKS}, "c.yaml", ["--task", "{kind: arithmetic, terms: 2}"])
    assert one.task.kind == "arithmetic" and one.task.terms == 2
    several = validate({}, "c.yaml", ["--task", "[{name: a}, {name: b, weight: 2}]"])
    assert [(part.name, part.weight) for part in several.task.tasks] == [("a", 1.0), ("b", 2.0)]


def test_inputs_report_what_does_not_fit_their_rows(tmp_path):
    """The longest right response of three digits, 27#, has three tokens; a file without `response` knows none."""
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1", "answer": "1"}\n{"prompt": "2", "answer": "2"}\n')
    data = {"kind": "file", "path": str(tmp_path / "rows.jsonl"), "held_out": 1}
    tasks = [TASKS[0], TASKS[1] | {"max_new_tokens": 2}, {"name": "data", "task": data}]
    found = inputs.read(config(task=tasks, warm_start={"steps": 1}), trains=True).problems
    assert found == [
        "task.tasks.1.max_new_tokens: got 2, want at least the 3 tokens of its longest right response",
        "task.response: got nothing for data, want the right response: warm_start.steps is 1",
    ]
    assert inputs.read(config(reward={"grader": "numeric", "tasks": ["easy"]})).problems == [
        "task.tasks.1: got no grader for the task 'hard', want it in reward.graders.0.tasks, say"
    ]


def test_a_plan_reads_the_longest_prompt_of_all_tasks():
    """<1+2+3> has seven characters."""
    assert prompt_slots(config(), Target(None, None, 0)) == 7
    data = {"kind": "file", "path": "x", "held_out": 1, "max_prompt_tokens": 9}
    assert prompt_slots(config(task=[*TASKS, {"name": "data", "task": data}]), Target(None, None, 0)) == 9


def test_a_change_of_one_task_is_named_and_paths_are_absolute():
    files = [{"name": "a", "task": {"kind": "file", "path": "x.jsonl", "held_out": 3}}, TASKS[1]]
    cfg = with_absolute_paths(config(task=files), lambda path: f"/at/{path}")
    assert cfg.task.tasks[0].task.path == "/at/x.jsonl"
    other = config(task=[files[0] | {"weight": 2}, TASKS[1]])
    assert changes(to_dict(config(task=files)), to_dict(other)) == ["task.tasks.0.weight: 1.0 -> 2.0"]
