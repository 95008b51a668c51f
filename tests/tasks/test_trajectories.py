"""Trajectory files as they are read: what others write, and what is refused, with file and line."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_setup import save_tokenizer

from jaxrl_llm.errors import UserError
from jaxrl_llm.tasks import trajectories
from jaxrl_llm.tasks.config import CharacterTokenizer, PretrainedTokenizer
from jaxrl_llm.tasks.tokenizer import load_tokenizer

DIGITS = load_tokenizer(CharacterTokenizer())
NAME = trajectories.tokenizer_name(DIGITS)
# "<3+4>" and "7#" in the alphabet "0123456789+<> #", from 1 on.
PROMPT, IDS = [12, 4, 11, 5, 13], [8, 15]
ROW = {"tokenizer": NAME, "prompt_ids": PROMPT, "ids": IDS, "logprobs": [-0.5, -0.25], "version": 3}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_needs_ids_and_little_else(tmp_path):
    (found,) = trajectories.read(write(tmp_path / "x.jsonl", {**ROW, "level": "easy"}), DIGITS)
    assert (
        found.prompt_ids.tolist() == PROMPT and found.ids.tolist() == IDS and found.logprobs.tolist() == [-0.5, -0.25]
    )
    assert found.version.tolist() == [3, 3] and found.sampled.all() and found.entropy.tolist() == [0, 0]
    assert (found.finish, found.temperature, found.reward, found.success, found.row) == ("eos", 1.0, None, None, -1)
    assert found.columns == {"tokenizer": NAME, "level": "easy"}
    (cut,) = trajectories.read(write(tmp_path / "x.jsonl", ROW | {"ids": [8, 8], "version": [3, 4]}), DIGITS)
    assert cut.finish == "length" and cut.version.tolist() == [3, 4]


def test_nulls_of_parquet_are_columns_left_out(tmp_path):
    rows = [
        ROW | {"version": [3, 3], "sampled": [True, False], "reward": float("nan")},
        ROW | {"version": [3, 3], "reward": 1.0},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "x.parquet")
    first, second = trajectories.read(tmp_path / "x.parquet", DIGITS)
    assert first.sampled.tolist() == [True, False] and second.sampled.all()
    assert (first.reward, second.reward) == (None, 1.0) and "reward" not in first.columns


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"ids": None}, "ids: got nothing, want a list of one or more token ids"),
        ({"ids": []}, r"ids: got \[\], want a list of one or more token ids"),
        ({"ids": [8, "x"]}, r"ids: got \[8, 'x'\], want a list of one or more token ids"),
        ({"prompt_ids": None}, "prompt_ids: got nothing, want a list of one or more token ids"),
        ({"ids": [8, 16]}, "ids: got the token 16, want 0 to 15, those of the tokenizer"),
        ({"prompt_ids": [-1]}, "prompt_ids: got the token -1, want 0 to 15"),
        ({"logprobs": [-0.5]}, "logprobs: got 1, want 2, one per token of ids"),
        ({"logprobs": -0.5}, "logprobs: got -0.5, want a list"),
        ({"logprobs": [-0.5, "x"]}, r"logprobs: got \[-0.5, 'x'\], want a number per token"),
        ({"logprobs": [0.5, -1]}, "logprobs: got 0.5, want logarithms, 0 at most"),
        ({"logprobs": [-0.5, None]}, "logprobs: got null, want logarithms"),
        ({"logprobs": [-0.5, -1e99]}, r"logprobs: got \[-0.5, -1e\+99\], want numbers that float32 holds"),
        ({"entropy": [1, 2, 3]}, "entropy: got 3, want 2, one per token of ids"),
        ({"version": "new"}, "version: got 'new', want a whole number"),
        ({"version": [1, 2**40]}, "version: .* want numbers that int32 holds"),
        ({"sampled": [1, 0]}, r"sampled: got \[1, 0\], want true or false per token"),
        ({"kept_tokens": [[8], [15], [1]]}, "kept_tokens: got 3, want 2, one list per token of ids"),
        ({"kept_tokens": [[8], 15]}, r"kept_tokens: got \[\[8\], 15\], want a list of token ids per token"),
        ({"kept_tokens": [[8], [15, 99]]}, "kept_tokens: got the token 99, want 0 to 15"),
        ({"kept_tokens": [[8], [3, 4]]}, r"kept_tokens: got \[3, 4\], want the sampled token 15 among them"),
        ({"finish": "bored"}, "finish: got 'bored', want one of eos, length, stop, unfinished"),
        ({"temperature": -1}, "temperature: got -1.0, want 0 or more"),
        ({"temperature": "hot"}, "temperature: got 'hot', want a number"),
        ({"reward": 1e99}, r"reward: got 1e\+99, want 3.4028234663852886e\+38 at most"),
        ({"uid": 2**31}, "uid: got 2147483648, want 2147483647 at most"),
        ({"success": 1}, "success: got 1, want true or false"),
        (
            {"components": {"right": "yes"}},
            "components: got {'right': 'yes'}, want a number by the name of each grader",
        ),
        ({"prompt": 3}, "prompt: got 3, want text"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, changes, message):
    bad = {name: x for name, x in (ROW | changes).items() if x is not None}
    with pytest.raises(UserError, match=rf"x\.jsonl:2: {message}"):
        trajectories.read(write(tmp_path / "x.jsonl", ROW, bad), DIGITS)


def test_files_of_another_tokenizer_are_refused(tmp_path):
    other = load_tokenizer(CharacterTokenizer("0123456789+<>#"))
    with pytest.raises(UserError) as error:
        trajectories.read(write(tmp_path / "x.jsonl", ROW), other)
    assert str(error.value) == (
        f"{tmp_path}/x.jsonl: got tokens of another tokenizer ('{NAME}' in {tmp_path}/x.jsonl:1), want those of this run's "
        f"('{trajectories.tokenizer_name(other)}'): token ids say nothing under another vocabulary; give the tokenizer they were "
        "sampled with, or a file of texts alone, without ids and prompt_ids"
    )
    nameless = {name: x for name, x in ROW.items() if name != "tokenizer"}
    with pytest.raises(UserError, match=r"x\.jsonl:2: got token ids without the column tokenizer, want"):
        trajectories.read(write(tmp_path / "x.jsonl", ROW, nameless), DIGITS)


def test_files_that_are_none(tmp_path):
    (tmp_path / "x.jsonl").write_text("")
    with pytest.raises(UserError, match=r"x\.jsonl: got no rows, want one or more"):
        trajectories.read(tmp_path / "x.jsonl", DIGITS)
    (tmp_path / "x.jsonl").write_text(json.dumps(ROW) + "\n{cut off")
    with pytest.raises(UserError, match=r"x\.jsonl:2: not JSON"):
        trajectories.read(tmp_path / "x.jsonl", DIGITS)
    with pytest.raises(
        UserError, match=r":1: got the columns question, answer, want prompt_ids and ids, prompt and completion, or"
    ):
        trajectories.read(write(tmp_path / "x.jsonl", {"question": "?", "answer": "!"}), DIGITS)
    with pytest.raises(UserError, match=r":2: task.response: got no column 'completion'"):
        trajectories.read(write(tmp_path / "x.jsonl", {"prompt": "1", "completion": "2"}, {"prompt": "1"}), DIGITS)


USER, SAID = {"role": "user", "content": "What is 3 + 4?"}, {"role": "assistant", "content": "7."}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "What is 3 + 4?", "completion": "7."},
        {"prompt": [USER], "completion": [SAID]},
        {"messages": [USER, SAID]},
    ],
    ids=["texts", "conversation", "messages"],
)
def test_texts_of_others_are_encoded(tmp_path, row):
    """As TRL and OpenAI write them: the prompt in the chat template, the response with the end token."""
    tokenizer = load_tokenizer(PretrainedTokenizer(str(save_tokenizer(tmp_path / "t"))))
    path = write(tmp_path / "x.jsonl", row | {"reward": 2, "answer": 7})
    (found,) = trajectories.read(path, tokenizer)
    assert found.prompt_ids.tolist() == tokenizer.prompt("What is 3 + 4?")
    assert found.ids.tolist() == [*tokenizer.encode("7."), tokenizer.eos[0]]
    assert (found.prompt, found.completion, found.answer, found.reward) == ("What is 3 + 4?", "7.", "7", 2.0)
    assert found.logprobs is None and found.uid is None and found.success is None and found.finish == "eos"
    with pytest.raises(UserError, match=r"x\.jsonl:1: reward: got 'good', want a number"):
        trajectories.read(write(path, row | {"reward": "good"}), tokenizer)


def test_what_a_float32_is_read_back_from(tmp_path):
    """9 digits name every float32: also neighbors, and the smallest number above 0."""
    from jaxrl_llm.tasks.trajectory_writer import writing

    x = -np.array(
        [np.nextafter(np.float32(1), np.float32(2)), np.float32(1), np.float32(1e-45), np.finfo(np.float32).max]
    )
    row = ROW | {"ids": [1, 2, 3, 4], "version": 0, "logprobs": x.astype(np.float32)}
    with writing(tmp_path / "x.jsonl") as write_rows:
        write_rows([row])
    assert '"logprobs": [-1.00000012, -1.0, -1.40129846e-45, -3.40282347e+38]' in (tmp_path / "x.jsonl").read_text()
    assert trajectories.read(tmp_path / "x.jsonl", DIGITS)[0].logprobs.tobytes() == x.astype(np.float32).tobytes()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from([*trajectories.COLUMNS, "messages"]), VALUES, max_size=4), st.booleans())
@settings(max_examples=100, deadline=None)
def test_anything_is_read_or_refused_in_words(tmp_path_factory, columns, has_ids):
    path = tmp_path_factory.mktemp("any") / "x.jsonl"
    path.write_text(json.dumps((ROW if has_ids else {}) | columns) + "\n")
    try:
        (found,) = trajectories.read(path, DIGITS)
    except UserError as error:
        assert "x.jsonl" in str(error) and "want" in str(error)
    else:
        assert len(found.ids) == len(found.sampled) == len(found.version) > 0 and found.prompt_ids.max() < DIGITS.size
