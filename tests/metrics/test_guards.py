"""Guards: each tested by the fault that it is there for, as a value and in a run."""

import math
from contextlib import nullcontext
from typing import get_args

import jax
import numpy as np
import pytest

from jaxrl_llm import train
from jaxrl_llm.config import loading
from jaxrl_llm.errors import AdvantageError, DroppedError, GradingError, MismatchError, NonFiniteError
from jaxrl_llm.metrics.guards import Guards, RatioAlarm, observe
from jaxrl_llm.objective.advantages import Published, estimate
from jaxrl_llm.objective.estimator import AdvantageEstimate, EstimatorInputs
from jaxrl_llm.objective.group_estimators import Grpo, PassAtK, Raw, Rloo
from jaxrl_llm.objective.statistics import Grouping
from jaxrl_llm.objective.token_estimators import Gae, ReinforcePlusPlus
from jaxrl_llm.roles import updates
from jaxrl_llm.roles.start_or_restore import rl_target
from jaxrl_llm.update.config import GuardConfig

FINE = {
    "nonfinite": 0.0, "mismatch/kl": 1e-6, "alarm/ratio": 0.0, "updates": 2, "groups/graded": 8.0, "groups/kept": 8.0,
}  # fmt: skip
# What a step without a token to learn from leaves: nothing was measured.
NO_SIGNAL = {"updates": 0, "groups/kept": 0.0}
UNGRADED = NO_SIGNAL | {"groups/graded": 0.0}
SOME = {"embed": False, "layers/qkv": False}


def look(steps, cfg=GuardConfig(), guards=Guards()):  # noqa: B008
    """Reports on steps, each (changes of FINE, parameters without a gradient), up to the first error."""
    found = []
    for changes, zero in steps:
        metrics = FINE | changes
        if not metrics["updates"]:
            del metrics["nonfinite"], metrics["mismatch/kl"]
        found.append(observe(guards, cfg, metrics, zero, "grader even: ValueError: odd"))
        guards = found[-1].guards
        if found[-1].error:
            break
    return found


def test_a_finite_step_warns_about_nothing():
    (report,) = look([({}, SOME)])
    guards = report.guards._replace(zero_gradient=report.guards.zero_gradient.tolist())
    assert (guards, *report[1:]) == (Guards(seen=1, zero_gradient=[0, 0]), (), None)


def test_steps_without_a_finite_update_end_the_run_when_they_are_in_a_row():
    bad, good, idle = ({"nonfinite": 1.0, "mismatch/kl": np.nan}, {}), ({"nonfinite": 0.5}, SOME), (NO_SIGNAL, {})
    found = look([bad, bad, good, bad, bad, idle, bad, good], GuardConfig(max_nonfinite=3))
    assert [v.guards.nonfinite for v in found] == [1, 2, 0, 1, 2, 2, 3]
    assert [v.error is None for v in found] == [True] * 6 + [False]
    assert isinstance(found[-1].error, NonFiniteError) and found[-1].error.exit_code == 4
    assert "no update of 3 consecutive steps was finite" in str(found[-1].error)


def test_a_sampler_far_from_the_trainer_ends_the_run():
    far = {"mismatch/kl": 0.3}
    found = look([({"mismatch/kl": np.nan}, SOME), ({"mismatch/kl": 0.1}, SOME), (far, SOME)])
    assert [v.error is None for v in found] == [True, True, False]
    assert isinstance(found[-1].error, MismatchError) and found[-1].error.exit_code == 4
    assert str(found[-1].error).startswith(
        "mismatch/kl: got 0.3 nats per token, want at most 0.1 (update.guards.max_mismatch_kl)"
    )
    assert look([(far, SOME)], GuardConfig(max_mismatch_kl=None))[0].error is None


