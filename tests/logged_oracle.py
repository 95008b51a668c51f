"""Metrics of a run, recomputed from its arrays: loops in NumPy and a plain forward pass, both in float64.

Nothing of the package is called. The definitions are those of docs/update.md ("What is logged"), docs/objectives.md and
docs/rollouts.md, and of the papers named there. `cfg` is the config as a person writes it: nested dicts.

Letters: B rows (sequences) of P groups of G, C completion slots, T slots of a whole sequence, V vocabulary.
"""

import itertools
import zlib
from collections import Counter
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

ALPHABET = (
    "0123456789+<> #"  # of the task: token 0 is padding, then one for each character, the last of which ends a response
)
PAD, END, NUM_TOKENS = 0, 15, 16
FAILURES = "none", "raised", "timed_out", "not_finite", "wrong_type", "died"
NEVER = -1e30


@dataclass
class SampledGroups:
    """Rollouts of one sampler call, with their grades and their policy."""

    params: dict
    prompts: np.ndarray  # [P S]
    prompt_length: np.ndarray  # [P]
    tokens: np.ndarray  # [B C]
    length: np.ndarray  # [B]
    noise: np.ndarray  # [B C], by which the sampler's log-probs are off
    behavior: np.ndarray  # [B C], the sampler's log-probs, noise and all
    parts: np.ndarray  # [n P G], of each grader
    failure: np.ndarray  # [P]
    failed_by: np.ndarray  # [P], which grader
    vote: np.ndarray  # [P G]

    def reward(self, cfg) -> np.ndarray:
        """[P G], NaN where a group was not graded."""
        weights = [grader.get("weight", 1.0) for grader in cfg["reward"]["graders"]]
        return np.einsum("n,npg->pg", weights, self.parts.astype(np.float64))

    @property
    def graded(self) -> np.ndarray:
        return self.failure == 0


@dataclass
class Rows:
    """Prompts with their completions; one sequence per row."""

    full: np.ndarray  # [B T], the completion right behind its prompt
    start: np.ndarray  # [B], prompt tokens
    tokens: np.ndarray  # [B C]
    learn: np.ndarray  # bool[B C], there is a token


def rows_of(prompts, completions, slots: int) -> Rows:
    """Rows from lists of tokens."""
    longest = max(map(len, prompts))
    full = np.full((len(prompts), longest + slots), PAD)
    tokens = np.full((len(prompts), slots), PAD)
    for b, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        full[b, : len(prompt) + len(completion)] = [*prompt, *completion]
        tokens[b, : len(completion)] = completion
    learn = np.arange(slots) < np.array([len(completion) for completion in completions])[:, None]
    return Rows(full, np.array([len(prompt) for prompt in prompts]), tokens, learn)


def rows_of_rollouts(rollouts: SampledGroups) -> Rows:
    samples = len(rollouts.tokens) // len(rollouts.prompts)
    prompts = [
        prompt[:n] for prompt, n in zip(rollouts.prompts, rollouts.prompt_length, strict=True) for _ in range(samples)
    ]
    completions = [tokens[:n] for tokens, n in zip(rollouts.tokens, rollouts.length, strict=True)]
    return rows_of(prompts, completions, rollouts.tokens.shape[1])


# --- the model -------------------------------------------------------------------------------------------------------------


def rms_norm(x, weight):
    return x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6) * weight


def rotated(x):
    """Su et al. 2021, in Llama's form: the pairs (i, i + H / 2) of each head turn by position / 10000^(2 i / H)."""
    half = x.shape[-1] // 2
    angle = jnp.arange(len(x))[:, None] / 10_000.0 ** (jnp.arange(half) / half)
    angle = angle.reshape(len(x), *(1,) * (x.ndim - 2), half)
    a, b = x[..., :half], x[..., half:]
    return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], axis=-1)


