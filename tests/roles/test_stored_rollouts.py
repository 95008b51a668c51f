"""Groups through a file and back: to the last bit, in both formats; and files from which no groups can be made."""

import json

import jax
import numpy as np
import pytest
from experience.random_groups import groups_of, ragged
from fakes import sums
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.errors import UserError
from jaxrl_llm.metrics.json_lines import JsonRecords
from jaxrl_llm.roles.stored_rollouts import read_trajectories, trajectory_rows, write_trajectories
from jaxrl_llm.roles.summary import responses
from jaxrl_llm.tasks.records import read
from jaxrl_llm.types import Groups, check, select_groups

TASK = sums()
SIZE = TASK.tokenizer.size


def any_float32(rng, shape, low=None) -> np.ndarray:
    """Random bits, as numbers of any exponent, subnormal ones too. `low`: no larger number."""
    x = rng.integers(0, 2**32, shape, np.uint32).view(np.float32)
    x = np.where(np.isfinite(x), x, np.float32(-0.0))
    return x if low is None else np.minimum(x, np.float32(low))


def with_contents(groups: Groups, rng, K: int, optional: bool) -> Groups:
    """The groups with prompts, log-probs, kept tokens and rewards of random bits. All columns are 0 behind a row's end, and tokens
    the pad token."""
    rollouts, prompts = groups.rollouts, groups.rollouts.prompts
    (rows, slots), num = rollouts.tokens.shape, len(prompts.length)
    there = np.arange(slots) < rollouts.length[:, None]
    length = rng.integers(1, 5, num).astype(np.int32)
    asked = np.where(np.arange(4) < length[:, None], rng.integers(1, SIZE, (num, 4)), 0).astype(np.int32)
    sampled = there & (rng.random(there.shape) < 0.8) if optional else there
    of = lambda x, where, fill=0: np.where(where, x, fill).astype(x.dtype)  # noqa: E731
    tokens = of(rng.integers(0, SIZE, there.shape).astype(np.int32), there)
    kept = np.argsort(rng.random((*there.shape, SIZE)), axis=-1)[..., :K].astype(np.int32)
    kept[..., 0] = tokens
    kept = np.where(np.arange(K) < rng.integers(1, K + 1, (*there.shape, 1)), kept, -1)
    known = ~np.isnan(groups.reward)
    more = {
        "kept_tokens": of(kept, sampled[..., None], -1),
        "control_state": np.where(there, rng.integers(0, 9, there.shape), 0).astype(np.int32),
        "raw_logprobs": of(any_float32(rng, there.shape), sampled),
    }
    unknown, uid = np.full(num, -1, np.int32), np.arange(7, 7 + num, dtype=np.int32)
    temperature = np.where(rollouts.prompt >= 0, np.abs(any_float32(rng, rows)), 0).astype(np.float32)
    rollouts = rollouts.replace(
        prompts=prompts.replace(tokens=asked, length=length, row=unknown, uid=uid),
        tokens=tokens, sampled=sampled, behavior_logprobs=of(any_float32(rng, there.shape, 0), sampled),
        entropy=of(any_float32(rng, there.shape), sampled), version=of(rng.integers(0, 9, there.shape).astype(np.int32), there),
        temperature=temperature, **(more if optional else {}),
    )  # fmt: skip
    hint = np.where(optional & (rollouts.prompt >= 0), rng.integers(0, 4, rows), 0).astype(np.int32)
    components = np.where(known[:, None], any_float32(rng, (rows, 2)), np.float32(np.nan))
    steps = of(
        np.where(rng.random(there.shape) < 0.5, any_float32(rng, there.shape), np.nan).astype(np.float32), there, np.nan
    )
    return groups.replace(
        rollouts=rollouts, reward=np.where(known, any_float32(rng, rows), np.float32(np.nan)), components=components,
        vote=np.where(known, rng.integers(0, 2**31, rows), 0).astype(np.int32), keep=known,
        step_reward=steps if optional else None, hint=hint if hint.any() else None,
    )  # fmt: skip


def bits(x: np.ndarray) -> bytes:
    """Equal for equal bits; every NaN is the same."""
    x = np.asarray(x)
    return np.where(np.isnan(x), np.nan, x).astype(x.dtype).tobytes() if x.dtype.kind == "f" else x.tobytes()


def assert_same(got: Groups, want: Groups) -> None:
    assert got.graders == want.graders and jax.tree.structure(got) == jax.tree.structure(want)
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert (x.dtype, x.shape, bits(x)) == (y.dtype, y.shape, bits(y)), jax.tree_util.keystr(path)


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@given(groups=ragged(), seed=st.integers(0, 2**32 - 1), K=st.integers(1, 5), optional=st.booleans())
@settings(max_examples=30, deadline=None)
def test_groups_come_back_to_the_last_bit(tmp_path_factory, suffix, groups, seed, K, optional):
    """Filler rows, groups without rows and what a filter dropped are not in a file. The slots are those asked for."""
    groups = with_contents(groups, np.random.default_rng(seed), K, optional)
    path = tmp_path_factory.mktemp("files") / f"groups.{suffix}"
    write_trajectories(path, TASK, groups)
    found = read_trajectories(path, TASK, slots=(4, 6), kept=K)
    assert_same(check(found), select_groups(groups, np.flatnonzero(groups.rollouts.size)))


def plain() -> Groups:
    """Two groups of two rows with 2 tokens each, by hand."""

    groups = groups_of([2, 2], [1, 0, 1, 1])
    logprobs = np.where(groups.rollouts.sampled, np.float32(-0.1), 0).astype(np.float32)
    return groups.replace(
        rollouts=groups.rollouts.replace(behavior_logprobs=logprobs, temperature=np.ones(4, np.float32))
    )


