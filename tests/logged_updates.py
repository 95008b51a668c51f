"""Metrics of updates, in RL and in the warm start: the second part of `logged_oracle`, with its types."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from logged_oracle import (
    Rows,
    SampledGroups,
    earned,
    inputs,
    nucleus,
    rows_of,
    rows_of_rollouts,
    score,
    scores_of,
    wide,
)

# --- losses ----------------------------------------------------------------------------------------------------------------


def cross_entropy(params, x, how):
    logp, entropy, value, _ = scores_of(params, *x["inputs"])
    return jnp.sum(jnp.where(x["mask"], -logp, 0.0)) / jnp.sum(x["mask"]), (logp, entropy, value)


def policy_gradient(params, x, how):
    """w min(r A, clip(r) A) of Schulman et al. 2017, eq. 7; k3 of Schulman 2020; a value loss clipped as theirs, by 0.5."""
    (low, high), beta, bonus = how
    logp, entropy, value, _ = scores_of(params, *x["inputs"])
    r = jnp.exp(logp - x["old"])
    term = -x["correction"] * jnp.minimum(r * x["advantage"], jnp.clip(r, 1 - low, 1 + high) * x["advantage"])
    if beta:
        term = term + beta * (jnp.exp(x["reference"] - logp) - 1 + logp - x["reference"])
    term = term - bonus * entropy
    if "returns" in x:
        near = x["value"] + jnp.clip(value - x["value"], -0.5, 0.5)
        term = term + jnp.maximum((value - x["returns"]) ** 2, (near - x["returns"]) ** 2) / 2
    return jnp.sum(jnp.where(x["mask"], x["weight"] * term, 0.0)), (logp, entropy, value)


def dpo(params, x, beta):
    """Rafailov et al. 2023, eq. 7, a mean over pairs; `sign` is 1 at the tokens of the best, -1 at those of the worst."""
    logp, entropy, value, _ = scores_of(params, *x["inputs"])
    margin = jnp.sum(
        (x["sign"] * jnp.where(x["mask"], logp - x["reference"], 0.0)).reshape(*x["shape"], -1), axis=(1, 2)
    )
    pair = jnp.any(x["mask"].reshape(len(margin), -1), axis=1)
    loss = jnp.sum(jnp.where(pair, jnp.log1p(jnp.exp(-beta * margin)), 0.0)) / jnp.sum(pair)
    return loss, (logp, entropy, value, margin)


@partial(jax.jit, static_argnums=(0, 3, 4))
def _differentiated(loss, params, x, how, shape):
    x = x | {"shape": shape}
    return jax.value_and_grad(loss, has_aux=True)(params, x, how)


def differentiated(loss, params, x, how=None):
    """(loss, the gradient's global norm, what was scored)."""
    with jax.enable_x64(True):
        shape = x.get("shape")
        arrays = {name: value for name, value in x.items() if name != "shape"}
        (value, seen), grads = _differentiated(loss, wide(params), arrays, how, shape)
        norm = np.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(grads)))
    return float(value), norm, [np.asarray(part) for part in seen]


def of_warm_start(params, prompts, targets, cfg) -> dict[str, float]:
    rows = rows_of(prompts, targets, cfg["rollout"]["max_new_tokens"])
    loss, norm, (_, entropy, _) = differentiated(
        cross_entropy, params, {"inputs": inputs(rows, cfg), "mask": rows.learn}
    )
    return {"loss": loss, "grad_norm": norm, "nonfinite": 0.0, "entropy": entropy[rows.learn].mean()}


# --- a step of RL ----------------------------------------------------------------------------------------------------------


@dataclass
class Update:
    params: dict
    """Before it."""
    learned: np.ndarray
    """The sampler's log-probs of the tokens in its loss. No two tokens of a run have the same: they are noisy."""


@dataclass
class Step:
    rollouts: SampledGroups
    updates: list[Update]


