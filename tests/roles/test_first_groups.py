"""Groups of a file with which the buffer of a replay starts: regraded, in the columns of the run; or refused in one message."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from fakes import blueprint, config, sums

from jaxrl_llm.distribution.control_tables import encode
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.errors import UserError
from jaxrl_llm.experience.buffer import empty_buffer
from jaxrl_llm.experience.replay import exchange, filled
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.first_groups import first_groups
from jaxrl_llm.tasks.trajectories import tokenizer_name
from jaxrl_llm.types import check

TASK = sums()
ROWS = [row.prompt for row in TASK.train[:3]]
# The responses to each of the three prompts: right, wrong, right, ...
TEXTS = [(prompt, str(int(prompt[1]) + int(prompt[3]) + i % 2)) for prompt in ROWS for i in range(5)]


@pytest.fixture(scope="module")
def pool():
    with GraderPool(config().reward) as pool:
        yield pool


def write(path, rows) -> str:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)


def texts(path) -> str:
    return write(path, [{"prompt": prompt, "completion": text} for prompt, text in TEXTS])


def with_ids(path, **more) -> str:
    """The same, token by token, sampled by another run."""
    encode, name = TASK.tokenizer.encode, tokenizer_name(TASK.tokenizer)
    rows = []
    for i, (prompt, text) in enumerate(TEXTS):
        ids = [*encode(text), *TASK.eos]
        rows.append(
            {"prompt_ids": encode(prompt), "ids": ids, "logprobs": [-0.5 - i] * len(ids), "version": 77, "uid": i // 5,
             "sample": i % 5, "tokenizer": name, "reward": 0.0, "temperature": 0.5} | more
        )  # fmt: skip
    return write(path, rows)


def of(start: str, **more):
    """Blueprint of a run of 4 samples per prompt that starts with the file."""
    return blueprint(
        experience={"replay": {"capacity": 6, "start": start} | more}, objective={"loss": {"shaping": 0.1}}
    )


def test_texts_of_others_are_graded_and_count_as_sampled_for_certain(tmp_path, pool):
    """Five responses to each of three prompts: with four samples per prompt, groups of four and of one."""
    run = of(texts(tmp_path / "x.jsonl"))
    found = check(first_groups(run, TASK, pool, 9))
    rollouts = found.rollouts
    assert rollouts.size.tolist() == [4, 1] * 3 and rollouts.prompts.row.tolist() == [0, 0, 1, 1, 2, 2]
    # The graders of the run, whatever the file says.
    assert found.reward.tolist() == [1, 0, 1, 0, 1] * 3 and found.keep.all() and found.graders == ("exact_match",)
    assert (rollouts.behavior_logprobs == 0).all() and (rollouts.temperature == 1).all()
    assert set(rollouts.version[rollouts.sampled].tolist()) == {9}
    assert rollouts.tokens.shape == (15, 6) and rollouts.prompts.tokens.shape == (6, 5)


def test_no_column_of_a_response_without_log_probs_is_unknown(tmp_path, pool):
    """Sampled for certain, also before truncation; nothing was masked."""
    run = blueprint(
        experience={"replay": {"capacity": 6, "start": texts(tmp_path / "x.jsonl")}},
        rollout={"prompts": 8, "samples": 4, "max_new_tokens": 6, "raw_logprobs": True, "min_new_tokens": 1},
    )
    rollouts = first_groups(run, TASK, pool, 9).rollouts
    assert (
        (rollouts.raw_logprobs == 0).all()
        and (rollouts.entropy == 0).all()
        and (rollouts.control_state[:, 0] > 0).all()
    )


def test_a_row_with_a_limit_of_its_own_is_read_under_it(tmp_path, pool):
    """What was allowed in a slot depends on the tokens that were left."""
    run = blueprint(
        experience={"replay": {"capacity": 6, "start": texts(tmp_path / "x.jsonl")}},
        rollout={"prompts": 8, "samples": 4, "max_new_tokens": 6, "min_new_tokens": 1},
    )
    first = dataclasses.replace(TASK.train[0], max_new_tokens=3)
    rollouts = first_groups(run, dataclasses.replace(TASK, train=(first, *TASK.train[1:])), pool, 9).rollouts
    limit, slots = np.where(rollouts.prompts.row == 0, 3, 6)[rollouts.prompt][:, None], np.arange(6)
    want = np.asarray(encode(np.zeros_like(limit), limit - slots, np.broadcast_to(slots < 1, (len(limit), 6))))
    np.testing.assert_array_equal(rollouts.control_state, np.where(slots < rollouts.length[:, None], want, 0))


def test_what_a_policy_sampled_keeps_its_log_probs_and_its_temperature(tmp_path, pool):
    found = first_groups(of(with_ids(tmp_path / "x.jsonl")), TASK, pool, 9)
    assert found.rollouts.behavior_logprobs[:, 0].tolist() == [-0.5 - i for i in range(15)]
    assert (found.rollouts.temperature == 0.5).all() and found.reward.tolist() == [1, 0, 1, 0, 1] * 3


def test_beside_hints_they_have_the_columns_of_hints(tmp_path, pool):
    """Those of a run that had hints say so, and nothing of them is trained on but what was sampled."""
    start = with_ids(tmp_path / "x.jsonl", hint_tokens=1)
    for train in (False, True):
        run = blueprint(
            experience={"replay": {"capacity": 6, "start": start}, "hints": {"kind": "cosine", "train": train}},
            objective={"loss": {"shaping": 0.1}},
        )
        found = check(first_groups(run, TASK, pool, 9))
        assert found.hint.tolist() == [1] * 15 and (found.taught is None) == (not train)
        np.testing.assert_array_equal(found.trainable_tokens, found.rollouts.sampled)
    found = first_groups(of(texts(tmp_path / "y.jsonl")), TASK, pool, 9)
    assert found.hint is None and found.taught is None


def test_the_buffer_starts_with_them_and_no_step_has_used_them(tmp_path, pool):
    """They have the columns of the run's own groups, so that both lie in one buffer; and fresh ones need not enter it."""
    run = of(texts(tmp_path / "x.jsonl"), join={"most": 1, "right": True, "swap": True}, store_fresh=False, max_age=0)
    cfg, groups = run.cfg.experience.replay, first_groups(run, TASK, pool, 9)
    buffer = filled(empty_buffer(6), groups, cfg, 0)
    assert buffer.known.uses.tolist() == [0] * 6 and buffer.known.version.tolist() == [9] * 6
    fresh = groups.replace(rollouts=groups.rollouts.replace(version=groups.rollouts.version + 1000))
    after, out, metrics = exchange(buffer, fresh, np.random.default_rng(0), None, cfg, 0)
    # The first group of each prompt has one for a fresh response: the newest right one.
    assert metrics["replay/rows"] == 3 and out.reused.sum() == 3 and (out.reward[out.reused] == 1).all()
    assert after.next == buffer.next and after.known.uses.sum() == 3
    jax.tree.map(np.testing.assert_array_equal, after.packed, buffer.packed)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"capacity": 5}, r"experience.replay.capacity: got 5, want 6 or more, the groups in .*x.jsonl"),
        ({"memory_mib": 1e-4}, r"experience.replay.memory_mib: got 0.0001, want 0.00\d or more, the size of .*x.jsonl"),
    ],
)
def test_a_buffer_that_cannot_hold_the_file(tmp_path, pool, changes, message):
    run = of(texts(tmp_path / "x.jsonl"), **changes)
    with pytest.raises(UserError, match=message):
        filled(empty_buffer(6), first_groups(run, TASK, pool, 0), run.cfg.experience.replay, 0)


