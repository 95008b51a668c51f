"""Whole runs with gates, budgets, refill and filters: killed and resumed, on other meshes, in two processes, and as identities."""

import dataclasses
import json
import os
import random
import re
import subprocess
import time
from functools import cache

import numpy as np
import pytest
from test_train import ROOT, assert_same_run, environment, final_fingerprints, rows, run, start, wait_for_rows  # noqa: F401
from two_meshes import launcher

from jaxrl_llm import train
from jaxrl_llm.config import loading
from jaxrl_llm.errors import DroppedError

BASE = """
steps: {steps}
model: {{vocab_size: 16, layers: 1, d_model: 32, heads: 8, kv_heads: 8, head_dim: 8, d_mlp: 64}}
rollout: {{prompts: 8, samples: 4, max_new_tokens: 4, per_sample: {per_sample}, control: {control}}}
task: {task}
reward: {reward}
objective: {{advantage: {{kind: rloo}}, baseline_over: {baseline}, loss: {loss}}}
update: {{minibatches: 2, epochs: 2, packing: {{kind: shared_prefix}}, optimizer: {{lr: 3.0e-3}}}}
evaluation: {{every: 6}}
checkpoint: {{every: 1}}
metrics: {{rollouts_every: 1, rollout_groups: -1, samples_every: 0, tensorboard: false}}
experience: {experience}
"""
# Between them every curriculum, gate and budget with a state, refill, filters of both kinds, replay of any groups, and a control.
STAGES = {
    "refill": (
        "{refill: {filter: [success, {kind: no_duplicates}], attempts: 3}, gate: {kind: greso, rate: 0.2},"
        " curriculum: {kind: stratified_by_difficulty}}"
    ),
    "knapsack": (
        "{budget: {kind: knapsack, high: 9}, gate: {kind: exclude_solved, visits: 1, returns_after: 2},"
        " curriculum: {kind: stratified, column: answer},"
        " filter: {any_of: [success, {kind: best_by, keep: 2}]}, "
        " replay: {capacity: 24, groups: 2, draw: prioritized, correction: 0.5,"
        " join: {most: 1, choose: lowest_entropy}}}"
    ),
    "rounds": (
        "{budget: {kind: reinforce_ada, per_round: 2, rounds: 4, keep: 2},"
        " curriculum: {kind: stratified, column: task, shares: {low: 3, short: 1}},"
        ' filter: [{kind: max_variance, keep: 4}, "stage_graders:ended"], replay: {capacity: 20, groups: 2}}'
    ),
    "hints": (
        "{hints: {kind: cosine, last: 0.6, samples: 2, only_unsolved: true, train: true},"
        " curriculum: {kind: unsolved, memory: 0.5}, gate: {kind: exclude_solved, visits: 1, returns_after: 2},"
        " replay: {capacity: 12, groups: 2}}"
    ),
    "own": (
        '{budget: "stage_graders:Twice", gate: {function: "stage_graders:NotTwice", options: {rest: 1}},'
        " curriculum: {kind: stages, column: answer, after: 3, rehearsal: 0.5,"
        " stages: [[3, 4, 5, 6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16, 17, 18]]},"
        " filter: {kind: no_repetition, ngram: 1}}"
    ),
}
SUMS = "{kind: arithmetic, terms: 2, held_out: 60}"
OPTIONS = {
    "baseline": "sampled",
    "per_sample": "{}",
    "control": "{kind: none}",
    "loss": "{}",
    "task": SUMS,
    "reward": '{workers: 1, grader: "stage_graders:first_is_low"}',
}
# A mixture whose tasks have graders and limits of their own.
MIXTURE = (
    f"[{{name: low, task: {SUMS}}}, {{name: short, max_new_tokens: 3, task: {SUMS}}}]",
    '{workers: 1, graders: [{grader: "stage_graders:first_is_low", tasks: [low]},'
    ' {grader: "stage_graders:first_is_high", tasks: [short]}, {grader: cut_off, tasks: [short], weight: 0.5}]}',
)
# Prompts in two forms behind two examples, all drawn at each visit.
PROMPTED = (
    '{kind: file, path: ROWS, held_out: 60, prompt: "<{q}>", answer: "{a}", max_prompt_tokens: 21, prompting: {'
    'forms: [{name: plain}, {name: bare, prompt: "{q} ", weight: 2}],'
    ' examples: {number: 2, by: visit, place: text, text: "{prompt}{response}#"}}}'
)
DIGITS = '{kind: regex, pattern: "[0-9]{1,2}#"}'
MORE = {
    "refill": {"task": PROMPTED},
    "knapsack": {"control": DIGITS},
    "rounds": {
        "baseline": "kept",
        "per_sample": "{temperature: [1.5, 0.7, 1.0]}",
        "task": MIXTURE[0],
        "reward": MIXTURE[1],
    },
    "hints": {
        "control": DIGITS,
        "task": "{kind: arithmetic, terms: 2, held_out: 82}",
        "loss": "{shaping: 0.1}",
        "reward": '{workers: 1, grader: "stage_graders:first_is_one"}',
    },
}
GRADERS = '''
import numpy as np


def first_is_low(sample):
    """Right if the first character is one of 0 to 6."""
    return float(sample.completion[:1] in tuple("0123456"))


def first_is_high(sample):
    """The others; only rows of its task."""
    assert sample.task == sample.columns["task"] == "short" and sample.num_tokens <= 3
    return 1 - first_is_low(sample)


def first_is_one(sample):
    """Right behind any hint: sums of two digits begin with 1."""
    return float(sample.completion[:1] == "1")


def ended(groups):
    return groups.rollouts.finish == 0


class Twice:
    """Two samples each; two more for those whose first two are equal; its state counts the steps."""

    def init(self, num_rows):
        return np.zeros((), np.int32)

    def allocate(self, state, row, seen, left):
        if seen is None:
            return state, np.full(len(row), 2)
        if (seen.rollouts.size > 2).any():
            return state, np.zeros(len(row), int)
        equal = [len(set(seen.reward[seen.rollouts.prompt == p].tolist())) == 1 for p in range(len(row))]
        return state, np.where(equal, 2, 0)

    def observe(self, state, groups):
        return state + 1


class NotTwice:
    """No prompt of the last `rest` steps."""

    def __init__(self, rest):
        self.rest = rest

    def init(self, num_rows):
        return {"last": np.full(num_rows, -9), "step": 0}

    def admit(self, state, rng, row):
        return state, state["step"] - state["last"][row] > self.rest

    def observe(self, state, groups):
        last = state["last"].copy()
        last[groups.rollouts.prompts.row] = state["step"]
        return {"last": last, "step": state["step"] + 1}
'''


