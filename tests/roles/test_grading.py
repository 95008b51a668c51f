"""Grading in this process and by a pool: groups with the grades of each row."""

import jax
import numpy as np
import pytest
from fakes import groups_of, sums
from row_graders import odd

from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import UserError
from jaxrl_llm.roles.grading import grade
from jaxrl_llm.tasks.stream import make_prompts
from jaxrl_llm.types import check, number_rows

TASK = sums()
SAYS = ["12#", "3", "12#", ""]
ROWS = (5, 8)


def rollouts(rows=TASK.train, index=ROWS):
    """Two prompts with two samples each, whose texts are SAYS."""
    made = groups_of(np.zeros((2, 2))).rollouts
    tokens = np.zeros((4, 3), np.int32)
    for b, text in enumerate(SAYS):
        ids = TASK.tokenizer.encode(text)
        tokens[b, : len(ids)] = ids
    wide, length = np.zeros(tokens.shape, np.float32), np.array([len(text) for text in SAYS], np.int32)
    return made.replace(
        prompts=make_prompts(TASK, rows, np.array(index), np.arange(2)), tokens=tokens, length=length, behavior_logprobs=wide,
        sampled=np.arange(3) < length[:, None], entropy=wide, version=np.zeros(tokens.shape, np.int32),
    )  # fmt: skip


def test_a_function_grades_each_sample_of_each_row():
    seen = []

    def reward(sample):
        seen.append((sample.prompt, sample.completion, sample.answer))
        return len(sample.completion) / 2

    groups = check(grade(rollouts(), TASK, reward))
    rows = [TASK.train[row] for row in (5, 5, 8, 8)]
    assert seen == [(row.prompt, text, row.answer) for row, text in zip(rows, SAYS, strict=True)]
    assert groups.reward.tolist() == [1.5, 0.5, 1.5, 0.0] == groups.components[:, 0].tolist()
    assert groups.keep.all() and not groups.failure.any() and groups.failed_by.tolist() == [-1, -1]
    # Equal answers have one vote, none has 0; without a grader that extracts, the answer is the response.
    vote = groups.vote.tolist()
    assert vote[0] == vote[2] != vote[1] and vote[3] == 0 and all(vote[:3])


def test_groups_of_any_size_are_graded_row_by_row():
    """The first prompt has three rows, the second one, and a filler row has no grade."""
    prompt, sample = number_rows([3, 1], 5)
    made = jax.tree.map(lambda x: np.concatenate([x, np.zeros_like(x[:1])]) if len(x) == 4 else x, rollouts())
    groups = check(
        grade(made.replace(prompt=prompt, sample=sample), TASK, lambda s: len(s.completion) + ord(s.prompt[1]) / 99)
    )
    answers = [TASK.train[row] for row in (5, 5, 5, 8)]
    want = [len(text) + ord(row.prompt[1]) / 99 for text, row in zip(SAYS, answers, strict=True)]
    np.testing.assert_array_equal(groups.reward, np.float32([*want, np.nan]))
    assert groups.keep.tolist() == [True] * 4 + [False] and groups.vote[4] == 0 and groups.failure.tolist() == [0, 0]
    assert groups.kept.tolist() == [True, True]


def test_a_grader_that_extracts_gives_the_votes_and_is_started():
    class Started:
        started = False

        def start(self):
            self.started = True

        def __call__(self, sample):
            return self.started

        def extract(self, sample):
            return sample.completion[:1]

    groups = grade(rollouts(), TASK, Started())
    assert groups.reward.tolist() == [1.0] * 4
    assert groups.vote[0] == groups.vote[2] and groups.vote[1] != groups.vote[0]


def test_rows_may_be_others_than_the_training_rows():
    answers, held_out = [], TASK.held_out
    grade(rollouts(held_out, (2, 0)), TASK, lambda sample: answers.append(sample.answer) or 0, rows=held_out)
    assert answers == [held_out[row].answer for row in (2, 2, 0, 0)]
    # Prompts that engine.generate got as texts or ids have no row.
    asked = rollouts(held_out, (2, 0))
    asked = asked.replace(prompts=asked.prompts.replace(row=np.full(2, -1, np.int32)))
    grade(asked, TASK, lambda sample: answers.append(sample.answer) or 0, rows=[held_out[2], held_out[0]])
    assert answers[4:] == answers[:4]
    with pytest.raises(UserError, match="rollouts: got a prompt 0 other than that of row 0"):
        grade(asked, TASK, lambda sample: 0)


@pytest.mark.parametrize(
    "rows", [None, TASK.held_out[::-1], TASK.held_out[:1]], ids=["training rows", "order", "too few"]
)
def test_prompts_of_other_rows_are_not_graded_by_their_answers(rows):
    with pytest.raises(UserError, match=r"rollouts: got a prompt 0 other than that of row 2, .* want .* rows=..."):
        grade(rollouts(TASK.held_out, (2, 0)), TASK, lambda sample: 0, rows=rows)


def test_an_exception_is_the_functions_own():
    with pytest.raises(ZeroDivisionError):
        grade(rollouts(), TASK, lambda sample: 1 / (len(sample.completion) - 1))


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ("1", "returned a str, want a real number"),
        (None, "returned a NoneType, want a real number"),
        (float("nan"), "returned nan"),
        (1e39, "returned 1e+39"),
    ],
)
def test_what_is_no_number_is_an_error_with_the_response(result, words):
    def score(sample):
        return result

    with pytest.raises(UserError) as error:
        grade(rollouts(), TASK, score)
    for part in ("the reward score", words, "the response '12#'", repr(TASK.train[5].prompt)):
        assert part in str(error.value)


def test_a_name_is_no_function():
    with pytest.raises(
        UserError, match=r"reward: got 'gsm8k', want a function of one Sample, rl\.make_grader of a name"
    ):
        grade(rollouts(), TASK, "gsm8k")


def test_a_pool_gives_the_grades_of_its_workers():
    with GraderPool(odd, workers=1, deadline_s=60.0) as pool:
        assert pool.names == ["odd"]
        groups = grade(rollouts(), TASK, pool)
    alone = grade(rollouts(), TASK, odd)
    assert groups.reward.tolist() == alone.reward.tolist() and groups.vote.tolist() == alone.vote.tolist()
