"""The engine: chunks, growth, compaction, refill and stop strings change when a row is computed, and never its tokens."""

import dataclasses
from collections import Counter
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from setups import FAMILIES, SMALL, engine, layouts, make_params, make_policy, make_prompts

from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.rollout.batch_sizes import BatchSizes, doubled, first_window
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Finish, check

KEY = jax.random.key(4)
P, G, C = 8, 4, 12
ONE_LAYER = dataclasses.replace(SMALL, layers=1)
# Several end tokens, so that most rows end early.
VOCAB = Vocabulary(size=16, pad=0, eos=(15, 11, 4))
WHOLE = EngineConfig(decode_chunk=C, compact=False, window=C)
# Three chunks of four steps; windows of 4, 8 and 12 slots.
# Two of them are a part of others, and run by themselves in the long run.
FORMS = {
    "chunks": EngineConfig(decode_chunk=4, compact=False, window=C),
    "growth": EngineConfig(decode_chunk=8, compact=False, window=4),
    "compaction": EngineConfig(decode_chunk=4, window=4),
    "refill": EngineConfig(decode_chunk=4, max_concurrent_prompts=4, window=4),
    "refill, pairs": EngineConfig(decode_chunk=4, max_concurrent_prompts=2, rows_per_prompt_cache=2, window=4),
    "every step": EngineConfig(decode_chunk=4, eos_interval=1, max_concurrent_prompts=2, compact=False),
}


def of(form: EngineConfig, cfg=ONE_LAYER, sizes=(1, 1, 1), **more) -> Engine:
    more = {"prompts": P, "samples": G, "max_new_tokens": C, "temperature": 3.0, **more}
    return engine(cfg, layouts(sizes)[1], VOCAB, engine=form, **more)


def policy_of(cfg=ONE_LAYER, sizes=(1, 1, 1)):
    train, decode = layouts(sizes)
    return make_policy(cfg, make_params(cfg, train), train, decode)


def run(form: EngineConfig, cfg=ONE_LAYER, sizes=(1, 1, 1), **more):
    session = of(form, cfg, sizes, **more).session(policy_of(cfg, sizes), KEY)
    ids, order = session.add(make_prompts(P)), []
    while session.pending:
        order += session.advance().tolist()
    assert sorted(order) == ids.tolist() == list(range(P))
    return check(session.take(ids)), session.stats, order


def same(a, b) -> None:
    for name in ("tokens", "length", "sampled", "version", "finish", "temperature"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name), err_msg=name)
    # Other shapes, other kernels: rounding of sums of a few dozen f32 products.
    np.testing.assert_allclose(a.behavior_logprobs, b.behavior_logprobs, atol=1e-4)
    np.testing.assert_allclose(a.entropy, b.entropy, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        pytest.param(form, marks=[pytest.mark.soak] if name in ("growth", "refill") else [])
        for name, form in FORMS.items()
    ],
    ids=FORMS,
)
def test_engine_config_changes_no_token(form):
    want, all_at_once, _ = run(WHOLE)
    got, stats, _ = run(form)
    same(got, want)
    assert set(want.finish) == {Finish.EOS, Finish.LENGTH} and len(set(want.length)) > 5
    assert stats.tokens == all_at_once.tokens == want.sampled.sum()
    assert all_at_once.chunks == 1 and stats.chunks >= 3


@pytest.mark.slow
def test_another_mesh_changes_no_token():
    """Each shard admits, removes and prefills its own prompts."""
    form = dataclasses.replace(FORMS["refill, pairs"], max_concurrent_prompts=4)
    same(run(form, sizes=(2, 2, 2))[0], run(WHOLE)[0])


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["wide", MeshConfig(data=1, fsdp=2, tensor=4)], ids=["wide", "own axes"])
def test_another_policy_layout_changes_no_token(choice):
    """Published from FSDP 2 x 2 x 2 in one jit, to one tensor shard per pair of devices, or to a mesh with other axes."""
    train = layouts((2, 2, 2))[0]
    decode = train.for_decode(choice)
    policy = make_policy(ONE_LAYER, make_params(ONE_LAYER, train), train, decode)
    made = Engine(EngineModel(ONE_LAYER, decode, VOCAB), of(WHOLE).cfg, 7)
    same(made.generate(policy, make_prompts(P), KEY), run(WHOLE)[0])


@pytest.mark.slow
def test_sliding_windows_shorter_than_the_cache_change_no_token():
    """As in Gemma 2: a ring buffer of 5 slots beside one that grows past it, both moved while rows of several ages are active."""
    cfg = FAMILIES["gemma2, window 5"]
    same(run(FORMS["refill, pairs"], cfg)[0], run(WHOLE, cfg)[0])


