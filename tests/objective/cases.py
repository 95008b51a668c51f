"""Random off-policy minibatches for the oracle, and the same through the package: one row a sequence, or all in one row."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from oracle_advantages import Case
from pydantic import TypeAdapter

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.objective import losses
from jaxrl_llm.objective.advantages import estimate
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.estimator import EstimatorInputs, at_tokens
from jaxrl_llm.objective.loss_config import Dpo, resolve_correction
from jaxrl_llm.objective.presets import with_preset
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.types import Batch
from jaxrl_llm.update.batch import token_weights

GROUPS, SAMPLES, SLOTS, GRADERS, CONSTANT = 3, 4, 7, 2, 9
SIZES = {8: (6, 1, 5), 9: (1, 9, 2)}
"""Rows per group where they differ."""
SEEDS = range(10)
PER_TOKEN = ("now", "behavior", "proximal", "reference", "entropy", "values", "old_values")


def random_case(seed: int) -> Case:
    """Probabilities anywhere in (0.02, 0.98), so ratios and KL terms pass every bound. Ragged, with tokens inside sequences that
    the policy did not sample. Seed 1 has a group of equal rewards, seed 2 one that was not graded, seeds 8 and 9 have groups of
    different sizes. Garbage where `mask` is False."""
    rng = np.random.default_rng(seed)
    full = (GROUPS * SAMPLES, SLOTS)
    prompt = np.repeat(np.arange(GROUPS), SIZES.get(seed, SAMPLES))
    parts = rng.integers(0, 3, (full[0], GRADERS)) / 2.0 if seed % 2 else rng.random((full[0], GRADERS))
    counts = np.ones(GROUPS, bool)
    if seed == 1:
        parts[prompt == 1] = 0.3
    if seed == 2:
        counts[0], parts[prompt == 0] = False, np.nan
    length = rng.integers(1, SLOTS + 1, full[0])
    length[0], length[-1] = SLOTS, 1
    mask = np.arange(SLOTS) < length[:, None]
    mask &= (rng.random(full) > 0.15) | (np.arange(SLOTS) == length[:, None] - 1)
    mask &= counts[prompt][:, None]
    log_p = {name: np.log(rng.uniform(0.02, 0.98, full)) for name in ("now", "behavior", "reference")}
    log_p["proximal"] = np.minimum(log_p["behavior"] + rng.normal(0, 0.9, full), -1e-3)
    log_p = {name: np.where(mask, x, rng.uniform(-900, 0, full)) for name, x in log_p.items()}
    component_weights = np.array([1.0, 0.5])
    return Case(
        reward=parts @ component_weights,
        prompt=prompt,
        reward_components=parts,
        component_weights=component_weights,
        used=counts,
        mask=mask,
        entropy=rng.uniform(0, 2, full),
        values=rng.normal(0.5, 0.8, full),
        old_values=rng.normal(0.5, 0.5, full),
        length=CONSTANT,
        **log_p,
    )


def objective_of(preset: str, **beside: Any) -> ObjectiveConfig:
    """The config of a preset with what is written beside it, as a YAML file's is made."""
    given = {"preset": preset, **beside}
    return TypeAdapter(ObjectiveConfig).validate_python(with_preset(given, dataclasses.asdict(ObjectiveConfig())))


class Found(NamedTuple):
    advantage: np.ndarray
    """[B, C]"""
    returns: np.ndarray | None


def assess(cfg: ObjectiveConfig, case: Case) -> Found:
    """Advantages and returns by the package."""
    own, late = cfg.reward_kl(case.behavior, case.reference, case.mask), cfg.reward_kl.to == "advantage"
    counts = case.used[case.prompt]
    inputs = EstimatorInputs(
        reward=case.reward[counts],
        reward_components=case.reward_components[counts],
        component_weights=case.component_weights,
        groups=Grouping.of(case.prompt[counts]),
        mask=case.mask[counts],
        token_reward=None if late else own[counts],
        values=case.old_values[counts],
        late_reward=own[counts] if late else None,
    )
    found = []
    for x in estimate(cfg.advantage, inputs):
        found.append(None if x is None else np.zeros(case.mask.shape))
        if x is not None:
            found[-1][counts] = at_tokens(x, inputs.mask)
    return Found(*found)


def batch_of(case: Case, found: Found, learn: np.ndarray, aggregation: str, packed: bool) -> Batch:
    """[B, C], or [1, B * C]: all sequences in one row."""
    rows, slots = learn.shape
    member = np.arange(rows)[:, None] + np.zeros((1, slots), int)
    ones = np.ones_like(member)
    segment, group = (member + 1, case.prompt[member] + 1) if packed else (ones, ones)
    tokens = {
        "segment": segment,
        "group": group,
        "loss_mask": learn,
        "weight": token_weights(learn, case.prompt, aggregation, case.length),
        "behavior_logprobs": case.behavior,
        "proximal_logprobs": case.proximal,
        "reference_logprobs": case.reference,
        "advantage": found.advantage,
    }
    if found.returns is not None:
        tokens |= {"returns": found.returns, "values": case.old_values}
    unread = dict.fromkeys(("tokens", "position", "until", "before", "temperature"), np.zeros((rows, slots), np.int32))
    shape = (1, -1) if packed else (rows, slots)
    given = {name: x for name, x in (unread | tokens).items() if x is not None}
    return Batch(**{name: jnp.asarray(np.reshape(x, shape)) for name, x in given.items()})


def package_loss(cfg: ObjectiveConfig, case: Case, found: Found, packed: bool = False):
    """(loss of (now, values, entropy), those three), in the arrangement of the batch; call under enable_x64."""
    loss = losses.make_loss(cfg, resolve_correction(cfg.loss, "compute", "compute"), CONSTANT)
    learn = case.mask & (found.advantage != 0) if isinstance(cfg.loss, Dpo) else case.mask
    batch = batch_of(case, found, learn, loss.aggregation, packed)
    if loss.keep is not None:
        batch = batch.replace(weight=jnp.where(loss.keep(batch), batch.weight, 0.0))

    def of(now, values, entropy):
        scores = TokenScores(now, entropy, values)
        terms = loss.terms(scores, batch)
        return jnp.sum(jnp.where(batch.loss_mask, terms.loss, 0.0) * batch.weight)

    given = tuple(jnp.asarray(x.reshape(batch.tokens.shape)) for x in (case.now, case.values, case.entropy))
    return of, given


def package(cfg: ObjectiveConfig, case: Case, packed: bool = False) -> tuple[np.ndarray, float]:
    """Advantages [B, C] and the loss."""
    with jax.enable_x64(True):
        found = assess(cfg, case)
        of, given = package_loss(cfg, case, found, packed)
        return found.advantage, float(of(*given))
