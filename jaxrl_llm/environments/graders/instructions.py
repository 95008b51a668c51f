"""Checkable instructions, as IFEval defines them (Zhou et al. 2023, arXiv 2311.07911): words, counts, language, format.

A row names its instructions as the data set google/IFEval does, in two columns:

    {"prompt": ..., "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
     "kwargs": [{}, {"relation": "at least", "num_words": 300}]}
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrl_llm.environments.grader import Sample

RELATIONS = ("at least", "less than")
# "Answers" of detectable_format:constrained_response.
CHOICES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")


@dataclass(frozen=True, kw_only=True)
class Instructions:
    """Fraction of the row's instructions that the response follows; with `every`, 1 if it follows all of them, else 0.

    Sentences end at ".", "!" or "?" before a space or the end, where IFEval asks a trained splitter. The language needs langdetect.
    """

    every: bool = False
    finished: bool = False
    """A response that was cut off follows none."""

    def __call__(self, sample: Sample) -> float:
        asked = _asked(sample)
        followed = [KINDS[kind](sample.completion, **options) for kind, options in asked]
        if self.finished and sample.finish == "length":
            return 0.0
        return float(all(followed)) if self.every else sum(followed) / len(followed)

    def problem(self, row: Sample) -> str:
        try:
            for kind, options in _asked(row):
                KINDS[kind]("a text", **options)
        except ImportError:
            return "language:response_language needs langdetect, which is not installed: pip install 'jaxrl-llm[tasks]'"
        except (ValueError, TypeError, AttributeError, re.error) as error:
            return str(error)
        return ""


def _asked(sample: Sample) -> list[tuple[str, Mapping[str, Any]]]:
    """Return kind and options per instruction. Raises ValueError if the row's columns do not hold them."""
    kinds, options = (sample.columns.get(name) for name in ("instruction_id_list", "kwargs"))
    if not isinstance(kinds, list | tuple) or not kinds:
        raise ValueError(f"instruction_id_list: got {kinds!r}, want a list of one or more kinds of instructions")
    options = [{}] * len(kinds) if options is None else options
    if not isinstance(options, list | tuple) or len(options) != len(kinds):
        raise ValueError(f"kwargs: got {options!r}, want a list of {len(kinds)}, the options of each instruction")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        raise ValueError(f"instruction_id_list: got {unknown[0]!r}, want one of {', '.join(KINDS)}")
    # Data sets fill the options of all kinds with null.
    return [
        (kind, {k: v for k, v in (given or {}).items() if v is not None})
        for kind, given in zip(kinds, options, strict=True)
    ]


def _related(count: int, relation: str, number: int) -> bool:
    if relation not in RELATIONS:
        raise ValueError(f"relation: got {relation!r}, want one of {', '.join(RELATIONS)}")
    return count >= number if relation == "at least" else count < number


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"\b{re.escape(word)}\b", text, re.IGNORECASE) is not None


def number_words(text: str, num_words: int, relation: str) -> bool:
    return _related(len(re.findall(r"\w+", text)), relation, num_words)


def number_sentences(text: str, num_sentences: int, relation: str) -> bool:
    return _related(len([x for x in re.split(r"(?<=[.!?])\s+", text.strip()) if x]), relation, num_sentences)


