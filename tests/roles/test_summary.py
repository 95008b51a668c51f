"""A step's groups in numbers and as text, by hand."""

import zlib

import numpy as np
import pytest
from fakes import groups_of, sums

from jaxrl_llm.control.automaton import token_automaton
from jaxrl_llm.distribution.control_tables import encode, join_automata
from jaxrl_llm.environments.grader_pool import Failure
from jaxrl_llm.perf.utilization import DecodeRates
from jaxrl_llm.perf.work import Work
from jaxrl_llm.roles.stage_metrics import describe_stages
from jaxrl_llm.roles.summary import advantage_of, describe, describe_engine, replayed_rows, responses
from jaxrl_llm.rollout.session import Stats
from jaxrl_llm.types import Credit, Finish, join_groups, number_rows, select_groups

TASK, NAN = sums(), np.nan


def step():
    """Three groups of two: rewards differ, are equal, could not be graded. Ten tokens in all."""
    groups = groups_of(np.array([[1.0, 3.0], [2.0, 2.0], [NAN, NAN]]), length=[2, 1, 2, 2, 1, 2])
    rollouts = groups.rollouts
    logprobs = np.where(rollouts.sampled, np.float32(-0.25), 0).astype(np.float32)
    rollouts = rollouts.replace(
        behavior_logprobs=logprobs,
        entropy=-2 * logprobs,
        finish=np.array([Finish.LENGTH, Finish.EOS, Finish.LENGTH, Finish.EOS, Finish.EOS, Finish.EOS], np.int32),
        prompts=rollouts.prompts.replace(uid=np.int32([30, 31, 32])),
    )
    keep = np.array([True, True, False, False, False, False])
    components = np.stack([groups.reward - 0.5, np.full(6, 0.5, np.float32)], axis=1)
    components[4:] = NAN
    failed_by = np.int32([-1, -1, 1])
    return groups.replace(rollouts=rollouts, keep=keep, components=components, failed_by=failed_by)


def test_a_step_in_numbers():
    groups = step()
    found = describe(groups, ["right", "short"])
    want = {
        "completions/mean_length": 10 / 6,
        "completions/min_length": 1.0,
        "completions/max_length": 2.0,
        "completions/clipped_ratio": 2 / 6,
        "completions/tokens": 10.0,
        "completions/crc32": float(zlib.crc32(groups.rollouts.tokens.tobytes())),
        "prompts/first_uid": 30.0,
        "groups/graded": 2.0,
        "groups/kept": 1.0,
        "sampling/mean_logprob": -0.25,
        "sampling/entropy": 0.5,
        "reward": 2.0,
        # Of 1 and 3 the sample's deviation is sqrt(2), of equal ones 0.
        "reward_std": 2**0.5 / 2,
        "frac_reward_zero_std": 0.5,
        "rewards/right/mean": 1.5,
        "rewards/short/mean": 0.5,
        "rewards/short/raised": 1.0,
    }
    zeros = {f"rewards/{grader}/{kind.name.lower()}": 0.0 for grader in ("right", "short") for kind in Failure if kind}
    stages = describe_stages(groups)
    assert found == pytest.approx(zeros | want | stages) and all(type(x) is float for x in found.values())


def test_a_step_of_groups_of_any_size_in_numbers():
    """Sizes 3, 1, 2 and 0, and two fillers: a group of one has no deviation, and fillers are nobody's."""
    prompt, sample = number_rows([3, 1, 2, 0], 8)
    groups = groups_of(np.array([[1.0, 3.0], [5.0, 7.0], [2.0, 2.0], [NAN, NAN]]))
    groups = groups.replace(
        rollouts=groups.rollouts.replace(prompt=prompt, sample=sample, length=np.int32([2, 1, 2, 2, 2, 1, 0, 0])),
        reward=np.float32([1, 1, 4, 9, 2, 2, NAN, NAN]), components=np.float32([[1], [1], [4], [9], [2], [2], [NAN], [NAN]]),
        failure=np.zeros(4, np.int32), failed_by=np.full(4, -1, np.int32), keep=prompt == 0,
    )  # fmt: skip
    found = describe(groups, ["right"])
    assert found["completions/mean_length"] == 10 / 6 and found["completions/min_length"] == 1
    assert found["groups/graded"] == 3 and found["groups/kept"] == 1
    assert found["reward"] == pytest.approx(19 / 6) == found["rewards/right/mean"]
    # 1, 1, 4 lie 1, 1, 2 from their mean: sqrt(6 / 2).
    assert found["reward_std"] == pytest.approx(3**0.5 / 2) and found["frac_reward_zero_std"] == 0.5
    records = responses(sums(), groups, np.zeros((8, 2)), 3)
    assert [(x["uid"], x["sample"]) for x in records] == [(0, 0), (0, 1), (0, 2), (1, 0), (2, 0), (2, 1)]


