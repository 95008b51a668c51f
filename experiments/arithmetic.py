"""The small set-up of the experiments in RL: sums of three digits, a transformer of 75,000 parameters, a noisy warm start.

An experiment is a table of arms. An arm is a config, and perhaps a stage in place of the run's own; it is trained with each seed by
the library's own loop. The arms of a seed have the held-out prompts, the warm start, the stream of prompts and all random keys in
common. Evaluation is exact: `eval/exact` is the mean probability of the right response, teacher-forced.
"""

import argparse
import dataclasses
import hashlib
import itertools
import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from experiments import report, results_file
from jaxrl_llm.checkpoint.config import CheckpointConfig
from jaxrl_llm.config.run_config import RunConfig, to_dict
from jaxrl_llm.metrics.config import MetricsConfig
from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.group_estimators import Rloo
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.start_or_restore import start_rl
from jaxrl_llm.roles.state import RunState
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask
from jaxrl_llm.train import Run, Step, first_policy, open_run, step, supervise
from jaxrl_llm.types import PyTree
from jaxrl_llm.update.config import UpdateConfig, WarmStartConfig
from jaxrl_llm.update.optimizer.config import AdamW

SEEDS = (0, 1, 2)
EVERY = 10
"""Steps between records."""
NEVER = 10**9
HELD_OUT = 128

SETUP = RunConfig(
    steps=100,
    task=ArithmeticTask(terms=3, held_out=HELD_OUT),
    model=ModelConfig(vocab_size=16, layers=2, d_model=64, heads=4, kv_heads=2, head_dim=16, d_mlp=128),
    warm_start=WarmStartConfig(
        steps=500, rows=128, noise=0.56, optimizer=AdamW(lr=2e-3, warmup_steps=20, weight_decay=0.1)
    ),
    rollout=RolloutConfig(prompts=32, samples=8, max_new_tokens=4),
    objective=ObjectiveConfig(advantage=Rloo()),
    update=UpdateConfig(epochs=2, minibatches=2, optimizer=AdamW(lr=3e-4)),
    checkpoint=CheckpointConfig(every=NEVER),
    metrics=MetricsConfig(console_every=NEVER, samples_every=0, rollouts_every=0, tensorboard=False),
)
"""Everything that an arm does not change. The loss clips at 0.2 on both sides and has no KL term: its defaults."""


class Pool(NamedTuple):
    """Prompts that are not all sums of three digits, in a file."""

    name: str
    """Name of the file."""
    terms: tuple[int, ...]
    """Numbers of digits, equally many sums of each."""
    rows: int
    """HELD_OUT of them are held out."""

    @property
    def path(self) -> Path:
        return Path("runs") / f"{self.name}.jsonl"

    @property
    def task(self) -> FileTask:
        return FileTask(str(self.path), held_out=HELD_OUT, response="{sum}")

    def write(self) -> None:
        """Write the file, in random order."""
        rng, each = np.random.default_rng(0), self.rows // len(self.terms)
        digits = [d for n in self.terms for d in rng.permutation(list(itertools.product(range(10), repeat=n)))[:each]]
        prompts = [(ArithmeticTask.prompt([str(x) for x in d]), str(sum(d))) for d in digits]
        rows = [
            {"prompt": prompt, "answer": f"{total}#", "sum": total, "digits": len(d)}
            for d, (prompt, total) in zip(digits, prompts, strict=True)
        ]
        self.path.parent.mkdir(exist_ok=True)
        self.path.write_text("".join(f"{json.dumps(rows[i])}\n" for i in rng.permutation(len(rows))))


def unchanged(run: Run) -> Run:
    return run


def nothing_more(run: Run) -> Callable[[PyTree], dict[str, float]]:
    return lambda params: {}


class Arm(NamedTuple):
    cfg: RunConfig
    """SETUP with the arm's changes. Its seed and its run directory are set when it runs."""
    change: Callable[[Run], Run] = unchanged
    """Replaces a stage, for what no config value expresses."""
    warm: RunConfig | None = None
    """Config of the warm start, if that is another."""
    metrics: tuple[str, ...] = ()
    """Metrics of the updates to record, each as the mean of the steps since the last record; of a name in /max the largest."""
    measures: Callable[[Run], Callable[[PyTree], dict[str, float]]] = nothing_more
    """Makes a function of the parameters, for an open run, whose numbers are recorded too."""