@pytest.mark.slow
def test_compaction_and_refill_save_work():
    plain, compact, refill = (run(FORMS[name])[1] for name in ("growth", "compaction", "refill, pairs"))
    assert plain.row_steps == plain.steps * P * G
    assert compact.row_steps < plain.row_steps and refill.row_steps < plain.row_steps


def test_groups_are_reported_as_they_finish():
    """Four concurrent prompts: a later prompt with short completions is reported before the longest one."""
    rollouts, _, order = run(FORMS["refill"])
    longest = rollouts.length.reshape(P, G).max(axis=1)
    assert order != sorted(order)
    session = of(FORMS["refill"]).session(policy_of(), KEY)
    session.add(make_prompts(P))
    while not len(first := session.advance()):
        pass
    early = session.rollouts(first)
    assert len(first) < P and (longest[first] <= 4).all()
    np.testing.assert_array_equal(early.tokens, rollouts.tokens.reshape(P, G, C)[first].reshape(-1, C))


def test_an_abandoned_session_does_not_affect_the_next():
    """As in a run that is stopped between chunks and restarted."""
    abandoned = of(FORMS["refill"]).session(policy_of(), KEY)
    abandoned.add(make_prompts(P))
    abandoned.advance()
    same(run(FORMS["refill"])[0], run(WHOLE)[0])


def test_limits_per_prompt():
    whole, _, _ = run(WHOLE)
    limit = np.array([1, 2, 3, 4, 5, 6, 7, 12], np.int32)
    got = of(FORMS["refill"]).generate(policy_of(), make_prompts(P), KEY, limit=limit)
    each = np.repeat(limit, G)
    np.testing.assert_array_equal(got.length, np.minimum(whole.length, each))
    np.testing.assert_array_equal(got.tokens, np.where(np.arange(C) < each[:, None], whole.tokens, VOCAB.pad))
    cut = whole.length > each
    np.testing.assert_array_equal(got.finish, np.where(cut, int(Finish.LENGTH), whole.finish))


@pytest.mark.slow
def test_fewer_prompts_run_smaller_programs_with_equal_tokens():
    """Three prompts in an active batch of four, in an engine for eight."""
    whole, _, _ = run(WHOLE)
    some = jax.tree.map(lambda x: x[2:5], make_prompts(P))
    session = of(FORMS["compaction"]).session(policy_of(), KEY)
    ids = session.add(some)
    while session.pending:
        session.advance()
    np.testing.assert_array_equal(session.take(ids).tokens, whole.tokens.reshape(P, G, C)[2:5].reshape(-1, C))
    assert session.stats.row_steps <= session.stats.steps * 4 * G


@pytest.mark.slow
def test_nothing_compiles_after_the_warm_up():
    """Random numbers of prompts, lengths and limits in one engine; part `soak` of `benchmarks.engine` is the longer version."""
    soaked, policy, rng = of(FORMS["refill"], max_new_tokens=8), policy_of(), np.random.default_rng(0)
    soaked.warm(policy)
    soaked.generate(policy, make_prompts(P), KEY)
    counter = CompileCounter()
    for seed in range(20):
        num = int(rng.integers(1, 2 * P))
        prompts = make_prompts(max(num, 2), slots=7, seed=seed)
        soaked.generate(
            policy, jax.tree.map(lambda x, n=num: x[:n], prompts), KEY, limit=rng.integers(1, 9, num).astype(np.int32)
        )
    assert counter.take()["compiles"] == 0


@pytest.mark.parametrize("limit", [0, C + 1, -1])
def test_a_limit_out_of_range_is_refused(limit):
    """0 for all rows would loop forever; C + 1 would write beyond the last slot."""
    each = np.full(P, 3, np.int32)
    each[-1] = limit
    with pytest.raises(ValueError, match=rf"^limit: got \[3, .*, {limit}\], want {P} numbers from 1 to {C}$"):
        of(WHOLE).generate(policy_of(), make_prompts(P), KEY, limit=each)
    with pytest.raises(ValueError, match=rf"^limit: got \[3, 3\], want {P} numbers from 1 to {C}$"):
        of(WHOLE).generate(policy_of(), make_prompts(P), KEY, limit=np.full(2, 3, np.int32))


@pytest.mark.parametrize("length", [0, 8])
def test_a_prompt_without_tokens_or_with_too_many_is_refused(length):
    """An empty prompt would start from the last slot's content."""
    prompts = make_prompts(2, slots=9)
    prompts = prompts.replace(length=np.array([3, length], np.int32))
    with pytest.raises(
        ValueError,
        match=rf"^prompts.length: got \[3, {length}\], want 2 numbers from 1 to 7; the most is the engine's prompt_slots$",
    ):
        of(WHOLE).generate(policy_of(), prompts, KEY)


