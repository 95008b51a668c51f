"""`train.step` with a fake source and a fake learner: every stage once, in order, on the result of the one before."""

import numpy as np
import pytest
from fakes import Calls, groups_of, state_of

from jaxrl_llm.errors import AdvantageError
from jaxrl_llm.experience.filters import Filter
from jaxrl_llm.experience.replay import Replay
from jaxrl_llm.roles.collector import GivenUp
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.updates import Learned
from jaxrl_llm.train import step
from jaxrl_llm.types import Credit, Experience, Scores

GRADED, FRESH = (groups_of(np.full((2, 2), float(i)), version=i) for i in range(2))
MIXED = groups_of(np.full((2, 2), 2.0), length=[1] * 4)
SCORES, CREDIT = Scores(np.zeros((4, 2))), Credit(np.ones((4, 2)))
LEARNED = Learned({"loss": 0.5}, alarm=2, zero_gradient={}, flops=None, seconds=1.0)
STAGES = (
    "use", "take", "filter", "replay", "score", "advantage", "update", "publish", "refresh", "observe",
)  # fmt: skip


class Source:
    def __init__(self, calls: Calls):
        self.use, self.take = calls.of("use", None), calls.of("take", GRADED)
        self.state, self.calls = "source before", calls

    def observe(self, groups):
        self.calls.of("observe", None)(groups)
        self.state = "source after"


def roles(**changes):
    calls = Calls()
    learner = Learner(
        filter=Filter(tuple, calls.of("filter", ("filters after", FRESH, {"dropped": 1.0}))),
        replay=Replay(tuple, calls.of("replay", ("replay after", MIXED, {"reused": 2.0}))),
        score=calls.of("score", SCORES),
        entropy=calls.of("entropy", None),
        advantage=calls.of("advantage", CREDIT),
        update=calls.of("update", ("train after", LEARNED)),
        refresh=calls.of("refresh", "reference after"),
        publish=calls.of("publish", "policy after"),
        compile=calls.of("compile", None),
    )
    return calls, learner._replace(**changes), Source(calls)


def before():
    return state_of(filters="filters before", replay="replay before", source="source before", reference="reference")


def test_each_stage_is_called_once_in_order_with_the_results_before_it():
    calls, learner, source = roles()
    state, rng = before(), np.random.default_rng(0)
    done = step(learner, source, state, "policy", rng)
    assert tuple(calls.names) == STAGES
    assert calls.args("use") == ("policy",)
    assert calls.args("take") == (5,)
    assert calls.args("filter") == ("filters before", GRADED)
    *given, entropy = calls.args("replay")
    assert given == ["replay before", FRESH, rng] and entropy.args == (state,)
    assert calls.args("score") == (state, MIXED)
    assert calls.args("advantage") == (MIXED, SCORES)
    of, experience, noise = calls.args("update")
    assert of is state and noise is rng and experience == Experience(MIXED, SCORES, CREDIT)
    assert calls.args("publish") == ("train after", "policy")
    assert calls.args("refresh") == (state, "train after")
    # What was sampled now: never what replay brought back.
    assert calls.args("observe")[0] is FRESH
    assert (done.policy, done.fresh, done.credit, done.learned) == ("policy after", FRESH, CREDIT, LEARNED)


def test_the_next_state_holds_what_every_stage_made():
    _, learner, source = roles()
    state = before()
    after = step(learner, source, state, "policy", np.random.default_rng(0)).state
    assert int(after.step) == 6
    assert (after.train, after.reference) == ("train after", "reference after")
    assert (after.source, after.filters, after.replay) == ("source after", "filters after", "replay after")
    assert after.guards == state.guards._replace(alarm=2) and float(after.eval_before) == 0.25


def test_metrics_of_filter_and_replay_are_joined_and_those_of_updates_stay_where_they_are():
    _, learner, source = roles()
    done = step(learner, source, before(), "policy", np.random.default_rng(0))
    assert done.metrics == {"dropped": 1.0, "reused": 2.0} and done.learned.metrics == {"loss": 0.5}


@pytest.mark.parametrize("stage", ["take", "advantage"])
def test_if_a_stage_raises_no_later_one_runs_and_the_state_is_unchanged(stage):
    def refuse(*_):
        raise GivenUp if stage == "take" else AdvantageError("no")

    calls, learner, source = roles(**({"advantage": refuse} if stage == "advantage" else {}))
    if stage == "take":
        source.take = refuse
    state = before()
    with pytest.raises((GivenUp, AdvantageError)):
        step(learner, source, state, "policy", np.random.default_rng(0))
    assert calls.names == list(STAGES[: STAGES.index(stage)])
    assert state == before() and source.state == "source before"
