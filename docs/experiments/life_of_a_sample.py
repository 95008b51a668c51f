"""The life of a sample: one response from the data set to the gradient, with its real values at each stage.

    python docs/experiments/life_of_a_sample.py            # half a minute; writes the tables into docs/architecture.md

A tiny model takes a few supervised steps, so that some of its responses are right; then the script takes one RL step with the
functions that `train.step` calls. `tests/test_architecture_page.py` compares the page with what this script prints.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrl_llm import train
from jaxrl_llm.config import loading
from jaxrl_llm.types import Batch, Experience, Finish, Groups, Rollouts
from jaxrl_llm.update.batch import fill_batch

PAGE = Path(__file__).parents[1] / "architecture.md"
BEGIN, END = "<!-- life of a sample: begin -->", "<!-- life of a sample: end -->"
CONFIG = {
    "seed": 3,
    "steps": 1,
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 4},
    "model": {"vocab_size": 16, "layers": 2, "d_model": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 64},
    "mesh": {"data": 1, "fsdp": 1, "tensor": 1},
    "warm_start": {"steps": 60, "rows": 64, "noise": 0.5, "optimizer": {"lr": 5.0e-3}},
    "rollout": {"prompts": 4, "samples": 4, "max_new_tokens": 4},
    "reward": {"grader": "exact_match"},
    "objective": {"loss": {"kl": {"weight": 0.01}}},
    "update": {"packing": {"kind": "shared_prefix"}},
    "metrics": {"tensorboard": False, "console_every": 1000},
}


def shown(value: Any) -> str:
    """Cell of a table for a value: four decimal places, flags as 0 and 1."""
    array = np.asarray(value)
    if array.ndim:
        return " ".join(shown(x) for x in array)
    if array.dtype == np.bool_:
        return str(int(array))
    # + 0.0: no minus sign before a number that is 0 in four digits.
    return f"{round(array.item(), 4) + 0.0:.4f}" if array.dtype.kind == "f" else str(array.item())


def station(title: str, where: str, values: Mapping[str, Any]) -> str:
    rows = "\n".join(
        f"| `{name}` | `{value if isinstance(value, str) else shown(value)}` |" for name, value in values.items()
    )
    return f"**{title}** ({where})\n\n| value | of this sample |\n|---|---|\n{rows}\n"


def of_row(rollouts: Rollouts, b: int) -> dict[str, Any]:
    names = ("tokens", "sampled", "behavior_logprobs", "entropy", "version", "length")
    return {name: getattr(rollouts, name)[b] for name in names} | {"finish": Finish(rollouts.finish[b]).name}


def in_batch(batch: Batch, r: int) -> dict[str, Any]:
    names = (
        "tokens",
        "position",
        "segment",
        "until",
        "before",
        "loss_mask",
        "weight",
        "behavior_logprobs",
        "advantage",
    )
    used = int(np.max(np.nonzero(batch.group[r])[0])) + 1
    return {name: getattr(batch, name)[r, :used] for name in names}


def teaching_row(groups: Groups) -> int:
    """Row of the first right response in a group that also has wrong ones."""
    right, prompt = groups.reward == 1, groups.rollouts.prompt
    return int(np.flatnonzero(right & np.isin(prompt, prompt[groups.reward < 1]))[0])


def stations(run: train.Run) -> list[str]:
    state, policy, _ = train.start(run)
    learner, source, task, rng = run.learner, run.source, run.task, np.random.default_rng(0)
    source.use(policy)
    graded = source.take(int(state.step))
    b = teaching_row(graded)
    rollouts, p = graded.rollouts, graded.rollouts.prompt[b]
    group = rollouts.prompt == p
    row = task.train[int(rollouts.prompts.row[p])]
    _, groups, dropped = learner.filter.apply(state.filters, graded)
    _, groups, _ = learner.replay.exchange(state.replay, groups, rng, None)
    scores = learner.score(state, groups)
    credit = learner.advantage(groups, scores)
    experience, loss = Experience(groups, scores, credit), run.blueprint.loss
    batch, places = fill_batch(
        experience, run.blueprint.shapes.update, task.pad, loss.aggregation, loss.length, loss.own
    )
    version = int(policy.version)
    trained, learned = learner.update(state, experience, rng)
    published = learner.publish(trained, policy)
    prompts = rollouts.prompts
    packed = int(places.row[b])
    return [
        station("1. A row of the task", "tasks", {"prompt": row.prompt, "answer": row.answer, "tokens": row.tokens}),
        station("2. `Prompts`", "tasks", {n: getattr(prompts, n)[p] for n in ("tokens", "length", "uid", "row")}),
        station("3. `Rollouts`, sampled by the policy", "rollout", of_row(rollouts, b)),
        station(
            "4. A `Sample`, read by the grader",
            "environments",
            {
                "completion": task.decode(rollouts.tokens[b : b + 1], rollouts.length[b : b + 1])[0],
                "reward": graded.reward[b],
            },
        ),
        station(
            "5. `Groups`, after the filter",
            "experience",
            {
                "reward of its group": graded.reward[group],
                "keep of its group": groups.keep[group],
                **{f"metric {name}": value for name, value in dropped.items()},
            },
        ),
        station("6. `Scores`", "distribution", {"reference_logprobs": scores.reference_logprobs[b]}),
        station("7. `Credit`", "objective", {"advantage": credit.advantage[b]}),
        station("8. A row of the `Batch`: the prompt once, then its responses", "update", in_batch(batch, packed)),
        station(
            "9. The update",
            "update",
            {name: learned.metrics[name] for name in ("loss", "ratio/min", "ratio/max", "kl", "grad_norm")},
        ),
        station("10. The next `Policy`", "model", {"version before": version, "version after": published.version}),
    ]


def life() -> str:
    """All stages, as Markdown."""
    with tempfile.TemporaryDirectory() as directory:
        cfg = loading.validate(CONFIG | {"run_dir": f"{directory}/run"}, "life of a sample")
        with train.open_run(cfg, must_resume=False, given=None, ends_process=False) as run:
            return "\n".join(stations(run))


def main() -> None:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n\n{life()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
