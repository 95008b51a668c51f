"""Truth table of the multiple-choice grader."""

import pytest

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.multiple_choice import MultipleChoice


def read(text, finish="eos"):
    return MultipleChoice().extract(Sample("", text, "", finish))


@pytest.mark.parametrize(
    "text",
    [
        "B",
        "b",
        "B.",
        "(B)",
        "(b)",
        "[B]",
        "**B**",
        " B\n",
        "B) Paris",
        "(B) Paris",
        "B. Paris",
        "B: Paris",
        "**B.** Paris",
        "Answer: B",
        "Answer:B",
        "ANSWER: B",
        "Answer: (b)",
        "answer is B",
        "The correct answer is (B).",
        "The correct answer is: **B**",
        "The answer is option B",
        "The best choice is B, because A is absurd.",
        "Because A is absurd, the answer is B.",
        "A) London\nB) Paris\nC) Rome\nThe answer is B) Paris",
        "Answer: A. No, wait. Answer: B",
        r"So \boxed{B}",
        r"\boxed{A} or rather \boxed{\text{(B)}}",
        r"Answer: A, I mean \boxed{\mathbf{B}}",
        "It must be (B), as (B) is Paris",
        "I pick B.",
        "<think>Answer: A</think>B",
        "Answer: B<|im_end|>",
        r"\boxed B",
        r"\boxed{\textbf{(B)}\ 12}",
        r"\boxed{B. Paris}",
        r"The answer is \(B\).",
        "<answer>B</answer>",
        "<answer>\n B. Paris </answer>",
        "So it is (B), not (A)",
        r"A, or \fbox{B}",
        r"\boxed{A}, no: \fbox{\text{B}}",
        "\uff22",
        "\u7b54\u6848\u662fB",
        "\u7b54\u6848\uff1a\uff08\uff22\uff09\u3002",
    ],
)
def test_b(text):
    assert read(text) == "B"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Because",
        "Because it is so",
        "Answer: Because it is so",
        "Banana",
        "bad",
        "A or B",
        "Answer: A or B",
        "Answer: A, B",
        "The answer is (A) or (B)",
        "Answer: A/B",
        "(A) or (B)",
        "A) London\nB) Paris",
        "(A) is London, (B) is Paris",
        "B is a letter of the alphabet like any other",
        "Answer: Z",
        r"\boxed{B",
        r"\boxed{A}{B}, \boxed{AB}",
        "<think>Answer: B</think>",
        "<think>B",
        "vitamin B12",
        "The answer is not B",
        "The answer isn't B.",
        "It cannot be B",
        "The answer is not (B)",
        r"\boxed{A, B}",
        "1",
    ],
)
def test_no_letter(text):
    assert read(text) == ""


def test_one_right_letter_in_four():
    rewards = {letter: MultipleChoice()(Sample("", f"The answer is {letter}.", "B) Paris", "eos")) for letter in "ABCD"}
    assert rewards == {"A": 0.0, "B": 1.0, "C": 0.0, "D": 0.0}


def test_cut_off_and_other_letters():
    assert read("Answer: B", "length") == ""
    few = MultipleChoice(letters="ABCD")
    assert few.extract(Sample("", "Answer: E", "", "eos")) == ""
    assert few.extract(Sample("", "So D, I think. But C", "", "eos")) == "C"


@pytest.mark.parametrize("answer", ["", "1", "Paris", "A or B"])
def test_an_answer_without_a_letter_cannot_be_graded(answer):
    with pytest.raises(ValueError, match="want one of the letters"):
        MultipleChoice()(Sample("", "B", answer, "eos"))


@pytest.mark.parametrize(
    "unit", ["Answer: ", "answer is the ", "answer*", "*", "(", "(A) ", "A,", "\n", "\nB)", "Because ", r"\boxed{", " "]
)
def test_a_hundred_thousand_adversarial_characters_are_read_in_one_pass(unit):
    assert read(unit * (100_000 // len(unit))) in ("", "A", "B")
