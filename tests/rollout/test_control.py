"""Controls in the decode loop: what rows consist of, what is recorded of them, and that they depend on nothing else."""

import re

import jax
import numpy as np
import pytest
from controlled import CONTROLS, TOKENIZER, VOCAB, C, G, P, follows, policy, sampler, texts
from setups import make_prompts

from jaxrl_llm.control.config import (
    AllowControl,
    BudgetControl,
    ChoiceControl,
    RegexControl,
    StopControl,
)
from jaxrl_llm.distribution.control_tables import allowed_tokens, state_of
from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.rollout.config import EngineConfig
from jaxrl_llm.types import Finish, check

KEY = jax.random.key(0)
NAMES = list(CONTROLS)
# One row per sample of each prompt; prompt p is under control p.
BY_ROW = np.repeat(NAMES, G)
assert len(NAMES) == P


def generate(engine, sizes=(1, 1, 1), key=KEY, limit=None, **controls):
    """Prompt p under control p."""
    of = engine.controls(P, control=list(CONTROLS.values())).replace(**controls)
    return check(engine.generate(policy(sizes), make_prompts(P), key, of, limit))


@pytest.fixture(scope="module")
def engine():
    return sampler()


@pytest.mark.parametrize("seed", range(6))
def test_every_row_is_what_its_control_allows(engine, seed):
    """Eight controls in one batch, limits down to the shortest text that each allows."""
    least = np.array([engine.tables.distance[engine.control_set.start(c)] for c in CONTROLS.values()]) if seed else 0
    limit = np.maximum(np.random.default_rng(seed).integers(least, C + 1), 1) if seed else np.full(P, C)
    limit[NAMES.index("forbid")], limit[NAMES.index("budget")], limit[NAMES.index("waits")] = C, C, C
    of = generate(engine, key=jax.random.key(seed), limit=limit, temperature=np.full(P, 1.0 + seed, np.float32))
    for name, text, finish in zip(BY_ROW, texts(of), of.finish, strict=True):
        assert follows(name, text, Finish(finish).name), (name, text)
    assert len(set(texts(of))) > P


def test_rows_that_have_ended_make_no_nan(engine):
    """Also those that ended at their limits, where no token has room."""
    with jax.debug_nans(True):
        generate(engine, limit=np.array([10, 7, 3, 10, 3, 8, 10, 5]))


def test_what_is_forced_was_not_sampled(engine):
    of = generate(engine)
    inside = np.arange(C) < of.length[:, None]
    forced = inside & ~of.sampled
    begin = np.flatnonzero(BY_ROW == "begin")
    np.testing.assert_array_equal(forced[begin], np.arange(C) < 2 * np.ones((G, 1)))
    assert not forced[np.isin(BY_ROW, ("regex", "choice", "allow", "forbid", "stop"))].any()
    for column in (of.behavior_logprobs, of.entropy):
        np.testing.assert_array_equal(column[~of.sampled], 0)
    # A budget's closing, where the thinking was cut off.
    for b in np.flatnonzero(BY_ROW == "budget"):
        text = texts(of)[b]
        was_cut = ">" not in text[:4] and text[4:6] == "+>"
        np.testing.assert_array_equal(np.flatnonzero(forced[b]), [4, 5] if was_cut else [])


