"""Budgets of thinking: accuracy against tokens of thinking, cut by a budget, extended by waits, and after RL under a budget.

    python -m experiments.thinking_budgets              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.thinking_budgets --report     # the plot and the tables alone

The last digit of a sum of four or five digits: for `<3+4+5+2>` the thinking is `724`, the last digits of the sums so far, and
the response `724|4#`. Three in ten responses of the warm start stop thinking too early, so that the policy has answered behind
every length; some have a space, which is what a wait forces.
"""

import argparse
import dataclasses
import itertools
import json
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from experiments.arithmetic import SETUP, changes_of, digest, warm_start
from experiments.report import spread
from experiments.results_file import DIRECTORY, complete, read
from jaxrl_llm.config.run_config import RunConfig, to_dict
from jaxrl_llm.control.config import BudgetControl, Control, NoControl, RegexControl
from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.experience.config import ExperienceConfig, Signal
from jaxrl_llm.model import params as model_params
from jaxrl_llm.parallel import hosts
from jaxrl_llm.roles.start_or_restore import start_rl
from jaxrl_llm.tasks.config import CharacterTokenizer, FileTask
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.train import Run, first_policy, open_run, step
from jaxrl_llm.types import Policy
from jaxrl_llm.update.config import WarmStartConfig
from jaxrl_llm.update.optimizer.config import AdamW

RESULTS = DIRECTORY / "thinking_budgets.json"
SEEDS = (0, 1, 2)
TERMS, ROWS, HELD_OUT = (4, 5), 20_000, 500
CUT, SPACE = 0.3, 0.2
"""Shares of the responses of the warm start that stop too early, and that have a space."""
MOST = 7
"""Thinking of at most so many tokens: four digits, and three spaces."""
ANSWER = RegexControl(pattern="[0-9]#")
BUDGETS = (1, 2, 3, 4, MOST)
WAITS = (1, 2, 3)


def under(tokens: int, waits: int = 0) -> BudgetControl:
    return BudgetControl(tokens=tokens, close="|", waits=waits, wait=" ", then=ANSWER)


MEASURED: dict[str, Control] = {
    "free": NoControl(),
    **{f"budget {tokens}": under(tokens) for tokens in BUDGETS},
    **{f"{waits} waits": under(MOST, waits) for waits in WAITS},
}
"""Controls of the evaluations. A budget of `MOST` cuts next to nothing, as do those with waits."""
POOL = Path("runs") / "last_digits.jsonl"
START = dataclasses.replace(
    SETUP,
    steps=60,
    task=FileTask(str(POOL), held_out=HELD_OUT, response="{response}"),
    tokenizer=CharacterTokenizer("0123456789+<>| #"),
    model=dataclasses.replace(SETUP.model, vocab_size=17),
    warm_start=WarmStartConfig(
        steps=1500,
        rows=128,
        optimizer=AdamW(lr=2e-3, warmup_steps=20, decay_steps=1480, final_lr=2e-4, weight_decay=0.1),
    ),
    reward=RewardConfig((GraderConfig("regex", options={"pattern": "[0-9]", "after": "|"}),)),
    rollout=dataclasses.replace(SETUP.rollout, max_new_tokens=MOST + 3),
    experience=ExperienceConfig(filter=Signal()),
)
ARMS = {
    name: dataclasses.replace(START, rollout=dataclasses.replace(START.rollout, control=control))
    for name, control in {
        "free": NoControl(),
        "budget 2": under(2),
        "budget 3": under(3),
        "2 waits": under(MOST, 2),
    }.items()
}
"""RL by control."""


def write_pool() -> None:
    """Write the task's file: equally many sums of each number of terms, none of them twice."""
    rng, rows = np.random.default_rng(0), {}
    while len(rows) < ROWS:
        digits = rng.integers(0, 10, TERMS[len(rows) % len(TERMS)]).tolist()
        sums = "".join(str(total % 10) for total in itertools.accumulate(digits))[1:]
        thinking = sums[: rng.integers(0, len(sums)) if rng.random() < CUT else None]
        if rng.random() < SPACE:
            at = rng.integers(0, len(thinking) + 1)
            thinking = f"{thinking[:at]} {thinking[at:]}"
        prompt = f"<{'+'.join(map(str, digits))}>"
        rows.setdefault(prompt, {"prompt": prompt, "answer": sums[-1], "response": f"{thinking}|{sums[-1]}"})
    POOL.parent.mkdir(exist_ok=True)
    POOL.write_text("".join(f"{json.dumps(row)}\n" for row in rows.values()))


def run_seed(seed: int) -> list[dict]:
    """Return the runs of all arms, from one warm start; the first has RL of no steps."""
    warm = warm_start(dataclasses.replace(START, seed=seed))
    arms = {"warm start": dataclasses.replace(START, steps=0), **ARMS}
    return [{"arm": name, **run_arm(dataclasses.replace(cfg, seed=seed), warm)} for name, cfg in arms.items()]