def test_a_mean_over_nothing_is_absent():
    ungraded = groups_of(np.full((2, 2), NAN))
    found = describe(ungraded, ["right"])
    assert found["groups/graded"] == 0 and found["rewards/right/raised"] == 2
    assert not {"reward", "reward_std", "frac_reward_zero_std", "rewards/right/mean"} & set(found)
    alone = describe(groups_of(np.array([[1.0], [3.0]])), ["right"])
    assert alone["reward"] == 2 and not {"reward_std", "frac_reward_zero_std"} & set(alone)


@pytest.mark.parametrize("value", [0.9532, 0.3, 1 / 3, 1e-8, 1e8])
def test_equal_rewards_have_a_deviation_of_exactly_0(value):
    found = describe(groups_of(np.full((3, 7), value, np.float32)), ["right"])
    assert found["reward_std"] == 0 and found["frac_reward_zero_std"] == 1


def test_metrics_of_the_engine():
    """By hand: 52 bytes at 2 bytes per second are 26 s of 52; FLOPs are the cheaper part."""
    stats = Stats(seconds=52.0, chunks=2, steps=16, row_steps=80, tokens=60, overflow=6, work=Work(52, 16))
    found = describe_engine(stats, DecodeRates(2.0, 10.0))
    assert found == {
        "rollout/steps": 16.0,
        "rollout/segments": 2.0,
        "rollout/live_rows": 3.75,
        "rollout/waste": 0.25,
        "sampling/support_overflow": 0.1,
        "rollout/ceiling_fraction": 0.5,
    }
    # Here products are what takes long: 16 FLOPs at 0.5 a second.
    assert describe_engine(stats, DecodeRates(1e9, 0.5))["rollout/ceiling_fraction"] == 32 / 52
    assert describe_engine(stats, None) == {k: v for k, v in found.items() if k != "rollout/ceiling_fraction"}


def test_records_of_rows():
    groups = step()
    tokens = np.array([TASK.tokenizer.encode(text) for text in ("12", "3#", "45", "6#", "7#", "89")], np.int32)
    prompt = TASK.tokenizer.encode("<4>")
    rollouts = groups.rollouts.replace(
        tokens=np.where(groups.rollouts.sampled, tokens, 0).astype(np.int32),
        prompts=groups.rollouts.prompts.replace(
            tokens=np.tile(np.int32(prompt), (3, 1)), length=np.full(3, len(prompt), np.int32)
        ),
    )
    advantage = np.float32([[1, 2], [3, 9], [0, 0], [0, 0], [0, 0], [0, 0]])
    found = responses(TASK, groups.replace(rollouts=rollouts), advantage, 2)
    assert [(row["uid"], row["sample"], row["completion"]) for row in found] == [
        (30, 0, "12"),
        (30, 1, "3"),
        (31, 0, "45"),
        (31, 1, "6#"),
    ]
    assert [row["advantage"] for row in found] == [1.5, 3.0, 0.0, 0.0]
    assert [row["finish"] for row in found] == ["length", "eos", "length", "eos"]
    assert [float(row["reward"]) for row in found] == [1, 3, 2, 2] and {row["prompt"] for row in found} == {"<4>"}
    second = found[1]
    assert second["ids"] == tokens[1, :1].tolist() and second["tokens"] == ["3"]
    assert second["logprobs"].tolist() == [-0.25] and second["entropy"].tolist() == [0.5]
    assert "raw_logprobs" not in second


def test_log_probs_before_truncation_are_shown_where_they_are_kept():
    groups = step()
    raw = np.where(groups.rollouts.sampled, -1.0, 0.0).astype(np.float32)
    groups = groups.replace(rollouts=groups.rollouts.replace(raw_logprobs=raw))
    [first, second] = responses(TASK, groups, np.zeros((6, 2)), 1)
    assert (first["raw_logprobs"].tolist(), second["raw_logprobs"].tolist()) == ([-1, -1], [-1])