def test_recorded_states_are_those_of_the_automaton(engine):
    """The state in which each token was drawn: the start at first, then that behind the token before, unless it expired."""
    of, tables = generate(engine), engine.tables
    starts = engine.controls(P, control=list(CONTROLS.values())).control
    for b in range(P * G):
        state, budget = int(starts[b // G]), CONTROLS[BY_ROW[b]].tokens if "tokens" in dir(CONTROLS[BY_ROW[b]]) else C
        budget = budget if isinstance(budget, int) else C
        for slot in range(of.length[b]):
            state = int(tables.expires[state]) if slot >= budget else state
            recorded = int(state_of(of.control_state[b, slot]))
            assert recorded == state or tables.replaces[recorded], (BY_ROW[b], slot)
            state = int(tables.after(recorded, of.tokens[b, slot]))
    np.testing.assert_array_equal(of.control_state[np.arange(C) >= of.length[:, None]], 0)


def test_logprobs_are_those_of_the_allowed_tokens(engine):
    """A row under a control that allows two tokens has their probabilities, renormalized: entropy at most log 2."""
    two = AllowControl(tokens=("1", "2"))
    of = engine.generate(policy(), make_prompts(P), KEY, engine.controls(P, control=two))
    allowed = np.asarray(allowed_tokens(jax.tree.map(np.asarray, engine.tables), of.control_state).mask)
    assert set(np.flatnonzero(allowed[0, 0])) == {*TOKENIZER.encode("12"), *VOCAB.eos}
    assert of.entropy.max() <= np.log(3) and (of.behavior_logprobs[of.sampled] < 0).all()


@pytest.mark.slow
def test_the_mesh_changes_no_token(engine):
    one, many = generate(engine), generate(sampler((2, 2, 2)), (2, 2, 2))
    for name in ("tokens", "sampled", "finish", "length", "control_state"):
        np.testing.assert_array_equal(getattr(one, name), getattr(many, name), err_msg=name)
    np.testing.assert_allclose(one.behavior_logprobs, many.behavior_logprobs, atol=1e-4)


def test_another_control_of_the_same_size_compiles_nothing():
    engine = sampler(control=RegexControl(pattern="[0-9]{2}#"))
    engine.generate(policy(), make_prompts(P), KEY)
    other = sampler(control=RegexControl(pattern="[1-5]{2}#"))
    assert other.tables.sizes == engine.tables.sizes
    other.programs._compiled = engine.programs._compiled
    compiles = CompileCounter()
    of = other.generate(policy(), make_prompts(P), KEY)
    assert compiles.take()["compiles"] == 0
    assert all(len(text) == 3 and set(text[:2]) <= set("12345") for text in texts(of))


def test_rows_without_a_control_are_free(engine):
    """In one batch with controlled rows they have the tokens, to the last bit, that they have in an engine without controls."""
    free, before = sampler().generate(policy(), make_prompts(P), KEY), engine.tables
    assert free.control_state is None and before is not None
    of = engine.generate(policy(), make_prompts(P), KEY)
    for name in ("tokens", "sampled", "finish", "length", "behavior_logprobs", "entropy"):
        np.testing.assert_array_equal(getattr(of, name), getattr(free, name), err_msg=name)


def test_requests_with_other_controls_join_while_others_decode(engine):
    """Each has the tokens that it has alone, though a control that comes later makes the tables larger."""
    alone, prompts, ids = generate(engine), make_prompts(P), []
    growing = sampler()
    session = growing.session(policy(), KEY)
    for p, control in enumerate(CONTROLS.values()):
        own = jax.tree.map(lambda x, p=p: x[p : p + 1], prompts)
        ids += session.add(own, controls=growing.controls(1, control=control)).tolist()
        session.advance()
    while session.pending:
        session.advance()
    got = session.take(ids)
    for name in ("tokens", "sampled", "finish", "length"):
        np.testing.assert_array_equal(getattr(got, name), getattr(alone, name), err_msg=name)


def think(tokens):
    return BudgetControl(tokens=tokens, close=">", then=ChoiceControl(texts=("1#", "2#")))


def finish(session):
    while session.pending:
        session.advance()


@pytest.fixture(scope="module")
def chopped():
    """An engine of chunks of two steps, so that requests can be stopped in between."""
    return sampler(engine=EngineConfig(decode_chunk=2, eos_interval=1))


def test_a_stopped_row_continues_in_its_state(engine, chopped):
    """Stopped after two, four and six tokens, under each control; and after a change of the policy, which reads all keys again."""
    alone, session = generate(engine), chopped.session(policy(), KEY)
    ids = session.add(make_prompts(P), controls=chopped.controls(P, control=list(CONTROLS.values())))
    for _ in range(3):
        session.advance()
        session.stop(ids)
        session.use(policy())
        session.resume(ids)
    finish(session)
    got = session.take(ids)
    for name in ("tokens", "sampled", "finish", "length", "control_state"):
        np.testing.assert_array_equal(getattr(got, name), getattr(alone, name), err_msg=name)


def test_rollouts_that_are_known_go_on_in_another_session(engine, chopped):
    """States are recorded, so what replaced a drawn token is not taken for a drawn one."""
    alone, controls = generate(engine), chopped.controls(P, control=list(CONTROLS.values()))
    session = chopped.session(policy(), KEY)
    ids = session.add(make_prompts(P), controls=controls)
    session.advance()
    session.stop(ids)
    known, later = session.take(ids), chopped.session(policy(), KEY)
    ids = later.add(known.prompts, controls=controls, known=known)
    finish(later)
    np.testing.assert_array_equal(later.take(ids).tokens, alone.tokens)


def test_known_tokens_are_a_part_of_the_controlled_text(chopped):
    """A hint of two digits leaves one digit and the end; a hint that the control does not allow is refused, and so is one that
    leaves too little room."""
    digits = chopped.controls(1, control=RegexControl(pattern="[0-9]{3}#"))
    session, prompt = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    ids = session.add(prompt, controls=digits, known=[TOKENIZER.encode("12")] * G)
    finish(session)
    got = session.take(ids)
    assert all(re.fullmatch("12[0-9]#", text) for text in texts(got))
    np.testing.assert_array_equal(got.sampled[:, :4], [[False, False, True, True]] * G)
    # Stopped behind the hint, they continue in its state in another session.
    ids = session.add(prompt, controls=digits, known=[TOKENIZER.encode("12")] * G)
    session.stop(ids)
    hinted, later = session.take(ids), chopped.session(policy(), KEY)
    ids = later.add(prompt, controls=digits, known=hinted)
    finish(later)
    np.testing.assert_array_equal(later.take(ids).tokens, got.tokens)
    with pytest.raises(ValueError, match=r"known\[0\]: got token \d+ after .*, want one that the control allows"):
        session.add(prompt, controls=digits, known=[TOKENIZER.encode("1+")] * G)
    longer = chopped.controls(1, control=RegexControl(pattern="[0-9]{2}(\\+[0-9]{6})?#"))
    with pytest.raises(ValueError, match=r"limit: got 7 for row 0, of which 3 tokens are known, want at least 10"):
        session.add(prompt, controls=longer, known=[TOKENIZER.encode("12+")] * G, limit=np.array([7]))
    assert not session.requests


def test_a_control_starts_anew_behind_the_turn_of_another(chopped):
    """And its budget counts from there: thinking of one token in each of two turns."""
    session, controls = chopped.session(policy(), KEY), chopped.controls(P, control=think(1))
    ids = session.add(make_prompts(P), controls=controls, limit=np.full(P, 4))
    finish(session)
    session.resume(ids, [TOKENIZER.encode("+")] * (P * G), limit=np.full(P, C))
    session.stop(ids)
    begun, later = session.rollouts(ids), chopped.session(policy(), KEY)
    again = later.add(begun.prompts, controls=controls, known=begun)
    session.resume(ids)
    finish(session)
    finish(later)
    got = session.take(ids)
    for text in texts(got):
        assert re.fullmatch(r"([^>#]?>[12]#)\+[^>#]?>[12]#", text), text
    np.testing.assert_array_equal(later.take(again).tokens, got.tokens, err_msg="read back in the second turn")


def test_a_turn_without_room_for_thinking_and_closing_is_refused(chopped):
    """Five tokens, one of another, two of thinking and three behind: 11."""
    session = chopped.session(policy(), KEY)
    ids = session.add(make_prompts(P), controls=chopped.controls(P, control=think(2)), limit=np.full(P, 5))
    finish(session)
    before = session.rollouts(ids)
    long = int(np.flatnonzero(before.length == 5)[0])
    with pytest.raises(
        ValueError, match=f"limit: got 10 for row {long}, of which 6 tokens are known, want at least 11"
    ):
        session.resume(ids, [TOKENIZER.encode("+")] * (P * G), limit=np.full(P, C))
    np.testing.assert_array_equal(session.rollouts(ids).tokens, before.tokens)


def test_a_limit_within_which_a_stopped_row_could_not_end_is_refused(chopped):
    """Two tokens of six, five digits and the end, are there. What has ended needs no room."""
    session, controls = chopped.session(policy(), KEY), chopped.controls(P, control=RegexControl(pattern="[0-9]{5}#"))
    ids = session.add(make_prompts(P), controls=controls)
    session.advance()
    session.stop(ids)
    with pytest.raises(ValueError, match="limit: got 5 for row 0, of which 2 tokens are known, want at least 6"):
        session.resume(ids, limit=np.full(P, 5))
    session.resume(ids, limit=np.full(P, 6))
    finish(session)
    session.resume(ids, limit=np.full(P, 6))
    assert all(re.fullmatch("[0-9]{5}#", text) for text in texts(session.take(ids)))


def test_known_rollouts_of_another_control_are_refused(chopped):
    """So are those without states whose tokens the control does not allow, its budget included."""
    session, prompts = chopped.session(policy(), KEY), make_prompts(P)
    ids = session.add(prompts, controls=chopped.controls(P, control=RegexControl(pattern="[0-9]{3}#")))
    session.advance()
    session.stop(ids)
    known = session.take(ids)
    for control in (RegexControl(pattern="[0-9]{4}#"), think(2)):
        with pytest.raises(ValueError, match=r"known.control_state\[0\]: got states of another control"):
            session.add(prompts, controls=chopped.controls(P, control=control), known=known)
    bare = known.replace(control_state=None)
    with pytest.raises(ValueError, match=r"known\[0\]: got token \d+ after \[\d+\], want one that the control allows"):
        session.add(prompts, controls=chopped.controls(P, control=think(1)), known=bare)
    ids = session.add(prompts, controls=chopped.controls(P, control=think(2)), known=bare)
    finish(session)
    assert all(re.fullmatch("[0-9]{2}>[12]#", text) for text in texts(session.take(ids)))


def test_a_limit_below_the_shortest_text_is_refused(chopped):
    controls = chopped.controls(P, control=RegexControl(pattern="[0-9]{5}#"))
    session = chopped.session(policy(), KEY)
    with pytest.raises(ValueError, match=r"limit: got 5, want at least 6: the control allows no response of fewer"):
        session.add(make_prompts(P), controls=controls, limit=np.full(P, 5))
    with pytest.raises(ValueError, match=r"controls.control: got 99, want that of engine.controls"):
        session.add(make_prompts(P), controls=controls.replace(control=np.full(P, 99, np.int32)))
    think = chopped.controls(P, control=BudgetControl(tokens=8, close=">", then=RegexControl(pattern="[0-9]{2}#")))
    with pytest.raises(ValueError, match=r"limit: got 10, want at least 12, or a budget of 6 at most"):
        session.add(make_prompts(P), controls=think)
    with pytest.raises(
        ValueError, match=r"controls: got list, want what engine.controls\(prompts, control=...\) returns"
    ):
        session.add(make_prompts(P), controls=[RegexControl(pattern="[0-9]#")] * P)
    assert not session.requests
    with pytest.raises(
        UserError, match="max_new_tokens: got 5, want at least 6: the control allows no response of fewer"
    ):
        sampler(control=RegexControl(pattern="[0-9]{5}#"), max_new_tokens=5)


@pytest.mark.parametrize(
    ("control", "text", "why"),
    [
        (RegexControl(pattern="[0-9]{3}#"), "123#", Finish.EOS),
        (StopControl(texts=("1", "+2")), "3+2", Finish.STOP),
        (ChoiceControl(texts=("12#",)), "12#", Finish.EOS),
    ],
)
def test_known_tokens_that_are_the_whole_text_end_the_row(chopped, control, text, why):
    """Nothing is allowed behind them."""
    session, one = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    controls, whole = chopped.controls(1, control=control), TOKENIZER.encode(text)
    ids = session.add(one, controls=controls, known=[whole] * G)
    cut = session.add(one, controls=controls, known=[whole[:-1]] * G)
    session.stop(cut)
    session.resume(cut, [whole[-1:]] * G)
    assert sorted(session.advance()) == [*ids, *cut]
    of = session.rollouts([*ids, *cut])
    assert texts(of) == [text] * 2 * G and (of.finish == why).all()
    # Read back, with and without states.
    for known in (of, of.replace(control_state=None, finish=np.full(2 * G, Finish.UNFINISHED))):
        again = session.add(of.prompts, controls=chopped.controls(2, control=control), known=known)
        session.advance()
        assert texts(session.rollouts(again)) == [text] * 2 * G and (session.rollouts(again).finish == why).all()


@pytest.mark.parametrize(
    ("control", "text"),
    [
        (CONTROLS["begin"], "57"),
        (CONTROLS["begin"], "<9"),
        (CONTROLS["waits"], "1>"),
        (CONTROLS["waits"], "1>2"),
        (CONTROLS["budget"], "1234++"),
    ],
)
def test_known_tokens_in_the_place_of_forced_ones_are_refused(chopped, control, text):
    """Forced are `<1`; `<` in the place of `>`; `+>` behind four tokens of thinking."""
    session, one = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    with pytest.raises(ValueError, match=r"known\[0\]: got token \d+ after .*, want one that the control allows there"):
        session.add(one, controls=chopped.controls(1, control=control), known=[TOKENIZER.encode(text)] * G)


def test_a_row_that_has_answered_needs_no_room_for_thinking(chopped):
    """`resume` and `add` say the same of it; `1>` leaves two tokens."""
    think, one = BudgetControl(tokens=6, close=">", then=RegexControl(pattern="[0-9]#")), make_prompts(P)
    session, one = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], one)
    controls = chopped.controls(1, control=think)
    ids = session.add(one, controls=controls, known=[TOKENIZER.encode("1>")] * G, limit=np.array([4]))
    session.stop(ids)
    again = session.add(one, controls=controls, known=session.rollouts(ids), limit=np.array([4]))
    session.resume(ids, limit=np.array([4]))
    finish(session)
    for each in (ids, again):
        assert all(re.fullmatch("1>[0-9]#", text) for text in texts(session.rollouts(each)))


