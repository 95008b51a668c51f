"""Loss, advantages and gradients of the presets trl:* against TRL's trainers on the same tensors, in float64.

JAXRL_TRL_PYTHON names the Python of an environment with TRL 1.16 and torch: neither is a dependency of ours.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import TypeAdapter

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.objective.advantages import estimate
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.estimator import EstimatorInputs, at_tokens
from jaxrl_llm.objective.loss_config import AutoCorrection, NoCorrection
from jaxrl_llm.objective.losses import policy_terms
from jaxrl_llm.objective.presets import with_preset
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.types import Batch
from jaxrl_llm.update.batch import token_weights

PYTHON = os.environ.get("JAXRL_TRL_PYTHON")
pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(PYTHON is None, reason="JAXRL_TRL_PYTHON: not set, want the Python of an environment with TRL"),
]
P, G, C = 4, 4, 6
B = P * G
# Both sides compute in float64; our token weights are f32, with a rounding error of 6e-8 each.
TOLERANCE = 1e-6
BETA = 0.04


class Case(NamedTuple):
    preset: str
    arguments: dict[str, Any]
    """Arguments of TRL's config."""
    over: Mapping[str, Any] = MappingProxyType({})
    """Config keys beside the preset."""
    trainer: str = "grpo"
    sampler: bool = False
    """Completions come from another program, whose log-probs differ from the trainer's."""
    reward_components: bool = False
    """Two graders."""


PLAIN_K3 = {"loss": {"kl": {"kind": "k3", "weight": BETA, "times": "one"}}}
# TRL multiplies its k3 by the ratio by default.
K3 = {"loss": {"kl": {"kind": "k3", "weight": BETA, "times": "ratio"}}}
CASES = {
    "grpo": Case("trl:grpo_sequence", {"loss_type": "grpo"}),
    "grpo kl": Case("trl:grpo_sequence", {"loss_type": "grpo", "beta": BETA}, K3),
    "bnpo": Case("trl:grpo", {"loss_type": "bnpo"}),
    "bnpo kl": Case("trl:grpo", {"loss_type": "bnpo", "beta": BETA}, K3),
    "dr_grpo": Case("trl:dr_grpo", {"loss_type": "dr_grpo"}),
    "dr_grpo kl": Case("trl:dr_grpo", {"loss_type": "dr_grpo", "beta": BETA}, K3),
    "dapo": Case("trl:grpo", {}),
    "dapo kl": Case("trl:grpo", {"beta": BETA}, K3),
    "dapo clip higher": Case("trl:grpo", {"epsilon_high": 0.28}, {"loss": {"surrogate": {"high": 0.28}}}),
    "two-sided": Case("trl:grpo", {"delta": 1.5}, {"loss": {"surrogate": {"dual": 1.5}}}),
    "plain kl": Case("trl:grpo", {"beta": BETA, "use_bias_correction_kl": False}, PLAIN_K3),
    "entropy": Case("trl:grpo", {"entropy_coef": 0.01}, {"loss": {"entropy": 0.01}}),
    "gspo": Case("trl:gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence"}),
    "gspo kl": Case(
        "trl:gspo",
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "beta": BETA, "use_bias_correction_kl": False},
        PLAIN_K3,
    ),
    "cispo": Case("trl:cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
    "cispo tight": Case(
        "trl:cispo", {"loss_type": "cispo", "epsilon_high": 1.2}, {"loss": {"surrogate": {"high": 1.2}}}
    ),
    "cispo kl": Case("trl:cispo", {"loss_type": "cispo", "epsilon_high": 5.0, "beta": BETA}, K3),
    "sapo": Case("trl:sapo", {"loss_type": "sapo"}),
    "sapo kl": Case("trl:sapo", {"loss_type": "sapo", "beta": BETA}, K3),
    "mean only": Case("trl:grpo", {"scale_rewards": "none"}, {"advantage": {"kind": "mean_only"}}),
    "std of the batch": Case("trl:grpo", {"scale_rewards": "batch"}, {"advantage": {"std_over": "batch"}}),
    "gdpo": Case(
        "trl:gdpo",
        {"multi_objective_aggregation": "normalize_then_sum", "reward_weights": [1.0, 0.3]},
        reward_components=True,
    ),
    "truncated importance": Case(
        "trl:grpo",
        {"vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_max": 1.3},
        {"loss": {"correction": {"kind": "truncated_importance", "cap": 1.3}}},
        sampler=True,
    ),
    "masked importance": Case(
        "trl:grpo",
        {"vllm_importance_sampling_mode": "sequence_mask", "vllm_importance_sampling_clip_max": 1.3},
        {"loss": {"correction": {"kind": "masked_importance", "level": "sequence", "low": 0.0, "high": 1.3}}},
        sampler=True,
    ),
    "rloo": Case("trl:rloo", {}, trainer="rloo"),
    "rloo without kl": Case("trl:rloo", {"beta": 0.0}, {"reward_kl": {"weight": 0.0}}, trainer="rloo"),
    "rloo whitened": Case(
        "trl:rloo", {"normalize_advantages": True}, {"advantage": {"whiten": True}}, trainer="rloo"
    ),
}  # fmt: skip