def test_an_evaluation_ends_the_run_where_the_steps_data_is_old():
    """Replay: the step itself measures nothing, and its place in the metrics is empty."""
    old = FINE | {"eval/mismatch_kl": 0.2}
    del old["mismatch/kl"]
    error = observe(Guards(), GuardConfig(), old, SOME).error
    assert isinstance(error, MismatchError) and str(error).startswith("eval/mismatch_kl: got 0.2 nats per token")
    # What a step that was not finite says of the sampler hides nothing.
    assert isinstance(observe(Guards(), GuardConfig(), old | {"mismatch/kl": np.nan}, SOME).error, MismatchError)


def test_updates_that_are_not_finite_now_and_then_are_told():
    """Never in as many consecutive steps as end the run."""
    bad, some, good = ({"nonfinite": 1.0, "mismatch/kl": np.nan}, {}), ({"nonfinite": 0.75}, SOME), ({}, SOME)
    found = look([bad, bad, good, some] * 3)
    warned = [v.warnings for v in found]
    assert [
        n for n, texts in enumerate(warned) if any("non-finite loss or gradient; in this one" in text for text in texts)
    ] == [3, 7]
    assert warned[3] == (
        "3 of 4 RL steps so far had updates with a non-finite loss or gradient; in this one 75%: look at the size of the "
        "rewards, and at update.optimizer.lr",
    )
    assert warned[4] == ("3 of 5 RL steps so far learned nothing; this one: no update was finite",)
    assert all(v.error is None for v in found)


def test_a_parameter_without_a_gradient_is_named_once():
    dead, trained = ({}, {"embed": False, "layers/qkv": True}), ({}, SOME)
    found = look([dead, trained, dead, dead, dead, dead, trained, dead, dead, dead], GuardConfig(zero_gradient_steps=3))
    warned = ("the gradient of layers/qkv was exactly 0 for 3 steps: nothing in the loss depends on it",)
    assert [v.warnings for v in found] == [()] * 4 + [warned] + [()] * 5
    streaks = [v.guards.zero_gradient.tolist() for v in found[:6]]
    assert streaks == [[0, 1], [0, 0], [0, 1], [0, 2], [0, 3], [0, 3]]


def test_steps_without_a_useful_update_neither_count_nor_reset():
    dead = ({}, {"embed": False, "layers/qkv": True})
    found = look([dead, dead, ({}, {}), dead], GuardConfig(zero_gradient_steps=3))
    assert [bool(v.warnings) for v in found] == [False, False, False, True]


def test_no_gradient_anywhere_is_one_warning_about_rewards():
    nothing = ({}, {"embed": True, "layers/qkv": True})
    dead = ({}, {"embed": False, "layers/qkv": True})
    found = look([dead, dead, nothing, nothing, nothing, nothing, dead], GuardConfig(zero_gradient_steps=3))
    assert [len(v.warnings) for v in found] == [0, 0, 0, 0, 1, 0, 1]
    assert (
        found[4]
        .warnings[0]
        .startswith("3 of 5 RL steps so far learned nothing; this one: every gradient was exactly 0: are the rewards")
    )
    assert "layers/qkv" in found[6].warnings[0]


def test_steps_without_signal_are_warned_about_at_3_6_12_and_24_consecutive_or_not():
    idle, fine = (NO_SIGNAL, {}), ({}, SOME)
    found = look([idle, fine] * 26)
    warned = {n: v.warnings[0] for n, v in enumerate(found, 1) if v.warnings}
    assert list(warned) == [5, 11, 23, 47]
    assert warned[47].startswith(
        "24 of 47 RL steps so far learned nothing; this one: the rewards of each group were equal"
    )
    assert found[-1].error is None


def test_a_guard_may_say_why_a_step_learned_nothing():
    reasons = {
        "no group could be graded": UNGRADED,
        "the rewards of each group were equal": NO_SIGNAL
        | {"filter/signal_right/dropped": 64.0, "filter/short/dropped": 0.0},
        "the filters dropped every response (experience.filter): signal 24, short 40": (
            NO_SIGNAL | {"filter/signal/dropped": 24.0, "filter/short/dropped": 40.0}
        ),
        "none of 24 groups was accepted (experience.refill)": NO_SIGNAL
        | {"refill/accepted": 0.0, "refill/prompts": 24.0},
        "no token of the kept groups is in the loss": NO_SIGNAL | {"groups/kept": 8.0},
    }
    for reason, changes in reasons.items():
        (report,) = look([(changes, {})], GuardConfig(idle_steps=1, max_ungraded=2))
        assert report.warnings[0].startswith(f"1 of 1 RL steps so far learned nothing; this one: {reason}")


