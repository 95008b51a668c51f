"""Sessions: requests that join late, stop, resume, change their policy or are canceled have the tokens of an uninterrupted call."""

import dataclasses
from functools import cache
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from setups import FAMILIES, SMALL, engine, layouts, make_params, make_policy, make_prompts, to_batch, to_experience

from jaxrl_llm.distribution.score import Scoring
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.parallel import hosts
from jaxrl_llm.rollout.config import EngineConfig, PerSample
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.requests import split
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Finish, Rollouts, check
from jaxrl_llm.update.step import jit_score

KEY = jax.random.key(4)
P, G, C = 8, 4, 12
ONE_LAYER = dataclasses.replace(SMALL, layers=1)
VOCAB = Vocabulary(size=16, pad=0, eos=(15, 11, 4))
# A ring of 5 slots beside one that grows past it: a row that waits would lose keys of the first.
SLIDING = FAMILIES["gemma2, window 5"]
# Chunks of 4 steps, rings of 4, 8 and 12 slots, pairs of rows that share a prompt cache, two to four prompts at once.
FORM = EngineConfig(decode_chunk=4, max_concurrent_prompts=4, rows_per_prompt_cache=2, window=4)
TEMPERATURES = (3.0, 1.5)


def of(cfg=ONE_LAYER, sizes=(1, 1, 1), form=FORM, **more) -> Engine:
    more = {"prompts": P, "samples": G, "max_new_tokens": C, "temperature": 3.0, **more}
    return engine(cfg, layouts(sizes)[1], VOCAB, engine=form, **more)


@cache
def params_of(cfg=ONE_LAYER, sizes=(1, 1, 1), seed=0):
    return make_params(cfg, layouts(sizes)[0], seed)


def policy_of(cfg=ONE_LAYER, sizes=(1, 1, 1), seed=0, version=3):
    return make_policy(cfg, params_of(cfg, sizes, seed), *layouts(sizes), version)


def some(prompts, index):
    return jax.tree.map(lambda x: x[np.atleast_1d(index)], prompts)


def controls_of(engine: Engine, num: int, temperature: float):
    return engine.controls(num, temperature)


@cache
def whole(temperature: float = 3.0, cfg=ONE_LAYER, seed=0) -> Rollouts:
    """All prompts with all samples, in one call on one device."""
    form = EngineConfig(decode_chunk=C, compact=False, window=C)
    sampler = of(cfg, form=form)
    return sampler.generate(policy_of(cfg, seed=seed), make_prompts(P), KEY, sampler.controls(P, temperature))


def finish(session) -> None:
    while session.pending:
        session.advance()


def each_like_its_own(got: Rollouts, temperature, cfg, rows, limit) -> None:
    """Each row of `got`, sampled at a temperature of its own, is that of the call in which all rows have this temperature."""
    np.testing.assert_array_equal(got.temperature, np.float32(temperature))
    for t in set(temperature):
        at = np.array(temperature) == t
        part = {name: x[at] for name, x in vars(got).items() if name not in ("prompts", "prompt") and x is not None}
        same_rows(SimpleNamespace(**part), whole(t, cfg), rows[at], np.array(limit)[at])


def same_rows(got: Rollouts, want: Rollouts, rows, limit=C) -> None:
    """`got` has the rows `rows` of `want`, cut at `limit`."""
    length = np.minimum(want.length[rows], limit)
    inside = np.arange(C) < length[:, None]
    np.testing.assert_array_equal(got.length, length)
    np.testing.assert_array_equal(got.tokens, np.where(inside, want.tokens[rows], VOCAB.pad))
    np.testing.assert_array_equal(got.sampled, inside)
    np.testing.assert_array_equal(got.version, np.where(inside, 3, 0))
    np.testing.assert_array_equal(
        got.finish, np.where(want.length[rows] > length, int(Finish.LENGTH), want.finish[rows])
    )
    # Other shapes, other kernels: rounding of sums of a few dozen f32 products.
    np.testing.assert_allclose(got.behavior_logprobs, np.where(inside, want.behavior_logprobs[rows], 0), atol=1e-4)
    np.testing.assert_allclose(got.entropy, np.where(inside, want.entropy[rows], 0), atol=1e-4)


