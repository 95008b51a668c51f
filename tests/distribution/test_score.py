"""Scoring: what is refused."""

import numpy as np
import pytest
from setups import TINY, layouts

from jaxrl_llm.distribution.score import Scoring, score_tokens
from jaxrl_llm.types import Batch


def test_a_control_without_its_tables_is_refused():
    ones = np.ones((1, 2), np.int32)
    batch = Batch(*[ones] * 6, ones > 0, *[ones.astype(np.float32)] * 4, control_state=ones)
    with pytest.raises(ValueError, match="tables: got none"):
        score_tokens({}, batch, Scoring(TINY, layouts()[0], 16))