class Record(NamedTuple):
    """A run after a step. Counts and times are sums from the start of RL."""

    step: int
    samples: int
    """Rows generated, all attempts."""
    tokens: int
    """Completion tokens generated."""
    groups_kept: int
    """Groups that the filter left to train on."""
    seconds: float
    """Wall clock of the steps, without evaluations. The first step, which compiles, counts as the median of the others."""
    cpu_seconds: float
    """As `seconds`, over all threads."""
    exact: float
    """`eval/exact`."""


def command(
    doc: str,
    path: Path,
    arms: Mapping[str, Arm],
    tables: Callable[[list[dict]], str],
    panels: Mapping[str, Sequence[str]],
    seeds: Sequence[int] = SEEDS,
    pools: Sequence[Pool] = (),
) -> None:
    """The command of an experiment: train its arms, print its tables and write the plot beside the results file.

    Args:
        doc, path, arms, seeds, pools: as in `runs_of`.
        tables: returns the tables of the runs of the file.
        panels: of the plot, as in `report.plot`.
    """
    runs = runs_of(doc, path, arms, seeds, pools)
    print(tables(runs))
    report.plot(path.with_suffix(".png"), runs, panels)


def runs_of(
    doc: str, path: Path, arms: Mapping[str, Arm], seeds: Sequence[int] = SEEDS, pools: Sequence[Pool] = ()
) -> list[dict]:
    """Train the arms, unless the command line has --report, and return the runs of the results file.

    Args:
        doc: of the module; its first line is the help.
        path: of the results file.
        arms: by name.
        seeds: of the runs.
        pools: prompts of the arms, whose files are written before the runs.
    """
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the plot and the tables from the results file")
    if not parser.parse_args().report:
        for pool in pools:
            pool.write()
        train_arms(path, arms, seeds)
    return results_file.read(path)


def train_arms(path: Path, arms: Mapping[str, Arm], seeds: Sequence[int] = SEEDS, every: int = EVERY) -> None:
    """Run every arm with every seed, except the runs that the results file has.

    Args:
        path: of the results file.
        arms: by name.
        seeds: of the runs.
        every: steps between records.

    Raises:
        SystemExit: a run in the file was made with another config.
    """
    changes = {name: changes_of(arm.cfg) for name, arm in arms.items()}
    for stored in results_file.read(path):
        if stored["changes"] != changes.get(stored["arm"], stored["changes"]):
            raise SystemExit(
                f"{path}: got a run of {stored['arm']!r}, seed {stored['seed']}, with {stored['changes']}; want "
                f"{changes[stored['arm']]}: remove the run from the file, or give the arm another name"
            )
    warm: dict[str, PyTree] = {}

    def run(case: tuple[str, int]) -> dict:
        name, seed = case
        cfg = dataclasses.replace(arms[name].cfg, seed=seed)
        before = dataclasses.replace(arms[name].warm or cfg, seed=seed)
        start = repr((seed, before.task, before.model, before.warm_start))
        if start not in warm:
            warm[start] = warm_start(before)
        found = run_arm(arms[name]._replace(cfg=cfg), warm[start], every)
        last = found["records"][-1]
        print(f"{time.strftime('%X')} {name}, seed {seed}: {last}", flush=True)
        return {"arm": name, "seed": seed, "changes": changes[name], **found}

    settings = {"setup": to_dict(SETUP), "every": every}
    cases = [(name, seed) for seed in seeds for name in arms]
    results_file.complete(path, settings, cases, lambda run: (run["arm"], run["seed"]), run)


def changes_of(cfg: RunConfig) -> dict[str, Any]:
    """Return the values that an arm changes, by path, as JSON stores them."""
    mine, setup = flat(to_dict(cfg)), flat(to_dict(SETUP))
    return json.loads(json.dumps({path: value for path, value in mine.items() if value != setup.get(path)}))


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {path: value for name in tree for path, value in flat(tree[name], f"{prefix}.{name}".strip(".")).items()}


def warm_start(cfg: RunConfig) -> PyTree:
    """Return the parameters, as NumPy arrays, from which all arms of a seed start."""
    with (
        tempfile.TemporaryDirectory() as run_dir,
        open_run(dataclasses.replace(cfg, run_dir=run_dir), must_resume=False, given=None, ends_process=False) as run,
    ):
        state, metrics = supervise(run, None)
        print(f"seed {cfg.seed}: warm start, loss {metrics['loss']:.3f}", flush=True)
        return jax.device_get(state.train.params)