def test_groups_that_cannot_be_graded_end_the_run_with_the_first_failure():
    found = look([(UNGRADED, {}), (UNGRADED, {}), (NO_SIGNAL, {}), *[(UNGRADED, {})] * 3], GuardConfig(max_ungraded=3))
    assert [v.guards.ungraded for v in found] == [1, 2, 0, 1, 2, 3]
    assert [v.error is None for v in found] == [True] * 5 + [False]
    assert isinstance(found[-1].error, GradingError) and found[-1].error.exit_code == 4
    assert str(found[-1].error) == (
        "no group of 3 consecutive steps could be graded (update.guards.max_ungraded), so nothing was learned; the first failure: "
        "grader even: ValueError: odd"
    )


def test_a_filter_that_drops_everything_ends_the_run():
    """Only consecutive steps count, and only those with graded groups: these are what the other guard is for."""
    lost = NO_SIGNAL | {"dropped/success": 0.125}
    found = look([(lost, {}), ({}, SOME), (lost, {}), (lost, {}), (lost, {})], GuardConfig(max_dropped=3))
    assert [v.guards.dropped for v in found] == [1, 0, 1, 2, 3]
    assert [v.error is None for v in found] == [True] * 4 + [False]
    assert isinstance(found[-1].error, DroppedError) and found[-1].error.exit_code == 4
    assert str(found[-1].error).startswith(
        "every graded group of 3 consecutive steps was dropped (update.guards.max_dropped), so nothing was learned; of the last "
        "step's responses 12.5% were right: look at experience.filter and experience.refill"
    )
    # All began with a hint, of which the step says this alone.
    hinted = NO_SIGNAL | {"hints/success": 0.25}
    assert "25.0% were right" in str(look([(hinted, {})], GuardConfig(max_dropped=1))[-1].error)
    assert [v.guards.dropped for v in look([(lost, {}), (UNGRADED, {}), (lost, {})])] == [1, 0, 1]
    # Stored responses were trained on: something was learned.
    assert [v.guards.dropped for v in look([(lost, {}), (lost | {"updates": 2}, SOME)])] == [1, 0]


def test_too_few_kept_tokens_are_warned_about_once():
    cut, whole = ({"sampling/support_overflow": 1.0}, SOME), ({"sampling/support_overflow": 0.1}, SOME)
    found = look([cut, cut, whole, cut, cut, cut, cut])
    assert [len(v.warnings) for v in found] == [0, 0, 0, 0, 0, 1, 0]
    assert found[5].warnings[0].startswith("sampling/support_overflow: got 1.00 of the tokens, want at most 0.1")


def test_the_ratio_alarm_is_passed_on():
    (report,) = look([({"alarm/ratio": 1.0}, SOME)])
    assert report.warnings == (
        "ALARM: all ratios were exactly 1 on stale data, twice: old log-probs are not those captured",
    )


@pytest.mark.parametrize(
    "updates, rings",
    [
        ([(1.0, 1.0, True), (1.0, 1.0, True), (1.0, 1.0, True)], [False, True, True]),
        ([(1.0, 1.0, False), (1.0, 1.0, False)], [False, False]),
        ([(1.0, 1.0, True), (1.0, 1.0, False), (1.0, 1.0, True)], [False, False, True]),
        ([(1.0, 1.0, True), (0.9, 1.1, False), (1.0, 1.0, True)], [False, False, True]),
        ([(1.0, 1.0, True), (0.9, 1.0, True), (1.0, 1.0, True), (1.0, 1.0, True)], [False, False, False, True]),
        ([(1.0, 1.0 + 2**-23, True)] * 2, [False, False]),
        ([(0.5, 0.5, True)] * 2, [False, False]),
        ([(math.nan, math.nan, True)] * 2, [False, False]),
    ],
)
def test_ratio_alarm_state_machine(updates, rings):
    alarm, rang_at = RatioAlarm(), []
    for update in updates:
        alarm, rang = RatioAlarm(streak=alarm.streak).observe(*update)  # as through a checkpoint
        rang_at.append(rang)
    assert rang_at == rings


