"""The filters of docs/extending.md do what the page says."""

import re
from pathlib import Path

import numpy as np

from jaxrl_llm.experience.replay import blank_groups

PAGE = (Path(__file__).parents[2] / "docs" / "extending.md").read_text(encoding="utf-8")


def test_the_filters_of_the_page():
    """Two prompts with two rows each, of 3, 5, 4 and 2 tokens; in the next step the second prompt comes again."""
    (code,) = re.findall(r"```python\n# my_filters\.py\n(.*?)```", PAGE, re.DOTALL)
    page: dict = {}
    exec(code, page)
    blank = blank_groups(2, 2, (3, 5), 1, (), 0)
    groups = blank.replace(
        keep=np.array([True, True, False, True]), rollouts=blank.rollouts.replace(length=np.array([3, 5, 4, 2]))
    )
    assert page["long_enough"](groups).tolist() == [False, True, True, False]

    def step(state, rows):
        prompts = groups.rollouts.prompts.replace(row=np.array(rows, np.int32))
        return found.apply(state, groups.replace(rollouts=groups.rollouts.replace(prompts=prompts)))

    found = page["NotTwice"](2)
    state, kept, metrics = step(found.init(), [7, 9])
    assert (state.tolist(), kept.keep.tolist(), metrics) == ([7, 9], [True, True, False, True], {"repeated": 0.0})
    state, kept, metrics = step(state, [9, 8])
    assert (state.tolist(), kept.keep.tolist(), metrics) == ([9, 8], [False, False, False, True], {"repeated": 0.5})