def test_other_prompts_and_truncation_are_told(tmp_path, pool):
    other = write(tmp_path / "o.jsonl", [{"prompt": "<1>", "completion": "1"}])
    with pytest.raises(UserError, match=r"start: got no response in .*o.jsonl to a prompt that is trained on"):
        first_groups(of(other), TASK, pool, 0)
    run = blueprint(
        experience={"replay": {"capacity": 6, "start": texts(tmp_path / "x.jsonl")}},
        rollout={"prompts": 8, "samples": 4, "max_new_tokens": 6, "top_p": 0.9},
    )
    with pytest.raises(UserError, match=r"start: got responses without kept_tokens, want them, or rollout.top_p 1"):
        first_groups(run, TASK, pool, 0)


@pytest.mark.parametrize(
    "make, objective, message",
    [
        (texts, {}, r"x.jsonl:1: got no logprobs in 15 of 15 responses, want .*; or objective.loss.shaping: 0.1"),
        (texts, {"loss": {"shaping": 0.1}}, ""),
        (texts, {"loss": {"shaping": 0.1, "kl": {"weight": 0.1}}}, ""),
        (
            texts,
            {"loss": {"shaping": 0.1, "kl": {"weight": 0.1, "to": "behavior"}}},
            r"or objective.loss.kl.weight 0: it reads",
        ),
        (
            texts,
            {"loss": {"shaping": 0.1, "kl": {"weight": 0.1, "times": "ratio"}}},
            r"or objective.loss.kl.weight 0: it reads",
        ),
        (
            texts,
            {"loss": {"shaping": 0.1}, "reward_kl": {"weight": 0.1}},
            r"or objective.reward_kl.weight 0: it compares",
        ),
        (
            lambda path: with_ids(path, temperature=0.0),
            {},
            r"x.jsonl:1: got temperature 0 in 15 of 15 responses, want more",
        ),
        (lambda path: with_ids(path, tokenizer="f" * 16), {}, r"got tokens of another tokenizer"),
        (lambda path: with_ids(path), {}, ""),
        (lambda path: with_ids(path, logprobs=[0.0]), {}, r"x.jsonl:1: .*logprobs"),
        (lambda path: str(path), {}, r"x.jsonl: cannot be read: No such file"),
        (
            lambda path: write(path, [{"prompt": ROWS[0], "completion": "123456"}]),
            {"loss": {"shaping": 0.1}},
            r"x.jsonl:1: got 7 tokens, and 1 of 1 responses have more than rollout.max_new_tokens \(6\), want that many at most",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused_before_anything_compiles(tmp_path, make, objective, message):
    cfg = config(
        experience={"replay": {"capacity": 6, "start": make(tmp_path / "x.jsonl")}},
        objective=objective,
        task={"kind": "arithmetic", "terms": 2, "held_out": 3},
    )
    found = [line for line in inputs.read(cfg, trains=True).problems if "replay" in line]
    if message:
        (line,) = found
        assert line.startswith("experience.replay.start: ") and re.search(message, line)
    else:
        assert found == []