# --- equal rewards teach nothing -------------------------------------------------------------------------------------------


COMPARING = [
    *(kind() for kind in get_args(Published) if kind not in (Raw, Gae)),
    Grpo(mean_over="batch", std_over="batch"),
    Rloo(whiten=True),
    PassAtK(scale=True),
    ReinforcePlusPlus(baseline=True),
]


@pytest.mark.parametrize("reward", [0.0, 0.1, -1 / 3, 1e6 + 0.1])
@pytest.mark.parametrize("cfg", COMPARING, ids=repr)
def test_equal_rewards_have_an_advantage_of_exactly_zero(cfg, reward):
    """All groups equal, one with a row more, sequences of one length; numbers whose mean is not themselves in floating point."""
    inputs = EstimatorInputs(
        reward=np.full(29, reward),
        reward_components=np.full((29, 2), [reward, 0.3]),
        component_weights=np.array([1.0, 0.7]),
        groups=Grouping.of(np.repeat([0, 1, 3, 4], [7, 7, 7, 8])),
        mask=np.arange(6)[None] < np.full((29, 1), 5),
    )
    assert not estimate(cfg, inputs).advantage.any()


# --- in a run --------------------------------------------------------------------------------------------------------------

# `out` is 0 and stays so: no attention reaches the residual stream, so queries, keys, values and their norm have no gradient.
CONFIG = {
    "steps": 9,
    "model": {"vocab_size": 16, "layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 4},
    "task": {"kind": "arithmetic", "terms": 2, "held_out": 8},
    "reward": {"workers": 1, "grader": "parity_grader:odd"},
    "experience": {"filter": "none"},
    "update": {"optimizer": {"lr": 1e-3, "groups": [{"match": "layers/out", "lr_scale": 0}]}},
    "mesh": {"data": 8},
    "metrics": {"tensorboard": False, "samples_every": 0, "rollouts_every": 0},
}


class Told(list):
    """A recorder that remembers messages alone."""

    def message(self, text):
        self.append(text)

    def wants(self, step, every):
        return False

    def log(self, step, metrics):
        pass

    def during(self, words, first=""):
        return nullcontext()

    evaluating = during


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """(run, state at the start of RL): built once."""
    directory = tmp_path_factory.mktemp("guards")
    (directory / "parity_grader.py").write_text("def odd(sample): return float(sum(map(ord, sample.completion)) % 2)\n")
    cfg = loading.validate(CONFIG | {"run_dir": str(directory / "run")}, "test")
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(directory))
        with train.open_run(cfg, must_resume=False, given=None, ends_process=False) as run:
            run = train.assemble(run.blueprint, run.task, run.context._replace(recorder=Told()))
            state, _, _ = train.start(run)
            yield run, state


@pytest.fixture
def start(opened):
    """(run, state, policy, messages), made again."""
    run, state = opened
    run.context.recorder.clear()
    run.source.state = state.source
    # The state is donated to the first update.
    state = state._replace(train=jax.tree.map(lambda x: jax.device_put(np.array(x), x.sharding), state.train))
    return run, state, run.learner.publish(state.train, None), run.context.recorder


def taken(run, state, policy):
    """One step of RL, as `train` takes it."""
    rng = np.random.default_rng((run.blueprint.cfg.seed, int(state.step)))
    return train.step(run.learner, run.source, state, policy, rng)


