"""Sessions when something goes wrong: interrupts and errors between two chunks, wrong input, rollouts of another engine."""

import dataclasses

import jax
import numpy as np
import pytest
from setups import SMALL, engine, layouts, make_params, make_policy, make_prompts

from jaxrl_llm.errors import UserError
from jaxrl_llm.rollout.config import EngineConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.types import Finish, Prompts

KEY = jax.random.key(4)
P, G, C = 8, 4, 12
MODEL = dataclasses.replace(SMALL, layers=1)
VOCAB = Vocabulary(size=16, pad=0, eos=(15, 11, 4))
FORM = EngineConfig(decode_chunk=4, max_concurrent_prompts=4, rows_per_prompt_cache=2, window=4)
TEXT = "_abcdefghijklmno"


def of(form=FORM, **more) -> Engine:
    return engine(
        MODEL, layouts()[1], VOCAB,
        engine=form, **{"prompts": P, "samples": G, "max_new_tokens": C, "temperature": 3.0, **more},
    )  # fmt: skip


def policy_of(version=3):
    return make_policy(MODEL, make_params(MODEL, layouts()[0]), *layouts(), version)


def open_session(**more):
    return of(**more).session(policy_of(), KEY)


def some(prompts, index):
    return jax.tree.map(lambda x: np.array(x[np.atleast_1d(index)]), prompts)


def whole(**more):
    return of(EngineConfig(decode_chunk=C, compact=False, window=C), **more).generate(policy_of(), make_prompts(P), KEY)


def finish(session, most=100):
    found = []
    while session.pending and most:
        found += session.advance().tolist()
        most -= 1
    assert most, "never ends"
    return found


class Letters:
    def prompt_batch(self, prompts):
        return [[TEXT.index(c) for c in prompt] for prompt in prompts]

    def spellings(self, ids):
        return ("".join(TEXT[i] for i in ids),)


def spelling():
    shared = of()
    made = Engine(EngineModel(MODEL, layouts()[1], VOCAB, Letters()), shared.cfg, 7)
    made.programs = shared.programs
    return made.session(policy_of(), KEY)


class FailingOnce:
    """The programs, of which one fails once: before it runs (as when memory is exhausted), or after (as with Ctrl-C)."""

    def __init__(self, real, name, when):
        self.real, self.name, self.when, self.failed = real, name, when, False

    def __getattr__(self, name):
        return getattr(self.real, name)

    def __call__(self, params, *name):
        program = self.real(params, *name)
        if name[0] != self.name or self.failed:
            return program

        def fail(*args):
            self.failed = True
            if self.when == "after":
                jax.block_until_ready(program(*args))
            raise KeyboardInterrupt

        return fail


def interrupted(name, when):
    session = open_session()
    ids = session.add(make_prompts(P))
    session.advance()
    if name in ("read_rows", "join_suffix"):
        session.stop(ids)
        session.resume(ids)
    failing = FailingOnce(session.programs, name, when)
    session.programs = session.batch.programs = failing
    with pytest.raises(KeyboardInterrupt):
        finish(session)
    assert failing.failed
    finish(session)
    np.testing.assert_array_equal(session.take(ids).tokens, whole().tokens)


@pytest.mark.parametrize("name", ["prefill", "insert_prefix", "read_rows", "join_suffix", "compact", "decode_chunk"])
def test_a_chunk_that_failed_while_admitting_does_not_change_tokens(name):
    interrupted(name, "before")


@pytest.mark.parametrize("name", ["insert_prefix", "join_suffix", "compact", "decode_chunk"])
def test_a_session_survives_an_interrupt_behind_a_donation(name):
    interrupted(name, "after")


def test_a_failure_of_the_tokenizer_does_not_decode_ended_rows_again():
    session, calls = spelling(), [0]

    class Failing(Letters):
        def spellings(self, ids):
            calls[0] += 1
            if calls[0] == 2:
                raise RuntimeError("a tokenizer's error")
            return super().spellings(ids)

    session.tokenizer = Failing()
    ids = session.add(make_prompts(P), stop=["zzz"])
    with pytest.raises(RuntimeError):
        session.advance()
    finish(session)
    np.testing.assert_array_equal(session.take(ids).tokens, whole().tokens)


