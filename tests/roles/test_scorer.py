"""The scorer with a fake program: what of a batch's scores goes to which token of the groups."""

import numpy as np
import pytest
from fakes import PROMPT_SLOTS, SLOTS, groups_of
from setups import layouts

from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.roles.scorer import Scorer
from jaxrl_llm.update.packing import batch_shape, equal_groups


@pytest.mark.parametrize("kind", ["none", "plain", "shared_prefix"])
def test_each_token_of_a_kept_row_gets_its_own_score_and_all_others_0(kind):
    """The program gives the parameter times the token, its entropy, and its slot. Row b: a prompt of one token, tokens b + 1."""
    seen = []

    def program(params, batch, tables):
        seen.append(batch)
        return TokenScores(params * batch.tokens, 0.5 * batch.tokens, 1.0 * batch.position)

    groups = groups_of(np.array([[1.0, 0.0], [np.nan, np.nan], [0.0, 1.0]]), length=[2, 1, 2, 2, 2, 2])
    shape = batch_shape(kind, equal_groups(3, 2), (PROMPT_SLOTS, SLOTS), 0, 1, 1)
    score = Scorer(program, shape, 0, layouts()[0].sharding(("rows", None)))
    found = score(10.0, groups)
    said = np.float32([[1, 1], [2, 0], [0, 0], [0, 0], [5, 5], [6, 6]])
    np.testing.assert_array_equal(found.logprobs, 10 * said)
    np.testing.assert_array_equal(found.entropy, said / 2)
    np.testing.assert_array_equal(found.values, np.where(said > 0, np.float32([1, 2]), 0))
    assert all(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in found if x is not None)
    [batch] = seen
    assert batch.tokens.shape == (shape.rows, shape.slots) and batch.tokens.sharding == score.rows
    # Nothing is learned from what is only scored.
    assert not np.asarray(batch.advantage).any()


def test_a_program_without_a_critic_gives_no_values():
    groups = groups_of(np.array([[1.0, 0.0]]))
    shape = batch_shape("none", equal_groups(1, 2), (PROMPT_SLOTS, SLOTS), 0, 1, 1)
    score = Scorer(
        lambda params, batch, tables: TokenScores(1.0 * batch.tokens, 1.0 * batch.tokens),
        shape, 0, layouts()[0].sharding(("rows", None)),
    )  # fmt: skip
    assert score(None, groups).values is None
