"""Grading by a function in this process, for a notebook: without a deadline, and an exception is the function's own."""

from collections.abc import Sequence

import numpy as np

from jaxrl_llm.environments.grader import Grader, Sample
from jaxrl_llm.environments.grader_pool import Graded, stripped_completions
from jaxrl_llm.environments.worker import Failure, InvalidResult, rewards_of, votes_of
from jaxrl_llm.errors import UserError


def grade_in_process(grader: Grader, groups: Sequence[Sequence[Sample]]) -> Graded:
    """Grade P groups of up to G samples.

    Raises:
        UserError: the grader is no function, or a result is no number that float32 holds.
        Exception: whatever the grader raises.
    """
    if not callable(grader):
        raise UserError(
            f"reward: got {grader!r}, want a function of one Sample, rl.make_grader of a name, or a GraderPool"
        )
    if hasattr(grader, "start"):
        grader.start()
    rows = np.full((len(groups), max(map(len, groups), default=0)), np.nan, np.float32)
    for index, group in enumerate(groups):
        rows[index, : len(group)] = _rewards(grader, group)
    extracts = hasattr(grader, "extract")
    return Graded(
        reward=rows,
        components=rows[None],
        failure=np.full(len(groups), Failure.NONE, np.int32),
        failed_by=np.full(len(groups), -1, np.int32),
        votes=[votes_of(grader, group) if extracts else stripped_completions(group) for group in groups],
    )


def _rewards(grader: Grader, group: Sequence[Sample]) -> list[float]:
    if hasattr(grader, "grade_group"):
        parts = [group]
    else:
        parts = [[sample] for sample in group]
    found: list[float] = []
    for part in parts:
        try:
            found += rewards_of(grader, part)
        except InvalidResult as error:
            name, sample = getattr(grader, "__name__", type(grader).__name__), part[0]
            raise UserError(
                f"the reward {name}: {error.text}, for the response {sample.completion[:200]!r} to the prompt "
                f"{sample.prompt[:200]!r}; want one finite number"
            ) from None
    return found
