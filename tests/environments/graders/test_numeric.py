"""Truth tables of the graders of numbers."""

import pytest

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.numeric import Gsm8k, Numeric, canonical_text, numbers


def sample(completion, answer, finish="eos"):
    return Sample("How much?", completion, answer, finish)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1,234", "1234"),
        ("1,234,567.5", "2469135/2"),
        ("$5.00", "5"),
        (r"\$1,000", "1000"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("€ 7", "7"),
        ("5 dollars", "5"),
        ("12kg", "12"),
        (r"\frac{1}{2}", "1/2"),
        (r"-\dfrac{3}{4}", "-3/4"),
        (r"3\frac{1}{2}", "7/2"),
        ("3 1/2", "7/2"),
        ("-1/2", "-1/2"),
        ("12/4", "3"),
        ("50%", "50"),
        (r"50\%", "50"),
        ("1e3", "1000"),
        ("1.5E-2", "3/200"),
        (r"1.5 \times 10^{3}", "1500"),
        ("2 \u00d7 10^4", "20000"),
        ("-0", "0"),
        ("+7", "7"),
        ("3.", "3"),
        (".5", "1/2"),
        ("0.50", "1/2"),
        ("007", "7"),
        ("\u22125", "-5"),  # minus sign
        ("\u20135", "-5"),  # en dash
        ("x=-4", "-4"),
        ("1{,}234", "1234"),
        (r"1,\!234", "1234"),
        ("1\u202f234", "1234"),  # narrow space
        ("**42**", "42"),
        (r"\(42\)", "42"),
        ("$42$", "42"),
        ("42!", "42"),
        ("1e400", str(10**400)),
        ("\u00bd", "1/2"),
    ],
)
def test_notations_of_one_number(text, want):
    assert [canonical_text(number) for number in numbers(text)] == [want]


@pytest.mark.parametrize(
    "text",
    [
        *[
            "3,14",
            "1.234,56",
            "0,5",
            "1,23",
            "12,345,67",
            "1.2.3",
            "1..2",
            "1/0",
            "1/2/2020",
            "2^10",
            "2^{10}",
            "1,2,3",
        ],
        *[r"\sqrt{2}", "1e99999", "1e-1001", "9" * 1001, "1." + "3" * 1001, "10^" + "9" * 5000, "9" * 100_000],
    ],
    ids=lambda text: text[:12],
)
def test_text_that_only_looks_like_a_number_is_invalid(text):
    assert list(numbers(text)) == [None]


@pytest.mark.parametrize(
    "text",
    ["", "nan", "inf", "-", "x2", "H2O", "v1.2.3", "a_1", "one", "...", "$", "%", "x\u00b2", "H\u2082O", "m/s^2"],
)
def test_no_number(text):
    assert list(numbers(text)) == []


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("5-3", "5 3"),
        ("5 - 3", "5 3"),
        ("10\u201320", "10 20"),
        ("(3, -4)", "3 -4"),
        ("2 + 2 = 4.", "2 2 4"),
        ("2x10=20", "2 20"),
    ],
)
def test_several_numbers(text, want):
    assert " ".join(canonical_text(number) for number in numbers(text)) == want


@pytest.mark.parametrize(
    ("completion", "answer", "want"),
    [
        ("1,234", "1234", 1.0),
        ("$5.00", "5", 1.0),
        ("5 dollars", "$5.00", 1.0),
        (r"\frac{1}{2}", "0.5", 1.0),
        ("0.5", "1/2", 1.0),
        ("0.3333", "1/3", 0.0),
        ("50%", "50", 1.0),
        ("50%", "0.5", 0.0),
        ("1e3", "1000", 1.0),
        ("-0", "0", 1.0),
        ("3.", "3", 1.0),
        ("3,14", "3.14", 0.0),
        ("3,14", "14", 0.0),
        ("1.234", "1234", 0.0),
        ("\u22125", "-5", 1.0),
        ("5", "-5", 0.0),
        ("12 + 30 = 42. So the answer is 41.", "42", 0.0),  # right in the reasoning, wrong in the answer
        ("41 was my guess. The answer is 42.", "42", 1.0),
        ("The answer is 42. I used 3 steps.", "42", 0.0),
        ("<think>the answer is 42</think>41", "42", 0.0),
        ("<think>the answer is 42</think>", "42", 0.0),
        ("<think>41, or 43</think>42", "42", 1.0),
        ("<think>42", "42", 0.0),
        ("42<|im_end|>", "42", 1.0),
        ("42</s>", "42", 1.0),
        ("4 2", "42", 0.0),
        ("", "42", 0.0),
        ("   \n", "42", 0.0),
        ("forty-two", "42", 0.0),
        ("NaN", "42", 0.0),
        ("infinity", "42", 0.0),
        ("9" * 5000, "42", 0.0),
        ("12345678901234567890123456789013", "12345678901234567890123456789012", 0.0),  # equal as floats
        ("12345678901234567890123456789012", "12345678901234567890123456789012", 1.0),
        ("0.1", "0.10", 1.0),
    ],
)
def test_the_last_number_exactly(completion, answer, want):
    assert Numeric()(sample(completion, answer)) == want


