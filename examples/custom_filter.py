"""Filters of one's own: one that is a function, and one with a state, which remembers the rewards of the steps before.

    python examples/custom_filter.py

A row is trained on if every filter of the chain keeps it. Ten seconds on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_llm as rl


def ended(groups: rl.Groups) -> np.ndarray:
    """True for the rows [B] that the policy ended itself: those that were cut off teach nothing."""
    return groups.rollouts.finish == rl.Finish.EOS


class NearTheMean:
    """Keeps rows whose reward is within `width` standard deviations of the running mean over all steps."""

    def __init__(self, width: float):
        self.width = width

    def init(self) -> dict[str, float]:
        return {"mean": 0.0, "square": 0.0, "steps": 0}

    def apply(self, state: dict, groups: rl.Groups) -> tuple[dict, rl.Groups, dict[str, float]]:
        """Return the next state, groups with fewer rows in `keep`, and metrics. The arguments stay as they are."""
        n = state["steps"] + 1
        mean = state["mean"] + (groups.reward.mean() - state["mean"]) / n
        square = state["square"] + ((groups.reward**2).mean() - state["square"]) / n
        std = np.sqrt(max(square - mean**2, 0.0))
        near = np.abs(groups.reward - mean) <= self.width * std
        after = {"mean": mean, "square": square, "steps": n}
        return after, groups.replace(keep=groups.keep & near), {"near": float(near.mean())}


def reward(sample: rl.Sample) -> float:
    """1 for a response that ends, and 0.2 for each digit 7 in it."""
    return (sample.finish == "eos") + 0.2 * sample.completion.count("7")


def loss(scores: rl.TokenScores, batch: rl.Batch) -> jax.Array:
    return -jnp.exp(scores.logprobs - batch.behavior_logprobs) * batch.advantage


def main(steps: int = 40) -> list[dict[str, float]]:
    """Train, print and return the filters' metrics of each step, with the mean reward and the fraction of rows kept."""
    model = rl.load_model(rl.ModelConfig(layers=1, d_model=32, d_mlp=64))
    task = rl.load_task(rl.ArithmeticTask(terms=2, held_out=20), model.tokenizer)
    engine = rl.Engine(model, prompts=16, samples=8, max_new_tokens=6)
    update, publish = rl.make_update(model, loss, optax.adam(3e-3), micro_batches=1), rl.make_publish(model)
    advantage, curriculum = rl.advantages.MeanOnly(), rl.curricula.Uniform()
    keep = rl.filters.chain(rl.filters.has_signal, ended, NearTheMean(width=3.0))
    state, policy, filtered = update.start(model.params), publish(model.params), keep.init()
    choice, rng, found = curriculum.init(len(task.train)), np.random.default_rng(0), []
    for step in range(steps):
        choice, prompts = rl.next_prompts(task, curriculum, choice, rng, 16)
        groups = rl.grade(engine.generate(policy, prompts, jax.random.key(0)), task, reward)
        filtered, groups, metrics = keep.apply(filtered, groups)
        state, _ = update(state, rl.make_batch(groups, advantage(groups)))
        policy = publish(state.params, state.step, policy)
        found.append(metrics | {"reward": float(groups.reward.mean()), "kept": float(groups.keep.mean())})
        print(step, *(f"{name} {x:.3f}" for name, x in found[-1].items()))
    return found


if __name__ == "__main__":
    main()