def tensors() -> dict[str, np.ndarray]:
    """Ratios on both sides of every bound; lengths 1 to C; a group of equal rewards; tokens that were not sampled."""
    rng = np.random.default_rng(5)
    length = rng.integers(1, C + 1, B)
    length[:2] = 1, C
    reward = np.round(rng.normal(size=(P, G)), 2)
    reward[1] = 0.7
    sampled = rng.random((B, C)) < 0.85
    sampled[:, 0] = True
    logprobs = -rng.exponential(1.2, (B, C))
    parts = np.stack([reward, rng.integers(0, 2, (P, G)).astype(float)], axis=-1)
    return {
        "length": length,
        "reward": reward,
        "parts": parts,
        "sampled": sampled & (np.arange(C) < length[:, None]),
        "logprobs": logprobs,
        "old": logprobs + rng.normal(0, 0.35, (B, C)),
        "sampler": logprobs + rng.normal(0, 0.35, (B, C)),
        "reference": logprobs + rng.normal(0, 0.5, (B, C)),
        "entropy": rng.exponential(1.0, (B, C)),
    }


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, np.ndarray]:
    """Results of TRL, by <case>/<result>."""
    directory = tmp_path_factory.mktemp("trl")
    np.savez(directory / "tensors.npz", **tensors())
    listed = [
        {k: v for k, v in case._asdict().items() if k not in ("preset", "over")} | {"name": name}
        for name, case in CASES.items()
    ]
    (directory / "cases.json").write_text(json.dumps(listed))
    script = Path(__file__).parent / "trl_reference.py"
    done = subprocess.run([PYTHON, script, directory], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(np.load(directory / "trl.npz"))


def ours(case: Case) -> dict[str, np.ndarray]:
    given = tensors()
    settings = with_preset({"preset": case.preset, **case.over}, asdict(ObjectiveConfig()))
    cfg = TypeAdapter(ObjectiveConfig).validate_python(settings)
    # RLOOTrainer uses all tokens of a completion.
    mask = np.arange(C) < given["length"][:, None] if case.trainer == "rloo" else given["sampled"]
    token_reward = None
    if cfg.reward_kl.weight:
        token_reward = cfg.reward_kl(given["old"], given["reference"], mask)
    parts = given["parts"] if case.reward_components else given["reward"][..., None]
    weights = np.array(case.arguments.get("reward_weights", [1.0]))
    groups = Grouping.of(np.repeat(np.arange(P), G))
    inputs = EstimatorInputs((parts @ weights).ravel(), parts.reshape(B, -1), weights, groups, mask, token_reward)
    advantage = at_tokens(estimate(cfg.advantage, inputs).advantage, mask)
    found = loss_and_gradients(cfg, given, mask, advantage, case.sampler)
    return found | {"advantages": advantage[:, 0]}


def loss_and_gradients(
    cfg: ObjectiveConfig, given: dict[str, np.ndarray], mask: np.ndarray, advantage: np.ndarray, sampler: bool
) -> dict[str, np.ndarray]:
    group = np.repeat(np.arange(P), G)
    slot = np.tile(np.arange(C), (B, 1))
    batch = Batch(
        tokens=np.zeros((B, C), np.int32),
        position=slot,
        until=np.full((B, C), C),
        before=slot,
        segment=np.where(np.arange(C) < given["length"][:, None], 1, 0),
        group=np.where(np.arange(C) < given["length"][:, None], 1, 0),
        loss_mask=mask,
        weight=token_weights(mask, group, cfg.loss.aggregation, C),
        behavior_logprobs=given["sampler" if sampler else "old"],
        advantage=advantage,
        temperature=np.ones((B, C)),
        reference_logprobs=given["reference"],
        proximal_logprobs=given["old"] if sampler else None,
    )
    correction = cfg.loss.correction
    correction = NoCorrection() if isinstance(correction, AutoCorrection) else correction

    def loss(logprobs, entropy):
        terms = policy_terms(TokenScores(logprobs, entropy), batch, cfg.loss, correction)
        each = jnp.where(mask, terms.loss, 0.0) * batch.weight
        return jnp.sum(each), jnp.sum(jnp.abs(each))

    with jax.enable_x64(True):
        batch = jax.tree.map(jnp.asarray, batch)
        run = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))
        (value, size), grads = jax.device_get(run(given["logprobs"], given["entropy"]))
    return {"loss": value, "size": size, "logprobs": grads[0], "entropy": grads[1]}


@pytest.mark.parametrize("name", CASES)
def test_trl(name, results):
    found = ours(CASES[name])
    for key in ("advantages", "loss", "logprobs", "entropy"):
        want = results[f"{name}/{key}"]
        assert want.dtype == np.float64 and found[key].dtype == np.float64
        # The loss is a sum with cancellation: its error from the weights' rounding is relative to the sum of magnitudes.
        size = found["size"] if key == "loss" else np.abs(want).max()
        assert np.abs(found[key] - want).max() <= TOLERANCE * size, key
    assert np.abs(results[f"{name}/logprobs"]).max() > 1e-3