def test_a_request_that_was_resumed_before_it_was_reported_is_not_reported_as_finished():
    session = open_session()
    ids = session.add(some(make_prompts(P), 0), known=[[1] * 6] * G, limit=np.array([6]))
    session.resume(ids, limit=np.array([C]))
    for id in session.advance():
        assert session.requests[id].groups == 0, "reported as finished, and still decoded: take raises"


def test_a_request_is_reported_once():
    session = open_session()
    ids = session.add(some(make_prompts(P), 0), known=[[1] * 6] * G, limit=np.array([6]))
    session.resume(ids)
    assert session.advance().tolist() == [0]


def test_a_finished_request_is_reported_after_a_donated_policy_was_named():
    session, old = open_session(), policy_of()
    session.use(old)
    session.add(some(make_prompts(P), 0), known=[[1] * 6] * G, limit=np.array([6]))
    session.add(some(make_prompts(P), 1))
    jax.tree.map(lambda x: x.delete(), old)
    with pytest.raises(UserError):
        session.advance()
    session.use(policy_of())
    assert sorted(finish(session)) == [0, 1]


def test_a_new_version_of_the_same_parameters_is_recorded():
    session, policy = open_session(), policy_of()
    session.use(policy)
    session.use(policy.replace(version=np.int32(9)))
    ids = session.add(make_prompts(P))
    finish(session)
    got = session.take(ids)
    assert set(got.version[got.sampled]) == {9}


@pytest.mark.parametrize("source", [{}, {"top_p": 0.9, "max_kept_tokens": 1}])
def test_kept_tokens_of_known_rollouts_are_those_that_the_engine_records(source):
    """None, or of another K: K = 1 is repeated K times by broadcasting."""
    known = of(**source).generate(policy_of(), make_prompts(P), KEY)
    session = open_session(top_p=0.9, max_kept_tokens=4)
    with pytest.raises(ValueError, match=r"known\.kept_tokens"):
        session.add(known.prompts, known=known)


def test_kept_tokens_of_known_rollouts_are_not_dropped():
    known = of(top_p=0.9, max_kept_tokens=4).generate(policy_of(), make_prompts(P), KEY)
    session = open_session()
    with pytest.raises(ValueError, match=r"known\.kept_tokens"):
        session.add(known.prompts, known=known)


def test_raw_log_probs_of_known_rollouts_are_not_invented():
    known = whole()
    session = open_session(raw_logprobs=True)
    with pytest.raises(ValueError, match=r"known\.raw_logprobs"):
        session.add(known.prompts, known=known)


def test_known_rollouts_have_the_temperature_of_the_request():
    """Otherwise captured log-probs are not the scorer's, which divides by `Rollouts.temperature`."""
    known = some_part()
    session = open_session(temperature=1.5)
    with pytest.raises(ValueError, match=r"known\.temperature"):
        session.add(known.prompts, known=known)


def test_the_end_mask_of_known_rollouts_is_kept():
    known = some_part(min_new_tokens=5)
    assert known.control_state.any()
    session = open_session()
    ids = session.add(known.prompts, known=known)
    finish(session)
    got = session.take(ids)
    assert got.control_state is not None and (got.control_state[:, :4] == known.control_state[:, :4]).all()


def some_part(**more):
    """Four tokens of each row."""
    session = open_session(**more)
    ids = session.add(make_prompts(P), limit=np.full(P, 4))
    finish(session)
    return session.take(ids)


# 4. Bad input: one clear error (ValueError or UserError that names the field), and nothing changes.