def write(directory, name: str, steps: int = 6):
    (directory / "stage_graders.py").write_text(GRADERS)
    sums = ({"q": f"{i // 10}+{i % 10}", "a": str(i // 10 + i % 10)} for i in range(100))
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    path = directory / f"{name}.yaml"
    text = BASE.format(steps=steps, experience=STAGES[name], **OPTIONS | MORE.get(name, {}))
    path.write_text(text.replace("ROWS", str(directory / "rows.jsonl")))
    return path


def rows_of(run_dir) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "rollouts.jsonl").read_text().splitlines()]


# Two examples with their sums, and the question, in each form.
PROMPT = {"plain": r"(<\d\+\d>\d+#){2}<\d\+\d>", "bare": r"(\d\+\d \d+#){2}\d\+\d "}


def each(*fast: str) -> list:
    """All runs; those that are not named belong to the long test."""
    return [pytest.param(name, marks=[] if name in fast else [pytest.mark.soak]) for name in STAGES]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, environment):  # noqa: F811
    @cache
    def run_of(name: str):
        place = tmp_path_factory.mktemp(name)
        config = write(place, name)
        with_graders = environment | {"PYTHONPATH": f"{place}{os.pathsep}{environment['PYTHONPATH']}"}
        run(config, place / "run", with_graders)
        return config, place / "run", with_graders

    return run_of


