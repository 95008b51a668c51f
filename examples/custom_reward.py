"""A reward of one's own: partial credit for sums of digits, in this process and in worker processes.

    python examples/custom_reward.py

A model of 40,000 parameters, made from nothing, learns to end its answers; ten seconds on two CPU cores.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxrl_llm as rl


def reward(sample: rl.Sample) -> float:
    """1 for the right answer; else 0.1 for each character that is right and in its place, and 0.2 for a response that ends."""
    if sample.completion == sample.answer:
        return 1.0
    right = sum(a == b for a, b in zip(sample.completion, sample.answer, strict=False))
    return 0.1 * right + 0.2 * (sample.finish == "eos")


def loss(scores: rl.TokenScores, batch: rl.Batch) -> jax.Array:
    return -jnp.exp(scores.logprobs - batch.behavior_logprobs) * batch.advantage


def main(steps: int = 40) -> list[float]:
    """Train, print and return the mean reward of each step."""
    model = rl.load_model(rl.ModelConfig(layers=1, d_model=32, d_mlp=64))
    task = rl.load_task(rl.ArithmeticTask(terms=2, held_out=20), model.tokenizer)
    engine = rl.Engine(model, prompts=16, samples=8, max_new_tokens=6)
    update, publish = rl.make_update(model, loss, optax.adam(3e-3), micro_batches=1), rl.make_publish(model)
    advantage, curriculum = rl.advantages.Grpo(), rl.curricula.Uniform()
    state, policy = update.start(model.params), publish(model.params)
    choice, rng, means = curriculum.init(len(task.train)), np.random.default_rng(0), []
    for step in range(steps):
        choice, prompts = rl.next_prompts(task, curriculum, choice, rng, 16)
        groups = rl.grade(engine.generate(policy, prompts, jax.random.key(0)), task, reward)
        state, _ = update(state, rl.make_batch(groups, advantage(groups)))
        policy = publish(state.params, state.step, policy)
        means.append(float(groups.reward.mean()))
        print(step, f"{means[-1]:.3f}")
    # The same function in workers, with a deadline: they import it by its name, so that it must stand in a module.
    with rl.GraderPool("custom_reward:reward", workers=1, deadline_s=30.0) as pool:
        again = rl.grade(groups.rollouts, task, pool)
    print("workers give the same rewards:", bool((again.reward == groups.reward).all()))
    return means


if __name__ == "__main__":
    main()