def run_arm(cfg: RunConfig, warm: dict) -> dict:
    """Train one arm, and measure it under each control. `warm`: parameters after the warm start."""
    # A run has steps, and this one may have none.
    opened = dataclasses.replace(cfg, steps=max(cfg.steps, 1))
    with (
        tempfile.TemporaryDirectory() as run_dir,
        open_run(
            dataclasses.replace(opened, run_dir=run_dir), must_resume=False, given=None, ends_process=False
        ) as run,
    ):
        shardings = model_params.shardings(run.blueprint.specs, run.blueprint.train)
        params = hosts.put(jax.tree.map(np.array, warm), shardings)
        state = start_rl(run.blueprint, run.learner, run.source.state, params, run.keys.train)
        start, policy = digest(state.train.params), first_policy(run, state.train)
        for _ in range(cfg.steps):
            done = step(run.learner, run.source, state, policy, np.random.default_rng((cfg.seed, int(state.step))))
            state, policy = done.state, done.policy
        measured = {name: measure(run, policy, control) for name, control in MEASURED.items()}
        return {"start": start, "changes": changes_of(cfg), "measured": measured}


def measure(run: Run, policy: Policy, control: Control) -> dict[str, float]:
    """Share of right answers to the held-out prompts, 8 samples of each, and tokens of thinking and in all, means per response."""
    task, engine = run.evaluator.task, run.evaluator.collect.engine
    places = np.arange(len(task.held_out))
    controls = engine.controls(len(places), control=control)
    rollouts = engine.generate(policy, make_prompts(task, task.held_out, places, places), run.evaluator.key, controls)
    rows = rollouts.prompt >= 0
    texts = np.array(task.decode(rollouts.tokens, rollouts.length))[rows]
    answers = [task.held_out[prompt].answer for prompt in rollouts.prompt[rows]]
    right = [re.search(r"\|([0-9])#?$", text) for text in texts]
    return {
        "right": float(np.mean([m is not None and m[1] == a for m, a in zip(right, answers, strict=True)])),
        "thinking": float(np.mean([len(text.partition("|")[0]) for text in texts])),
        "tokens": float(rollouts.length[rows].mean()),
    }


def table(runs: Sequence[dict], names: Sequence[str]) -> str:
    """Markdown table with a row per arm and a column per control: accuracy, and tokens of thinking in parentheses."""
    lines = [f"| trained | {' | '.join(names)} |", "|---|" + "---|" * len(names)]
    for arm in dict.fromkeys(run["arm"] for run in runs):
        of = [[run["measured"][name] for run in runs if run["arm"] == arm] for name in names]
        cells = [f"{spread([m['right'] for m in some])} ({np.mean([m['thinking'] for m in some]):.1f})" for some in of]
        lines.append(f"| {arm} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(path: Path, runs: Sequence[dict]) -> None:
    """Accuracy over tokens of thinking: one panel cut by budgets, the other extended by waits. Thin lines are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        "cut by a budget": [f"budget {n}" for n in BUDGETS],
        "extended by waits": [f"budget {MOST}", *(f"{n} waits" for n in WAITS)],
    }
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    for axis, (title, names) in zip(axes, panels.items(), strict=True):
        for arm, color in zip(arms, plt.get_cmap("viridis")(np.linspace(0, 0.9, len(arms))), strict=True):
            points = np.array([
                [[run["measured"][name][of] for of in ("thinking", "right")] for name in names]
                for run in runs if run["arm"] == arm
            ])  # fmt: skip
            for line in points:
                axis.plot(*line.T, color=color, lw=0.6, alpha=0.35)
            axis.plot(*points.mean(0).T, "o-", color=color, lw=2, ms=3, label=arm)
        axis.set_title(title, loc="left")
        axis.set_xlabel("tokens of thinking, mean")
    axes[0].set_ylabel("right answers")
    axes[1].legend(frameon=False, title="trained")
    figure.savefig(path, dpi=90, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="no runs: the plot and the tables from the results file")
    if not parser.parse_args().report:
        write_pool()
        settings = {"start": to_dict(START), "rows": ROWS, "cut": CUT, "space": SPACE}
        complete(RESULTS, settings, SEEDS, lambda run: run["seed"], lambda seed: {"seed": seed, "arms": run_seed(seed)})
    runs = [{"seed": run["seed"], **arm} for run in read(RESULTS) for arm in run["arms"]]
    print(
        table(runs, ["free", *(f"budget {n}" for n in BUDGETS)]),
        table(runs, [f"budget {MOST}", *(f"{n} waits" for n in WAITS)]),
        sep="\n\n",
    )
    plot(RESULTS.with_suffix(".png"), runs)


if __name__ == "__main__":
    main()
