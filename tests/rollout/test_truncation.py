"""Truncated sampling: exactly the right tokens are kept, the recorded distribution is the sampled one, no large sort."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats
from setups import TINY, layouts

from jaxrl_llm.distribution import top_k
from jaxrl_llm.distribution.control_tables import allowed_tokens, encode, join_automata
from jaxrl_llm.distribution.logits import kept_logprobs, process_logits
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout import sample
from jaxrl_llm.rollout.sample import Controls, Decoding, Vocabulary

KEY = jax.random.key(5)
ROWS, MAX_KEPT = 24, 16
# Padding after 291 of 300 and 9001 of 9011 tokens; columns of several logits, the last block and the last slice short.
SMALL, LARGE = Vocabulary(size=291, pad=0, eos=(7, 290)), Vocabulary(size=9001, pad=0, eos=(7, 9000))
ENTRIES = {SMALL: 300, LARGE: 9011}


@pytest.fixture(scope="module", autouse=True)
def small_columns():
    """512 columns of 18 logits, so that 9,011 logits are searched by columns."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_k, "BLOCKS", 16)
        patch.setattr(top_k, "COLUMNS", 32)
        yield


def make_program(vocab: Vocabulary, max_kept_tokens: int = MAX_KEPT, sizes: tuple[int, ...] = (1, 1, 1)):
    """One program that samples from raw logits with controls per row, and also returns the distribution."""
    decoding = Decoding(TINY, layouts(sizes)[1], vocab, max_kept_tokens=max_kept_tokens)

    def both(keys, slot, raw, controls):
        tables = jax.tree.map(jnp.asarray, join_automata([], vocab.size, vocab.eos, raw.shape[1])[0])
        code = encode(controls.control, 10_000 - slot, slot < controls.min_new_tokens)
        of = sample.distribution(raw, controls, jnp.array(True), decoding, allowed_tokens(tables, code))
        return sample.sample_from(keys, slot, of, raw_logprobs=True), of

    return jax.jit(both)


TRUNCATED = {vocab: make_program(vocab) for vocab in (SMALL, LARGE)}
FULL = make_program(SMALL, 0)


def keys_of(rows: int) -> jax.Array:
    return sample.row_keys(KEY, jnp.arange(rows), jnp.zeros((rows, 1), jnp.int32))


def controls_of(rows: int, temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, min_new_tokens=0) -> Controls:
    values = (temperature, top_p, top_k, min_p, min_new_tokens, 0, 0)
    dtypes = (np.float32, np.float32, np.int32, np.float32, np.int32, np.int32, np.int32)
    return Controls(*(jnp.asarray(np.broadcast_to(v, rows), d) for v, d in zip(values, dtypes, strict=True)))


def random_controls(rng: np.random.Generator) -> Controls:
    """Each truncation is off in some rows."""
    off = rng.random((3, ROWS)) < 0.4
    return controls_of(
        ROWS,
        temperature=np.resize([0.0, 0.5, 1.0, 2.0], ROWS),
        top_p=np.where(off[0], 1.0, rng.uniform(0.05, 0.99, ROWS)),
        top_k=np.where(off[1], 0, rng.integers(1, 2 * MAX_KEPT, ROWS)),
        min_p=np.where(off[2], 0.0, rng.uniform(0.001, 0.5, ROWS)),
        min_new_tokens=np.resize([0, 3], ROWS),
    )