@st.composite
def schedules(draw):
    """Operations: ("add", prompt, first sample, samples, temperatures, limits) or (name, index into the open requests)."""
    add = st.integers(0, G - 1).flatmap(
        lambda first: st.integers(1, G - first).flatmap(
            lambda num: st.tuples(
                st.just("add"), st.integers(0, P - 1), st.just(first), st.just(num),
                st.lists(st.sampled_from(TEMPERATURES), min_size=num, max_size=num),
                st.lists(st.integers(1, C), min_size=num, max_size=num),
            )
        )
    )  # fmt: skip
    which = st.integers(0, 99)
    other = st.one_of(
        st.just(("advance",)), st.just(("advance",)), st.tuples(st.just("stop"), which),
        st.tuples(st.just("resume"), which), st.tuples(st.just("cancel"), which), st.just(("use",)),
    )  # fmt: skip
    return [draw(add), *draw(st.lists(st.one_of(add, other), min_size=4, max_size=24))]


class Play:
    """Plays a schedule in a session; at the end all stopped requests resume, and each has the tokens of `whole`."""

    def __init__(self, cfg, sizes):
        self.cfg, self.sizes, self.engine = cfg, sizes, of(cfg, sizes)
        self.session = self.engine.session(policy_of(cfg, sizes), KEY)
        self.open, self.stopped, self.prompts = {}, set(), make_prompts(P)

    def __call__(self, schedule) -> None:
        for name, *args in schedule:
            getattr(self, name)(*args)
        if self.stopped:
            self.session.resume(sorted(self.stopped))
        finish(self.session)
        for id, (prompt, first, num, temperature, limit) in self.open.items():
            rows = prompt * G + first + np.arange(num)
            each_like_its_own(self.session.take(id), temperature, self.cfg, rows, limit)
        assert not self.session.requests and not self.session.batch.active.any()
        assert sorted(self.session.output.free) == list(range(len(self.session.output.length)))

    def add(self, prompt, first, num, temperature, limit):
        controls = self.engine.controls(num).replace(temperature=np.float32(temperature))
        ids = self.session.add(some(self.prompts, prompt), num, controls, np.array([limit]), first_sample=first)
        self.open[int(ids[0])] = (prompt, first, num, temperature, limit)

    def advance(self):
        self.session.advance()

    def pick(self, which):
        return sorted(self.open)[which % len(self.open)] if self.open else None

    def stop(self, which):
        if (id := self.pick(which)) is not None:
            self.session.stop(id)
            self.stopped.add(id)

    def resume(self, which):
        if self.stopped:
            id = sorted(self.stopped)[which % len(self.stopped)]
            self.session.resume(id)
            self.stopped.remove(id)

    def cancel(self, which):
        if (id := self.pick(which)) is not None:
            self.session.cancel(id)
            self.stopped.discard(id)
            del self.open[id]

    def use(self):
        self.session.use(policy_of(self.cfg, self.sizes))


CASES = {"one device": (ONE_LAYER, (1, 1, 1)), "(2,2,2)": (ONE_LAYER, (2, 2, 2)), "sliding": (SLIDING, (1, 1, 1))}


@pytest.mark.slow
@pytest.mark.parametrize("num", [20, pytest.param(200, marks=pytest.mark.soak)])
@pytest.mark.parametrize("case", CASES)
def test_random_schedules_change_no_token(case, num):
    @settings(
        max_examples=num, deadline=None, database=None, derandomize=True,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )  # fmt: skip
    @given(schedule=schedules())
    def play(schedule):
        Play(*CASES[case])(schedule)

    play()


@pytest.mark.parametrize(
    "sizes", [(1, 1, 1), pytest.param((2, 2, 2), marks=pytest.mark.soak)], ids=["one device", "(2,2,2)"]
)
def test_each_sample_of_a_group_has_its_own_temperature(sizes):
    """Sample i has value i mod 3, whichever request asks for it: of 4 samples, and of samples 5 to 8."""
    per_sample = PerSample(temperature=(3.0, 1.5, 1.5))
    session = of(sizes=sizes, samples=8, per_sample=per_sample).session(policy_of(sizes=sizes), KEY)
    prompts = make_prompts(P)
    ids = session.add(prompts, 4)
    more = session.add(some(prompts, [0, 1]), 4, first_sample=5)
    finish(session)
    got = session.take(ids)
    each_like_its_own(got, [3.0, 1.5, 1.5, 3.0] * P, ONE_LAYER, np.arange(P * 4), [C] * P * 4)
    np.testing.assert_array_equal(session.take(more).temperature, np.float32([1.5, 3.0, 1.5, 1.5] * 2))
    # A row that took its group's first temperature would have other tokens.
    assert (whole(3.0).tokens != whole(1.5).tokens).any(axis=1).mean() > 0.5


