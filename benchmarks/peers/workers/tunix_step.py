"""Tunix's GRPOLearner through `train()`, with vanilla rollout and trainer on one mesh: one optimizer step per batch.

    plain   activations are stored, the default

Otherwise its defaults: the mean over sequences of each one's mean; AdamW of optax after gradient-norm clipping, lr 1e-6, as in the
others. With beta the reference is a second copy of the weights. With compute bfloat16 weights and moments stay f32.
"""

import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tunix.models.qwen2.params import create_model_from_safe_tensors
from tunix.rl import rl_cluster
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rollout.base_rollout import RolloutConfig

from benchmarks.peers.paced import Paced
from benchmarks.peers.reward import rewards
from benchmarks.peers.serve import Step, serve_steps, versions
from benchmarks.peers.workers.tunix_sampler import NO_TOKEN, Ids, model_config

GROUPS, SAMPLES, PROMPT, NEW_TOKENS = 8, 8, 64, 128


class Words(Ids):
    """w<i> for token i, as in the other trainers' tokenizer."""

    def encode(self, text: str) -> list[int]:
        return [int(word[1:]) for word in text.split()]

    def decode(self, ids: list[int]) -> str:
        return " ".join(f"w{i}" for i in ids)


def cluster(directory: str, compute: str, beta: float) -> rl_cluster.RLCluster:
    mesh = jax.make_mesh((1, 1), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def model() -> nnx.Module:
        cfg = model_config(directory, compute)
        cfg.param_dtype = jnp.float32
        return create_model_from_safe_tensors(directory, cfg, mesh, dtype=jnp.float32)

    role = rl_cluster.Role
    training = rl_cluster.RLTrainingConfig(
        actor_optimizer=optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-6)),
        eval_every_n_steps=1_000_000,
        max_steps=10_000,
    )
    rollout = RolloutConfig(
        max_tokens_to_generate=NEW_TOKENS,
        max_prompt_length=PROMPT,
        kv_cache_size=PROMPT + NEW_TOKENS,
        temperature=1.0,
        top_p=1.0,
        eos_tokens=[NO_TOKEN],
    )
    return rl_cluster.RLCluster(
        actor=model(),
        reference=model() if beta else None,
        tokenizer=Words(),
        cluster_config=rl_cluster.ClusterConfig(
            role_to_mesh=dict.fromkeys((role.ACTOR, role.REFERENCE, role.ROLLOUT), mesh),
            training_config=training,
            rollout_config=rollout,
        ),
    )


def load(directory: str, words: str, compute: str, variant: str, beta: float) -> tuple[Step, dict]:
    lines = (Path(words) / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line)["prompt"] for line in lines]
    found = cluster(directory, compute, beta)
    algorithm = GRPOConfig(num_generations=SAMPLES, num_iterations=1, beta=beta)
    learner = GRPOLearner(rl_cluster=found, algo_config=algorithm, reward_fns=rewards)
    sampled: list[tuple[float, int]] = []
    generate = found.generate

    def timed(*given, **named):
        start = time.perf_counter()
        out = generate(*given, **named)
        sampled.append((time.perf_counter() - start, sum(map(len, out.tokens))))
        return out

    found.generate = timed

    def batches(pause: Callable[[], None]) -> Iterator[dict]:
        """The learner requests a batch after the previous one, whose last update may still run."""
        at = 0
        while True:
            yield {"prompts": np.array([prompts[(at + i) % len(prompts)] for i in range(GROUPS)])}
            at += GROUPS
            jax.block_until_ready(nnx.state(found.actor_trainer.model, nnx.Param))
            pause()

    run = Paced(lambda pause: learner.train(batches(pause)))

    def step() -> dict:
        run.step()
        seconds, tokens = sampled[-1]
        updates = found.actor_trainer.train_steps
        assert len(sampled) == updates, "an optimizer step for each generation"
        return {"rollout_s": seconds, "tokens": tokens, "updates": updates}

    leaf = jax.tree.leaves(nnx.state(found.actor_trainer.model, nnx.Param))[0]
    return step, {
        "versions": versions("google-tunix", "jax", "jaxlib", "flax", "optax"),
        "threads": "XLA: one per core",
        "attention": "einsum over the whole cache",
        "dtype": str(leaf.dtype),
        "optimizer": "optax.adamw",
    }


if __name__ == "__main__":
    serve_steps(load)
    # The learner's thread is waiting for a batch, and Python would wait for the thread.
    os._exit(0)
