"""Equivalence of answers: all verdicts in answers.txt are right, and grades and votes never disagree."""

import re
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrl_llm.environments.grader import Sample, make_grader
from jaxrl_llm.environments.graders.numeric import Numeric

# From the extra "tasks".
pytest.importorskip("mpmath")

SPACES = {"<nbsp>": "\u00a0", "<thin>": "\u2009", "<narrow>": "\u202f"}


def _pairs():
    """Yield (grader, the row's answer, sign, response) per line."""
    text = (Path(__file__).parent / "answers.txt").read_text(encoding="utf-8")
    grader = ""
    for line in text.partition("\n\n[")[2].join(("[", "")).splitlines():
        for name, space in SPACES.items():
            line = line.replace(name, space)
        if found := re.fullmatch(r"\[(math|numeric|gsm8k)\]", line):
            grader = found[1]
        elif found := re.fullmatch(r"(.*?)  (==|!=|\?\?)(?:  (.*))?", line):
            answer, sign, response = found.groups("")
            if grader == "math" and not re.search(r"\\boxed|\\fbox", response):
                response = rf"So \boxed{{{response}}}"
            yield grader, answer, sign, response


PAIRS = tuple(_pairs())
GRADERS = {name: make_grader(name) for name in ("math", "numeric", "gsm8k")}


def sample(response, answer=""):
    return Sample("How much?", response, answer, "eos")


def grade(answer, response, grader="math"):
    """Reward of the response, boxed for `math`."""
    return GRADERS[grader](sample(rf"\boxed{{{response}}}" if grader == "math" else response, answer))


def vote(response, answer="", grader="math"):
    return GRADERS[grader].extract(sample(rf"\boxed{{{response}}}" if grader == "math" else response, answer))


def test_the_table_is_large_and_balanced():
    signs = Counter(sign for _, _, sign, _ in PAIRS)
    assert min(signs["=="], signs["!="]) >= 300 and 0.75 < signs["=="] / signs["!="] < 1.25
    assert len(set(PAIRS)) == len(PAIRS)


@pytest.mark.parametrize("name", GRADERS)
def test_all_verdicts_are_right(name):
    grader = GRADERS[name]
    wrong = [
        (answer, sign, response)
        for grader_name, answer, sign, response in PAIRS
        if grader_name == name
        and (
            not grader.problem(sample("", answer))
            if sign == "??"
            else grader.problem(sample("", answer)) or grader(sample(response, answer)) != (sign == "==")
        )
    ]
    assert wrong == []


@pytest.mark.parametrize("name", GRADERS)
def test_a_response_is_right_exactly_if_it_votes_for_the_rows_answer(name):
    grader = GRADERS[name]
    for grader_name, answer, sign, response in PAIRS:
        if grader_name == name and sign != "??":
            written = answer if r"\boxed" in answer or name != "math" else rf"\boxed{{{answer}}}"
            own = grader.extract(sample(f"#### {written}" if name == "gsm8k" else written, answer))
            agrees = grader.extract(sample(response, answer)) == own
            assert own and agrees == (sign == "=="), (answer, response)


ANSWERS = sorted({text for name, a, _, b in PAIRS if name == "math" and "%" not in a + b for text in (a,)})


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(ANSWERS), st.sampled_from(ANSWERS))
def test_equality_is_symmetric(a, b):
    grader = GRADERS["math"]
    readable = not any(grader.problem(sample("", text)) for text in (a, b))
    if readable and r"\boxed" not in a + b:
        assert grade(a, b) == grade(b, a) == (vote(a, b) == vote(b, b)) == (vote(b, a) == vote(a, a))