def activations(params, tokens):
    """[T D] of one sequence: what the head and the critic read. K key/value heads serve G query heads each."""
    x, causal = params["embed"][tokens], jnp.tril(jnp.ones((len(tokens), len(tokens)), bool))
    for i in range(len(params["layers"]["qkv"])):
        w = {name: leaf[i] for name, leaf in params["layers"].items()}
        packed = jnp.einsum("td,dkgh->tkgh", rms_norm(x, w["attn_norm"]), w["qkv"])
        q, k, v = rotated(packed[:, :, :-2]), rotated(packed[:, :, -2]), packed[:, :, -1]
        scores = jnp.einsum("tkgh,ukh->kgtu", q, k) / np.sqrt(q.shape[-1])
        seen = jax.nn.softmax(jnp.where(causal, scores, NEVER), axis=-1)
        x = x + jnp.einsum("kgtu,ukh,kghd->td", seen, v, w["out"])
        gate, up = jnp.einsum("td,cdf->ctf", rms_norm(x, w["mlp_norm"]), w["gate_up"])
        x = x + (gate / (1 + jnp.exp(-gate)) * up) @ w["down"]
    return rms_norm(x, params["final_norm"])


def scores_of(params, full, start, tokens, allowed, temperature):
    """Per completion token [B C]: its log-prob, the entropy of its distribution, and the value before it; all
    log-probs [B C V]. The distribution is over the tokens that are `allowed` [B C V]."""

    def one(full, start, tokens, allowed):
        slot = jnp.arange(len(tokens))
        before = activations(params, full)[start - 1 + slot]
        every = jax.nn.log_softmax(jnp.where(allowed, before @ params["embed"].T / temperature, NEVER), axis=-1)
        value = before @ params["value"]["kernel"] + params["value"]["bias"] if "value" in params else 0.0 * slot
        return every[slot, tokens], -jnp.sum(jnp.exp(every) * every, axis=-1), value, every

    return jax.vmap(one)(full, start, tokens, allowed)


_scores = jax.jit(scores_of)


def wide(params):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def inputs(rows: Rows, cfg, allowed=None) -> tuple:
    vocabulary = np.arange(cfg["model"]["vocab_size"])
    whole = np.broadcast_to(vocabulary < NUM_TOKENS, (*rows.tokens.shape, len(vocabulary)))
    return rows.full, rows.start, rows.tokens, whole if allowed is None else allowed, cfg["rollout"]["temperature"]


def score(params, rows: Rows, cfg, allowed=None):
    with jax.enable_x64(True):
        return [np.asarray(x) for x in _scores(wide(params), *inputs(rows, cfg, allowed))]


def nucleus(rollouts: SampledGroups, cfg) -> tuple[np.ndarray | None, np.ndarray]:
    """Tokens that each token was sampled from, bool[B C V], by the policy that sampled it (Holtzman et al. 2020: the fewest
    likeliest tokens that hold `top_p`, of these `max_kept_tokens`), and where more would have been in it, bool[B C]."""
    rows, top_p = rows_of_rollouts(rollouts), cfg["rollout"].get("top_p", 1.0)
    if top_p == 1:
        return None, np.zeros(rows.tokens.shape, bool)
    p = np.exp(score(rollouts.params, rows, cfg)[3])
    allowed, over = np.zeros(p.shape, bool), np.zeros(rows.tokens.shape, bool)
    for b, c in np.argwhere(rows.learn):
        order, held, count = np.argsort(-p[b, c], kind="stable"), 0.0, 0
        while held < top_p:
            held, count = held + p[b, c, order[count]], count + 1
        over[b, c] = count > cfg["rollout"]["max_kept_tokens"]
        allowed[b, c, order[: min(count, cfg["rollout"]["max_kept_tokens"])]] = True
    return allowed, over


# --- metrics of rollouts ---------------------------------------------------------------------------------------------------


