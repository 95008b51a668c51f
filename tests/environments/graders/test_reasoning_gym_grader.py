"""Rewards of reasoning-gym's scorers, on rows as its tasks make them."""

import json

import pytest

from jaxrl_llm.environments.grader import Sample, make_grader

# From the extra "tasks".
reasoning_gym = pytest.importorskip("reasoning_gym")


@pytest.fixture(scope="module")
def entry():
    return reasoning_gym.create_dataset("chain_sum", size=1, seed=3)[0] | {"reasoning_gym": "chain_sum"}


def score(completion, entry, finish="eos", **options):
    return make_grader("reasoning_gym", options)(Sample(entry["question"], completion, entry["answer"], finish, entry))


def test_the_right_answer_earns_1_and_others_partial_credit(entry):
    right = entry["answer"]
    assert score(right, entry) == score(f" {right}\n", entry) == score(f"<think>{right}0</think>{right}", entry) == 1.0
    assert score(str(int(right) + 1), entry) < 0.1
    # `score_answer` gives len(oracle) / len(answer) for an answer that contains the oracle.
    assert score(f"It is {right}", entry) == pytest.approx(len(right) / (6 + len(right)))
    assert score("", entry) == score(" ", entry) == score(right, entry, finish="length") == 0.0


def test_a_pattern_selects_the_answer(entry):
    right, pattern = entry["answer"], "<answer>(.*?)</answer>"
    assert score(f"So: <answer> {right} </answer>.", entry, pattern=pattern) == 1.0
    assert score(f"<answer>{right}</answer><answer>x</answer>", entry, pattern=pattern) < 0.1
    assert score(right, entry, pattern=pattern) == 0.0


def test_a_scorer_reads_metadata_and_settings():
    """decimal_arithmetic allows one unit in the last place of its settings."""
    places = {"min_num_decimal_places": 2, "max_num_decimal_places": 2}
    row = reasoning_gym.create_dataset("decimal_arithmetic", size=1, seed=0, **places)[0]
    row |= {"reasoning_gym": "decimal_arithmetic", "metadata": json.dumps(row["metadata"])}
    near = str(float(row["answer"]) + 0.005)
    assert score(row["answer"], row, config=places) == score(near, row, config=places) == 1.0
    assert score(near, row, config={"max_num_decimal_places": 6}) < 0.1
    assert score(near, row | {"reasoning_gym_config": places}) == 1.0 and score(near, row) < 0.1


def test_a_row_of_another_data_set_cannot_be_graded(entry):
    with pytest.raises(ValueError, match='no column "reasoning_gym"'):
        score("1", {key: entry[key] for key in entry if key != "reasoning_gym"})
    with pytest.raises(ValueError, match="has no metadata"):
        score("1", {key: entry[key] for key in entry if key != "metadata"})
    with pytest.raises(ValueError, match="not registered"):
        score("1", entry | {"reasoning_gym": "chain_some"})
    without = {key: entry[key] for key in entry if key != "reasoning_gym"}
    assert score(entry["answer"], without, dataset="chain_sum") == 1.0