def test_no_prompts_are_refused():
    none = jax.tree.map(lambda x: x[:0], make_prompts(P))
    with pytest.raises(ValueError, match=r"^prompts: got none, want one or more$"):
        of(WHOLE).generate(policy_of(), none, KEY)


TEXT = dict(enumerate("_abcdefghijklmno"))


def text_of(tokens: list[int]) -> str:
    return "".join(TEXT[t] for t in tokens)


def stopping(stop: tuple[str, ...], texts_of, form: EngineConfig) -> Engine:
    """A new engine with stop strings, which the shared ones lack; it reuses their programs."""
    shared = of(form)
    model = EngineModel(ONE_LAYER, layouts()[1], VOCAB, SimpleNamespace(spellings=texts_of))
    made = Engine(model, shared.cfg, 7, stop=stop)
    made.programs = shared.programs
    return made


def check_stops(stop: tuple[str, ...], texts_of, form: EngineConfig) -> int:
    """Check that each row ends with the first token after which its text contains a stop string, by testing every prefix. Returns
    the number of such rows."""
    whole, found = run(WHOLE)[0], 0
    got = stopping(stop, texts_of, form).generate(policy_of(), make_prompts(P), KEY)
    for b, tokens in enumerate(whole.tokens.tolist()):
        length = int(whole.length[b])
        ends = [n for n in range(1, length + 1) if any(s in text for text in texts_of(tokens[:n]) for s in stop)]
        n = min(ends, default=length)
        found += bool(ends)
        assert got.tokens[b].tolist() == [*tokens[:n], *[VOCAB.pad] * (C - n)]
        assert got.finish[b] == (Finish.STOP if ends else whole.finish[b])
        np.testing.assert_array_equal(got.sampled[b], np.arange(C) < n)
        np.testing.assert_array_equal(got.behavior_logprobs[b, n:], 0.0)
    return found


def test_a_stop_string_ends_a_row_with_the_token_that_completes_it():
    """Two tokens long, so that it may span two chunks."""
    whole, _, _ = run(WHOLE)
    texts = [text_of(t[:n]) for t, n in zip(whole.tokens.tolist(), whole.length, strict=True)]
    pairs = Counter(pair for text in texts for pair in {text[i : i + 2] for i in range(len(text) - 1)})
    stop = tuple(pair for pair, _ in pairs.most_common(2))
    assert 2 < check_stops(stop, lambda tokens: (text_of(tokens),), FORMS["chunks"]) < P * G


@pytest.mark.parametrize("stop", [("\ufffd",), ("\ufffd\ufffd",), ("a\ufffd",)])
def test_a_stop_string_of_half_characters_ends_a_row_at_once(stop):
    """After half of an e with acute the text contains U+FFFD, and after the other half it does not: plain bisection misses it."""
    halves = [b"\xc3", b"\xa9", b"a"]
    text = lambda tokens: b"".join(halves[t % 3] for t in tokens).decode(errors="replace")  # noqa: E731
    assert 8 < check_stops(stop, lambda tokens: (text(tokens),), WHOLE) < P * G


def test_sizes_are_few():
    assert doubled(128, 1024, 2) == (128, 256, 512, 1024)
    assert doubled(128, 300, 2) == (128, 256, 300)
    assert doubled(5, 5, 2) == (5,)
    form = EngineConfig(max_concurrent_prompts=24, rows_per_prompt_cache=2)
    cfg = dataclasses.replace(of(form).cfg, prompts=64, max_new_tokens=1024)
    sizes = BatchSizes.of(cfg, 128, 512, 700, 4)
    # 24 over 4 shards is 6 each; 6, 3 and 2 prompts of 4 rows; at least 8 rows per shard.
    assert sizes == BatchSizes(4, (24, 12, 8), 2, 2, (128, 256, 512, 700), (128, 512), (128, 512, 1536))


@pytest.mark.parametrize(
    "chunk, interval, want", [(128, 8, (128, 8)), (100, 8, (100, 5)), (5, 8, (5, 5)), (7, 2, (7, 1))]
)
def test_chunks_are_whole_intervals(chunk, interval, want):
    made = of(EngineConfig(decode_chunk=chunk, eos_interval=interval), max_new_tokens=200)
    assert (made.decoding.steps, made.decoding.interval) == want


def test_the_initial_window_fits_the_caches_of_a_cpu():
    """M of the benchmarks: 64 rows x 4 heads x 64 numbers, keys and values in f32, are 128 KiB per slot; 32 slots fit into 4 MiB.
    Fewer than 64 were measured to gain nothing."""
    m = dataclasses.replace(SMALL, heads=8, kv_heads=4, head_dim=64)
    at = lambda rows: first_window(RolloutConfig(prompts=rows // 8, samples=8), m, layouts()[1])  # noqa: E731
    assert (at(32), at(8), at(64), at(512), at(2048)) == (64, 256, 64, 64, 64)
