"""Groups whose prompts were asked in several forms: what graders read, metrics of each form, files and what is read from them."""

import dataclasses
import json
import re

import numpy as np
import pytest
from fakes import config, groups_of, sums

from jaxrl_llm.errors import UserError
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.grading import grade
from jaxrl_llm.roles.stored_rollouts import read_trajectories, trajectory_rows, write_trajectories
from jaxrl_llm.roles.summary import describe
from jaxrl_llm.roles.task_metrics import describe_forms
from jaxrl_llm.tasks.config import CharacterTokenizer
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.task import load_task
from jaxrl_llm.types import check

N = np.nan
UIDS = np.arange(4)
FORMS = [{"name": "plain"}, {"name": "bare", "prompt": "{q} "}]
LIVE = {"number": 1, "by": "visit", "place": "text", "text": "{prompt}{response}#"}


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = ({"q": f"{i // 5}+{i % 5}", "a": str(i // 5 + i % 5), "most": 2 + i % 3} for i in range(20))
    place.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(place)


@pytest.fixture
def load(path):
    def load(examples=None, **prompting):
        made = {"forms": FORMS, "examples": examples or {}} | prompting
        fields = {"prompt": "<{q}>", "answer": "{a}", "held_out": 2, "max_prompt_tokens": 20}
        return load_task(path, CharacterTokenizer(), **fields, prompting=made)

    return load


def step(task, row=(0, 1, 2, 3)):
    """Groups of two responses to visits 0 to 3 of these rows. The last could not be graded."""
    groups = groups_of(np.array([[1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [N, N]]), length=[2, 1, 2, 2, 1, 1, 2, 2])
    prompts = make_prompts(task, task.train, np.array(row), UIDS)
    return check(groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)))


def test_graders_read_the_question_as_it_was_asked(load):
    task, seen = load(LIVE), []
    graded = grade(step(task).rollouts, task, lambda sample: seen.append(sample) or 1.0)
    asked = [task.train[i].asked(i) for i in range(4) for _ in range(2)]
    assert graded.keep.all() and {row.asks.form for row in asked} == {"plain", "bare"}
    assert [(sample.prompt, sample.answer) for sample in seen] == [
        ((f"<{row.columns['q']}>" if row.asks.form == "plain" else f"{row.columns['q']} "), row.columns["a"])
        for row in asked
    ]
    # Groups of one row are not those of another, whatever the form.
    others = step(task).rollouts
    prompts = others.prompts.replace(row=np.int32([1, 0, 2, 3]))
    with pytest.raises(UserError, match="got a prompt 0 other than that of row 1"):
        grade(others.replace(prompts=prompts), task, lambda sample: 1.0)


def test_typed_prompts_and_stated_rows_are_graded_too(load):
    """Prompts in the evaluation's form, whatever the uid of their visit."""
    task, seen = load(), []
    rollouts = step(task).rollouts
    stated = make_prompts(task, [row.stated for row in task.train], np.arange(4), UIDS)
    grade(rollouts.replace(prompts=stated), task, lambda sample: seen.append(sample.prompt) or 1.0)
    assert seen == [task.train[i].prompt for i in range(4) for _ in range(2)]


def test_the_numbers_of_each_form(load):
    """Four groups of two rows, some of each form; the last is not graded."""
    task = load(LIVE)
    groups = step(task)
    forms = np.array([task.train[i].asked(i).asks.form for i in range(4)])
    assert set(forms) == {"plain", "bare"}
    found = describe_forms(groups, task)
    lengths, rewards = np.array([3, 4, 2, 4]) / 2, np.array([0.5, 1.0, 0.0, N])
    for name in ("plain", "bare"):
        own = forms == name
        assert found[f"form/{name}/groups"] == own.mean() and found[f"form/{name}/mean_length"] == lengths[own].mean()
        for measure in ("reward", "success"):
            assert found.get(f"form/{name}/{measure}", N) == pytest.approx(np.nanmean(rewards[own]), nan_ok=True)
    assert found["prompts/examples"] == 1 and found["prompts/mean_length"] == groups.rollouts.prompts.length.mean()
    assert describe(groups, ["x"], task).items() >= found.items()
    plain = sums()
    assert describe_forms(step(plain), plain) == {}


def test_a_form_without_examples_has_no_names_to_count(load):
    """Examples alone: the prompts are described, forms are not."""
    task = load({"number": 1, "place": "text", "text": "{prompt}{response}#"}, forms=[])
    assert describe_forms(step(task), task).keys() == {"prompts/mean_length", "prompts/examples"}


@pytest.mark.parametrize("examples", [None, LIVE])
def test_rows_come_back_from_files_in_every_form(load, tmp_path, examples):
    task, place = load(examples), tmp_path / "x.jsonl"
    groups = step(task)
    write_trajectories(place, task, groups)
    forms = [task.train[i].asked(i).asks.form for i in range(4)]
    assert [row["form"] for row in trajectory_rows(task, task.train, groups)][::2] == forms
    found = read_trajectories(place, task, slots=(task.prompt_slots, 2))
    assert found.rollouts.prompts.row.tolist() == [0, 1, 2, 3]
    # Known by its tokens, or by the row and visit that drew it; not if another number is written there.
    lines = [json.loads(line) | {"row": 17} for line in place.read_text().splitlines()]
    (tmp_path / "y.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = read_trajectories(tmp_path / "y.jsonl", task).rollouts.prompts.row.tolist()
    assert rows == ([0, 1, 2, 3] if examples is None else [-1] * 4)
    # Its responses are graded as those of the form that it has, also where the run would ask that visit otherwise.
    seen = []
    grade(
        found.rollouts.replace(prompts=found.rollouts.prompts.replace(uid=UIDS.astype(np.int32))),
        task,
        lambda s: seen.append(s.prompt) or 1.0,
    )
    assert seen[::2] == [task.train[i].asked(i).text for i in range(4)]


def test_limits_of_columns_are_held_against_the_config(path):
    """2, 3 and 4 tokens in the column, for right responses of 4 with their end token; a mixture's other tasks have no column."""
    task = {"kind": "file", "path": path, "prompt": "<{q}>", "answer": "{a}", "held_out": 2, "response": "00{a}"}
    task["prompting"] = {"columns": {"max_new_tokens": "most"}}
    other = {"name": "b", "max_new_tokens": 3, "task": {"kind": "arithmetic", "terms": 2, "held_out": 8}}
    for whole in (task, [other, {"name": "a", "task": task}]):
        for most, known in ((6, 1), (3, 2)):
            found = inputs.read(
                config(task=whole, rollout={"prompts": 8, "samples": 4, "max_new_tokens": most})
            ).problems
            found = [text for text in found if text.startswith("task.prompting.columns.max_new_tokens: ")]
            assert len(found) == known and re.search(
                r"rows.jsonl:\d+: got [23] there, one of 1\d such rows, want at least the tokens of its right response",
                found[-1],
            )
    assert "got 4 there, one of " in found[0] and "want at most rollout.max_new_tokens (3)" in found[0]


def test_held_out_rows_have_one_form(load):
    task = load(LIVE)
    assert all(row.visit is None and row.asks.form == "" for row in task.held_out)
    assert dataclasses.replace(task.train[0], visit=None).asked(3).asks.form == ""