@pytest.mark.slow
@pytest.mark.parametrize("name", each("refill", "hints"))
def test_a_run_with_stages_does_what_they_say(undisturbed, name):
    _, run_dir, _ = undisturbed(name)
    found = rows(run_dir)[1:]
    assert len(found) == 6 and any(row["updates"] for row in found)
    whole = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    first = next(i for i, row in enumerate(whole) if row.get("updates"))
    # The first step compiles update and publish, and the first beside which nothing compiles measures the machine: on a busy
    # one the third. Requests of any number and size were compiled for before.
    measured = next(i for i, row in enumerate(whole) if "rollout/ceiling_fraction" in row)
    assert measured <= first + 2 and not any(row["compiles"] for row in whole[max(measured, first + 1) + 1 :])
    total = [row["rollout/samples"] for row in found]
    if name == "refill":
        prompts = [row["refill/prompts"] for row in found]
        assert max(prompts) > 8 and total == [4 * n for n in prompts]
        assert {row["form"] for row in rows_of(run_dir)} == {"plain", "bare"}
        assert all(re.fullmatch(PROMPT[row["form"]], row["prompt"]) for row in rows_of(run_dir))
        assert all(row["prompts/examples"] == 2 and 15 <= row["prompts/mean_length"] <= 21 for row in found)
        shares = [row["form/plain/groups"] + row["form/bare/groups"] for row in found]
        assert shares == pytest.approx([1] * 6) and 0.15 < np.mean([row["form/plain/groups"] for row in found]) < 0.5
    else:
        assert max(total) <= 32 and (name != "knapsack" or set(total) == {32})
    if name == "knapsack":
        # Groups and rows came back, also where nothing had been dropped.
        assert sum(row["replay/rows"] for row in found) > 0 and max(row["groups/replayed"] for row in found) >= 2
    logged = rows_of(run_dir)
    if MORE.get(name, {}).get("control") == DIGITS:
        assert all(re.fullmatch("[0-9]{1,2}#", row["completion"]) for row in logged)
    each = {(row["step"], row["uid"], row["sample"]) for row in logged}
    # No response is there twice, so no noise was used twice.
    assert len(each) == len(logged)
    temperatures = np.float32([1.5, 0.7, 1.0] if name == "rounds" else [1.0])
    assert all(row["temperature"] == temperatures[row["sample"] % len(temperatures)] for row in logged)
    sizes = {(step, uid): 0 for step, uid, _ in each}
    for step, uid, _ in each:
        sizes[step, uid] += 1
    assert (len(set(sizes.values())) > 1) == (name not in ("refill", "hints"))
    if name == "hints":
        begins_with_a_part_of_the_answer(found, logged)
    if name == "rounds":
        # Of 8 prompts 6 are of the task with three times the share.
        assert {(row["task/low/groups"], row["task/short/groups"]) for row in found} == {(0.75, 0.25)}
        assert all("rewards/cut_off/raised" in row and not row["rewards/first_is_high/raised"] for row in found)
        assert max(row["task/short/mean_length"] for row in found) <= 3 < max(len(row["ids"]) for row in logged)
        assert {len(row["ids"]) for row in logged if row["task"] == "short"} <= {1, 2, 3}
        assert {row["task"] for row in logged if len(row["ids"]) > 3} == {"low"}
        both = found[-1]["eval/low/pass@1"], found[-1]["eval/short/pass@1"]
        assert sum(both) / 2 == pytest.approx(found[-1]["eval/pass@1"])


def begins_with_a_part_of_the_answer(found: list[dict], logged: list[dict]) -> None:
    """Prompts that were visited before without a right answer have hints, which end before the answer does."""
    hinted = [row for row in logged if row.get("hint_tokens")]
    assert hinted and found[0]["hints/share"] == 0 < found[-1]["hints/share"]
    for row in hinted:
        n, answer = row["hint_tokens"], row["answer"].strip("#")
        assert 1 <= n < len(answer) and row["tokens"][:n] == list(answer[:n]) and row["sample"] < 2
        assert not any(row["sampled"][:n]) and all(row["sampled"][n:]) and len(row["ids"]) > n
        assert not any(row["logprobs"][:n]) and any(row["logprobs"][n:])
    assert all(row["success"] for row in hinted) and max(row.get("hints/success", 0) for row in found) == 1
    for row in found:
        mine = [r for r in logged if r["step"] == row["step"]]
        right = [r["success"] for r in mine if not r.get("hint_tokens")]
        assert row["reward"] == row["hints/success_without"] == pytest.approx(np.mean(right))
        assert row["hints/share"] == pytest.approx(sum("hint_tokens" in r for r in mine) / len(mine))
        sampled = sum(sum(r.get("sampled", [True] * len(r["ids"]))) for r in logged if r["step"] <= row["step"])
        assert row["num_tokens"] == sampled