def controlled_step():
    """The first row's two tokens: `7` is one of two that were allowed, and `#` the only one; the others were free."""
    classes = np.where(np.arange(16) == 15, 1, np.isin(np.arange(16), [1, 8]) * 2)
    automaton = token_automaton(
        classes, np.array([[-1, -1, 1], [-1, 2, -1], [-1, -1, -1]]), np.array([2, 1, 0]), 0, np.arange(3) == 2
    )
    tables, [start] = join_automata([automaton], 16, (15,), 16)
    groups, codes = step(), np.zeros((6, 2), np.int32)
    codes[0] = encode(np.array([start, start + 1]), np.array([6, 5]), np.zeros(2, bool))
    return groups.replace(rollouts=groups.rollouts.replace(control_state=codes)), tables


def test_what_was_allowed_is_recorded_where_not_all_was():
    groups, tables = controlled_step()
    first, second = responses(TASK, groups, np.zeros((6, 2)), 1, tables)
    assert first["num_allowed"] == [2, 1] and first["allowed"] == [["0", "7"], ["#"]]
    assert not {"num_allowed", "allowed"} & second.keys()
    free = responses(TASK, groups, np.zeros((6, 2)), 1)[0]
    assert not {"num_allowed", "allowed"} & free.keys()


def test_the_share_of_forced_tokens():
    """One of the ten tokens was not sampled."""
    assert "control/forced_share" not in describe(step(), ["right", "short"])
    groups, _ = controlled_step()
    sampled = groups.rollouts.sampled.copy()
    sampled[0, 1] = False
    found = describe(groups.replace(rollouts=groups.rollouts.replace(sampled=sampled)), ["right", "short"])
    assert found["control/forced_share"] == pytest.approx(0.1)


@pytest.mark.parametrize(("asked", "rows"), [(0, 0), (1, 2), (3, 6), (99, 6)])
def test_no_more_groups_than_there_are_are_recorded(asked, rows):
    assert len(responses(TASK, step(), np.zeros((6, 2)), asked)) == rows


def test_advantages_are_shown_beside_their_own_rows_after_a_replay():
    """The dropped first group was replaced by a smaller one, so all later rows moved."""
    fresh = groups_of(np.array([[0.0] * 4, [1.0, 0.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    fresh = fresh.replace(keep=np.repeat([False, True, True], 4))
    stored = select_groups(groups_of(np.array([[1.0, 0.0]])), np.array([0]))
    stored = stored.replace(
        rollouts=stored.rollouts.replace(prompts=stored.rollouts.prompts.replace(uid=np.int32([77])))
    )
    trained = select_groups(join_groups(stored, select_groups(fresh, np.array([1, 2]))), np.arange(3), 12)
    assert replayed_rows(fresh, trained) == {"replay/task_rows": [0]} and replayed_rows(fresh, fresh) == {}
    # A stored response among the fresh ones of group 1.
    joined = trained.replace(reused=np.arange(12) < 3)
    assert replayed_rows(fresh, joined) == {"replay/task_rows": [0, 1]}
    credit = Credit(np.arange(12, dtype=np.float32)[:, None].repeat(2, axis=1))
    assert advantage_of(fresh, trained, credit)[:, 0].tolist() == [0] * 4 + [2, 3, 4, 5, 6, 7, 8, 9]
    # A group of a file behind them, whose rows have the names of fresh ones; and an empty place, whose prompt is nobody's.
    stored = stored.replace(
        rollouts=stored.rollouts.replace(prompts=stored.rollouts.prompts.replace(uid=np.int32([1]), row=np.int32([5])))
    )
    empty = select_groups(fresh, np.array([0])).replace(failure=np.int32([0]))
    whole = join_groups(select_groups(fresh, np.array([1, 2])), stored, empty)
    asked = whole.rollouts.prompts.replace(uid=np.int32([1, 2, 1, 60]))
    trained = select_groups(whole.replace(rollouts=whole.rollouts.replace(prompts=asked)), np.arange(4), 14)
    rows = trained.rollouts
    trained = trained.replace(
        rollouts=rows.replace(prompt=np.where(rows.prompt == 3, -1, rows.prompt)), reused=np.arange(14) // 2 == 4
    )
    credit = Credit(np.arange(14, dtype=np.float32)[:, None].repeat(2, axis=1))
    assert advantage_of(fresh, trained, credit)[:, 0].tolist() == [0] * 4 + [0, 1, 2, 3, 4, 5, 6, 7]
    assert replayed_rows(fresh, trained) == {"replay/task_rows": [5]}