def known_part(want: Rollouts, n: np.ndarray) -> list[list[int]]:
    """The first n[b] tokens of each row."""
    return [tokens[:k].tolist() for tokens, k in zip(want.tokens, n, strict=True)]


@pytest.mark.parametrize("cfg", [ONE_LAYER, SLIDING], ids=["whole attention", "sliding"])
def test_rows_continue_from_given_tokens(cfg):
    """Each row from another number of them, in a new session whose rings are still small."""
    want, rng = whole(cfg=cfg), np.random.default_rng(0)
    n = np.minimum(rng.integers(0, C + 1, P * G), want.length - 1)
    assert n.max() > 8
    session = of(cfg).session(policy_of(cfg), KEY)
    ids = session.add(make_prompts(P), known=known_part(want, n))
    finish(session)
    got = check(session.take(ids))
    np.testing.assert_array_equal(got.tokens, want.tokens)
    np.testing.assert_array_equal(got.length, want.length)
    np.testing.assert_array_equal(got.finish, want.finish)
    slot = np.arange(C)
    np.testing.assert_array_equal(got.sampled, (slot >= n[:, None]) & (slot < want.length[:, None]))
    np.testing.assert_array_equal(got.version, np.where(got.sampled, 3, 0))
    np.testing.assert_allclose(got.behavior_logprobs, np.where(got.sampled, want.behavior_logprobs, 0), atol=1e-4)


def stopped_after(session, chunks: int, **more):
    """Requests for all prompts, stopped after some chunks."""
    ids = session.add(make_prompts(P), **more)
    for _ in range(chunks):
        session.advance()
    session.stop(ids)
    return ids


def test_stopped_rollouts_continue_in_another_session():
    """As after a restart: what was sampled keeps its log-probs and versions; rows that had ended stay as they are."""
    want = whole()
    ids = stopped_after(first := of().session(policy_of(), KEY), 3)
    part = check(first.take(ids))
    assert set(part.finish) >= {Finish.UNFINISHED, Finish.EOS} and 0 < part.length.max() < C
    second = of().session(policy_of(), KEY)
    ids = second.add(part.prompts, known=part)
    finish(second)
    same_rows(second.take(ids), want, np.arange(P * G))


def test_a_row_that_ended_is_not_decoded_again():
    want = whole()
    session = of().session(policy_of(), KEY)
    ids = session.add(want.prompts, known=want)
    np.testing.assert_array_equal(session.advance(), ids)
    assert not session.pending and session.stats.steps == 0
    same_rows(session.take(ids), want, np.arange(P * G))


@pytest.mark.parametrize("when", ["resumed", "active"])
def test_log_probs_are_the_scores_of_the_policy_that_sampled(when):
    """A newer policy after a chunk of four: each token has the version of its policy, and its score under that policy."""
    session = of(form=dataclasses.replace(FORM, max_concurrent_prompts=8)).session(policy_of(), KEY)
    if when == "resumed":
        ids = stopped_after(session, 1)
        session.use(policy_of(seed=1, version=5))
        session.resume(ids)
    else:
        ids = session.add(make_prompts(P))
        session.advance()
        session.use(policy_of(seed=1, version=5))
    finish(session)
    got = check(session.take(ids))
    slot, border = np.arange(C), 4
    np.testing.assert_array_equal(got.version, np.where(got.sampled, np.where(slot < border, 3, 5), 0))
    before = slot < np.minimum(whole().length, border)[:, None]
    np.testing.assert_array_equal(got.tokens[before], whole().tokens[before])
    assert (got.length > border).sum() > 5
    layout = layouts()[0]
    batch = to_batch(to_experience(got))
    score = jit_score(Scoring(ONE_LAYER, layout, VOCAB.size))
    for version, seed in ((3, 0), (5, 1)):
        scores = score(params_of(seed=seed), hosts.put(batch, layout.sharding(("rows", None))))
        at = np.asarray(batch.loss_mask) & (of_batch(got.version, batch) == version)
        assert at.sum() > 20
        np.testing.assert_allclose(np.asarray(scores.logprobs)[at], batch.behavior_logprobs[at], atol=1e-4)


