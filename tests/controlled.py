"""A small engine whose tokens are characters, for tests of controls."""

import dataclasses
import re
from functools import cache

import numpy as np
from setups import TINY, layouts, make_params, make_policy

from jaxrl_llm.control.config import (
    AllowControl,
    BeginControl,
    BudgetControl,
    ChoiceControl,
    ForbidControl,
    RegexControl,
    StopControl,
)
from jaxrl_llm.rollout.config import RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.tasks.tokenizer import character_tokenizer

ALPHABET = "0123456789+<> #"
TOKENIZER = character_tokenizer(ALPHABET)
"""16 tokens; `#` ends a response, and is a part of its text."""
VOCAB = Vocabulary(TOKENIZER.size, TOKENIZER.pad, TOKENIZER.eos)
MODEL = dataclasses.replace(TINY, layers=1)
P, G, C = 8, 2, 10
CONTROLS = {
    "regex": RegexControl(pattern="-?[1-9][0-9]{0,3}(\\+[0-9]{2,3})?#"),
    "choice": ChoiceControl(texts=("12#", "7+7#", "123456#")),
    "allow": AllowControl(tokens=("1", "2", "+")),
    "forbid": ForbidControl(tokens=("#", "3")),
    "stop": StopControl(texts=("1", "+2")),
    "budget": BudgetControl(tokens=4, close=">", closing="+>", then=RegexControl(pattern="[0-9]{1,2}#")),
    "waits": BudgetControl(tokens=7, close=">", waits=1, wait="<"),
    "begin": BeginControl(text="<1", then=RegexControl(pattern="[0-9]{2}#")),
}


def sampler(sizes: tuple[int, ...] = (1, 1, 1), **rollout) -> Engine:
    shape = {"prompts": P, "samples": G, "max_new_tokens": C}
    model = EngineModel(MODEL, layouts(sizes)[1], VOCAB, TOKENIZER)
    return Engine(model, RolloutConfig(**{**shape, **rollout}), 7)


@cache
def params():
    return make_params(MODEL, layouts()[0], sharpness=2.0)


@cache
def policy(sizes: tuple[int, ...] = (1, 1, 1)):
    train, decode = layouts(sizes)
    return make_policy(MODEL, make_params(MODEL, train, sharpness=2.0), train, decode)


def texts(rollouts) -> list[str]:
    """Responses, padding tokens, which have no text, as `_`."""
    spelled = np.array(list("_" + ALPHABET))
    return ["".join(spelled[row[:n]]) for row, n in zip(rollouts.tokens, rollouts.length, strict=True)]


def follows(name: str, text: str, finish: str) -> bool:
    """Whether a response is what the control allows, read from its text alone."""
    if name == "regex":
        return bool(re.fullmatch(r"-?[1-9][0-9]{0,3}(\+[0-9]{2,3})?#", text))
    if name == "choice":
        return text in ("12#", "7+7#", "123456#")
    if name == "allow":
        return set(text[:-1]) <= set("12+") and text[-1] in "12+#"
    if name == "forbid":
        return not set(text) & set("#3") and len(text) == C
    if name == "stop":
        ends = re.search(r"1|\+2", text)
        return (ends is None or ends.end() == len(text)) and (finish == "STOP") == (ends is not None)
    if name == "budget":
        return bool(re.fullmatch(r"[^>#]{0,4}>[0-9]{1,2}#|[^>#]{4}\+>[0-9]{1,2}#", text))
    if name == "waits":
        return text.count(">") <= 1 or text.index(">") < 8
    return bool(re.fullmatch(r"<1[0-9]{2}#", text))