# Signs with two meanings (percent, degrees, a log without a base) and x = 5, which equals 5 but not y = 5, agree with answers that
# differ from each other. Without them equality is an equivalence relation.
CLEAR = [text for text in ANSWERS if not re.search(r"=|<|>|\\(?:circ|log|le|ge|ne|in|text|boxed)|degrees|°|\?", text)]
SPELLINGS = {
    "7": ["7", "7.0", "+7", "007", r"\frac{14}{2}", "14/2", r"\sqrt{49}", "3+4", r"7\text{ cm}", r"\text{7}", "\uff17"],
    "1/2": ["1/2", "0.5", r"\frac12", r"\dfrac{1}{2}", ".5", "2^{-1}", "½", r"\sin\frac{\pi}{6}", "5e-1"],
    "root": [r"\sqrt{2}", "2^{1/2}", r"\frac{2}{\sqrt2}", r"\sqrt{8}-\sqrt{2}", r"\frac{\sqrt{8}}{2}", "√2"],
    "square": ["x^2-1", "(x-1)(x+1)", "x²-1", "-1+x^2", r"x\cdot x - 1", r"\frac{x^4-1}{x^2+1}"],
    "point": ["(1,2)", "(1, 2)", r"\left(1,\frac{4}{2}\right)", "(1.0;2)"],
    "two": ["1,2", r"\{2,1\}", r"2 \text{ and } 1", r"\{1, 1, 2\}", "1; 2"],
}


def test_equality_is_transitive_over_many_spellings():
    """Each text equals exactly the texts of its own class, whichever of them is the row's answer."""
    classes = {text: name for name, texts in SPELLINGS.items() for text in texts}
    for a, b in [(a, b) for a in classes for b in classes]:
        assert grade(a, b) == (classes[a] == classes[b]), (a, b)
    for texts in SPELLINGS.values():
        assert len({vote(text) for text in texts}) == 1


def test_equality_is_transitive_over_the_table():
    equal = {a: frozenset(b for b in CLEAR if grade(a, b)) for a in CLEAR if not GRADERS["math"].problem(sample("", a))}
    assert all(equal[b] == equal[a] for a in equal for b in equal[a])


def _spell(value: Fraction, style: int) -> str:
    """Return a fraction in one of its usual notations."""
    top, bottom = abs(value.numerator), value.denominator
    sign = "" if value >= 0 else ("-", "\u2212")[style % 2]
    if bottom == 1:
        separator = (",", " ", "\u00a0", "\u2009", "'", r"\,", "{,}", "")[style % 8]
        return sign + f"{top:,}".replace(",", separator)
    whole, rest = divmod(top, bottom)
    if style % 3 == 0:
        return rf"{sign}\frac{{{top}}}{{{bottom}}}"
    if style % 3 == 1 and whole:
        return rf"{sign}{whole} {rest}/{bottom}"
    return f"{sign}{top}/{bottom}"


NUMBERS = st.fractions(max_denominator=12).filter(lambda value: abs(value) < 10**15)


@settings(max_examples=200, deadline=None)
@given(NUMBERS, NUMBERS, st.integers(0, 23), st.integers(0, 23))
def test_numbers_are_equal_exactly_if_their_values_are(a, b, style, other):
    for c in (a, b, a + 1, -a):
        for name in ("math", "numeric"):
            answer, response = _spell(a, style), _spell(c, other)
            assert grade(answer, response, name) == (a == c), (answer, response)
            assert (vote(response, answer, name) == vote(answer, answer, name)) == (a == c)
            assert vote(response, "", name) == vote(str(c), "", name)


def test_a_tolerance_is_part_of_the_vote():
    grader = Numeric(abs_tol=0.1)
    assert [grader.extract(sample(text, "3")) for text in ("3", "3.1", "2.95", "3.2")] == ["3", "3", "3", "16/5"]


def test_equal_answers_are_one_vote_and_unequal_ones_are_not():
    """5, 5.0 and x=5; a half in two forms; powers that math-verify compares to six decimals."""
    assert {vote(text, "5") for text in ("5", "5.0", "x=5", r"5\text{ cm}")} == {"5"}
    assert {vote(text, "7") for text in ("5", "5.0", "x=5", r"5\text{ cm}")} == {"5"}
    assert {vote(text, "1/2") for text in ("1/2", r"50\%", "0.5")} == {"1/2"}
    assert {vote(text, "50") for text in ("50", r"50\%")} == {"50"} and vote("0.5", "50") == "1/2"
    assert {vote(text, "x=5") for text in ("5", "x=5", "5=x")}.isdisjoint({vote("y=5", "x=5"), "5"})
    assert vote("1/2^98") != vote("1/2^99")