@pytest.mark.parametrize(
    ("options", "completion", "answer", "want"),
    [
        ({"abs_tol": 0.1}, "3.1", "3", 1.0),  # 3.1 - 3 is 0.10000000000000009 in floats
        ({"abs_tol": 0.1}, "3.11", "3", 0.0),
        ({"rel_tol": 0.01}, "101", "100", 1.0),
        ({"rel_tol": 0.01}, "101.01", "100", 0.0),
        ({"rel_tol": 0.01}, "-101", "-100", 1.0),
        ({"rel_tol": 0.01}, "0.001", "0", 0.0),
        ({"rel_tol": 0.01, "abs_tol": 0.01}, "0.001", "0", 1.0),
        ({"where": "first"}, "42, not 41", "42", 1.0),
        ({"where": "only"}, "42 dollars", "42", 1.0),
        ({"where": "only"}, "40 or 42", "42", 0.0),
        ({"after": "Answer:"}, "Answer: 42", "42", 1.0),
        ({"after": "Answer:"}, "It is 42", "42", 0.0),
        ({"after": "Answer:", "where": "first"}, "Answer: 41. Answer: 42, in 3 steps", "42", 1.0),
        ({"percent": "hundredth"}, "50%", "0.5", 1.0),
        ({"percent": "hundredth"}, "50%", "50", 0.0),
        ({"percent": "hundredth"}, "0.5", "50%", 1.0),
    ],
)
def test_options(options, completion, answer, want):
    assert Numeric(**options)(sample(completion, answer)) == want


def test_a_number_that_was_cut_off_counts_only_with_finished_false():
    assert Numeric()(sample("The answer is 42", "42", "length")) == 0.0
    assert Numeric(finished=False)(sample("The answer is 42", "42", "length")) == 1.0
    assert Numeric()(sample("The answer is 42", "42", "stop")) == 1.0


@pytest.mark.parametrize("answer", ["", "none", "3 or 4", "3,14", "nan"])
def test_an_answer_without_one_number_cannot_be_graded(answer):
    with pytest.raises(ValueError, match="want one number"):
        Numeric()(sample("3", answer))


SOLUTION = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nShe sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("completion", "answer", "want"),
    [
        ("48 + 24 = 72\n#### 72", SOLUTION, 1.0),
        ("#### 72", "72", 1.0),
        ("#### $72.00", SOLUTION, 1.0),
        ("#### 72 clips (not 24)", SOLUTION, 1.0),
        ("####72", SOLUTION, 1.0),
        ("####\n72", SOLUTION, 1.0),
        ("#### The answer is 72.", SOLUTION, 1.0),
        ("#### 1,450", "... = 1450\n#### 1,450", 1.0),
        ("48 + 24 = 72\n#### 73", SOLUTION, 0.0),
        ("the answer is 72", SOLUTION, 0.0),
        ("#### 72\n#### 24", SOLUTION, 0.0),
        ("#### 24\n#### 72", SOLUTION, 1.0),
        ("#### 24 or 72", SOLUTION, 0.0),
        ("####", SOLUTION, 0.0),
        ("72 ####", SOLUTION, 0.0),
        ("#### 72\n\nQuestion: what is 1 + 1?", SOLUTION, 1.0),
        ("### 72", SOLUTION, 0.0),
        ("", SOLUTION, 0.0),
    ],
)
def test_gsm8k(completion, answer, want):
    assert Gsm8k()(sample(completion, answer)) == want


def test_gsm8k_of_a_solution_without_its_end():
    with pytest.raises(ValueError, match="want one number"):
        Gsm8k()(sample("#### 72", SOLUTION.removesuffix("#### 72")))
    assert Gsm8k()(sample("#### 7", "72", "length")) == Gsm8k()(sample("#### 72", "72", "length")) == 0.0


def test_equal_answers_are_one_vote():
    answers = ["1,234", "$1234.00", "1.234e3", "2468/2", "1234"]
    assert {Numeric().extract(sample(text, "")) for text in answers} == {"1234"}
    assert {Gsm8k().extract(sample(f"#### {text}", "")) for text in answers} == {"1234"}
    assert Numeric().extract(sample("none", "")) == Numeric().extract(sample("3,14", "")) == ""


ADVERSARIES = [
    "9",
    "1,",
    "1.",
    "1/",
    "1 ",
    "-",
    "$",
    r"\frac{",
    r"\frac{1}{",
    r"\sqrt{",
    "1 1/",
    "1^",
    "1e",
    "1e1",
    ".",
    ".1",
    "1 x 10^",
    "a1",
]


@pytest.mark.parametrize("unit", [*ADVERSARIES, "1 / ", "$ ", "{,}1", "#### ", "</think>", "<think>"])
def test_a_hundred_thousand_adversarial_characters_are_read_in_one_pass(unit):
    """A regular expression that backtracks would need hours for some of these, so no time is asserted."""
    text = unit * (100_000 // len(unit))
    for grader in Numeric(), Gsm8k():
        assert grader(sample(text, "42")) == 0.0
        assert isinstance(grader.extract(sample(text, "42")), str)