# Runs with own stages and states are also killed and resumed by tests/test_newcomer.py.
@pytest.mark.slow
@pytest.mark.parametrize("name", each("hints"))
def test_a_killed_run_resumes_to_the_same_result(undisturbed, tmp_path, name):
    """No group is lost, none is used twice."""
    config, whole, env = undisturbed(name)
    process = start(config, tmp_path / "run", env)
    wait_for_rows(tmp_path / "run", 3, process)
    time.sleep(0.05 * list(STAGES).index(name))
    process.kill()
    process.communicate()
    run(config, tmp_path / "run", env)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.soak
@pytest.mark.timeout(900)
def test_buffer_curriculum_and_mixture_survive_eight_kills_at_random_instants(tmp_path, environment):  # noqa: F811
    """Every step is saved, so that a save is under way most of the time."""
    config, rng, done = write(tmp_path, "rounds", steps=24), random.Random(2), 0
    env = environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"}
    run(config, tmp_path / "whole", env)
    for _ in range(8):
        process = start(config, tmp_path / "run", env)
        wait_for_rows(tmp_path / "run", min(done + 2, 23), process)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        done = len(rows(tmp_path / "run"))
    run(config, tmp_path / "run", env)
    assert_same_run(tmp_path / "whole", tmp_path / "run")


@pytest.mark.soak
def test_a_run_with_a_buffer_continues_on_another_mesh(tmp_path, environment):  # noqa: F811
    """Three steps on one device, three on (2, 2, 2): what comes back is what was stored."""
    config = write(tmp_path, "knapsack")
    env = environment | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"}
    run(config, tmp_path / "whole", env)
    process = start(config, tmp_path / "run", env)
    wait_for_rows(tmp_path / "run", 4, process)
    process.kill()
    process.communicate()
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"]
    run(config, tmp_path / "run", env | {"JAX_NUM_CPU_DEVICES": "8"}, *mesh)
    got, want = rows(tmp_path / "run"), rows(tmp_path / "whole")
    alike(got, want)
    names = ("groups/replayed", "replay/rows", "replay/age", "replay/uses", "replay/groups", "replay/task_rows")
    assert [[row.get(name) for name in names] for row in got] == [[row.get(name) for name in names] for row in want]


def alike(got: list[dict], want: list[dict]) -> None:
    """The same samples at every step; numbers of the update to rounding."""
    names = (
        "completions/crc32",
        "reward",
        "groups/kept",
        "kept/rows",
        "dropped/rows",
        "rollout/samples",
        "gate/skipped",
    )
    assert [[row.get(name) for name in names] for row in got] == [[row.get(name) for name in names] for row in want]
    losses = [[row.get("loss", 0.0) for row in part] for part in (got, want)]
    np.testing.assert_allclose(*losses, atol=2e-5)


# Two processes for stages whose requests follow from grades, or whose state does; one with as many devices for the others.
PLACES = {"refill": "two", "knapsack": "two", "rounds": "one", "hints": "one", "own": "one"}


