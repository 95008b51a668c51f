r"""Truth table of the grader of \boxed{} mathematics."""

import pytest

from jaxrl_llm.environments.config import GraderConfig, RewardConfig
from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.grader_pool import GraderPool
from jaxrl_llm.environments.graders.mathematics import Math, last_boxed

# From the extra "tasks".
pytest.importorskip("mpmath")


MATH = Math()


def sample(completion, answer, finish="eos"):
    return Sample("", completion, answer, finish)


@pytest.mark.parametrize(
    ("text", "want"),
    [
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1} and \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\text{a \} b}}", r"\text{a \} b}"),
        (r"\boxed{1} \boxed{2", ""),
        (r"\boxed{\frac{1}{2}", ""),
        (r"\boxed", ""),
        (r"\boxed 5", "5"),
        (r"\boxed \pi and", r"\pi"),
        (r"\boxed7 or \boxed12.", "12"),
        (r"\fbox{5}", "5"),
        (r"\boxed{1} \fbox{2}", "2"),
        (r"\boxedness{5}", ""),
        (r"\boxed five", "f"),
        (r"\boxed{}", ""),
        (r"\boxed{\boxed{3}}", "3"),
        ("boxed{5}", ""),
        ("", ""),
    ],
)
def test_the_last_box(text, want):
    assert last_boxed(text) == want


@pytest.mark.parametrize(
    ("boxed", "answer", "want"),
    [
        (r"\frac{1}{2}", "0.5", 1.0),
        ("0.5", r"\frac{1}{2}", 1.0),
        (r"\dfrac12", "1/2", 1.0),
        ("1,234", "1234", 1.0),
        (r"1\,234", "1234", 1.0),
        (r"\$5.00", "5", 1.0),
        (r"5\text{ dollars}", "5", 1.0),
        (r"50\%", "50", 1.0),
        (r"50\%", "0.5", 1.0),
        ("-0", "0", 1.0),
        ("3.", "3", 1.0),
        ("3,14", "3.14", 0.0),
        ("0.333", "1/3", 0.0),
        ("\u22125", "-5", 1.0),
        ("5", "-5", 0.0),
        ("5", "x=5", 1.0),
        ("x=5", "5", 1.0),
        ("(x-1)(x+1)", "x^2-1", 1.0),
        ("(x-1)(x+2)", "x^2-1", 0.0),
        (r"\{2, 1\}", r"\{1, 2\}", 1.0),
        ("[1, 2]", "(1, 2)", 0.0),
        ("5, 6", "5", 0.0),
        ("5 or 6", "5", 0.0),
        (r"2\sqrt{3}", r"\sqrt{12}", 1.0),
        (r"\text{Paris}", "Paris", 1.0),
        ("nan", "5", 0.0),
        (r"\infty", "5", 0.0),
        ("", "5", 0.0),
        ("9" * 999, "5", 0.0),
        ("9" * 5000, "5", 0.0),
    ],
)
def test_equality(boxed, answer, want):
    assert MATH(sample(rf"So it is $\boxed{{{boxed}}}$.", answer)) == want


@pytest.mark.parametrize(
    ("completion", "answer", "finish", "want"),
    [
        ("The answer is 5.", "5", "eos", 0.0),
        (r"\boxed{5}, no, \boxed{6}", "5", "eos", 0.0),
        (r"\boxed{6}, no, \boxed{5}", "5", "eos", 1.0),
        (r"\boxed{5}, that is \boxed{5", "5", "eos", 0.0),
        (r"5 + 5 = 10, \boxed{11}", "10", "eos", 0.0),
        (r"\boxed{5}", "5", "length", 0.0),
        (r"<think>\boxed{5}</think>6", "5", "eos", 0.0),
        (r"\boxed{5}<|im_end|>", "5", "eos", 1.0),
        (r"\boxed{5}", r"We add: $2 + 3 = \boxed{5}$.", "eos", 1.0),
        (r"\boxed{5}", r"$5$", "eos", 1.0),
        ("", "5", "eos", 0.0),
    ],
)
def test_which_box_counts(completion, answer, finish, want):
    assert MATH(sample(completion, answer, finish)) == want


@pytest.mark.parametrize("answer", ["", r"\boxed{5", "x" * 1001])
def test_an_answer_that_cannot_be_read_cannot_be_graded(answer):
    with pytest.raises(ValueError, match="want mathematics"):
        MATH(sample(r"\boxed{5}", answer))


def test_equal_answers_are_one_vote():
    answers = [r"\frac{1}{2}", "0.5", "1/2", r"\dfrac{1}{2}"]
    assert {MATH.extract(sample(rf"\boxed{{{text}}}", "")) for text in answers} == {"1/2"}
    assert MATH.extract(sample("1/2", "")) == ""


@pytest.mark.parametrize("unit", [r"\boxed{", r"\boxed", "{", "}", "\\", r"\boxed{{", r"\boxed{}"])
def test_a_hundred_thousand_adversarial_characters_are_read_in_one_pass(unit):
    assert MATH(sample(unit * (100_000 // len(unit)), "5")) == 0.0


def test_a_number_that_is_too_large_is_wrong_in_a_worker_and_votes_as_text():
    config = RewardConfig((GraderConfig("math"),), workers=1, deadline_s=120.0)
    with GraderPool(config) as pool:
        graded = pool.grade([[sample(r"\boxed{\frac{10}{2}}", "5"), sample(r"\boxed{9^{9^{9^{9}}}}", "5")]])
    votes = [["5", "? 9^{9^{9^{9}}}"]]
    assert (graded.reward.tolist(), graded.failure.tolist(), graded.votes) == ([[1, 0]], [0], votes)


def test_a_lone_surrogate_in_a_variable_name_is_a_wrong_answer():
    wrong = sample("\\boxed{\\overline{A\ud800}}", "5")
    assert MATH(wrong) == 0.0 and MATH.extract(wrong).startswith("formula(")