@pytest.mark.parametrize("built_before", [False, True])
def test_free_rollouts_are_followed_as_known_tokens(built_before):
    """Whether or not the engine has built a control before: they are a part of the text, and keep their own log-probs."""
    of = sampler(engine=EngineConfig(decode_chunk=2, eos_interval=1))
    session, one = of.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    if built_before:
        of.controls(1, control=CONTROLS["regex"])
    ids = session.add(one)
    session.advance()
    session.stop(ids)
    known = session.take(ids)
    with pytest.raises(ValueError, match=r"known\[0\]: got token \d+ after \[\], want one that the control allows"):
        session.add(one, controls=of.controls(1, control=ChoiceControl(texts=("+++#",))), known=known)
    ids = session.add(one, controls=of.controls(1, control=RegexControl(pattern=".{3}#")), known=known)
    finish(session)
    got = session.take(ids)
    np.testing.assert_array_equal(got.behavior_logprobs[:, :2], known.behavior_logprobs[:, :2])
    assert (got.length == 4).all() and not state_of(got.control_state[:, :2]).any()


def test_rollouts_of_another_engine_are_refused_though_its_states_exist_here(chopped):
    session, one = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    other = sampler(engine=EngineConfig(decode_chunk=2, eos_interval=1), control=RegexControl(pattern="[0-9]{5}#"))
    theirs = other.session(policy(), KEY)
    ids = theirs.add(one)
    theirs.advance()
    theirs.stop(ids)
    mine = sampler(engine=EngineConfig(decode_chunk=2, eos_interval=1), control=RegexControl(pattern="[0-9]#|[+]{4}#"))
    session = mine.session(policy(), KEY)
    with pytest.raises(ValueError, match=r"known.control_state\[0\]: got states of another control"):
        session.add(one, known=theirs.take(ids))