def run_arm(arm: Arm, warm: PyTree, every: int) -> dict[str, Any]:
    """Train one arm with the seed of its config.

    Args:
        arm: its `cfg.steps` are the steps of RL.
        warm: parameters after the warm start.
        every: steps between records.

    Returns:
        `start`, a digest of the parameters before RL; `first_rows`, the task's rows of the first prompts; `records`.
    """
    with (
        tempfile.TemporaryDirectory() as run_dir,
        open_run(dataclasses.replace(arm.cfg, run_dir=run_dir), must_resume=False, given=None, ends_process=False) as run,
    ):  # fmt: skip
        run = arm.change(run)
        shardings = model_params.shardings(run.blueprint.specs, run.blueprint.train)
        # A copy, since the run donates its parameters.
        params = hosts.put(jax.tree.map(np.array, warm), shardings)
        state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
        return {"start": digest(state.train.params), **learn(run, state, every, arm)}


def learn(run: Run, state: RunState, every: int, arm: Arm) -> dict[str, Any]:
    """The loop of `jaxrl_llm.train.train`, with records in place of metrics."""
    cfg, policy, measures = run.blueprint.cfg, first_policy(run, state.train), arm.measures(run)
    exact, spent, first_rows = {0: exact_accuracy(run, state.train.params)}, [], []
    more, since = {0: measures(state.train.params)}, []
    for number in range(1, cfg.steps + 1):
        begun, used = time.perf_counter(), time.process_time()
        rng = np.random.default_rng((cfg.seed, int(state.step)))
        done = step(run.learner, run.source, state, policy, rng)
        state, policy = done.state, jax.block_until_ready(done.policy)
        spent.append((*drawn(run, done), time.perf_counter() - begun, time.process_time() - used))
        first_rows = first_rows or done.fresh.rollouts.prompts.row[:8].tolist()
        since.append(done.learned.metrics)
        if number % every == 0 or number == cfg.steps:
            exact[number] = exact_accuracy(run, state.train.params)
            more[number] = measures(state.train.params) | over_steps(since, arm.metrics)
            since = []
    records = [record._asdict() | rounded(more[record.step]) for record in to_records(exact, spent)]
    return {"first_rows": first_rows, "records": records}


def over_steps(metrics: Sequence[Mapping[str, float]], names: Sequence[str]) -> dict[str, float]:
    """Return the means of metrics over steps, of a name in /max the largest; without those that no step had."""
    each = {name: [step[name] for step in metrics if name in step] for name in names}
    return {
        name: float(np.max(x) if name.endswith("/max") else np.mean(x))
        for name, x in each.items()
        if len(x) and np.isfinite(x).all()
    }


def rounded(values: Mapping[str, float]) -> dict[str, float]:
    """Return the values with five significant digits."""
    return {name: float(f"{value:.5g}") for name, value in values.items()}


def exact_accuracy(run: Run, params: PyTree) -> float:
    """`eval/exact` alone; the evaluator also samples responses."""
    return float(run.evaluator.probabilities(params).mean())


def drawn(run: Run, done: Step) -> tuple[int, int, int]:
    """Rows and completion tokens generated for a step, all attempts, and groups kept."""
    rows = np.count_nonzero(run.source.last.groups.rollouts.prompt >= 0)
    return rows, run.source.last.stats.tokens, np.count_nonzero(done.fresh.kept)


def to_records(exact: dict[int, float], spent: list[tuple[float, ...]]) -> list[Record]:
    """Return the records of the steps in `exact`. `spent`: per step rows, tokens, groups kept, seconds, seconds of CPU."""
    each = np.array(spent, float)
    if len(each) > 1:
        each[0, 3:] = np.median(each[1:, 3:], axis=0)
    total = np.vstack([np.zeros(5), np.cumsum(each, axis=0)])
    return [
        Record(n, *(int(x) for x in total[n, :3]), *(round(float(x), 3) for x in total[n, 3:]), round(exact[n], 6))
        for n in exact
    ]


def digest(params: PyTree) -> str:
    """Return 16 hex digits, equal for parameters that are equal to the bit."""
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(params))).hexdigest()[:16]