def step(run, state, policy):
    """One step of RL under its guards, as `train` takes it."""
    done = taken(run, state, policy)
    state, metrics, error = train.guard(run, done.state, train.summary(run, done), done.learned)
    if error:
        raise error
    return state, done.policy, metrics


def as_numpy(state):
    return [np.array(x) for x in jax.tree.leaves((state.train.params, state.train.opt_state))]


def test_a_poisoned_batch_changes_nothing_and_ends_the_run(start, monkeypatch):
    run, state, policy, _ = start
    whole = updates.fill_batch
    state, policy, _ = step(run, state, policy)

    def poisoned(*args):
        batch, where = whole(*args)
        batch.advantage[batch.loss_mask] = np.nan
        return batch, where

    monkeypatch.setattr(updates, "fill_batch", poisoned)
    before = as_numpy(state)
    for streak in (1, 2):
        state, policy, metrics = step(run, state, policy)
        assert metrics["nonfinite"] == 1 and state.guards.nonfinite == streak
        assert all(np.array_equal(a, b) for a, b in zip(before, as_numpy(state), strict=True))
    with pytest.raises(NonFiniteError):
        step(run, state, policy)


def test_log_probs_of_another_distribution_end_the_run(start, monkeypatch):
    run, state, policy, _ = start
    collected = run.source.collect

    def colder(*args):
        found = collected(*args)
        rollouts = found.groups.rollouts
        rollouts = rollouts.replace(behavior_logprobs=rollouts.behavior_logprobs * 0.5)
        return found._replace(groups=found.groups.replace(rollouts=rollouts))

    state, policy, metrics = step(run, state, policy)
    assert 0 <= metrics["mismatch/kl"] < 1e-4
    # Of the updates' rates only that they are logged: the maker of this chip states no peak. What ran beside a compiler is compared
    # with no ceiling.
    fractions = {"update/ceiling_fraction", "rollout/ceiling_fraction"}
    assert metrics["update/flops_per_s"] > 0 and "update/mfu" not in metrics and not fractions & metrics.keys()
    run.context.compiles.take()
    state, policy, metrics = step(run, state, policy)
    assert all(metrics[name] > 0 for name in fractions)
    monkeypatch.setattr(run.source, "collect", colder)
    with pytest.raises(MismatchError, match=r"update\.guards\.max_mismatch_kl"):
        step(run, state, policy)


def test_advantages_that_no_reward_explains_end_the_run(start, monkeypatch):
    """Four rewards are at most 3 / sqrt(4) stds from their mean; the batch of four gives finite losses none the less."""
    run, state, policy, _ = start
    own = Grpo.estimate
    monkeypatch.setattr(Grpo, "estimate", lambda cfg, inputs: AdvantageEstimate(own(cfg, inputs).advantage * 1e5))
    with pytest.raises(
        AdvantageError, match=r"objective\.advantage\.kind grpo: got an advantage of .*, want at most 1\.5,"
    ):
        taken(run, state, policy)


def test_parameters_that_the_loss_cannot_reach_are_named_once_and_across_a_resume(start):
    run, state, policy, warned = start
    cut = dict(state.train.params["layers"])
    cut["out"] = jax.numpy.zeros_like(cut["out"])
    state = state._replace(train=state.train.replace(params=state.train.params | {"layers": cut}))
    policy = run.learner.publish(state.train, policy)
    for _ in range(2):
        state, policy, metrics = step(run, state, policy)
    assert not warned and not any(name.startswith("zero_gradient") for name in metrics) and "warnings" not in metrics
    run.context.checkpoints.save(int(state.step), state, {"phase": "rl"})
    target = rl_target(run.blueprint, run.learner, run.source.state)
    state = run.context.checkpoints.restore(lambda meta: target).tree
    state, policy, metrics = step(run, state, policy)
    state, policy, _ = step(run, state, policy)
    said = "the gradient of layers/attn_norm, layers/qkv was exactly 0 for 3 steps: nothing in the loss depends on it"
    assert warned == metrics["warnings"] == [said], "on the screen, and in the record"
