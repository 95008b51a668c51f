"""Truth tables of IFEval's kinds of instructions, after the definitions of its paper (arXiv 2311.07911, table 1)."""

import pytest

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.instructions import KINDS, Instructions

TRUE_AND_FALSE = {
    "keywords:existence": ({"keywords": ["sun", "moon"]}, ["The Moon, the sun."], ["The moon."]),
    "keywords:frequency": (
        {"keyword": "go", "frequency": 2, "relation": "at least"}, ["Go, go!"], ["Go.", ""],
    ),
    "keywords:forbidden_words": ({"forbidden_words": ["cat"]}, ["a category", ""], ["A Cat."]),
    "keywords:letter_frequency": (
        {"letter": "z", "let_frequency": 2, "let_relation": "less than"}, ["a zoo", ""], ["zZ"],
    ),
    "language:response_language": (
        {"language": "de"}, ["Der Himmel ist heute besonders blau, und die Sonne scheint."],
        ["The sky is very blue today, and the sun is shining.", ""],
    ),
    "length_constraints:number_sentences": (
        {"num_sentences": 2, "relation": "at least"}, ["One. Two!", "A? B. C."], ["One, two.", "", "3.5 is one."],
    ),
    "length_constraints:number_paragraphs": ({"num_paragraphs": 2}, ["a\n***\nb", "a *** b ***"], ["a\n\nb", "a *** *** b"]),
    "length_constraints:number_words": (
        {"num_words": 3, "relation": "less than"}, ["two words", ""], ["these are three", "it's not two"],
    ),
    "length_constraints:nth_paragraph_first_word": (
        {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"}, ["First.\n\nThen, second.", 'a\n\n"Then" b'],
        ["Then.\n\nFirst.", "Then", "a\n\nThen\n\nb"],
    ),
    "detectable_content:number_placeholders": ({"num_placeholders": 2}, ["[name] of [place]"], ["[name]", "name"]),
    "detectable_content:postscript": ({"postscript_marker": "P.S."}, ["Bye.\nP.S. more", "p. s. x"], ["Bye. PS"]),
    "detectable_format:number_bullet_lists": ({"num_bullets": 2}, ["* a\n* b", "- a\n  - b"], ["* a", "* a\n* b\n* c"]),
    "detectable_format:constrained_response": ({}, ["My answer is no.", "Well. My answer is maybe."], ["no", ""]),
    "detectable_format:number_highlighted_sections": ({"num_highlights": 2}, ["*a* and **b**"], ["*a*", "* a\n* b"]),
    "detectable_format:multiple_sections": (
        {"section_spliter": "Section", "num_sections": 2}, ["Section 1\na\nSection 2\nb"], ["Section 1", "Section a Section b"],
    ),
    "detectable_format:json_format": ({}, ['{"a": [1]}', "```json\n{}\n```", "3"], ["{a: 1}", ""]),
    "detectable_format:title": ({}, ["<<A title>>\ntext"], ["<A title>", "<<>>", "<<\n>>"]),
    "combination:two_responses": ({}, ["a\n******\nb"], ["a\n******\na", "a", "a ****** b ****** c"]),
    "combination:repeat_prompt": ({"prompt_to_repeat": "Say hi."}, ["say hi. Hi!"], ["Hi!"]),
    "startend:end_checker": ({"end_phrase": "The end."}, ["So. The end.", '"the end."\n'], ["The end. Or not."]),
    "startend:quotation": ({}, ['"a"', ' "a b" '], ["a", '"', '"a'],),
    "change_case:capital_word_frequency": (
        {"capital_frequency": 2, "capital_relation": "at least"}, ["NASA and ESA", "I DO"], ["NASA", "Nasa Esa"],
    ),
    "change_case:english_capital": ({}, ["ALL OF IT 1"], ["All", "1"]),
    "change_case:english_lowercase": ({}, ["all of it 1"], ["All", "1"]),
    "punctuation:no_comma": ({}, ["a; b", ""], ["a, b"]),
}  # fmt: skip


def sample(text, kinds, options=None, finish="eos"):
    columns = {"instruction_id_list": kinds} | ({} if options is None else {"kwargs": options})
    return Sample("prompt", text, "", finish, columns)


def test_every_kind_is_in_the_table():
    assert set(TRUE_AND_FALSE) == set(KINDS) and len(KINDS) == 25


@pytest.mark.parametrize("kind", TRUE_AND_FALSE)
def test_a_kind(kind):
    options, followed, not_followed = TRUE_AND_FALSE[kind]
    # A data set fills the options of all kinds with null.
    options = options | {"not an option of it": None}
    for text in followed:
        assert Instructions()(sample(text, [kind], [options])) == 1.0, text
    for text in not_followed:
        assert Instructions()(sample(text, [kind], [options])) == 0.0, text


def test_several_instructions():
    asked = (["punctuation:no_comma", "change_case:english_lowercase"], [{}, None])
    for text, share in (("all of it", 1.0), ("All of it", 0.5), ("All, of it", 0.0)):
        assert Instructions()(sample(text, *asked)) == share
        assert Instructions(every=True)(sample(text, *asked)) == float(share == 1)
    assert Instructions()(sample("all of it", *asked, finish="length")) == 1.0
    assert Instructions(finished=True)(sample("all of it", *asked, finish="length")) == 0.0


@pytest.mark.parametrize(
    ("kinds", "options", "message"),
    [
        (None, None, "instruction_id_list: got None, want a list of one or more"),
        ([], None, "instruction_id_list: got [], want a list of one or more"),
        (["no_comma"], None, "instruction_id_list: got 'no_comma', want one of keywords:existence, "),
        (["punctuation:no_comma"], [], "kwargs: got [], want a list of 1"),
        (["length_constraints:number_words"], [{"num_words": 3}], "missing 1 required positional argument: 'relation'"),
        (
            ["length_constraints:number_words"], [{"num_words": 3, "relation": "about"}],
            "relation: got 'about', want one of at least, less than",
        ),
        (["keywords:existence"], [{"keywords": ["("]}], "unterminated subpattern"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_checked_is_found_before_the_run(kinds, options, message):
    row = Sample("", "", "", "eos", {"instruction_id_list": kinds, "kwargs": options})
    assert message in Instructions().problem(row)


def test_a_row_that_can_be_checked_is_no_problem():
    for kind, (options, *_) in TRUE_AND_FALSE.items():
        assert Instructions().problem(sample("", [kind], [options])) == ""