@pytest.mark.parametrize("name", ["begin", "budget", "waits"])
def test_stop_strings_do_not_depend_on_the_chunks(engine, chopped, name):
    """Forced tokens, which end no row, may be in the chunk that has what is sampled before and behind them."""
    ended = 0
    for stop in "1238":
        found = []
        for of in (engine, chopped):
            session = of.session(policy(), KEY)
            ids = session.add(make_prompts(P), controls=of.controls(P, control=CONTROLS[name]), stop=[stop])
            finish(session)
            found.append(session.take(ids))
        for column in ("tokens", "length", "finish", "sampled"):
            np.testing.assert_array_equal(getattr(found[0], column), getattr(found[1], column), err_msg=column)
        for text, sampled, why in zip(texts(found[0]), found[0].sampled, found[0].finish, strict=True):
            hits = [i for i, (a, drawn) in enumerate(zip(text, sampled, strict=False)) if a == stop and drawn]
            assert hits == ([len(text) - 1] if why == Finish.STOP else []), text
        ended += (found[0].finish == Finish.STOP).sum()
    assert ended


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"control": np.zeros(P, np.float32)}, "controls.control: got float32"),
        ({"budget": np.full(P, 2.5)}, "controls.budget: got float64"),
        ({"min_new_tokens": np.ones(P)}, "controls.min_new_tokens: got float64"),
        ({"budget": [3] * P}, "controls.budget: got list, want an array"),
    ],
)
def test_numbers_of_tokens_are_whole(chopped, change, error):
    session = chopped.session(policy(), KEY)
    with pytest.raises(ValueError, match=error):
        session.add(make_prompts(P), controls=chopped.controls(P).replace(**change))