def of_batch(column: np.ndarray, batch) -> np.ndarray:
    """A column [B C] in the slots of a batch with one row per sequence."""
    out = np.zeros(batch.tokens.shape, column.dtype)
    for b, row in enumerate(np.asarray(batch.loss_mask)):
        at = np.flatnonzero(row)
        out[b, at] = column[b, : len(at)]
    return out


def test_a_turn_is_appended_behind_what_was_sampled():
    """Forced tokens, not equally many per row, behind rows that ended and rows at their limit. The same tokens as if all of it had
    been given to a new request."""
    turns = [[(b + i) % 13 + 1 for i in range(b % 4)] for b in range(P * G)]
    session = of().session(policy_of(), KEY)
    ids = session.add(make_prompts(P), limit=np.full(P, 6))
    finish(session)
    before = session.rollouts(ids)
    session.resume(ids, turns, limit=np.full(P, C))
    finish(session)
    got = check(session.take(ids))
    given_tokens = [
        [*tokens[:n], *turn] for tokens, n, turn in zip(before.tokens.tolist(), before.length, turns, strict=True)
    ]
    new = of().session(policy_of(), KEY)
    ids = new.add(make_prompts(P), known=given_tokens)
    finish(new)
    want = new.take(ids)
    continues = np.array([bool(turn) for turn in turns]) | (before.finish == Finish.LENGTH)
    assert 0 < continues.sum() < P * G
    np.testing.assert_array_equal(got.tokens[continues], want.tokens[continues])
    np.testing.assert_array_equal(got.finish[continues], want.finish[continues])
    np.testing.assert_array_equal(got.tokens[~continues], before.tokens[~continues])
    np.testing.assert_array_equal(got.finish[~continues], before.finish[~continues])
    for b, (n, turn) in enumerate(zip(before.length, turns, strict=True)):
        forced = np.zeros(C, bool)
        forced[n : n + len(turn)] = True
        np.testing.assert_array_equal(got.sampled[b], (np.arange(C) < got.length[b]) & ~forced)
        assert not got.behavior_logprobs[b, forced].any() and not got.version[b, forced].any()


def test_a_limit_that_is_raised_continues_the_rows_it_ended():
    session = of().session(policy_of(), KEY)
    limit = np.arange(P * G).reshape(P, G) % 5 + 1
    ids = session.add(make_prompts(P), limit=limit)
    finish(session)
    same_rows(session.rollouts(ids), whole(), np.arange(P * G), limit.reshape(-1))
    session.resume(ids, limit=limit + 4)
    finish(session)
    same_rows(session.take(ids), whole(), np.arange(P * G), limit.reshape(-1) + 4)


def test_samples_are_numbered_from_the_first():
    """Two requests of one prompt, in the end together the group of one request."""
    session, one = of().session(policy_of(), KEY), some(make_prompts(P), 3)
    ids = np.concatenate([session.add(one, 3), session.add(one, 1, first_sample=3)])
    finish(session)
    assert ids.tolist() == [0, 1]
    same_rows(session.take(0), whole(), 3 * G + np.arange(3))
    same_rows(session.take(1), whole(), np.array([3 * G + 3]))


def test_later_requests_enlarge_the_batch():
    session = of().session(policy_of(), KEY)
    first = session.add(some(make_prompts(P), [0]))
    session.advance()
    small = session.batch.num_slots
    second = session.add(some(make_prompts(P), np.arange(1, P)))
    finished = [*session.advance().tolist()]
    assert session.batch.num_slots > small
    while session.pending:
        finished += session.advance().tolist()
    assert sorted(finished) == [*first, *second]
    same_rows(session.take([*first, *second]), whole(), np.arange(P * G))


