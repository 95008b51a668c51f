"""Rewards of steps at tokens: where they are put, and that groups keep them in whatever is made of them."""

from functools import cache, partial

import jax
import numpy as np
import pytest
from fakes import groups_of, sums
from tokenizers import AddedToken, decoders, models
from tokenizers import Tokenizer as Backend

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.experience.buffer import empty_buffer
from jaxrl_llm.experience.config import ReplayConfig
from jaxrl_llm.experience.replay import blank_groups, exchange
from jaxrl_llm.roles import grading
from jaxrl_llm.roles.grading import grade, merge_requests, rewarded_slots
from jaxrl_llm.roles.summary import describe, responses
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.tasks.tokenizer import Tokenizer
from jaxrl_llm.types import check, join_groups, number_rows, select_groups

N = np.nan
TASK = sums()


@cache
def byte_level() -> Tokenizer:
    """Token 0 ends a response; é is tokens 1 2; ";" 3, ";;" 4, ";a" 5, a 6, and a lone byte of é 1."""
    backend = Backend(
        models.WordLevel({t: i for i, t in enumerate(["<e>", "Ã", "©", ";", ";;", ";a", "a"])}, unk_token="a")
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<e>", special=True)])
    return Tokenizer(backend, pad=0, eos=(0,), write=lambda out: None)


def placed(earned, ids, sampled=None, tokenizer=None):
    sampled = np.ones(len(ids), bool) if sampled is None else np.array(sampled, bool)
    return dict(grading.rewarded_slots(earned, ids, sampled, tokenizer or byte_level()))


# Response, sampled tokens, reward by the number of characters up to the end of a step, and by token.
PLACES = {
    "steps at the token with their last character": (
        [6, 3, 6, 6, 3, 6],
        None,
        {2: 1.0, 5: 2.0, 6: 4.0},
        {1: 1.0, 4: 2.0, 5: 4.0},
    ),
    "the last step at the end token": ([6, 3, 6, 0], None, {2: 1.0, 3: 2.0}, {1: 1.0, 3: 2.0}),
    "a last step that is ended, too": ([6, 3, 6, 3, 0], None, {2: 1.0, 4: 2.0}, {1: 1.0, 4: 2.0}),
    "a character of two tokens at the second": ([1, 2, 6, 0], None, {1: 1.0, 2: 2.0}, {1: 1.0, 3: 2.0}),
    "a step that ends inside a token": ([6, 5, 6], None, {2: 1.0, 4: 2.0}, {1: 1.0, 2: 2.0}),
    "two steps that end in one token": ([6, 4, 6], None, {2: 1.0, 3: 2.0, 4: 4.0}, {1: 3.0, 2: 4.0}),
    "nothing but the end": ([0], None, {0: 1.0}, {0: 1.0}),
    "no sampled token": ([6, 3], [0, 0], {2: 1.0}, {}),
    "a step that ends in tokens that were not sampled": (
        [6, 3, 6, 6, 0],
        [1, 0, 1, 1, 0],
        {2: 1.0, 4: 2.0},
        {0: 1.0, 3: 2.0},
    ),
    "a first step that was not sampled": ([6, 3, 6, 0], [0, 0, 1, 1], {2: 1.0, 3: 2.0}, {3: 2.0}),
    "bytes that are no character": ([1, 3, 6, 0], None, {2: 1.0, 3: 2.0}, {1: 1.0, 3: 2.0}),
    "a group that failed": ([6, 0], None, {}, {}),
}


def wrongly_placed() -> set[str]:
    return {name for name, (ids, sampled, earned, want) in PLACES.items() if placed(earned, ids, sampled) != want}


def test_each_step_is_at_its_last_token():
    assert wrongly_placed() == set()


def first_tokens(earned, ids, sampled, tokenizer):
    """A step's value at its first token."""
    ends = [-1, *(slot for slot, _ in rewarded_slots(earned, ids, sampled, tokenizer))]
    return [(ends[i] + 1, reward) for i, (_, reward) in enumerate(rewarded_slots(earned, ids, sampled, tokenizer))]


def before_the_end(earned, ids, sampled, tokenizer):
    """The last step's value at the last token with text."""
    visible = np.array([id != 0 for id in ids])
    return rewarded_slots(earned, ids, sampled & visible, tokenizer)


def by_single_tokens(self, ids, ends):
    """Texts of single tokens put together: a part of a character is one of its own."""
    known = np.cumsum([len(self.decode([id])) for id in ids])
    return np.searchsorted(known, ends).tolist()


@pytest.mark.parametrize(
    ("where", "name", "bug", "case"),
    [
        (grading, "rewarded_slots", first_tokens, "steps at the token with their last character"),
        (grading, "rewarded_slots", before_the_end, "the last step at the end token"),
        (Tokenizer, "tokens_at", by_single_tokens, "a character of two tokens at the second"),
    ],
)
def test_mutants(where, name, bug, case, monkeypatch):
    monkeypatch.setattr(where, name, bug)
    assert case in wrongly_placed()


# --- from graders to groups -----------------------------------------------------------------------------------------------------

SAYS = ["1+2+#", "123", "+", "4+4"]


def rollouts(says=SAYS, index=(15, 88)):
    """Two prompts with responses in turn, in 6 slots."""
    made, rows = groups_of(np.zeros((2, 2))).rollouts, len(says)
    tokens, length = np.zeros((rows, 6), np.int32), np.array([len(text) for text in says], np.int32)
    for b, text in enumerate(says):
        tokens[b, : len(text)] = TASK.tokenizer.encode(text)
    wide = np.zeros(tokens.shape, np.float32)
    return made.replace(
        prompts=make_prompts(TASK, TASK.train, np.array(index), np.arange(2)), tokens=tokens, length=length, behavior_logprobs=wide,
        sampled=np.arange(6) < length[:, None], entropy=wide, version=np.zeros(tokens.shape, np.int32),
    )  # fmt: skip


def fails(task) -> int:
    """A row that the grader cannot read."""
    return next(i for i, row in enumerate(task.train) if row.prompt[1] < "3")


def reads(task) -> int:
    return next(i for i, row in enumerate(task.train) if row.prompt[1] >= "3")


@pytest.fixture(scope="module")
def pool():
    graders = (
        GraderConfig("row_graders:even_steps", 2.0, step_end="+"),
        GraderConfig("format", 0.5, options={"pattern": "[0-9]+"}),
    )
    with GraderPool(RewardConfig(graders, 1, 60.0)) as pool:
        yield pool


@pytest.fixture(scope="module")
def graded(pool):
    """1+ 2+ # | 123: 1, 1, 0 times 2 | 0 times 2, and 1 for the format times 0.5."""
    return check(grade(rollouts(index=(reads(TASK), fails(TASK))), TASK, pool))


def test_a_pool_puts_steps_at_tokens_and_the_other_graders_at_the_last(graded):
    want = [[N, 2, N, 2, 0, N], [N, N, 0.5, N, N, N], [N] * 6, [N] * 6]
    np.testing.assert_array_equal(graded.step_reward, np.float32(want))
    np.testing.assert_array_equal(graded.components[:2], np.float32([[2 / 3, 0], [0, 1]]))
    np.testing.assert_array_equal(graded.reward[:2], np.float32([4 / 3, 0.5]))
    assert graded.failure.tolist() == [0, 1] and graded.keep.tolist() == [True, True, False, False]


def test_groups_of_any_size_and_filler_rows(pool):
    prompt, sample = number_rows([3, 1], 5)
    made = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]) if len(x) == 4 else x, rollouts())
    made = made.replace(prompts=rollouts(index=(reads(TASK), reads(TASK))).prompts, prompt=prompt, sample=sample)
    groups = check(grade(made, TASK, pool))
    want = [[N, 2, N, 2, 0, N], [N, N, 0.5, N, N, N], [0, N, N, N, N, N], [N, 2, 0, N, N, N], [N] * 6]
    np.testing.assert_array_equal(groups.step_reward, np.float32(want))