def test_rows_of_a_file_by_hand(tmp_path):
    write_trajectories(tmp_path / "x.jsonl", TASK, plain())
    rows = [record.columns for record in read(tmp_path / "x.jsonl", "")]
    assert [(row["uid"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    third = TASK.train[1]
    assert rows[2] == {
        "tokenizer": TASK.tokenizer.fingerprint[:16], "uid": 1, "sample": 0, "row": 1, "prompt": "<pad>", "completion": "<pad>0",
        "answer": third.answer, "prompt_ids": [0], "ids": [0, 1],
        # The nearest float32 to -0.1 is -0.100000001490116...
        "logprobs": [-0.100000001, -0.100000001], "entropy": [0.0, 0.0], "version": 3, "temperature": 1.0, "reward": 1.0,
        "components": {"right": 1.0, "style": 0.0}, "success": True, "vote": 0, "finish": "eos",
    }  # fmt: skip


def test_kept_tokens_are_as_many_as_were_kept(tmp_path):
    groups = plain()
    kept = np.full((4, 6, 3), -1, np.int32)
    kept[:, 0, 0], kept[:, 1, :2] = 0, (4, 1)
    rows = trajectory_rows(TASK, TASK.train, groups.replace(rollouts=groups.rollouts.replace(kept_tokens=kept)))
    assert rows[0]["kept_tokens"] == [[0], [4, 1]]


def test_the_row_is_that_of_the_task_with_the_prompts_tokens(tmp_path):
    """The order of the task's rows is the seed's, so the number in the file is not asked."""
    groups = plain()
    tokens = np.stack([TASK.train[5].tokens, TASK.held_out[0].tokens])
    prompts = groups.rollouts.prompts.replace(tokens=tokens, length=np.full(2, tokens.shape[1], np.int32))
    write_trajectories(tmp_path / "x.jsonl", TASK, groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)))
    assert read_trajectories(tmp_path / "x.jsonl", TASK).rollouts.prompts.row.tolist() == [5, -1]


def test_a_runs_own_record_is_a_trajectory_file(tmp_path):
    groups = with_contents(plain(), np.random.default_rng(1), 3, True)
    records = JsonRecords(tmp_path)
    records.rollouts(8, responses(TASK, groups, np.zeros((4, 6)), -1))
    records.close(False)
    found = read_trajectories(tmp_path / "rollouts.jsonl", TASK, slots=(4, 6), kept=3)
    assert_same(found, groups)
    row = read(tmp_path / "rollouts.jsonl", "")[0].columns
    assert {"step", "tokens", "advantage"} <= row.keys() and len(row["tokens"]) == len(row["ids"])


def test_a_full_disk_or_an_error_leaves_nothing(tmp_path):
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for suffix in ("jsonl", "parquet"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            with pytest.raises(UserError, match=r"x\.\w+: File too large; nothing was written"):
                write_trajectories(tmp_path / f"x.{suffix}", TASK, plain())
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    write_trajectories(tmp_path / "x.jsonl", TASK, plain())
    with pytest.raises(UserError, match=r"x\.jsonl, which exists, want a new file"):
        write_trajectories(tmp_path / "x.jsonl", TASK, plain())


def edited(tmp_path, **changes):
    """The file of `plain`, with columns of its second row changed; None takes one out."""
    path = tmp_path / "edited.jsonl"
    path.unlink(missing_ok=True)
    write_trajectories(path, TASK, plain())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    lines[1] = {name: x for name, x in (lines[1] | changes).items() if x is not None}
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_log_probs_may_be_missing_only_where_none_are_needed(tmp_path):
    path = edited(tmp_path, logprobs=None)
    with pytest.raises(
        UserError, match=r"edited\.jsonl:2: got a response without logprobs, and so have 1 of 4, want the log-prob"
    ):
        read_trajectories(path, TASK)
    found = read_trajectories(path, TASK, needs_logprobs=False).rollouts.behavior_logprobs
    assert np.isnan(found[1]).all() and not np.isnan(found[[0, 2, 3]]).any()


@pytest.mark.parametrize(
    "changes, options, message",
    [
        ({"kept_tokens": [[0], [1]]}, {}, r":1: got a response without kept_tokens, want them in all responses or in none"),
        ({}, {"slots": (0, 1)}, r":1: got 2 ids, want 1 at most"),
        ({"prompt_ids": [1, 2]}, {"slots": (1, 0)}, r":2: got 2 prompt_ids, want 1 at most"),
        ({"failure": "bored", "uid": 8}, {}, r":2: failure: got 'bored', want one of none, raised, timed_out"),
    ],
)  # fmt: skip
def test_what_makes_no_groups(tmp_path, changes, options, message):
    with pytest.raises(UserError, match=message):
        read_trajectories(edited(tmp_path, **changes), TASK, **options)


def test_rows_without_a_reward_are_not_kept_unless_no_row_has_one(tmp_path):
    assert read_trajectories(edited(tmp_path, reward=None), TASK).keep.tolist() == [True, False, True, True]
    (tmp_path / "texts.jsonl").write_text(
        '{"prompt": "<3+4>", "completion": "7"}\n{"prompt": "<3+4>", "completion": "8"}\n'
    )
    found = check(read_trajectories(tmp_path / "texts.jsonl", TASK, needs_logprobs=False))
    assert found.keep.all() and np.isnan(found.reward).all() and found.rollouts.size.tolist() == [2]
    eos = TASK.eos[0]
    assert found.rollouts.tokens.tolist() == [[8, eos], [9, eos]] and found.rollouts.sample.tolist() == [0, 1]
