"""The grader of multiple choice."""

import re
from dataclasses import dataclass

from jaxrl_llm.environments.grader import Sample
from jaxrl_llm.environments.graders.mathematics import last_boxed
from jaxrl_llm.environments.graders.normalization import LETTER, plain
from jaxrl_llm.environments.graders.text import FinalText

_MARKUP = " \t\r\n()[]{}*_.:,;!\"'`$"


@dataclass(frozen=True, kw_only=True)
class MultipleChoice(FinalText):
    """1 if the letter that the final text settles on is the answer's, else 0.

    Looked for in this order: a last box; the last "answer is B" or "Answer: (B)" (also choice, option); a text that is one letter;
    the only letter in parentheses or at the beginning of a line as "B)" or "B."; a capital that ends the text. Two letters joined
    by "or", "and", a comma or a slash are no choice, nor is one behind "not". A letter inside a word is none.

    The row's answer is read in the same way; one without a letter is refused before the run starts.
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
        """What is wrong with the row's answer; nothing if it can be graded."""
        if self._read(row.answer):
            return ""
        return f"the row's answer: got {row.answer[:200]!r}, want one of the letters {self.letters}"

    def _read(self, text: str) -> str:
        """The letter, or nothing."""
        # Tags, and LaTeX's marks of mathematics.
        text = re.sub(r"</?[A-Za-z_]{2,20}>|\\(?=[()])", " ", plain(text))
        if "\\boxed" in text or "\\fbox" in text:
            boxed = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\b", "", last_boxed(text))
            return self._alone(boxed) or self._listed(boxed.lstrip("{ "))
        if said := self._said(text):
            return said if said in self.letters else ""
        return self._alone(text) or self._listed(text) or self._last(text)

    def _alone(self, text: str) -> str:
        letter = text.strip(_MARKUP).upper()
        return letter if len(letter) == 1 and letter in self.letters else ""

    def _said(self, text: str) -> str:
        """The letter after the last "answer is"; "?" if there are two of them."""
        one = rf"[(\[*\"'`$]{{0,4}}(?:[{self.letters}](?![\w'\u2019])|(?<=[(\[])[{self.letters.lower()}](?=[)\]]))"
        said = list(re.finditer(rf"\b(?i:answer|choice|option)\b{_BETWEEN}({one})", text))
        if not said:
            return ""
        rest = text[said[-1].end() : said[-1].end() + 40]
        if re.match(rf"[)\]*\"'`$]*\s*(?:,|/|&|or\b|and\b)\s*(?i:option\s+|choice\s+)?{one}", rest):
            return "?"
        return said[-1][1][-1].upper()

    def _listed(self, text: str) -> str:
        """The letter of the only line that begins as a choice does, or in parentheses, if there is no other such letter."""
        lines = re.findall(rf"^[ \t]*[*(]{{0,3}}([{self.letters}])[)*]{{0,3}}[).:]", text, re.MULTILINE)
        bracketed = re.findall(rf"(?<!\bnot )\(([{self.letters}{self.letters.lower()}])\)", text)
        letters = {letter.upper() for letter in lines + bracketed}
        return letters.pop() if len(letters) == 1 and len(lines) <= 1 else ""

    def _last(self, text: str) -> str:
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