def order_of(vocab: int, count: int) -> np.ndarray:
    """Rank of each id among equal logits: (block, column, index in the column), the module's rule, implemented again."""
    if vocab <= 2 * top_k.BLOCKS * top_k.COLUMNS or count >= top_k.BLOCKS * top_k.COLUMNS:
        return np.arange(vocab)
    size = -(-vocab // top_k.BLOCKS)
    block, inside = np.divmod(np.arange(vocab), size)
    # The last slice of a block that does not fill its columns is aligned to the end of the block.
    whole = size // top_k.COLUMNS * top_k.COLUMNS
    column = np.where(inside < whole, inside % top_k.COLUMNS, inside - (size - top_k.COLUMNS))
    return np.argsort(np.lexsort((inside, column, block)))


def kept_by_hand(raw: np.ndarray, vocab: Vocabulary, controls: Controls, slot: np.ndarray, margin: float = 1e-5):
    """In float64, per row: kept ids, most likely first; log-probs of all tokens; True if a threshold is too close for float32."""
    rank, close, kept, full = order_of(raw.shape[1], MAX_KEPT + 1), [], [], []
    for b, x in enumerate(raw.astype(np.float64)):
        t, p, k, m, least, *_ = (float(np.asarray(c)[b]) for c in jax.tree.leaves(controls))
        x = x.copy()
        x[vocab.size :] = -np.inf
        x[list(vocab.eos) if slot[b] < least else []] = -np.inf
        x = np.where(x == x.max(), 0.0, -np.inf) if t == 0 else (x - x.max()) / t
        logp = x - np.log(np.exp(x).sum())
        by_rank = np.lexsort((rank, -raw[b].astype(np.float64) + np.where(logp == -np.inf, np.inf, 0)))
        among = by_rank[: int(k) if 0 < k <= MAX_KEPT else np.isfinite(logp).sum()]
        share = np.exp(logp[among]) / np.exp(logp[among]).sum()
        before = np.cumsum(share) - share
        ratio = np.exp(logp[among] - logp[among[0]])
        among_kept = among[((p >= 1) | (before < p)) & (ratio >= m) & np.isfinite(logp[among])]
        close.append((p < 1 and np.abs(before - p).min() < margin) or (m > 0 and np.abs(ratio / m - 1).min() < margin))
        kept.append(among_kept)
        full.append(logp)
    return kept, np.array(full), np.array(close)


def logits_with_ties(vocab: Vocabulary, seed: int) -> np.ndarray:
    """A third of the rows on a grid of quarters, so that dozens of tokens tie at the thresholds."""
    raw = np.random.default_rng(seed).normal(size=(ROWS, ENTRIES[vocab])).astype(np.float32) * 2
    raw[::3] = np.round(raw[::3] * 4) / 4
    # Padding and masked tokens have the largest logits.
    raw[:, vocab.size :] = 20
    raw[::2, vocab.eos[0]] = 15
    return raw


@pytest.mark.parametrize("vocab", [SMALL, LARGE], ids=["small", "by columns"])
@pytest.mark.parametrize("seed", range(6))
def test_exactly_the_right_tokens_are_kept(vocab, seed):
    raw, slot = logits_with_ties(vocab, seed), np.resize([0, 1, 2, 3, 9], ROWS)
    controls = random_controls(np.random.default_rng(seed))
    sampled, of = TRUNCATED[vocab](keys_of(ROWS), slot, raw, controls)
    kept, full, close = kept_by_hand(raw, vocab, controls, slot)
    assert close.sum() <= 3, "too few rows with clear thresholds"
    kept_tokens, logp = np.asarray(sampled.kept_tokens), np.asarray(of.logp)
    for b in np.flatnonzero(~close):
        want = kept[b][:MAX_KEPT]
        got = kept_tokens[b][kept_tokens[b] >= 0]
        np.testing.assert_array_equal(got, want)
        assert sampled.overflow[b] == (len(kept[b]) > MAX_KEPT)
        exact = full[b, want] - np.log(np.exp(full[b, want]).sum())
        np.testing.assert_allclose(logp[b, : len(want)], exact, atol=1e-5)
        np.testing.assert_allclose(sampled.entropy[b], -(np.exp(exact) * exact).sum(), atol=1e-5)
        np.testing.assert_allclose(sampled.raw_logprob[b], full[b, sampled.token[b]], atol=1e-5)
    assert len({len(ids[:MAX_KEPT]) for ids in kept}) >= 4 and 0 < np.asarray(sampled.overflow).sum() < ROWS


def test_a_sharded_vocabulary_gives_the_same_tokens():
    """9,024 logits in whole blocks on 4 shards, with ties at every threshold; each shard searches its own logits."""
    raw, slot, sizes = (
        np.random.default_rng(8).normal(size=(ROWS, 9024)).astype(np.float32),
        np.resize([0, 5], ROWS),
        (1, 2, 4),
    )
    args = slot, np.round(raw * 4) / 4, random_controls(np.random.default_rng(8))
    one, _ = TRUNCATED[LARGE](keys_of(ROWS), *args)
    dec = layouts(sizes)[1]
    rows = dec.sharding(("rows",))
    put = [hosts.put(x, where) for x, where in zip(args, (rows, dec.sharding(("rows", "vocab")), rows), strict=True)]
    split, _ = make_program(LARGE, sizes=sizes)(jax.device_put(keys_of(ROWS), rows), *put)
    for name in ("token", "kept_tokens", "overflow"):
        np.testing.assert_array_equal(getattr(one, name), getattr(split, name), err_msg=name)
    np.testing.assert_allclose(one.logprob, split.logprob, atol=1e-6)


def check_recorded(sampled, of) -> None:
    """Check that the token is among the kept ones, its log-prob exact to the bit; ids come first, then -1; never empty."""
    kept_tokens, logp, token = np.asarray(sampled.kept_tokens), np.asarray(of.logp), np.asarray(sampled.token)
    rank = np.argmax(kept_tokens == token[:, None], axis=1)
    assert (kept_tokens[np.arange(len(token)), rank] == token).all() and (token >= 0).all()
    stored, entry = np.asarray(sampled.logprob), logp[np.arange(len(token)), rank]
    np.testing.assert_array_equal(stored.view(np.uint32), entry.view(np.uint32))
    assert (kept_tokens[:, 0] >= 0).all()
    assert (np.diff((kept_tokens >= 0).astype(int), axis=1) <= 0).all()
    np.testing.assert_array_equal(np.isneginf(logp), kept_tokens < 0)
    np.testing.assert_allclose(np.exp(logp.astype(np.float64)).sum(axis=1), 1, atol=1e-5)


@pytest.mark.parametrize("eager", [False, True])
def test_the_stored_logprob_is_the_distributions_to_the_bit(eager):
    raw, slot = logits_with_ties(SMALL, 9), np.resize([0, 1, 2, 3, 9], ROWS)
    for seed in range(1 if eager else 20):
        args = keys_of(ROWS), jnp.asarray(slot), jnp.asarray(raw), random_controls(np.random.default_rng(seed))
        check_recorded(*(TRUNCATED[SMALL].__wrapped__ if eager else TRUNCATED[SMALL])(*args))


def test_ties_by_hand():
    """p = 1/2, 1/8, 1/8, 1/8, 1/8: the first token has half the probability; a bit more adds only the first of the tied ones."""
    raw = np.full((ROWS, 300), -np.inf, np.float32)
    raw[:, 50], raw[:, [20, 90, 100, 200]] = np.log(4.0), 0.0
    cases = [
        ({"top_p": 0.5}, [50]),
        ({"top_p": 0.55}, [50, 20]),
        ({"top_p": 0.75}, [50, 20, 90]),
        ({"top_p": 0.76}, [50, 20, 90, 100]),
        ({"top_k": 3}, [50, 20, 90]),
        # Of the three most likely, 4 : 1 : 1, two have five sixths of their sum, not of the total.
        ({"top_k": 3, "top_p": 0.8}, [50, 20]),
        ({"min_p": 0.2}, [50, 20, 90, 100, 200]),
        ({"min_p": 0.3}, [50]),
        ({"min_p": 0.2, "top_p": 0.6}, [50, 20]),
        ({"temperature": 0.0}, [50]),
        # At temperature 1/2, 16 : 1 : 1 : 1 : 1.
        ({"temperature": 0.5, "top_p": 0.82}, [50, 20]),
        ({"temperature": 0.5, "top_p": 0.79}, [50]),
    ]
    each = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    columns = {n: np.array([c.get(n, v) for c, _ in cases] + [v] * (ROWS - len(cases))) for n, v in each.items()}
    sampled, _ = TRUNCATED[SMALL](keys_of(ROWS), np.zeros(ROWS, np.int32), raw, controls_of(ROWS, **columns))
    for (case, want), kept_tokens in zip(cases, np.asarray(sampled.kept_tokens), strict=False):
        assert kept_tokens[kept_tokens >= 0].tolist() == want, case


def test_temperature_zero_keeps_all_largest_logits():
    raw = np.zeros((ROWS, 300), np.float32)
    raw[:, [3, 30]] = 1.0
    raw[0, :100] = 1.0
    sampled, _ = TRUNCATED[SMALL](keys_of(ROWS), np.zeros(ROWS, np.int32), raw, controls_of(ROWS, temperature=0.0))
    assert (np.asarray(sampled.kept_tokens[1:, :3]) == [3, 30, -1]).all()
    np.testing.assert_allclose(sampled.logprob[1:], -np.log(2.0), rtol=1e-6)
    assert sampled.overflow[0] and not sampled.overflow[1:].any()


def test_end_tokens_are_masked_below_the_minimum_length():
    """An end token with nearly all the probability, full and truncated: never sampled in slots 0 to 2, always from 3 on."""
    raw = np.random.default_rng(0).normal(size=(ROWS, 300)).astype(np.float32)
    raw[:, 290] = 40.0
    slot, controls = np.resize([0, 2, 3, 8], ROWS), controls_of(ROWS, min_new_tokens=3)
    for program in (FULL, TRUNCATED[SMALL]):
        sampled, of = program(keys_of(ROWS), slot, raw, controls)
        assert not np.isin(np.asarray(sampled.token)[slot < 3], SMALL.eos).any()
        assert (np.asarray(sampled.token)[slot >= 3] == 290).all()
        np.testing.assert_allclose(np.exp(np.asarray(of.logp, np.float64)).sum(axis=1), 1, atol=1e-5)
        ends_masked = (slot < 3)[:, None] & np.isin(np.arange(300), SMALL.eos)
        exact = np.asarray(process_logits(jnp.asarray(np.where(ends_masked, -np.inf, raw)), jnp.ones(ROWS), 291))
        np.testing.assert_allclose(sampled.raw_logprob, exact[np.arange(ROWS), np.asarray(sampled.token)], atol=1e-5)


def test_nan_logits_give_nan_logprobs():
    raw = np.zeros((ROWS, 300), np.float32)
    raw[0, 44] = np.nan
    sampled, _ = TRUNCATED[SMALL](keys_of(ROWS), np.zeros(ROWS, np.int32), raw, controls_of(ROWS, top_k=3))
    assert np.isnan(sampled.logprob[0]) and np.isfinite(sampled.logprob[1:]).all()


NUM_SAMPLES, CHUNK = 200_000, 10_000


def test_frequencies_match_the_truncated_distribution():
    """200,000 samples from 11 of 291 tokens: chi-square, and none outside."""
    raw = np.random.default_rng(3).uniform(-2.5, 2.5, 300).astype(np.float32)
    controls, slot = controls_of(CHUNK, temperature=0.7, top_p=0.25, min_p=0.4), jnp.zeros(CHUNK, jnp.int32)
    decoding = Decoding(TINY, layouts()[1], SMALL, max_kept_tokens=MAX_KEPT)

    @jax.jit
    def tokens(uid):
        rows = jnp.broadcast_to(raw, (CHUNK, 300))
        keys = sample.row_keys(KEY, uid, jnp.zeros_like(uid)[:, None])
        return sample.sample_tokens(keys, slot, rows, controls, jnp.array(True), decoding).token

    sampled = np.concatenate([np.asarray(tokens(jnp.arange(i, i + CHUNK))) for i in range(0, NUM_SAMPLES, CHUNK)])
    (kept,), full, (close,) = kept_by_hand(raw[None], SMALL, jax.tree.map(lambda x: x[:1], controls), np.zeros(1))
    probability = np.exp(full[0, kept])
    counts = np.bincount(sampled, minlength=300)
    assert not close and 8 <= len(kept) <= MAX_KEPT and counts[kept].sum() == NUM_SAMPLES
    p_value = stats.chisquare(counts[kept], NUM_SAMPLES * probability / probability.sum()).pvalue
    print(f"{len(kept)} tokens: chi-square p = {p_value:.4f}")
    assert p_value > 1e-3


def test_small_errors_of_the_logits_change_few_tokens():
    """Ranks change, tokens do not, because noise is keyed by id. Keyed by rank, a tenth of the tokens would change."""
    raw = np.random.default_rng(1).normal(size=(ROWS, 300)).astype(np.float32) / 10
    changed = []
    for i in range(40):
        noisy = raw + 1e-2 * np.random.default_rng(i).normal(size=raw.shape).astype(np.float32)
        keys, slot, controls = keys_of(ROWS), np.full(ROWS, i), controls_of(ROWS, top_k=8, min_new_tokens=0)
        # A gap after the eight most likely, so that the set stays the same.
        lift = np.where(np.arange(300) % 37 == 5, 3.0, 0.0).astype(np.float32)
        (a, _), (b, _) = (TRUNCATED[SMALL](keys, slot, x + lift, controls) for x in (raw, noisy))
        changed.append(np.asarray(a.token) != np.asarray(b.token))
    assert 0 < np.mean(changed) < 0.03


def test_scoring_kept_tokens_gives_the_sampled_distribution():
    """`kept_logprobs` of the same logits is the sampled distribution; finite in a row without kept tokens."""
    raw, slot = logits_with_ties(SMALL, 4), np.resize([0, 5], ROWS)
    sampled, of = TRUNCATED[SMALL](keys_of(ROWS), slot, raw, controls := random_controls(np.random.default_rng(4)))
    again = kept_logprobs(jnp.asarray(raw), controls.temperature, sampled.kept_tokens)
    np.testing.assert_allclose(again, of.logp, atol=1e-6)
    none = kept_logprobs(jnp.asarray(raw), controls.temperature, jnp.full((ROWS, MAX_KEPT), -1))
    assert np.isfinite(none).all()


@pytest.mark.parametrize("vocab, sorted_at_most", [(LARGE, MAX_KEPT + 1)])
def test_no_sort_is_larger_than_max_kept_tokens(vocab, sorted_at_most):
    """XLA:CPU has a top-k kernel, and falls back to sorting if it cannot see that only the first K are used."""
    args = keys_of(ROWS), np.zeros(ROWS, np.int32), np.zeros((ROWS, ENTRIES[vocab]), np.float32), controls_of(ROWS)
    text = TRUNCATED[vocab].lower(*args).compile().as_text()
    sorts = [int(n) for n in re.findall(r"\[\d+,(\d+)\]\S* sort\(", text)]
    assert max(sorts, default=0) <= sorted_at_most, sorts
    assert text.count('custom_call_target="TopK"') == 2