def test_the_number_of_written_keys_stays_small():
    """It is an int32 on the device; 2 ** 31 steps are 25 days at a millisecond each."""
    form = dataclasses.replace(FORM, window=C, max_concurrent_prompts=8)
    session = of(SLIDING, form=form).session(policy_of(SLIDING), KEY)
    ids = session.add(make_prompts(P))
    session.advance()
    # Rings of 5 and of 12 slots hold the same keys after 60 more.
    session.batch.count += 60 * (2**30 // 60 + 1)
    session.advance()
    assert session.batch.count == 8
    finish(session)
    same_rows(session.take(ids), whole(cfg=SLIDING), np.arange(P * G))


def test_truncation_and_minimum_length_continue_with_a_row():
    """The kept tokens of a row that was stopped twice are those of one that was not."""
    sampler = of(top_p=0.9, max_kept_tokens=6, min_new_tokens=5, raw_logprobs=True)
    want = sampler.generate(policy_of(), make_prompts(P), KEY)
    session = sampler.session(policy_of(), KEY)
    ids = stopped_after(session, 1)
    for _ in range(2):
        session.resume(ids)
        session.advance()
        session.stop(ids)
    session.resume(ids)
    finish(session)
    got = check(session.take(ids))
    for name in ("tokens", "kept_tokens", "control_state", "finish"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    assert (got.length >= 5).all() and (got.kept_tokens[got.sampled] >= 0).any()
    np.testing.assert_allclose(got.raw_logprobs, want.raw_logprobs, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["one device", "(2,2,2)", pytest.param("sliding", marks=pytest.mark.soak)])
def test_nothing_compiles_after_the_warm_up(case):
    cfg, sizes = CASES[case]
    sampler = of(cfg, sizes, max_new_tokens=8)
    sampler.warm(policy_of(cfg, sizes))
    counter, rng = CompileCounter(), np.random.default_rng(0)
    session = sampler.session(policy_of(cfg, sizes), KEY)
    for _ in range(30):
        session.add(some(make_prompts(P), rng.integers(0, P, rng.integers(1, 5))), int(rng.integers(1, 6)))
        for id in rng.choice(sorted(session.requests), 2, replace=False):
            request = session.requests[int(id)]
            session.stop(id)
            if (session.output.length[request.rows] < 7).all():
                session.resume(id, [[1]] * len(request.rows))
            elif rng.random() < 0.5:
                session.cancel(id)
        session.use(policy_of(cfg, sizes))
        for _ in range(rng.integers(1, 4)):
            session.advance()
    finish(session)
    assert counter.take()["compiles"] == 0


@pytest.mark.slow
def test_a_thousand_requests_leak_nothing():
    sampler, rng = of(), np.random.default_rng(0)
    session, prompts, done, rows, arrays = sampler.session(policy_of(), KEY), make_prompts(P), 0, [], []
    asked = {}
    while done < 1000:
        while len(session.requests) < 6:
            prompt, limit = rng.integers(0, P), rng.integers(1, C + 1, 1)
            asked[int(session.add(some(prompts, prompt), limit=limit)[0])] = prompt, limit
        for id in session.advance():
            prompt, limit = asked[int(id)]
            same_rows(session.take(id), whole(), prompt * G + np.arange(G), limit)
            done += 1
        if rng.random() < 0.1:
            session.cancel(rng.choice(sorted(session.requests)))
        rows.append(len(session.output.length))
        arrays.append(len(jax.live_arrays()))
    # Twice as many at most: the buffer doubles when it is full.
    assert max(rows) <= 2 * 6 * G and len(session.requests) <= 6 and len(session.queue) <= 6 * G
    # Compiled programs hold constants, so the first requests add some.
    assert max(arrays[len(arrays) // 2 :]) <= max(arrays[: len(arrays) // 2])


TEXT = dict(enumerate("_abcdefghijklmno"))


class Letters:
    """A tokenizer with one letter per token."""

    def prompt_batch(self, prompts):
        return [[list(TEXT.values()).index(c) for c in prompt] for prompt in prompts]

    def spellings(self, ids):
        return ("".join(TEXT[i] for i in ids),)


def spelling(**more) -> Engine:
    shared = of(**more)
    made = Engine(EngineModel(ONE_LAYER, layouts()[1], VOCAB, Letters()), shared.cfg, 7)
    made.programs = shared.programs
    return made


def test_stop_strings_of_a_request_are_found_across_a_pause_and_not_in_forced_tokens():
    want = whole()
    texts = ["".join(TEXT[t] for t in tokens[:n]) for tokens, n in zip(want.tokens, want.length, strict=True)]
    # A pair of letters of which one is sampled before the pause after four tokens, and one after it.
    b = next(b for b, text in enumerate(texts) if len(text) > 6 and text.find(text[3:5]) == 3)
    pair, prompt, sample = texts[b][3:5], some(make_prompts(P), b // G), b % G
    session = spelling().session(policy_of(), KEY)
    stopping = session.add(prompt, 1, first_sample=sample, stop=[pair])
    plain = session.add(prompt, 1, first_sample=sample)
    forced = session.add(prompt, 1, first_sample=sample, stop=[pair], known=[want.tokens[b, :5].tolist()])
    session.advance()
    session.stop(stopping)
    session.resume(stopping)
    finish(session)
    assert session.rollouts(stopping).length == 5 and session.take(stopping).finish == Finish.STOP
    same_rows(session.take(plain), want, np.array([b]))
    np.testing.assert_array_equal(session.take(forced).tokens, want.tokens[[b]])


def test_prompts_may_be_texts_or_token_ids():
    texts = ["abc", "d", "klmnabc"]
    ids = [[1, 2, 3], [4], [11, 12, 13, 14, 1, 2, 3]]
    sampler = spelling()
    from_texts = sampler.generate(policy_of(), texts, KEY)
    from_ids = sampler.generate(policy_of(), ids, KEY)
    np.testing.assert_array_equal(from_texts.tokens, from_ids.tokens)
    np.testing.assert_array_equal(from_texts.prompts.uid, [0, 1, 2])
    np.testing.assert_array_equal(from_texts.prompts.length, [3, 1, 7])
    np.testing.assert_array_equal(from_texts.prompts.row, [-1, -1, -1])
    for wrong, message in [
        ("abc", "prompts: got str, want Prompts, a list of texts, or a list of lists of ids"),
        (["a", [1]], "prompts: got texts and token ids in one list, want one kind"),
        ([[1.5]], r"prompts\[0\]: got float64\[1\], want a text or a list of token ids"),
    ]:
        with pytest.raises(UserError, match=message):
            sampler.generate(policy_of(), wrong, KEY)
    with pytest.raises(UserError, match="prompts: got texts for a model without a tokenizer, want token ids"):
        of().generate(policy_of(), texts, KEY)
    with pytest.raises(ValueError, match=r"prompts\[0\]: got 16, want token ids from 0 to 15"):
        sampler.generate(policy_of(), [[16]], KEY)


def test_an_engine_without_prompt_slots_fits_itself_to_the_prompts():
    sampler = Engine(EngineModel(ONE_LAYER, layouts()[1], VOCAB), of().cfg)
    with pytest.raises(UserError, match="prompt_slots: got none for engine or session, want the maximum"):
        sampler.session(policy_of(), KEY)
    same_rows(sampler.generate(policy_of(), make_prompts(P), KEY), whole(), np.arange(P * G))
    assert sampler.sizes.prompt_slots == (7,)
    programs = sampler.programs
    sampler.generate(policy_of(), [[1, 2, 3]], KEY)
    assert sampler.programs is programs
    sampler.generate(policy_of(), [[1] * 9], KEY)
    assert sampler.sizes.prompt_slots == (14,)


def test_a_donated_policy_is_named():
    session, old = of().session(policy_of(), KEY), policy_of()
    session.use(old)
    session.add(make_prompts(P))
    session.advance()
    jax.tree.map(lambda x: x.delete(), old)
    for call in (session.advance, lambda: session.use(old), lambda: of().generate(old, make_prompts(P), KEY)):
        with pytest.raises(UserError, match=r"policy: got arrays whose buffers .*session.use\(policy\)"):
            call()
    session.use(policy_of())
    finish(session)
    same_rows(session.take(np.arange(P)), whole(), np.arange(P * G))


def test_prompts_may_have_different_numbers_of_samples():
    """Each prompt's rows are the first of what it has with all of them; a request joins others of another size."""
    size, first = np.array([3, 1, G, 2][:P]), np.array([1, 2, 0, 0][:P])
    session = of().session(policy_of(), KEY)
    ids = session.add(some(make_prompts(P), np.arange(len(size))), size, first_sample=first)
    finish(session)
    taken = session.take(ids)
    place = np.arange(G) - first[:, None]
    rows = np.flatnonzero(((place >= 0) & (place < size[:, None])).reshape(-1))
    same_rows(taken, whole(), rows)
    np.testing.assert_array_equal(taken.prompt, rows // G)
    np.testing.assert_array_equal(taken.sample, rows % G)
    np.testing.assert_array_equal(taken.size, size)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda s: s.take(7), r"ids: got 7, want a request that was added and not taken"),
        (lambda s: s.stop([0, 0]), r"ids: got \[0, 0\], want one or more requests, each once"),
        (lambda s: s.take(0), r"take: got request 0, which is being decoded; want one that finished or was stopped"),
        (lambda s: s.resume(0), r"resume: got request 0, which is being decoded"),
        (
            lambda s: s.add([[1], [2]], [1, 2, 3]),
            r"samples: got \[1, 2, 3\], want a whole number from 1 to 2147483647, or one",
        ),
        (lambda s: s.add([[1]], 0), r"samples: got 0, want a whole number from 1 to 2147483647"),
        (
            lambda s: s.add([[1]], 2, limit=np.array([[3, 13]])),
            r"limit: got \[\[3, 13\]\], want 1 numbers from 1 to 12",
        ),
        (lambda s: s.add([[1]], 2, known=[[1]]), r"known: got 1 rows, want 2, one per sample of each prompt"),
        (
            lambda s: s.add([[1]], 1, known=[[1] * 13]),
            r"known\[0\]: got 13 tokens, want at most the 12 that limit= leaves",
        ),
        (lambda s: s.add([[1]], 1, known=[[99]]), r"known\[0\]: got 99, want token ids from 0 to 15"),
        (lambda s: s.resume(2, [[1]]), r"tokens: got 1 rows, want 4, one per sample of each prompt"),
        (
            lambda s: s.resume(2, [[1] * 13] * 4),
            r"tokens\[0\]: got 13 tokens, want at most the \d+ that limit= leaves",
        ),
        (lambda s: s.resume(2, limit=np.array([1])), r"limit: got 1, want at least the \d tokens that are known"),
        (
            lambda s: s.add([[1]], 1, known=jax.tree.map(lambda x: x[:3], whole())),
            r"known: got 3 rows, want 1, one per",
        ),
        (
            lambda s: s.add(whole().prompts, limit=np.full(P, 2), known=whole()),
            r"known.length\[\d+\]: got \d+ tokens, want 0 to 2, the row's limit",
        ),
        (
            lambda s: s.add(whole().prompts, known=whole(), controls=of().controls(P, 1.5)),
            r"known.temperature\[0\]: got 3.0, want 1.5, that of the request: a row is scored at one temperature",
        ),
        (
            lambda s: s.add(whole().prompts, known=whole().replace(kept_tokens=np.zeros((P * G, C, 6), np.int32))),
            r"known.kept_tokens: got \[B C 6\], want none, as this engine records",
        ),
        (lambda s: s.resume(2, limit=np.array([99])), r"limit: got \[99\], want 1 numbers from 1 to 12"),
    ],
)
def test_wrong_calls_are_named_and_change_nothing(call, message):
    session, prompts = of().session(policy_of(), KEY), make_prompts(P)
    session.add(some(prompts, 0), 2)
    session.add(some(prompts, 1))
    session.add(some(prompts, 2))
    session.advance()
    session.stop(2)
    with pytest.raises(ValueError, match=message):
        call(session)
    session.resume(2)
    finish(session)
    same_rows(session.take([1, 2]), whole(), G + np.arange(2 * G))
    same_rows(session.take(0), whole(), np.arange(2))


def test_what_the_caller_changes_later_does_not_matter():
    prompts = make_prompts(P)
    session = of().session(policy_of(), KEY)
    ids = session.add(prompts)
    prompts.tokens[:] = 0
    session.rollouts(ids).tokens[:] = 7
    finish(session)
    same_rows(session.take(ids), whole(), np.arange(P * G))


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(ValueError, match=r"stop: got \('a',\) for a model without a tokenizer, want no stop strings"):
        of().session(policy_of(), KEY).add([[1]], stop=["a"])


def test_rows_that_know_different_numbers_of_tokens_share_a_group():
    """Five rows in groups of four lanes, of which the second has ended: two groups, whatever the rows' ages."""
    request = SimpleNamespace(rows=np.arange(10, 15), begin=np.array([0, 0, 1, 0, 0]))
    first, second = split(request, 4, np.array([True, False, True, True, True]), np.array([0, 7, 3, 5, 2]))
    assert first.rows.tolist() == [10, -1, 12, 13] and first.age.tolist() == [0, 0, 2, 5] and first.first == 0
    assert second.rows.tolist() == [14, -1, -1, -1] and second.age.tolist() == [2, 0, 0, 0] and second.first == 4
    assert list(split(request, 4, np.zeros(5, bool), np.zeros(5, int))) == []
