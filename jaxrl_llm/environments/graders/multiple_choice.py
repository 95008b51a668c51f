"""Grader of multiple-choice answers."""

import re
from dataclasses import dataclass

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.mathematics import last_boxed
from jaxrl_llm.environments.graders.normalization import LETTER, to_ascii
from jaxrl_llm.environments.graders.text import FinalText

_MARKUP = " \t\r\n()[]{}*_.:,;!\"'`$"


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(FinalText):
    """1 if the letter chosen in the final text equals the answer, else 0.

    In this order: the last box; the last "answer is B" or "Answer: (B)" (also choice, option); one letter alone; the only letter
    in parentheses or at the beginning of a line as "B)" or "B."; a capital at the end of the text. Two letters joined by "or",
    "and", a comma or a slash are no choice, and neither is one after "not". Letters inside words do not count.

    The row's answer is read in the same way; rows without a letter are refused before the run starts.
    """

    letters: str = "ABCDEFGHIJ"

    def __post_init__(self) -> None:
        if not re.fullmatch("[A-Z]+", self.letters):
            raise ValueError(f"letters: got {self.letters!r}, want capital letters")

    def __call__(self, sample: Sample) -> float:
        if why := self.problem(sample):
            raise ValueError(why)
        return float(self.extract(sample) == self._read(sample.answer))

    def extract(self, sample: Sample) -> str:
        return self._read(self.final_text(sample))

    def problem(self, row: Sample) -> str:
        """Return why the row's answer cannot be graded; "" if it can."""
        if self._read(row.answer):
            return ""
        return f"the row's answer: got {row.answer[:200]!r}, want one of the letters {self.letters}"

    def _read(self, text: str) -> str:
        """Return the chosen letter; "" if there is none."""
        # Tags, and LaTeX's math delimiters.
        text = re.sub(r"</?[A-Za-z_]{2,20}>|\\(?=[()])", " ", to_ascii(text))
        if "\\boxed" in text or "\\fbox" in text:
            boxed = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", last_boxed(text))
            return self._single(boxed) or self._listed(boxed.lstrip("{ "))
        if stated := self._stated(text):
            return stated if stated in self.letters else ""
        return self._single(text) or self._listed(text) or self._trailing(text)

    def _single(self, text: str) -> str:
        letter = text.strip(_MARKUP).upper()
        return letter if len(letter) == 1 and letter in self.letters else ""

    def _stated(self, text: str) -> str:
        """Letter after the last "answer is"; "?" if there are two letters."""
        one = rf"[(\[*\"'`$]{{0,4}}(?:[{self.letters}](?![\w'\u2019])|(?<=[(\[])[{self.letters.lower()}](?=[)\]]))"
        stated = list(re.finditer(rf"\b(?i:answer|choice|option)\b{_BETWEEN}({one})", text))
        if not stated:
            return ""
        rest = text[stated[-1].end() : stated[-1].end() + 40]
        if re.match(rf"[)\]*\"'`$]*\s*(?:,|/|&|or\b|and\b)\s*(?i:option\s+|choice\s+)?{one}", rest):
            return "?"
        return stated[-1][1][-1].upper()

    def _listed(self, text: str) -> str:
        """Letter at the beginning of the only line that starts with one, or in parentheses, if there is only one such letter."""
        lines = re.findall(rf"^[ \t]*[*(]{{0,3}}([{self.letters}])[)*]{{0,3}}[).:]", text, re.MULTILINE)
        bracketed = re.findall(rf"(?<!\bnot )\(([{self.letters}{self.letters.lower()}])\)", text)
        letters = {letter.upper() for letter in lines + bracketed}
        return letters.pop() if len(letters) == 1 and len(lines) <= 1 else ""

    def _trailing(self, text: str) -> str:
        if re.search(r"\([A-Za-z]\)", text):
            return ""
        found = re.search(rf"(?<![{LETTER}'])([{self.letters}])$", text.rstrip(_MARKUP))
        before = text[: found.start()] if found else ""
        other = rf"(?:\b[{self.letters}](?:,|\s+or|\s+and|/)|(?:\b(?:can)?not|n['\u2019]t)(?:\s+be)?(?:\s+option)?)\s*$"
        return found[1] if found and not re.search(other, before[-20:]) else ""


# What may stand between "answer" and its letter: a few small words, colons and opening marks.
_BETWEEN = (
    r"(?:\s{0,3}(?:is|was|be|would|should|must|the|correct|final|best|option|choice|answer|:|=|\*|-)){0,9}\s{0,3}"
)