def test_without_steps_groups_have_none(pool):
    assert grade(rollouts(), TASK, lambda sample: 1.0).step_reward is None


def test_groups_that_are_selected_and_joined_keep_their_steps(graded):
    part = check(select_groups(graded, np.array([1, 0]), rows=6))
    np.testing.assert_array_equal(
        part.step_reward, np.concatenate([graded.step_reward[[2, 3, 0, 1]], np.full((2, 6), N)])
    )
    again = join_groups(part, graded)
    np.testing.assert_array_equal(again.step_reward, np.concatenate([part.step_reward[:4], graded.step_reward]))


def test_a_request_that_failed_costs_the_steps_of_the_whole_group(graded):
    merged = check(merge_requests(join_groups(graded, graded), np.array([0, 0, 1, 2])))
    assert merged.failure.tolist() == [1, 0, 1]
    np.testing.assert_array_equal(merged.step_reward[:4], np.full((4, 6), np.float32(N)))
    np.testing.assert_array_equal(merged.step_reward[4:6], graded.step_reward[:2])


def test_a_replay_returns_steps_as_they_were(graded):
    """The second group was not graded, so that the first one of the step before takes its place."""
    blank = blank_groups(2, 2, (graded.rollouts.prompts.tokens.shape[1], 6), 2, ("steps",), 0)
    buffer, rng, cfg = empty_buffer(3), np.random.default_rng(0), ReplayConfig(capacity=3, max_age=9)
    shapes = partial(jax.tree.map, lambda x: (x.shape, x.dtype))
    assert shapes(graded.replace(graders=(), threshold=1.0)) == shapes(check(blank))
    buffer, first, _ = exchange(buffer, graded.replace(graders=(), threshold=1.0), rng, None, cfg)
    other = graded.replace(graders=(), threshold=1.0, step_reward=graded.step_reward + np.float32(1))
    _, mixed, metrics = exchange(buffer, other, rng, None, cfg)
    assert metrics["groups/replayed"] == 1.0
    np.testing.assert_array_equal(mixed.step_reward, np.concatenate([other.step_reward[:2], graded.step_reward[:2]]))
    np.testing.assert_array_equal(first.step_reward, graded.step_reward)
    assert blank_groups(2, 2, (1, 6), 2, (), 0).step_reward is None


def test_the_numbers_and_the_record_of_a_step(graded):
    """Three steps and one in two graded responses."""
    found = describe(graded, ["even_steps", "format"])
    assert found["rewards/steps"] == 2 and found["rewards/even_steps/mean"] == pytest.approx(1 / 3)
    row = responses(TASK, graded, np.zeros((4, 6)), 1)[0]
    np.testing.assert_array_equal(row["step_reward"], np.float32([N, 2, N, 2, 0]))
    none = graded.replace(step_reward=None)
    assert (
        "rewards/steps" not in describe(none, ["a", "b"])
        and "step_reward" not in responses(TASK, none, np.zeros((4, 6)), 1)[0]
    )
    lost = select_groups(graded, np.array([1]))
    assert "rewards/steps" not in describe(lost, ["a", "b"])