@dataclass
class Numbers:
    """Metrics of an update with a token in the loss."""

    whole: dict[str, float]
    tokens: dict[str, np.ndarray]
    mismatch: dict[str, float]
    margin: np.ndarray | None = None
    """Metrics per pair."""


def kept_groups(rollouts: SampledGroups, cfg) -> list[int]:
    reward = rollouts.reward(cfg)
    all_equal = [len(set(group)) == 1 for group in reward]
    return [
        p
        for p in range(len(reward))
        if rollouts.graded[p] and not (cfg["experience"]["filter"] == "has_signal" and all_equal[p])
    ]


def learned_groups(step: Step, earlier: list[Step], cfg) -> list[set[tuple[int, int]]]:
    """(step, group) of each update's tokens. Raises KeyError for a log-prob that was not sampled."""
    steps, samples = [*earlier, step], cfg["rollout"]["samples"]
    where = {}
    for i, one in enumerate(steps):
        tokens = np.argwhere(rows_of_rollouts(one.rollouts).learn)
        where |= {one.rollouts.behavior[b, c].item(): (i, int(b) // samples) for b, c in tokens}
    assert len(where) == sum(one.rollouts.length.sum() for one in steps)
    return [{where[x] for x in update.learned.tolist()} for update in step.updates]


def places_of(step: Step, earlier: list[Step], cfg) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The group (step, number) in each place of the batch, and whether it counts. Each epoch goes once over all that count: the
    kept groups, and in places of dropped ones older groups, as many as there are."""
    now, update = len(earlier), cfg["update"]
    kept = {(now, p) for p in kept_groups(step.rollouts, cfg)}
    older = {(i, p) for i, one in enumerate(earlier) for p in kept_groups(one.rollouts, cfg)}
    groups, dropped = learned_groups(step, earlier, cfg), len(step.rollouts.prompts) - len(kept)
    counted = set().union(*groups)
    replayed = counted - kept
    assert replayed <= older
    assert len(replayed) == (min(dropped, len(older)) if cfg["experience"].get("replay") else 0)
    assert len(groups) == update["epochs"] * update["minibatches"]
    for n in range(0, len(groups), update["minibatches"]):
        epoch = groups[n : n + update["minibatches"]]
        assert kept <= set().union(*epoch) == counted and sum(map(len, epoch)) == len(counted)
    waiting = sorted(replayed)
    places = [(now, p) if (now, p) in kept or not waiting else waiting.pop() for p in range(len(step.rollouts.prompts))]
    return places, np.array([place in counted for place in places])


def of_buffer(step: Step, earlier: list[Step], replayed: list[tuple[int, int]], cfg) -> dict[str, float]:
    """Metrics of a buffer of `capacity` groups that are 8 updates old at most; nothing else leaves it."""
    steps, now, capacity = [*earlier, step], len(earlier), cfg["experience"]["replay"]["capacity"]
    born = np.cumsum([0, *(sum(update.learned.size > 0 for update in one.updates) for one in earlier)])
    stored: list[tuple[int, int]] = []
    for i, one in enumerate(steps):
        stored = [place for place in stored if born[i] - born[place[0]] <= 8]
        stored = [*stored, *((i, p) for p in kept_groups(one.rollouts, cfg))][-capacity:]
    found = {"replay/groups": len(stored), "replay/mib": sum(packed_bytes(steps[i], p, cfg) for i, p in stored) / 2**20}
    if replayed:
        learned = [set().union(*learned_groups(one, earlier[:j], cfg)) for j, one in enumerate(earlier)]
        ages = [born[now] - born[i] for i, _ in replayed]
        found |= {"replay/age": np.mean(ages), "replay/age_max": max(ages)}
        found["replay/uses"] = np.mean([1 + sum(place in each for each in learned) for place in replayed])
    return found


def packed_bytes(step: Step, p: int, cfg) -> int:
    """Size of a packed group with one grader that has steps, in a run that truncates."""
    rollouts, samples = step.rollouts, cfg["rollout"]["samples"]
    rows = slice(p * samples, (p + 1) * samples)
    tokens, kept = int(rollouts.length[rows].sum()), int(nucleus(rollouts, cfg)[0][rows].sum())
    # Header; prompt and its length, uid, row, failure and who failed; per row sample, length, temperature, finish, reward, grade,
    # vote, and whether it is kept.
    fixed = 16 + 4 * int(rollouts.prompt_length[p]) + 5 * 4 + samples * (7 * 4 + 1)
    # Id, log-prob, entropy, version, reward of the step, number of kept ones; a bit; kept ids.
    return fixed + tokens * (5 * 4 + 1) + -(-tokens // 8) + 4 * kept


def advantages(reward, counts, learn, token_reward, value, cfg, own_tokens) -> tuple[np.ndarray, np.ndarray]:
    """[B C] and what the critic is to predict. `own_tokens`: the reward at the tokens that earned it."""
    kind, samples = cfg["objective"]["advantage"]["kind"], reward.shape[1]
    found, returns = np.zeros(learn.shape), np.zeros(learn.shape)
    for b in np.flatnonzero(np.repeat(counts, samples)):
        group, own = reward[b // samples], reward[b // samples, b % samples]
        if kind == "grpo":
            std = np.sqrt(sum((r - group.mean()) ** 2 for r in group) / (samples - 1))
            found[b] = (own - group.mean()) / (std + 1e-4)
        elif kind == "best_worst":
            found[b] = (b % samples == np.argmax(group)) - (1.0 * (b % samples == np.argmin(group)))
        else:  # gae, Schulman et al. 2016, eq. 16: gamma 1, lambda 0.95
            n, later, after = learn[b].sum(), 0.0, 0.0
            for t in reversed(range(n)):
                now = 0 if np.isnan(own_tokens[b, t]) else own_tokens[b, t]
                later = token_reward[b, t] + now + after - value[b, t] + 0.95 * later
                found[b, t], after = later, value[b, t]
    if kind == "gae":
        returns, here = found + value, learn & np.repeat(counts, samples)[:, None]
        found = (found - found[here].mean()) / np.sqrt(found[here].var(ddof=1) + 1e-8)
    return found, returns


def weights_of(mask, aggregation: str) -> np.ndarray:
    """Weights that turn a sum over tokens into the loss's mean."""
    each = mask.sum(axis=1)
    if aggregation == "token":
        return mask / max(each.sum(), 1)
    assert aggregation == "sequence"
    return mask / np.maximum(each, 1)[:, None] / max(np.count_nonzero(each), 1)


def second_moment_kept(square, mask, threshold: float) -> np.ndarray:
    """Drop the largest of the tokens in `mask` until the mean of the others is at most the threshold."""
    left = sorted(square[mask])
    while left and np.mean(left) > threshold:
        left.pop()
    return mask & (square <= (left[-1] if left else -1))


def of_step(step: Step, earlier: list[Step], reference, cfg) -> tuple[dict[str, float], list[Numbers | None]]:
    """All numbers of a step's updates, and those of each; None if it had no token in the loss."""
    x, rows, found = batch_of(step, earlier, reference, cfg)
    each = [of_update(update, x, rows, cfg) for update in step.updates]
    some = [numbers for numbers in each if numbers]
    fresh = found["groups/replayed"] == 0
    found |= {"updates": len(some), "alarm/ratio": 0.0, "groups/kept": len(kept_groups(step.rollouts, cfg))}
    assert all(np.ptp(n.tokens["ratio"]) > 1e-6 for n in some[1:]), "ratios that differ ring no alarm"
    if some:
        found |= {name: np.mean([n.whole[name] for n in some]) for name in some[0].whole}
        pooled = {name: np.concatenate([n.tokens[name] for n in some]) for name in some[0].tokens}
        ratio = pooled.pop("ratio")
        found |= {name: values.mean() for name, values in pooled.items()}
        found |= {"ratio/max": ratio.max(), "ratio/min": ratio.min()}
        found |= of_margins(np.concatenate([n.margin for n in some])) if some[0].margin is not None else {}
        found |= some[0].mismatch if fresh else {}
    return found, each


def batch_of(step: Step, earlier: list[Step], reference, cfg):
    """Shared by all updates of a step: arrays of the loss, its rows, and their metrics."""
    sampled, samples, objective = (
        [one.rollouts for one in [*earlier, step]],
        cfg["rollout"]["samples"],
        cfg["objective"],
    )
    places, counts = places_of(step, earlier, cfg)
    before, allowed = [rows_of_rollouts(one) for one in sampled], [nucleus(one, cfg)[0] for one in sampled]

    def lay(arrays):
        return np.concatenate([arrays[i][p * samples : (p + 1) * samples] for i, p in places])

    rows = Rows(*(lay([getattr(one, name) for one in before]) for name in ("full", "start", "tokens", "learn")))
    rows.learn = rows.learn & np.repeat(counts, samples)[:, None]
    allowed = None if allowed[0] is None else lay(allowed)
    behavior = lay([one.behavior for one in sampled]).astype(np.float64)
    reward = np.stack([sampled[i].reward(cfg)[p] for i, p in places])
    start = score(step.updates[0].params, rows, cfg, allowed)
    x = {"inputs": inputs(rows, cfg, allowed), "behavior": behavior, "proximal": start[0], "reference": behavior}
    x |= {"reference": score(reference, rows, cfg, allowed)[0]}
    found, weight = (
        {"groups/replayed": sum(i < len(earlier) for i, _ in places)},
        objective.get("reward_kl", {}).get("weight"),
    )
    if "replay" in cfg["experience"]:
        found |= of_buffer(step, earlier, [place for place in places if place[0] < len(earlier)], cfg)
    token_reward = np.zeros(behavior.shape)
    if weight:
        k1 = behavior - x["reference"]
        token_reward = -weight * k1
        found |= {"reward_kl": k1[rows.learn].mean()} if rows.learn.any() else {}
    own_tokens = lay([earned(one, cfg) for one in sampled])
    x["advantage"], returns = advantages(reward, counts, rows.learn, token_reward, start[2], cfg, own_tokens)
    if objective["advantage"]["kind"] == "gae":
        x |= {"returns": returns, "value": start[2]}
    return x, rows, found


def of_update(update: Update, x, rows: Rows, cfg) -> Numbers | None:
    mask = rows.learn & np.isin(x["behavior"], update.learned.astype(np.float64))
    loss, kind = cfg["objective"]["loss"], cfg["objective"]["loss"].get("kind")
    # Of a group none or all: of a loss of pairs all that the two have.
    samples = cfg["rollout"]["samples"]
    whole = np.repeat(mask.reshape(len(mask) // samples, -1).any(axis=1), samples)[:, None] & rows.learn
    assert (mask == (whole & (x["advantage"] != 0) if kind == "dpo" else whole)).all()
    if not mask.any():
        return None
    found = (of_pairs if kind == "dpo" else of_tokens)(update, x | {"mask": mask}, loss, samples)
    if scaling := cfg["update"].get("ess_scaling"):
        found.whole["lr/ess_scale"] = min(1.0, found.whole["ess/sequences"] / scaling["base"]) ** 0.5
    return found


def of_pairs(update: Update, x, loss, samples: int) -> Numbers:
    mask, shape = x["mask"], (len(x["mask"]) // samples, samples)
    arrays = {"inputs": x["inputs"], "mask": mask, "reference": x["reference"], "sign": x["advantage"], "shape": shape}
    value, norm, (logp, entropy, _, margin) = differentiated(dpo, update.params, arrays, loss["beta"])
    tokens = {"ratio": np.exp(logp - x["behavior"])[mask], "entropy": entropy[mask]}
    mismatch = of_mismatch(x["proximal"] - x["behavior"], mask)
    whole = {"loss": value, "grad_norm": norm, "nonfinite": 0.0} | of_weights(logp - x["behavior"], mask)
    margin = margin[mask.reshape(shape[0], -1).any(axis=1)]
    return Numbers(whole, tokens, mismatch, margin)


def of_weights(log_ratio, mask) -> dict[str, float]:
    """Kong's effective sample size (sum w)^2 / sum w^2 of p / p_sampler, by sequence and by token, over their number."""
    by_sequence = [np.prod(np.exp(row[here])) for row, here in zip(log_ratio, mask, strict=True) if here.any()]
    kinds = {"sequences": np.array(by_sequence), "tokens": np.exp(log_ratio[mask])}
    return {f"ess/{name}": w.sum() ** 2 / (w**2).sum() / len(w) for name, w in kinds.items()}


def of_margins(margin) -> dict[str, float | tuple[float, float]]:
    """While the policy is the reference a margin is 0 but for rounding, and may fall on either side: two bounds."""
    return {"dpo/margin": margin.mean(), "dpo/accuracy": (np.mean(margin > 1e-5), np.mean(margin > -1e-5))}


def of_mismatch(off, mask) -> dict[str, float]:
    """From log p_trainer - log p_sampler: the samples are the sampler's, so KL(sampler || trainer) is the mean of m - 1 - log m."""
    off = off[mask]
    found = {"kl": np.mean(np.exp(off) - 1 - off), "mean_abs_dlogp": abs(off).mean(), "max_abs_dlogp": abs(off).max()}
    return {f"mismatch/{name}": number for name, number in found.items()}


def of_tokens(update: Update, x, loss, samples: int) -> Numbers:
    mask, advantage, correction = x["mask"], x["advantage"], loss["correction"]
    (low, high), beta = (loss["surrogate"]["low"], loss["surrogate"]["high"]), loss.get("kl", {}).get("weight", 0.0)
    off, weight = x["proximal"] - x["behavior"], weights_of(mask, loss["aggregation"])
    m, old, one = np.exp(off), x["behavior"], np.ones(mask.shape)
    mismatch = of_mismatch(off, mask)
    if correction["kind"] == "truncated_importance":
        old, one = x["proximal"], np.clip(m, correction["floor"], correction["cap"])
        mismatch |= {"mismatch/weight_mean": one[mask].mean(), "mismatch/truncated": (one != m)[mask].mean()}
    elif correction["kind"] == "second_moment":
        kept = second_moment_kept(off**2, mask, correction["threshold"])
        weight, mismatch = weight * kept, mismatch | {"mismatch/dropped": 1 - kept[mask].mean()}
    arrays = x | {"old": old, "correction": one, "weight": weight}
    how = ((low, high), beta, loss.get("entropy", 0.0))
    value, norm, (logp, entropy, values) = differentiated(policy_gradient, update.params, arrays, how)
    r, d = np.exp(logp - old), x["reference"] - logp
    tokens = {"ratio": r, "ratio/mean": r, "entropy": entropy}
    tokens |= {"clip_ratio/low": (r < 1 - low) & (advantage < 0), "clip_ratio/high": (r > 1 + high) & (advantage > 0)}
    if beta:
        tokens["kl"] = np.exp(d) - 1 - d
    if "returns" in x:
        near = x["value"] + np.clip(values - x["value"], -0.5, 0.5)
        worse = np.maximum((values - x["returns"]) ** 2, (near - x["returns"]) ** 2)
        tokens |= {"critic/loss": worse / 2, "critic/value": values, "critic/return": x["returns"]}
    whole = {"loss": value, "grad_norm": norm, "nonfinite": 0.0} | of_weights(logp - x["behavior"], mask)
    tokens = {name: values[mask] for name, values in tokens.items()}
    return Numbers(whole, tokens, mismatch)