@pytest.mark.slow
@pytest.mark.parametrize("other", [False, pytest.param(True, marks=pytest.mark.soak)])
@pytest.mark.parametrize("name", each())
def test_other_meshes_and_two_processes_sample_and_learn_the_same(undisturbed, tmp_path, name, other):
    """(2, 2, 2) devices of one process, or of two, against one device."""
    config, whole, env = undisturbed(name)
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2", "--steps", "3"]
    if (PLACES[name] == "one") != other:
        run(config, tmp_path / "run", env | {"JAX_NUM_CPU_DEVICES": "8"}, *mesh)
    else:
        arguments = ["train", str(config), "--run-dir", str(tmp_path / "run"), *mesh]
        done = subprocess.run(
            [*launcher(tmp_path, 4), *arguments],
            env=env, cwd=ROOT, capture_output=True, text=True, timeout=280,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:] + (tmp_path / "process_1.log").read_text()[-2000:]
    alike(rows(tmp_path / "run")[:4], rows(whole)[:4])


IDENTITIES = {
    "a gate, a budget and filters": {
        "gate": {"kind": "exclude_solved", "solved": None, "hopeless": None},
        "budget": {"kind": "vip", "low": 4, "high": 4},
        "filter": [{"kind": "between"}, "none"],
    },
    "a gate and rounds": {
        "gate": {"kind": "greso", "least": 1.0},
        "budget": {"kind": "rounds", "per_round": 4, "rounds": 1},
    },
    "refill": {"refill": {"filter": {"kind": "between"}}},
    "a mixture of one task": {},
}
OF_ONE = {"a mixture of one task": {"task": f"[{{name: one, weight: 1, task: {SUMS}}}]"}}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("plain"), {"filter": "none"})


def trained(directory, experience: dict, **options):
    (directory / "stage_graders.py").write_text(GRADERS)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(directory))
        text = BASE.format(steps=2, experience=json.dumps(experience), **OPTIONS | options)
        (directory / "c.yaml").write_text(text)
        cfg = loading.load(
            directory / "c.yaml", ["--run_dir", str(directory / "run"), "--mesh.fsdp", "4", "--mesh.tensor", "2"]
        )
        train.train(cfg)
    return directory / "run"


@pytest.mark.slow
@pytest.mark.parametrize("name", IDENTITIES)
def test_a_stage_at_its_identity_changes_no_bit(plain, tmp_path, name):
    experience = {"filter": "none"} | IDENTITIES[name]
    got = trained(tmp_path, experience, **OF_ONE.get(name, {}))
    logged = (got / "rollouts.jsonl").read_text().replace('"task": "one", ', "")
    assert logged == (plain / "rollouts.jsonl").read_text()
    want, found = final_fingerprints(plain), final_fingerprints(got)
    of_train = [path for path in want if "train" in path or "reference" in path]
    assert len(of_train) > 20 and {path: found[path] for path in of_train} == {path: want[path] for path in of_train}
    shared = set(rows(plain)[-1]) & set(rows(got)[-1])
    assert len(shared) > 40
    assert [{k: row.get(k) for k in shared} for row in rows(got)] == [
        {k: row.get(k) for k in shared} for row in rows(plain)
    ]


@pytest.mark.slow
def test_a_refill_that_never_fills_ends_the_run_with_one_message(tmp_path):
    """Bounded attempts, then n steps of nothing; the state is saved, and what was sampled is counted."""
    experience = {"refill": {"filter": {"kind": "between", "at_least": 2.0}, "attempts": 2}}
    (tmp_path / "stage_graders.py").write_text(GRADERS)
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(tmp_path))
        (tmp_path / "c.yaml").write_text(BASE.format(steps=9, experience=json.dumps(experience), **OPTIONS))
        cfg = loading.load(
            tmp_path / "c.yaml", ["--run_dir", str(tmp_path / "run"), "--mesh.fsdp", "4", "--mesh.tensor", "2"]
        )
        guards = dataclasses.replace(cfg.update.guards, max_dropped=3)
        with pytest.raises(DroppedError, match="every graded group of 3 consecutive steps was dropped"):
            train.train(dataclasses.replace(cfg, update=dataclasses.replace(cfg.update, guards=guards)))
    found = rows(tmp_path / "run")[1:]
    assert [row["refill/prompts"] for row in found] == [16.0] * 3 and [row["refill/missing"] for row in found] == [
        8.0
    ] * 3
    assert found[-1]["rollout/samples"] == 64 and found[-1]["kept/rows"] == 0
    assert len([p for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]) >= 1
