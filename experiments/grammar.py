"""A grammar in RL: sampled under it and scored over what it allowed, or scored over the whole vocabulary.

    python -m experiments.grammar              # the runs that the results file lacks, then the plot and the tables
    python -m experiments.grammar --report     # the plot and the tables alone

The grammar is a number of one or two digits and the end token, as all right responses are. After the usual warm start nearly all
responses follow it anyway; after the other one, nine of ten have a character that it forbids.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments import report
from experiments.arithmetic import HELD_OUT, SETUP, Arm, runs_of
from experiments.ratios import METRICS, with_ratios
from experiments.results_file import DIRECTORY
from jaxrl_llm.config.run_config import RunConfig
from jaxrl_llm.control.config import Control, NoControl, RegexControl
from jaxrl_llm.objective.loss_config import NoCorrection, PolicyGradient, TruncatedImportance
from jaxrl_llm.roles import build
from jaxrl_llm.roles.evaluator import Evaluator
from jaxrl_llm.tasks.config import ArithmeticTask, FileTask
from jaxrl_llm.train import Run
from jaxrl_llm.types import Groups, PyTree

RESULTS = DIRECTORY / "grammar.json"
STEPS, SAMPLES, WRONG_FORM, COUNTED = 100, 25_600, 9, 32
"""WRONG_FORM: responses of a wrong form for each other one. COUNTED: prompts over which the share of valid responses is exact."""
GRAMMAR = RegexControl(pattern="(0|[1-9][0-9]?)#")
VALID = [f"{number}#" for number in range(100)]


class Sums(NamedTuple):
    """Sums of three digits in files: those to train on, those held out, and responses of a wrong form."""

    directory: Path = Path("runs/grammar")

    def task(self, train: str) -> FileTask:
        held_out = str(self.directory / "held_out.jsonl")
        return FileTask(str(self.directory / f"{train}.jsonl"), held_out_path=held_out, response="{response}")

    def write(self) -> None:
        rng = np.random.default_rng(0)
        sums = [f"{number:03d}" for number in rng.permutation(1000)]
        right = [(ArithmeticTask.prompt(digits), str(sum(map(int, digits)))) for digits in sums]
        wrong = [(prompt, wrong_form(total, rng)) for prompt, total in right[HELD_OUT:] for _ in range(WRONG_FORM)]
        self.directory.mkdir(parents=True, exist_ok=True)
        for name, rows in {
            "held_out": right[:HELD_OUT],
            "right": right[HELD_OUT:],
            "mixed": [(right[HELD_OUT:] + wrong)[i] for i in rng.permutation((1000 - HELD_OUT) * (1 + WRONG_FORM))],
        }.items():
            lines = [json.dumps({"prompt": p, "answer": f"{r}#", "response": r}) + "\n" for p, r in rows]
            (self.directory / f"{name}.jsonl").write_text("".join(lines))


def wrong_form(total: str, rng: np.random.Generator) -> str:
    """Return a number with a character that the grammar forbids, before or behind it."""
    character = rng.choice(list("+<> "))
    return f"{character}{total}" if rng.random() < 0.5 else f"{total}{character}"


def scored_without(run: Run) -> Run:
    """Return the run whose scores and losses are over the whole vocabulary: entry 0 of `control_state` allows every token."""

    def free(groups: Groups) -> Groups:
        rollouts = groups.rollouts
        return groups.replace(rollouts=rollouts.replace(control_state=np.zeros_like(rollouts.control_state)))

    score, update = run.learner.score, run.learner.update
    learner = run.learner._replace(
        score=lambda state, groups: score(state, free(groups)),
        update=lambda state, experience, rng: update(state, experience._replace(groups=free(experience.groups)), rng),
    )
    return run._replace(learner=learner)


def evaluator_under(run: Run, control: Control, at_once: int) -> Evaluator:
    """Return an evaluator whose exact probabilities are those under a control, of so many prompts at once."""
    cfg = run.blueprint.cfg
    rollout = replace(cfg.rollout, control=control, prompts=at_once)
    blueprint = replace(run.blueprint, cfg=replace(cfg, rollout=rollout))
    return build.make_evaluator(blueprint, run.task, run.evaluator.collect, None, run.keys.evaluation)


def measures(run: Run) -> Callable[[PyTree], dict[str, float]]:
    """Make the function that returns a policy's exact accuracy with and without the grammar, and the probability of valid responses
    without it."""
    under, free = (evaluator_under(run, control, HELD_OUT) for control in (GRAMMAR, NoControl()))
    every = evaluator_under(run, NoControl(), COUNTED * len(VALID))
    targets = [np.array(run.task.tokenizer.encode(text), np.int32) for text in VALID]
    rows = [replace(row, target=target) for row in run.task.held_out[:COUNTED] for target in targets]
    groups = every.right(rows).groups

    def measure(params: PyTree) -> dict[str, float]:
        valid = np.exp(every.score_right(params, groups).logprobs.sum(axis=1)).sum() / COUNTED
        exact = {"with": under.probabilities(params).mean(), "without": free.probabilities(params).mean()}
        return {name: float(x) for name, x in (exact | {"valid": valid}).items()}

    return measure


def config(control: Control, loss: PolicyGradient) -> RunConfig:
    return replace(
        SETUP,
        steps=STEPS,
        task=SUMS.task("right"),
        rollout=replace(SETUP.rollout, control=control),
        objective=replace(SETUP.objective, loss=loss),
    )


SUMS = Sums()
AS_SAMPLED = PolicyGradient(correction=NoCorrection())
LOSSES = {
    "no grammar": (NoControl(), AS_SAMPLED, with_ratios),
    "grammar": (GRAMMAR, AS_SAMPLED, with_ratios),
    "without mask": (GRAMMAR, AS_SAMPLED, lambda run: scored_without(with_ratios(run))),
    "without mask, recomputed": (
        GRAMMAR,
        PolicyGradient(correction=NoCorrection(), anchor="proximal"),
        lambda run: scored_without(with_ratios(run)),
    ),
    "without mask, truncated": (
        GRAMMAR,
        PolicyGradient(correction=TruncatedImportance()),
        lambda run: scored_without(with_ratios(run)),
    ),
}
"""Control, loss and change of the run. The first three compare with the log-probs captured while sampling."""
STARTS = {"usual start": "right", "wrong forms": "mixed"}
ARMS = {
    f"{name}, {start}": Arm(
        config(control, loss),
        change,
        replace(config(NoControl(), AS_SAMPLED), task=SUMS.task(file)),
        METRICS,
        measures,
    )
    for start, file in STARTS.items()
    for name, (control, loss, change) in list(LOSSES.items())[: 3 if file == "right" else None]
}
PANELS = {start: [name for name in ARMS if name.endswith(start)] for start in STARTS}
COLUMNS = {
    "with": "exact accuracy with the grammar",
    "without": "exact accuracy without it",
    "valid": "valid responses without it",
}


def tables(runs: list[dict]) -> str:
    seen = {"with": "with the grammar", "without": "without it", "valid": "valid without it"}
    of_steps = {
        "fresh/ratio": "mean r, fresh", "fresh/max": "largest r, fresh", "ratio/mean": "mean r",
        "clipped/negative": "clipped, A < 0", "clipped/positive": "clipped, A > 0", "mismatch/kl": "KL",
        "entropy": "entropy", "grad_norm": "gradient norm",
    }  # fmt: skip
    return f"{report.late_table(runs, list(ARMS), seen)}\n\n{report.mean_table(runs, list(ARMS), of_steps)}"


if __name__ == "__main__":
    found = runs_of(__doc__, RESULTS, ARMS, pools=[SUMS])
    print(tables(found))
    report.plot_columns(RESULTS.with_suffix(".png"), found, PANELS, COLUMNS)
