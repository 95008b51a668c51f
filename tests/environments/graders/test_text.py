"""Truth tables of the graders of text."""

import pytest

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.text import ExactMatch, FinalText, Format, Length, Regex


def sample(completion, answer="", finish="eos", **more):
    return Sample("prompt", completion, answer, finish, **more)


@pytest.mark.parametrize(
    ("completion", "finish", "want"),
    [
        ("12#", "eos", 1.0),
        ("12", "length", 0.0),
        ("12#", "length", 0.0),
        ("12#", "stop", 1.0),
        ("012#", "eos", 0.0),
        ("12##", "eos", 0.0),
        ("13#", "eos", 0.0),
        (" 12#", "eos", 0.0),
        ("12# ", "length", 0.0),
        ("", "length", 0.0),
    ],
)
def test_exact_match_reads_the_whole_response(completion, finish, want):
    assert ExactMatch()(sample(completion, "12#", finish)) == want


def test_exact_match_of_a_response_that_was_cut_off_is_an_option():
    assert ExactMatch(finished=False)(sample("12", "12", "length")) == 1.0
    assert ExactMatch()(sample("12", "12", "length")) == 0.0


@pytest.mark.parametrize(
    ("options", "completion", "finish", "want"),
    [
        ({}, "all of it\n", "eos", "all of it\n"),
        ({}, "half of i", "length", ""),
        ({"finished": False}, "half of i", "length", "half of i"),
        ({}, "<think>1 or 2?</think>3", "eos", "3"),
        ({}, "1 or 2?</think>3", "eos", "3"),  # the chat template had opened the reasoning
        ({}, "<think>a</think>b<think>c</think>d", "eos", "d"),
        ({}, "<think>forever", "eos", ""),
        ({}, "<think>a</think>b<think>forever", "eos", ""),
        ({"after": "Answer:"}, "Answer: 1. No. Answer: 2", "eos", " 2"),
        ({"after": "Answer:"}, "it is 2", "eos", ""),
        ({"after": "Answer:"}, "<think>Answer: 1</think>2", "eos", ""),
        ({"after": "Answer:"}, "2 Answer:", "eos", ""),
    ],
)
def test_final_text(options, completion, finish, want):
    assert FinalText(**options).final_text(sample(completion, finish=finish)) == want


@pytest.mark.parametrize(
    ("options", "completion", "answer", "found", "want"),
    [
        ({"pattern": r"<answer>(.*?)</answer>"}, "<answer>a</answer> <answer> b </answer>", "b", "b", 1.0),
        (
            {"pattern": r"<answer>(.*?)</answer>", "where": "first"},
            "<answer>a</answer><answer>b</answer>",
            "b",
            "a",
            0.0,
        ),
        ({"pattern": r"<answer>(.*?)</answer>"}, "<answer>b", "b", "", 0.0),
        ({"pattern": r"<answer>(.*?)</answer>"}, "<answer>\nb</answer>", "b", "", 0.0),
        ({"pattern": r"(?s)<answer>(.*?)</answer>"}, "<answer>\nb</answer>", "b", "b", 1.0),
        ({"pattern": r"[A-Z]{3}"}, "ABC then XYZ", " XYZ\n", "XYZ", 1.0),
        ({"pattern": r"[A-Z]{3}"}, "abc", "abc", "", 0.0),
        ({"pattern": r"a(b)?"}, "a", "", "", 1.0),  # found, and the group is empty as the answer is
        ({"pattern": r"a(b)?"}, "c", "", "", 0.0),  # not found
    ],
)
def test_regex(options, completion, answer, found, want):
    grader = Regex(**options)
    assert (grader.extract(sample(completion)), grader(sample(completion, answer))) == (found, want)


@pytest.mark.parametrize(
    ("completion", "want"),
    [
        ("<think>x\ny</think><answer>1</answer>", 1.0),
        ("<think>x</think><answer>1</answer> and more", 0.0),
        ("so <think>x</think><answer>1</answer>", 0.0),
        ("<think>x</think><answer>1</answer", 0.0),
        ("", 0.0),
    ],
)
def test_format_matches_the_whole_response(completion, want):
    assert Format(pattern=r"<think>.*</think><answer>.*</answer>")(sample(completion)) == want


@pytest.mark.parametrize(
    ("n", "want"),
    # L_max 20, L_cache 8: 0 up to 12, then -1/8 per token, and -1 from 20 on.
    [(0, 0.0), (12, 0.0), (13, -0.125), (16, -0.5), (19, -0.875), (20, -1.0), (21, -1.0), (1000, -1.0)],
)
def test_length_is_equation_13_of_dapo(n, want):
    assert Length(limit=20, soft=8)(sample("", num_tokens=n)) == want


@pytest.mark.parametrize(("n", "want"), [(20, 0.0), (21, -1.0)])
def test_a_length_limit_without_a_soft_part_is_a_step(n, want):
    assert Length(limit=20)(sample("", num_tokens=n)) == want


@pytest.mark.parametrize(("n", "want"), [(0, -1.0), (5, -0.5), (10, 0.0), (12, -0.2), (30, -1.0), (99, -1.0)])
def test_length_with_a_target(n, want):
    assert Length(target=10)(sample("", num_tokens=n)) == pytest.approx(want, abs=1e-12)


def test_length_counts_words_or_characters_and_needs_the_number_of_tokens():
    assert Length(limit=2, unit="words")(sample("a bb\nccc")) == -1.0
    assert Length(limit=8, unit="characters")(sample("a bb\nccc")) == 0.0
    with pytest.raises(ValueError, match="got a sample without its number of tokens"):
        Length(limit=2)(sample("a"))
