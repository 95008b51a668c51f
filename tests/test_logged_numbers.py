"""Every number that a run logs, against `logged_oracle`, which recomputes it from the run's arrays.

Taken from a run are its inputs and its samples, nothing computed from them: parameters before each update, rollouts and grades, the
rows of the warm start, and the tokens in each update's loss.
"""

import re
from functools import cache, partial
from pathlib import Path

import jax
import logged_oracle as oracle
import logged_updates as updates
import numpy as np
import pytest
from setups import make_params

from jaxrl_llm import train
from jaxrl_llm.config import loading
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead
from jaxrl_llm.roles import blueprint, build, supervised

GRADERS = '''
"""A task's graders; `late` counts the prompts that it has seen."""
SEEN = []

def total(sample): return sum(map(int, sample.prompt.strip("<>").split("+")))

def letters(sample): return sum(map(ord, sample.completion))

def mixed(sample):
    """One group in seven cannot be read (nor, by `length`, another); of the others most have equal rewards."""
    if total(sample) % 7 == 5: raise ValueError("cannot read this")
    return float(letters(sample) % 2) if total(sample) % 3 == 0 else 1.0

def length(sample):
    if total(sample) % 7 == 4: return "long"
    return len(sample.completion) / 3 if total(sample) % 3 == 0 else 0.0

def spread(sample):
    """One number per step."""
    if total(sample) % 5 == 3: raise ValueError("cannot read this")
    return [sum(map(ord, step)) % 5 / 4 for step in sample.steps]

def late(sample):
    """No group from the 17th on: none after the first step of RL."""
    if sample.prompt not in SEEN[-1:]: SEEN.append(sample.prompt)
    if len(SEEN) > 16: raise ValueError("too late")
    return letters(sample) % 11 / 10
'''
BASE = {
    "steps": 2,
    "model": {"vocab_size": 20, "layers": 1, "d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 64},
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "metrics": {"tensorboard": False, "samples_every": 0, "rollouts_every": 0},
    "experience": {"filter": "none"},
}
ROLLOUT = {"prompts": 8, "samples": 4, "max_new_tokens": 4, "temperature": 1.0}
# Cases that each of them is meant for: `test_the_runs_contain_the_cases_they_are_meant_for`.
GRPO = BASE | {
    "warm_start": {"steps": 1, "rows": 16, "noise": 0.5, "optimizer": {"lr": 3e-3}},
    "rollout": ROLLOUT | {"engine": {"decode_chunk": 2, "eos_interval": 1, "compact": False}},
    "experience": {"filter": "has_signal"},
    "reward": {
        "workers": 1,
        "graders": [
            {"grader": "logged_graders:mixed", "name": "mixed", "weight": 1.0},
            {"grader": "logged_graders:length", "name": "length", "weight": 0.5},
        ],
    },
    "objective": {
        "advantage": {"kind": "grpo"},
        "loss": {
            "anchor": "behavior",
            "surrogate": {"kind": "clip", "low": 0.1, "high": 0.15},
            "correction": {"kind": "second_moment", "threshold": 0.001},
            "aggregation": "sequence",
            "kl": {"kind": "k3", "weight": 0.3},
            "entropy": 0.05,
        },
    },
    "update": {"epochs": 2, "minibatches": 4, "optimizer": {"lr": 1e-2}},
}
PPO = BASE | {
    "task": BASE["task"] | {"held_out": 5},
    "rollout": ROLLOUT
    | {"temperature": 0.8, "top_p": 0.8, "max_kept_tokens": 6, "engine": {"decode_chunk": 128, "eos_interval": 8}},
    "experience": {"filter": "none", "replay": {"capacity": 8}},
    "reward": {"workers": 1, "graders": [{"grader": "logged_graders:spread", "name": "spread", "step_end": "1"}]},
    "objective": {
        "advantage": {"kind": "gae"},
        "reward_kl": {"kind": "k1", "weight": 0.1},
        "loss": {
            "surrogate": {"kind": "clip", "low": 0.2, "high": 0.2},
            "correction": {"kind": "truncated_importance", "cap": 1.04, "floor": 0.97},
            "aggregation": "token",
        },
    },
    "update": {"epochs": 2, "minibatches": 2, "optimizer": {"lr": 1e-2}, "ess_scaling": {"base": 0.95}},
}
DPO = BASE | {
    "rollout": ROLLOUT | {"engine": {"decode_chunk": 128, "eos_interval": 8}},
    "reward": {"workers": 1, "graders": [{"grader": "logged_graders:late", "name": "late"}]},
    "objective": {"advantage": {"kind": "best_worst"}, "loss": {"kind": "dpo", "beta": 0.5}},
    "update": {"epochs": 2, "minibatches": 2, "packing": {"kind": "shared_prefix"}, "optimizer": {"lr": 1e-2}},
}
CONFIGS = {"grpo": GRPO, "ppo": PPO, "dpo": DPO}
# Measured by a clock, the compiler or the machine.
MEASURED = re.compile(
    r"time/.*|compiles|tokens_per_s|update/(flops_per_s|ceiling_fraction|mfu)|rollout/ceiling_fraction"
)
# Of runs with refill: tests/roles/test_asking.py.
REFILL = [f"refill/{name}" for name in ("prompts", "attempts", "accepted", "missing")]
# Of runs with such a budget or curriculum: tests/roles/test_asking.py, tests/experience/test_described.py, test_staged.py.
CHOICE = [f"budget/{name}" for name in ("min_samples", "max_samples", "share_at_min")] + [
    f"curriculum/{name}"
    for name in (
        "share/[^/]+", "expected_success", "target", "difficulty", "stage", "window_mean", "window_filled", "candidates", "retired"
    )
]  # fmt: skip
# Of runs with hints: tests/roles/test_hinting.py.
HINTS = [f"hints/{name}" for name in ("share", "tokens", "success", "success_without")]
# Of mixtures: tests/roles/test_task_metrics.py, tests/roles/test_evaluator.py.
MIXTURES = ["eval/[^/]+/exact", *(f"task/[^/]+/{name}" for name in ("groups", "reward", "success", "mean_length"))]
# Of runs with forms or examples: tests/roles/test_prompted_groups.py.
PROMPTING = [
    "prompts/mean_length",
    "prompts/examples",
    *(f"form/[^/]+/{name}" for name in ("groups", "reward", "success", "mean_length")),
]
# Row numbers of the task, which the recomputation does not know: tests/roles/test_summary.py.
NOT_RECOMPUTED = ("warnings", "replay/task_rows")
# The package computes in float32: log-probs are good to 1e-6, sums of some hundred terms of size 1 to 1e-7.
CLOSE = {"rtol": 1e-4, "atol": 3e-7}
EXACT = re.compile(
    r"step|phase|num_tokens|updates|groups/(?!eff).*|prompts/first.*|gate/.*|filter/.*|(kept|dropped)/rows|completions/.*|rollout/(steps|segments)|rewards/.*/(?!mean).*"
)


class Recording:
    """Inputs and samples of a run, for each row of metrics.jsonl in turn."""

    def __init__(self, seed: int = 0):
        self.rows: list[dict] = []
        self.rng = np.random.default_rng(seed)

    def install(self, patched):
        collector, jit_update, evaluate = train.Collector, build.jit_update, train.evaluate
        patched.setattr(train, "Collector", lambda *args: self.noisy(collector(*args)))
        patched.setattr(supervised, "noisy_rows", self.kept_rows(supervised.noisy_rows))
        patched.setattr(build, "jit_update", lambda *args, **how: self.watched(jit_update(*args, **how)))
        # A function that watches has nothing to compile.
        patched.setattr(CompiledAhead, "start", lambda self: None)

        def evaluated(run, params, *rest):
            if not self.rows:
                self.rows.append({"phase": "rl"})
            self.rows[-1]["evaluated"] = as_numpy(params)
            return evaluate(run, params, *rest)

        patched.setattr(train, "evaluate", evaluated)

    def kept_rows(self, noisy_rows):
        def kept(*args):
            found = noisy_rows(*args)
            self.rows.append({"phase": "warm_start", "learned": [(row.tokens, row.target) for row in found]})
            return found

        return kept

    def noisy(self, collect):
        """The sampler's log-probs are off by some 0.05: so its mismatch is a number that can be checked, and names its tokens."""

        def collected(policy, asked, rows, *rest):
            got = collect(policy, asked, rows, *rest)
            groups, rollouts = got.groups, got.groups.rollouts
            prompts = rollouts.prompts
            noise = np.where(rollouts.sampled, self.rng.normal(0, 0.05, rollouts.tokens.shape), 0).astype(np.float32)
            rollouts = rollouts.replace(behavior_logprobs=rollouts.behavior_logprobs + noise)
            of_group = len(groups.failure), len(groups.vote) // len(groups.failure)
            sampled_groups = oracle.SampledGroups(
                None, prompts.tokens, prompts.length, rollouts.tokens, rollouts.length, noise, rollouts.behavior_logprobs,
                np.moveaxis(groups.components.reshape(*of_group, -1), -1, 0), groups.failure, groups.failed_by,
                groups.vote.reshape(of_group),
            )  # fmt: skip
            if rows is collect.task.held_out:
                self.rows[-1]["answers"] = sampled_groups
            else:
                self.rows.append({"phase": "rl", "rollouts": sampled_groups, "updates": []})
            return got._replace(groups=groups.replace(rollouts=rollouts))

        return collected

    def watched(self, program):
        def update(state, batch, *rest):
            row, params = self.rows[-1], as_numpy(state.params)
            if row["phase"] == "warm_start":
                row["params"] = params
            else:
                learned = np.asarray(batch.behavior_logprobs)[np.asarray(batch.loss_mask)]
                row["updates"].append(updates.Update(params, learned))
            return program(state, batch, *rest)

        return update


def as_numpy(params):
    return jax.tree.map(lambda x: np.array(x), params)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """Runs by the name of their config: rows of metrics.jsonl, each with its inputs, samples and expected numbers. Run once."""
    # What a number means does not depend on how well its program was compiled, and this halves the time.
    jax.config.update("jax_disable_most_optimizations", True)

    @cache
    def recorded(name: str):
        directory, recording = tmp_path_factory.mktemp(name), Recording()
        (directory / "logged_graders.py").write_text(GRADERS)
        with pytest.MonkeyPatch.context() as patched:
            patched.syspath_prepend(str(directory))
            # One device: what several change is the business of other tests, and compiling for them takes longer.
            patched.setattr(jax, "device_count", lambda: 1)
            on_one = partial(blueprint.make_blueprint, devices=jax.devices()[:1])
            patched.setattr(blueprint, "make_blueprint", on_one)
            patched.setattr(train, "start_params", lambda of, key: make_params(of.model, of.train, sharpness=1.0))
            recording.install(patched)
            train.train(loading.validate(CONFIGS[name] | {"run_dir": str(directory / "run")}, name))
        logged = read_jsonl(directory / "run" / "metrics.jsonl")
        return list(zip(logged, recording.rows, expected(recording.rows, CONFIGS[name]), strict=True))

    yield recorded
    jax.config.update("jax_disable_most_optimizations", False)


def expected(rows: list[dict], cfg) -> list[tuple[dict, list]]:
    """For each row of metrics.jsonl: its numbers, and those of each of its updates."""
    found, earlier, num_tokens = [], [], 0
    first = next(row["updates"][0].params for row in rows if row.get("updates"))
    step = 0 if "rollouts" not in rows[0] and rows[0]["phase"] == "rl" else 1
    for row in rows:
        numbers, each = {"step": step, "phase": row["phase"]}, []
        if row["phase"] == "warm_start":
            numbers |= updates.of_warm_start(row["params"], *zip(*row["learned"], strict=True), cfg)
        if "rollouts" in row:
            row["rollouts"].params = row["updates"][0].params
            taken = updates.Step(row["rollouts"], row["updates"])
            of_updates, each = updates.of_step(taken, earlier, first, cfg)
            numbers |= oracle.of_rollouts(row["rollouts"], cfg) | of_updates
            kept = updates.kept_groups(row["rollouts"], cfg)
            numbers |= oracle.of_stages(row["rollouts"], kept, [one.rollouts for one in earlier], cfg)
            num_tokens += numbers["completions/tokens"]
            numbers |= {"num_tokens": num_tokens, "prompts/first_uid": len(earlier) * cfg["rollout"]["prompts"]}
            earlier.append(taken)
        if "answers" in row:
            row["answers"].params = row["evaluated"]
            numbers |= oracle.of_evaluation(row["evaluated"], row["answers"], cfg)
        found.append((numbers, each))
        step += 1
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_logged_number_follows_its_definition(recorded, name):
    for row, _, (want, _) in recorded(name):
        got = {key: value for key, value in row.items() if not MEASURED.fullmatch(key) and key not in NOT_RECOMPUTED}
        # Nothing else goes wrong in these runs.
        assert ("warnings" in row) == ("eval/left_out" in want and "eval/pass@1" not in want)
        assert got.keys() == want.keys()
        assert {key: (value, want[key]) for key, value in got.items() if not agrees(key, value, want[key])} == {}


def agrees(name: str, got, want) -> bool:
    if EXACT.fullmatch(name):
        return got == want
    if isinstance(want, tuple):
        return want[0] <= got <= want[1]
    return got is not None and bool(np.isclose(got, want, **CLOSE))


@pytest.mark.slow
def test_the_runs_contain_the_cases_they_are_meant_for(recorded):
    """Otherwise the test above would not cover them."""
    warm, *steps = recorded("grpo")
    assert warm[0]["phase"] == "warm_start" and {"eval/exact", "eval/pass@1"} <= warm[0].keys()
    for row, _, (_, each) in steps:
        assert 0 < row["groups/kept"] < row["groups/graded"], "groups with equal rewards"
        assert 0 < row["updates"] < len(each) == 8 and None in each, "minibatches without a token"
    assert steps[0][0]["rewards/mixed/raised"] > 0
    assert all(0 < steps[0][0][name] < 1 for name in ("clip_ratio/low", "clip_ratio/high", "mismatch/dropped"))

    before, fresh, old = (row for row, *_ in recorded("ppo"))
    assert before["step"] == 0 and before["eval/mismatch_kl"] > 1e-4 < fresh["mismatch/kl"], "the sampler is off"
    assert all(0 < fresh[name] < 1 for name in ("clip_ratio/low", "sampling/support_overflow", "mismatch/truncated"))
    assert fresh["rewards/steps"] > 1.1
    assert old["groups/replayed"] > 0 and not any(name.startswith("mismatch/") for name in old)

    _, some, nothing = (row for row, *_ in recorded("dpo"))
    gone = {"reward", "reward_std", "rewards/late/mean", "loss", "entropy", "dpo/margin", "ratio/max", "mismatch/kl"}
    assert gone <= some.keys() and not gone & nothing.keys(), "no group was graded"


@pytest.mark.slow
def test_a_minibatch_without_a_token_changes_no_parameter(recorded):
    for _, read, (_, each) in recorded("grpo")[1:]:
        after = [update.params for update in read["updates"]][1:]
        for update, numbers, params in zip(read["updates"], each, after, strict=False):
            same = jax.tree.map(np.array_equal, update.params, params)
            assert all(jax.tree.leaves(same)) == (numbers is None)


@pytest.mark.slow
def test_mutants_with_means_over_empty_updates(recorded):
    """Earlier bugs, applied to the numbers of the same runs, differ from the logged values."""
    for row, _, (_, each) in recorded("grpo")[1:]:
        some = [numbers for numbers in each if numbers]
        for name in ("loss", "grad_norm"):
            assert agrees(name, row[name], np.mean([n.whole[name] for n in some]))
            empty_as_zero = np.mean([n.whole[name] if n else 0.0 for n in each])
            assert not agrees(name, row[name], empty_as_zero)
        for name in ("ratio/mean", "entropy", "kl", "clip_ratio/low"):
            empty_as_zero = np.mean([n.tokens[name].mean() if n else 0.0 for n in each])
            updates_alike = np.mean([n.tokens[name].mean() for n in some])
            assert not agrees(name, row[name], empty_as_zero) and not agrees(name, row[name], updates_alike)
    row, read, _ = recorded("ppo")[-1]
    answers, k = read["answers"], PPO["rollout"]["samples"]
    allowed, _ = oracle.nucleus(answers, PPO)
    d = oracle.score(read["evaluated"], oracle.rows_of_rollouts(answers), PPO, allowed)[0] - answers.behavior
    # Five held-out prompts in a batch of eight: three were counted twice.
    twice = [(np.exp(x) - 1 - x)[: answers.length[b]] for b, x in enumerate(d) for _ in range(1 + (b < 3 * k))]
    assert not agrees("eval/mismatch_kl", row["eval/mismatch_kl"], np.concatenate(twice).mean())


def defined() -> list[str]:
    """Names in the table of docs/update.md, as patterns: `rewards/<grader>/mean` is one for any grader."""
    text = (Path(__file__).parents[1] / "docs" / "update.md").read_text().partition("## What is logged")[2]
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    return [re.sub(r"<\w+>", r"[^/]+", name) for cell in cells for name in re.findall("`([^`]+)`", cell)]


@pytest.mark.slow
def test_the_logged_numbers_are_those_defined_in_the_docs(recorded):
    logged = {key for name in CONFIGS for row, *_ in recorded(name) for key in row}
    assert {key for key in logged if not any(re.fullmatch(pattern, key) for pattern in defined())} == set()
    # The maker of this chip states no peak. Rows that join: tests/experience/test_joining.py. Forced tokens:
    # tests/test_controlled_run.py.
    unseen = {"update/mfu", *REFILL, *CHOICE, *HINTS, *MIXTURES, *PROMPTING, "replay/rows", "control/forced_share"}
    assert {pattern for pattern in defined() if not any(re.fullmatch(pattern, key) for key in logged)} == unseen