def number_paragraphs(text: str, num_paragraphs: int) -> bool:
    """Paragraphs between lines of ***; an empty one counts only at an end, as nothing."""
    parts = [part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
    return all(parts[1:-1]) and len([part for part in parts if part]) == num_paragraphs


def nth_paragraph_first_word(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs between empty lines; the word is compared in lower case, up to the first mark behind it."""
    parts = [part.strip() for part in re.split(r"\n\n", text) if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    word = re.match(r"[\"']*([^\s.,?!'\"]*)", parts[nth_paragraph - 1]).group(1)
    return word.lower() == first_word.lower()


def existence(text: str, keywords: list[str]) -> bool:
    return all(re.search(keyword, text, re.IGNORECASE) for keyword in keywords)


def forbidden_words(text: str, forbidden_words: list[str]) -> bool:
    return not any(_has_word(text, word) for word in forbidden_words)


def keyword_frequency(text: str, keyword: str, frequency: int, relation: str) -> bool:
    return _related(len(re.findall(keyword, text, re.IGNORECASE)), relation, frequency)


def letter_frequency(text: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _related(text.lower().count(letter.lower()), let_relation, let_frequency)


def number_placeholders(text: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", text)) >= num_placeholders


def postscript(text: str, postscript_marker: str) -> bool:
    marker = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}.get(
        postscript_marker, re.escape(postscript_marker.lower())
    )
    return re.search(rf"^\s*{marker}.*$", text.lower(), re.MULTILINE) is not None


def number_bullet_lists(text: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*\*[^\*].*$|^\s*-.*$", text, re.MULTILINE)) == num_bullets


def title(text: str) -> bool:
    return any(found.lstrip("<").rstrip(">").strip() for found in re.findall(r"<<[^\n]+>>", text))


def json_format(text: str) -> bool:
    text = re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def number_highlighted_sections(text: str, num_highlights: int) -> bool:
    found = re.findall(r"\*\*[^\n\*]+\*\*|\*[^\n\*]+\*", text)
    return len([x for x in found if x.strip("*").strip()]) >= num_highlights


def multiple_sections(text: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"\s?{re.escape(section_spliter)}\s?\d+\s?", text)) >= num_sections


def constrained_response(text: str) -> bool:
    return any(choice in text for choice in CHOICES)


def response_language(text: str, language: str) -> bool:
    import langdetect

    # Its result is random otherwise.
    langdetect.DetectorFactory.seed = 0
    try:
        return langdetect.detect(text) == language
    except langdetect.LangDetectException:
        return False


def english_capital(text: str) -> bool:
    return text.isupper()


def english_lowercase(text: str) -> bool:
    return text.islower()


def capital_word_frequency(text: str, capital_frequency: int, capital_relation: str) -> bool:
    return _related(
        len([x for x in re.findall(r"\b[\w']+\b", text) if x.isupper()]), capital_relation, capital_frequency
    )


def no_comma(text: str) -> bool:
    return "," not in text


def end_checker(text: str, end_phrase: str) -> bool:
    return text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def quotation(text: str) -> bool:
    text = text.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def repeat_prompt(text: str, prompt_to_repeat: str) -> bool:
    return text.strip().lower().startswith(prompt_to_repeat.strip().lower())


def two_responses(text: str) -> bool:
    parts = [part.strip() for part in text.split("******")]
    found = [part for part in parts if part]
    return all(parts[1:-1]) and len(found) == 2 and found[0] != found[1]


KINDS: Mapping[str, Callable[..., bool]] = {
    "keywords:existence": existence,
    "keywords:frequency": keyword_frequency,
    "keywords:forbidden_words": forbidden_words,
    "keywords:letter_frequency": letter_frequency,
    "language:response_language": response_language,
    "length_constraints:number_sentences": number_sentences,
    "length_constraints:number_paragraphs": number_paragraphs,
    "length_constraints:number_words": number_words,
    "length_constraints:nth_paragraph_first_word": nth_paragraph_first_word,
    "detectable_content:number_placeholders": number_placeholders,
    "detectable_content:postscript": postscript,
    "detectable_format:number_bullet_lists": number_bullet_lists,
    "detectable_format:constrained_response": constrained_response,
    "detectable_format:number_highlighted_sections": number_highlighted_sections,
    "detectable_format:multiple_sections": multiple_sections,
    "detectable_format:json_format": json_format,
    "detectable_format:title": title,
    "combination:two_responses": two_responses,
    "combination:repeat_prompt": repeat_prompt,
    "startend:end_checker": end_checker,
    "startend:quotation": quotation,
    "change_case:capital_word_frequency": capital_word_frequency,
    "change_case:english_capital": english_capital,
    "change_case:english_lowercase": english_lowercase,
    "punctuation:no_comma": no_comma,
}
"""IFEval's kinds of instructions: functions of the response and the instruction's options."""
