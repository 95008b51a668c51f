"""Looking at a policy from outside: responses to one prompt, and the score of a finished or stopped run."""

import dataclasses

import jax
import numpy as np

from jaxrl_llm.config import RunConfig
from jaxrl_llm.errors import CheckpointError, UserError
from jaxrl_llm.evaluate import evaluate
from jaxrl_llm.metrics import printable
from jaxrl_llm.parallel.config import resolve
from jaxrl_llm.prompts.stream import make_prompts
from jaxrl_llm.prompts.task import Row
from jaxrl_llm.prompts.tokenizer import unknown_characters
from jaxrl_llm.rewards.pool import GraderPool
from jaxrl_llm.run import Life, Run, begin, build, grade, open_checkpoints, publish, sample, target
from jaxrl_llm.types import Finish, Rollouts


def restore_or_begin(run: Run) -> Life:
    """The run's newest checkpoint, or a policy that knows nothing where it has none."""
    checkpoints = open_checkpoints(run.cfg)
    try:
        restored = checkpoints.restore(target(run))
    finally:
        checkpoints.close()
    return begin(run) if restored is None else Life.revive(restored.tree)


def evaluate_run(cfg: RunConfig) -> dict[str, float]:
    """`step`, `eval/exact` and `eval/pass@1` of a run directory's newest checkpoint."""
    run = build(cfg)
    life = restore_or_begin(run)
    if life.step == 0:
        raise CheckpointError(f"{cfg.run_dir}: got no checkpoint, want a run directory that holds one")
    with GraderPool(cfg.reward) as pool:
        return {"step": life.step, **evaluate(run, life.state.params, publish(run, life.state, None), pool)}


def sample_prompt(cfg: RunConfig, text: str | None, n: int) -> None:
    """Print `n` responses to one prompt: tokens with log-prob and entropy, and the reward where the answer is known."""
    run = build(_narrow(cfg, n))
    life = restore_or_begin(run)
    policy = publish(run, life.state, None)
    row = _find(run, text)
    prompts = make_prompts(run.task, (row,), np.zeros(run.cfg.rollout.prompts, int), np.arange(run.cfg.rollout.prompts))
    rollouts = sample(run, policy, prompts, run.eval_key)
    reward = np.full(n, np.nan)
    if row.answer:
        with GraderPool(cfg.reward) as pool:
            reward = grade(run, pool, (row,), rollouts).reward[0]
    what = f"step {life.step} of {cfg.run_dir}" if life.step else "an untrained policy"
    print(f"{printable(row.prompt)}   from {what}, temperature {cfg.rollout.temperature}")
    for b in range(n):
        print(_line(run, rollouts, b, float(reward[b])))


def _line(run: Run, rollouts: Rollouts, b: int, reward: float) -> str:
    length = int(rollouts.length[b])
    tokens = [printable(run.task.tokenizer.id_to_token(int(i))) for i in rollouts.tokens[b, :length]]
    parts = [
        f"{token} {logprob:.3f} (H {entropy:.3f})"
        for token, logprob, entropy in zip(tokens, rollouts.behavior_logprobs[b], rollouts.entropy[b], strict=False)
    ]
    graded = "?" if np.isnan(reward) else f"{reward:g}"
    total = float(rollouts.behavior_logprobs[b].sum())
    return (
        f"{b:3d}  {''.join(tokens):12s} reward {graded}  log-prob {total:8.3f}  {Finish(rollouts.finish[b]).name.lower():6s}  "
        + "  ".join(parts)
    )


def _narrow(cfg: RunConfig, n: int) -> RunConfig:
    """The config with as few rows as the mesh allows: one prompt a shard, its group of n."""
    sizes, _ = resolve(cfg.mesh, jax.device_count())
    split = sizes[0] * sizes[1] if sizes else cfg.rollout.prompts
    return dataclasses.replace(
        cfg,
        rollout=dataclasses.replace(cfg.rollout, prompts=split * jax.process_count(), samples=max(n, 2)),
        update=dataclasses.replace(cfg.update, minibatches=1, micro_batches=1),
    )


def _find(run: Run, text: str | None) -> Row:
    """The task's row for a prompt, or a row without an answer. Raises UserError for characters without a token."""
    if text is None:
        return run.task.held_out[0]
    if not text or (unknown := unknown_characters(text, run.task.tokenizer)):
        got = " ".join(map(repr, unknown)) if text else "nothing"
        raise UserError(f"--prompt: got {got}, want characters of the task: {' '.join(run.task.tokenizer.get_vocab())}")
    if len(text) > run.task.prompt_slots:
        raise UserError(f"--prompt: got {len(text)} tokens, want {run.task.prompt_slots} at most, as in the task")
    return next((row for row in run.task.held_out + run.task.train if row.prompt == text), Row(text, ""))