def test_an_unreadable_answer_votes_as_text():
    assert vote("5 +") == vote(" 5  + ") == "? 5 +"
    assert vote("") == "" == GRADERS["math"].extract(sample("no box"))


ATTACKS = [
    "9^{9^9}",
    "9^{9^{9^9}}",
    "10^{10^6}+1",
    "10^{10^{10^{10}}}",
    "(10^{1000})!",
    "(10^9)!",
    "2000!!!",
    r"\binom{10^9}{5\cdot 10^8}",
    r"\sqrt{" * 200 + "2" + "}" * 200,
    r"\sqrt{2+" * 25 + "2" + "}" * 25,
    "(" * 400 + "1" + ")" * 400,
    r"\frac{1}{" * 90 + "2" + "}" * 90,
    "x^" * 400 + "x",
    "2^{100000}" * 90,
    "2^{100000}, 3^{50000}, 5",
    r"\{2^{100000}, \frac{1}{3^{5000}}\}",
    "/".join(["2^{30000}"] * 99),
    "+".join(f"1/(2^{{8000}}+{i})" for i in range(60)),
    r"\sin(10^{100000})",
    r"e^{e^{e^{10}}}",
    "(x+1)^{1000000}",
    "(1+1/7)^{1000000}",
    r"\pm 1" * 100,
    ",".join([r"\pm 1"] * 140),
    "1" * 1000,
    "1e99999",
    "0.1e-99999",
    "9" * 990 + "!",
    "a^{b^{c^{d^{e^{f}}}}}",
    r"\log_{\log_2 2}2",
    r"\begin{pmatrix}" + "1&" * 300 + r"1\end{pmatrix}",
    r"\text{" * 150,
    "|x" * 300,
    r"50\%" * 200,
    r"\sin" * 150 + "1",
    "5" + r"\text{ cm}" * 90,
    "1 " * 500,
]


@pytest.mark.parametrize("text", ATTACKS, ids=lambda text: text[:20])
def test_an_attack_ends_in_time(text):
    """In CPU seconds of this process, which do not grow under load."""
    start = time.process_time()
    assert grade("6", text) == 0.0 and grade("6", text, "numeric") == 0.0
    assert len(vote(text)) < 2_000_000
    GRADERS["math"].problem(sample("", text))
    assert time.process_time() - start < 2.0


def test_the_length_limit_of_formulas_does_not_depend_on_the_stack():
    """140 terms are read, 160 are refused, in any process."""
    assert grade("140", "+".join(["1"] * 140)) == 1.0
    assert "more than 150" in GRADERS["math"].problem(sample("", "+".join(["1"] * 160)))


def test_large_powers_are_exact_within_the_limits():
    assert grade("2^{100000}", "4^{50000}") == 1.0 and grade("2^{100000}", "2^{100000}+1") == 0.0
    assert grade("9^{9^9}", "3^{2 \\cdot 9^9}") == 1.0 and grade("9^{9^9}", "9^{9^9-1}") == 0.0


@pytest.mark.parametrize(
    ("name", "answer", "why"),
    [
        ("math", "It depends on the number of apples that are left", "reads as prose"),
        ("math", "The area is 5 cm", "reads as prose"),
        ("math", r"\frac{1}{0}", "division by zero"),
        ("math", "29_8", "no such digits"),
        ("math", "1.000,5", "points between thousands"),
        ("math", "x" * 1001, "1,001 characters"),
        ("numeric", "12:30", "want one number"),
        ("numeric", "3 or 4", "want one number"),
        ("gsm8k", "a solution without its end", "want one number"),
        ("multiple_choice", "Paris", "want one of the letters"),
        ("reasoning_gym", "5", "no column"),
    ],
)
def test_an_unreadable_row_is_reported_with_the_reason(name, answer, why):
    grader = make_grader(name)
    assert why in grader.problem(sample("", answer))
    with pytest.raises(ValueError, match=re.escape(why)):
        grader(sample(r"\boxed{5} A #### 5", answer))