def of_rollouts(rollouts: SampledGroups, cfg) -> dict[str, float]:
    rows = rows_of_rollouts(rollouts)
    allowed, over = nucleus(rollouts, cfg)
    logp, entropy, *_ = score(rollouts.params, rows, cfg, allowed)
    last = rollouts.tokens[np.arange(len(rollouts.tokens)), rollouts.length - 1]
    longest, tokens = int(rollouts.length.max()), int(rollouts.length.sum())
    # All rows start together and the device looks every `interval` steps at whether one is active; the host every `chunk` steps.
    engine, slots = cfg["rollout"]["engine"], rollouts.tokens.shape[1]
    chunk = min(engine["decode_chunk"], slots)
    interval = min(engine["eos_interval"], chunk)
    steps = -(-longest // interval) * interval
    found = {
        "completions/mean_length": np.mean(rollouts.length),
        "completions/min_length": min(rollouts.length),
        "completions/max_length": longest,
        "completions/clipped_ratio": np.mean((rollouts.length == slots) & (last != END)),
        "completions/tokens": tokens,
        "completions/crc32": zlib.crc32(rollouts.tokens.astype("<i4").tobytes()),
        "sampling/mean_logprob": np.mean((logp + rollouts.noise)[rows.learn]),
        "sampling/entropy": np.mean(entropy[rows.learn]),
        "sampling/support_overflow": np.mean(over[rows.learn]),
        "rollout/steps": steps,
        "rollout/segments": -(-steps // chunk),
        "rollout/live_rows": tokens / steps,
        "rollout/waste": 1 - tokens / (steps * len(rollouts.tokens)),
        "groups/graded": np.sum(rollouts.graded),
    }
    reward = rollouts.reward(cfg)[rollouts.graded]
    if len(reward):
        found["reward"] = reward.mean()
        found["reward_std"] = np.mean([np.sqrt(sum((r - g.mean()) ** 2 for r in g) / (len(g) - 1)) for g in reward])
        found["frac_reward_zero_std"] = np.mean([len(set(g)) == 1 for g in reward])
        if any("step_end" in grader for grader in cfg["reward"]["graders"]):
            rows = np.repeat(rollouts.graded, rollouts.parts.shape[2])
            found["rewards/steps"] = np.sum(~np.isnan(earned(rollouts, cfg)[rows])) / np.sum(rows)
    for n, grader in enumerate(cfg["reward"]["graders"]):
        if len(reward):
            found[f"rewards/{grader['name']}/mean"] = rollouts.parts[n, rollouts.graded].astype(np.float64).mean()
        lost = Counter(rollouts.failure[rollouts.failed_by == n].tolist())
        found |= {f"rewards/{grader['name']}/{FAILURES[kind]}": lost[kind] for kind in range(1, len(FAILURES))}
    return found


def earned(rollouts: SampledGroups, cfg) -> np.ndarray:
    """[B C]: the reward at the token that earned it, NaN elsewhere: at the last token, or at the last of each step. Of the only
    grader with steps, which end with one character, it is known what it returns: the sum of the characters' numbers."""
    found = np.full(rollouts.tokens.shape, np.nan)
    ends = [grader["step_end"] for grader in cfg["reward"]["graders"] if "step_end" in grader]
    for b, reward in enumerate(rollouts.reward(cfg).reshape(-1)):
        last = rollouts.length[b] - 1
        if np.isnan(reward) or not ends:
            found[b, last] = reward
            continue
        step, values = "", []
        for c, token in enumerate(rollouts.tokens[b, : last + 1]):
            step += "<pad>" if token == PAD else ALPHABET[token - 1]
            if step.endswith(ends[0]) or c == last:
                found[b, c] = sum(map(ord, step)) % 5 / 4
                step = ""
                values.append(found[b, c])
        assert np.isclose(np.mean(values), reward, rtol=1e-6)
    return found


def of_stages(rollouts: SampledGroups, kept: list[int], earlier: list[SampledGroups], cfg) -> dict[str, float]:
    """What the stages left. `kept`: groups that passed the filter; `earlier`: the steps before."""
    samples, filtered = (
        cfg["rollout"]["samples"],
        {"has_signal": "signal_reward"}.get(cfg["experience"]["filter"], "none"),
    )
    graded = [p for p in range(len(rollouts.failure)) if rollouts.graded[p]]
    rows = lambda groups: [p * samples + i for p in groups for i in range(samples)]  # noqa: E731
    right = (rollouts.parts[0] >= 1.0).reshape(-1)
    found = {
        "rollout/samples": len(rollouts.length), "groups/sampled": len(rollouts.failure), "gate/skipped": 0, "gate/forced": 0,
        f"filter/{filtered}/dropped": samples * (len(graded) - len(kept)),
    }  # fmt: skip
    for name, groups in (("kept", kept), ("dropped", [p for p in graded if p not in kept])):
        found[f"{name}/rows"] = len(rows(groups))
        if groups:
            found[f"{name}/mean_length"] = np.mean([rollouts.length[b] for b in rows(groups)])
            found[f"{name}/success"] = np.mean([right[b] for b in rows(groups)])
    if kept:
        found["groups/effective_size"] = samples
    answers = [[int(vote) for vote in rollouts.vote[p] if vote] for p in graded]
    if some := [len(set(votes)) / len(votes) for votes in answers if votes]:
        found["diversity/unique_answers"] = np.mean(some)
    texts = [[rollouts.tokens[b, : rollouts.length[b]].tolist() for b in rows([p])] for p in graded]
    pairs = [[pair for text in group for pair in itertools.pairwise(text)] for group in texts]
    if some := [len(set(group)) / len(group) for group in pairs if group]:
        found["diversity/distinct_2"] = np.mean(some)
    prompts = {tuple(row) for one in [*earlier, rollouts] for row in one.prompts.tolist()}
    train = 10 ** cfg["task"]["terms"] - cfg["task"]["held_out"]
    found["prompts/never_seen"] = 1 - len(prompts) / train
    return found


def majority(votes, right) -> float:
    """Probability that the most frequent answer is right, ties broken at random; 0 is no answer."""
    counts = Counter(vote for vote in votes if vote)
    most = [answer for answer, n in counts.items() if n == max(counts.values())]
    return float(np.mean([right[votes == answer].mean() for answer in most])) if most else 0.0


def of_evaluation(params, rollouts: SampledGroups, cfg) -> dict[str, float]:
    """`params` of the trainer; the policy was made of them."""
    k, found = cfg["rollout"]["samples"], {}
    prompts = [prompt[:n] for prompt, n in zip(rollouts.prompts, rollouts.prompt_length, strict=True)]
    texts = ["".join(ALPHABET[t - 1] for t in prompt) for prompt in prompts]
    sums = [str(sum(map(int, text.strip("<>").split("+")))) + "#" for text in texts]
    rows = rows_of(prompts, [[1 + ALPHABET.index(c) for c in text] for text in sums], rollouts.tokens.shape[1])
    logp = score(params, rows, cfg)[0]
    found["eval/exact"] = np.mean([np.exp(x[here].sum()) for x, here in zip(logp, rows.learn, strict=True)])
    right = (rollouts.parts[0] >= 1.0)[rollouts.graded]
    if not rollouts.graded.all():
        found["eval/left_out"] = np.sum(~rollouts.graded)
    if len(right):
        found["eval/pass@1"] = right.mean()
        found[f"eval/pass@{k}"] = right.any(axis=1).mean()
        found[f"eval/maj@{k}"] = np.mean(
            [majority(*both) for both in zip(rollouts.vote[rollouts.graded], right, strict=True)]
        )
    if cfg["experience"].get("replay"):
        rows = rows_of_rollouts(rollouts)
        d = score(params, rows, cfg, nucleus(rollouts, cfg)[0])[0] - rollouts.behavior
        rows.learn[cfg["rollout"]["prompts"] * k :] = False
        found["eval/mismatch_kl"] = np.mean((np.exp(d) - 1 - d)[rows.learn])
    return found
