"""Scoring: what is refused."""

import numpy as np
import pytest
from setups import TINY, layouts

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.types import Batch


def test_masks_without_the_end_tokens_are_refused():
    ones = np.ones((1, 2), np.int32)
    batch = Batch(*[ones] * 6, ones > 0, *[ones.astype(np.float32)] * 4, eos_masked=ones > 0)
    with pytest.raises(ValueError, match="ends: got none"):
        score_tokens({}, batch, Scoring(TINY, layouts()[0], 16))