BAD = {
    "controls: too few": lambda s, p, c: s.add(p, controls=c),
    "controls: too many": lambda s, p, c: s.add(some(p, 1), controls=of().controls(3)),
    "controls: per row": lambda s, p, c: s.add(
        some(p, 1), controls=jax.tree.map(lambda x: np.repeat(x[:, None], G, 1), c)
    ),
    "controls: scalar": lambda s, p, c: s.add(some(p, 1), controls=c.replace(min_new_tokens=3)),
    "controls.temperature: NaN": lambda s, p, c: s.add(some(p, 1), controls=c.replace(temperature=np.array([np.nan]))),
    "controls.temperature: -1": lambda s, p, c: s.add(some(p, 1), controls=c.replace(temperature=np.array([-1.0]))),
    "controls.top_p: no truncation in the engine": lambda s, p, c: s.add(
        some(p, 1), controls=c.replace(top_p=np.array([0.1]))
    ),
    "prompts.uid: too few": lambda s, p, c: s.add(p.replace(uid=p.uid[:3])),
    "prompts.uid: int64": lambda s, p, c: s.add(some(p, 1).replace(uid=np.array([2**32 + 5]))),
    "prompts.uid: float": lambda s, p, c: s.add(some(p, 1).replace(uid=np.array([1.5]))),
    "prompts.row: too few": lambda s, p, c: s.add(p.replace(row=p.row[:3])),
    "prompts.tokens: too few": lambda s, p, c: s.add(p.replace(tokens=p.tokens[:3])),
    "prompts.tokens: fewer slots than length": lambda s, p, c: s.add(
        Prompts(np.ones((1, 3), np.int32), np.array([5]), np.array([0]), np.array([0]))
    ),
    "prompts.tokens: float": lambda s, p, c: s.add(some(p, 1).replace(tokens=some(p, 1).tokens + 0.5)),
    "prompts: id that wraps": lambda s, p, c: s.add([[2**32 + 1]]),
    "first_sample: -1": lambda s, p, c: s.add(some(p, 1), first_sample=-1),
    "first_sample: 2**31": lambda s, p, c: s.add(some(p, 1), first_sample=2**31),
    "first_sample: float": lambda s, p, c: s.add(some(p, 1), first_sample=1.5),
    "samples: float": lambda s, p, c: s.add(some(p, 1), 2.0),
    "known: a number": lambda s, p, c: s.add(some(p, 1), 1, known=[5]),
    "known.: fewer rows of tokens": lambda s, p, c: s.add(p, known=whole().replace(tokens=whole().tokens[:3])),
    "known.tokens: unknown ids": lambda s, p, c: s.add(p, known=some_part().replace(tokens=some_part().tokens + 100)),
    "known.length: negative": lambda s, p, c: s.add(p, known=unfinished(whole(), -1)),
    "known.kept_tokens: another K": lambda s, p, c: s.add(
        p, known=whole().replace(kept_tokens=np.zeros((P * G, C, 6), np.int32))
    ),
    "ids: two dimensions": lambda s, p, c: s.stop([[0]]),
}


def unfinished(rollouts, length):
    n = np.minimum(rollouts.length, length)
    return rollouts.replace(length=n, finish=np.full_like(n, int(Finish.UNFINISHED)))


@pytest.mark.parametrize("what", BAD)
def test_bad_input_is_named_and_changes_nothing(what):
    truncating = "another K" in what
    session = open_session(**({"top_p": 0.9, "max_kept_tokens": 4} if truncating else {}))
    session.add(some(make_prompts(P), 0))

    def state():
        used = len(session.output.length) - len(session.output.free)
        return session.num_added, len(session.requests), len(session.queue), used

    before = state()
    with pytest.raises((ValueError, UserError), match=what.partition(":")[0]):
        BAD[what](session, make_prompts(P), of().controls(1))
    assert state() == before


def test_a_bad_prompt_does_not_reach_advance():
    """Requests of the same session never finish after an error in `_place`."""
    session = open_session()
    good = session.add(make_prompts(P))
    with pytest.raises(ValueError, match=r"prompts\.uid"):
        session.add(make_prompts(1).replace(uid=np.array([2**32 + 5])))
    assert set(good.tolist()) <= set(finish(session))


@pytest.mark.parametrize("stop", ["abc", [""], ["a", 1]])
def test_stop_strings_are_a_list_of_texts(stop):
    """A bare text would be a list of letters, and an empty one would end every row at once."""
    with pytest.raises(ValueError, match=r"^stop: got .*, want a list of texts that are not empty$"):
        spelling().add(make_prompts(P), stop=stop)


def test_nothing_compiles_after_the_warm_up_of_a_call_with_a_remainder():
    """All rows end in one chunk, and the last prompts are fewer than half of those decoded at once."""
    sampler = of(EngineConfig(decode_chunk=4, max_concurrent_prompts=8, window=4), max_new_tokens=4, prompts=10)
    sampler.warm(policy_of(), 10)
    before = set(sampler.programs._compiled)
    sampler.generate(policy_of(), make_prompts(10), KEY)
    assert set(sampler.programs._compiled) == before