@pytest.mark.parametrize(
    ("known", "error"),
    [
        (5, "known: got int, want a list of token ids for each row"),
        ([[1, [2]], [1]], r"known\[0\]: got lists of several"),
    ],
)
def test_known_tokens_are_lists(chopped, known, error):
    session, one = chopped.session(policy(), KEY), jax.tree.map(lambda x: x[:1], make_prompts(P))
    with pytest.raises(ValueError, match=error):
        session.add(one, known=known)


def test_a_minimum_length_gives_way_to_a_text_that_has_ended(chopped):
    """No row can get stuck: a text that allows nothing more may end below the minimum."""
    controls = chopped.controls(P, control=RegexControl(pattern="[0-9]{1,3}#")).replace(
        min_new_tokens=np.resize([3, 9], P).astype(np.int32)
    )
    of = chopped.generate(policy(), make_prompts(P), KEY, controls)
    length = of.length.reshape(P, G)
    assert (length[::2] >= 3).all() and (length[1::2] == 4).all()


def test_another_budget_needs_no_other_table(chopped):
    few, many = (
        chopped.controls(1, control=BudgetControl(tokens=n, close=">", then=RegexControl(pattern="[0-9]#")))
        for n in (2, 5)
    )
    assert few.control[0] == many.control[0] > 0
    assert (few.budget[0], many.budget[0]) == (2, 5)
