"""Roles from a blueprint: each gets what the config says of it, and nothing is compiled before it is called."""

import dataclasses
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from fakes import blueprint, config, groups_of, state_of, sums

from jaxrl_llm.distribution.control_tables import encode
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.experience.curricula import make_order
from jaxrl_llm.metrics.timers import CompileCounter
from jaxrl_llm.objective.credit import make_advantage
from jaxrl_llm.perf.work import count_adapter_params, count_tokens, train_flops
from jaxrl_llm.roles import build
from jaxrl_llm.roles.build import (
    make_evaluator,
    make_keys,
    make_learner,
    make_publisher,
    make_sampler,
    make_scorer,
    make_supervised,
)
from jaxrl_llm.roles.updates import Updates
from jaxrl_llm.types import Credit, Experience, Scores, TrainState
from jaxrl_llm.update.batch import fill_batch

TASK = sums()
REWARD = {"graders": ["exact_match", {"grader": "length", "name": "short", "weight": 0.5, "options": {"limit": 1}}]}


def learner_of(score=None, **changes):
    of = blueprint(**changes)
    return of, make_learner(of, score, None)


def test_keys_are_those_of_the_seed_and_evaluation_has_its_own():
    keys, again, other = make_keys(3), make_keys(3), make_keys(4)
    data = [jax.random.key_data(key).tolist() for key in (*keys, *again, *other)]
    assert data[:2] == data[2:4] and len({tuple(x) for x in data}) == 4
    want = [jax.random.key_data(key).tolist() for key in jax.random.split(jax.random.key(3))]
    assert data[:2] == want


def test_the_sampler_takes_rows_in_the_seeds_order_and_supervised_training_in_another():
    asked, key = [], make_keys(0).train

    def collect(policy, requests, rows, key, give_up, more):
        asked.append((requests.prompts.row.tolist(), key))
        assert requests.samples.tolist() == [4] * 8 and more is None
        groups = groups_of(np.zeros((8, 4)))
        return SimpleNamespace(groups=groups.replace(rollouts=groups.rollouts.replace(prompts=requests.prompts)))

    sampler = make_sampler(config(seed=3), TASK, collect, key)
    for step in range(2):
        sampler.take(step)
    order = make_order(len(TASK.train), 3)
    assert [row for rows, _ in asked for row in rows] == [order(place) for place in range(16)]
    assert all(given is key for _, given in asked) and sampler.seed == 3
    supervised = make_supervised(blueprint(seed=3), TASK)
    other = make_order(len(TASK.train), 4)
    assert [supervised.order(place) for place in range(16)] == [other(place) for place in range(16)]


def test_a_learners_stages_are_the_configs():
    of, learner = learner_of(
        reward=REWARD,
        experience={"filter": "short", "replay": {"capacity": 3}},
        objective={"advantage": {"kind": "rloo"}},
    )
    groups = groups_of(np.array([[1.0, 0.0], [1.0, 0.0]]))
    parts = np.float32([[1, 0], [0, 0], [1, 0], [0, -1]])
    groups = groups.replace(components=parts, reward=parts[:, 0] + 0.5 * parts[:, 1], graders=("right", "short"))
    _, kept, _ = learner.filter.apply(learner.filter.init(), groups)
    assert kept.keep.tolist() == [False, False, True, True]
    # RLOO: less the mean of the others, of the weighted sum.
    credit = learner.advantage(kept, Scores())
    np.testing.assert_allclose(credit.advantage[2:], [[1.5] * 2, [-1.5] * 2])
    assert learner.replay.init(groups).known.number.tolist() == [-1] * 3
    update = learner.update
    assert isinstance(update, Updates) and update.shape == of.shapes.update and update.loss is of.loss
    assert (update.pad, update.cfg) == (0, of.cfg.update) and update.rows == of.train.sharding(("rows", None))


def test_an_advantage_that_normalizes_each_grader_has_their_weights():
    of, learner = learner_of(reward=REWARD, objective={"advantage": {"kind": "gdpo"}})
    groups = groups_of(np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 1.0]]))
    groups = groups.replace(components=np.float32([[1, 0], [0, 0], [0, -1], [0, 0], [1, -1], [1, 0]]))
    found = learner.advantage(groups, Scores()).advantage
    by_weights = [
        make_advantage(of.cfg.objective, weights)(groups, Scores()).advantage for weights in ([1.0, 0.5], [1.0, 1.0])
    ]
    np.testing.assert_array_equal(found, by_weights[0])
    assert np.abs(found - by_weights[1]).max() > 0.1


@pytest.mark.parametrize(
    ("changes", "anchored", "distribution"),
    [
        ({}, False, False),
        ({"objective": {"loss": {"anchor": "proximal"}}}, True, False),
        # Auto: a sampler in 8 bits is corrected, and the ratio then is to the trainer.
        ({"rollout": {"prompts": 8, "samples": 4, "engine": {"weights": "int8"}}}, True, False),
        ({"objective": {"loss": {"kl": {"weight": 0.1, "kind": "full"}}}}, False, True),
    ],
)
def test_updates_are_anchored_and_read_the_reference_as_configured(changes, anchored, distribution):
    update = learner_of(**changes)[1].update
    assert (update.anchored_on_proximal, update.reads_distribution) == (anchored, distribution)


def test_the_given_scorer_computes_the_scores():
    asked = []

    def score(params, groups):
        asked.append(params)
        nothing = np.zeros(groups.rollouts.tokens.shape, np.float32)
        return TokenScores(nothing, nothing)

    _, learner = learner_of(score, objective={"reward_kl": {"weight": 0.1}})
    learner.score(state_of(reference={"w": 1}), groups_of(np.zeros((1, 2))))
    assert asked == [{"w": 1}]


@pytest.mark.parametrize("changes", [{}, {"lora": {"rank": 2}}])
def test_flops_are_those_of_the_trained_parameters(changes):
    of, learner = learner_of(**changes)
    experience = Experience(groups_of(np.zeros((8, 4))), Scores(), Credit(np.zeros((32, 2), np.float32)))
    batch, _ = fill_batch(experience, of.shapes.update, 0)
    adapters = count_adapter_params(of.learner_specs, of.model)
    assert (adapters is None) == (not changes)
    assert learner.update.flops(batch) == train_flops(of.model, *count_tokens(of.model, batch), adapters)


def test_a_reference_follows_the_policy_and_counts_the_steps_of_rl_alone(monkeypatch):
    """The second step of RL after two supervised ones is done; a critic is no part of what the reference follows."""
    refreshed = []
    monkeypatch.setattr(build, "refresh", lambda *given: refreshed.append(given) or "new")
    of, learner = learner_of(
        warm_start={"steps": 2},
        objective={"preset": "verl:ppo", "reward_kl": {"weight": 0.1}, "reference": {"kind": "ema"}},
    )
    policy = dict.fromkeys(of.specs, 1.0)
    train = TrainState(policy | {"value": 2.0}, (), np.int32(0))
    assert learner.refresh(state_of(step=np.array(3), reference="old"), train) == "new"
    assert refreshed == [(of.cfg.objective.reference, "old", policy, 2)]


def test_an_evaluators_mismatch_is_measured_where_old_rollouts_may_come_back():
    def evaluator(**changes):
        of = blueprint(evaluation={"threshold": 0.75}, **changes)
        return of, make_evaluator(of, TASK, "collect", "score", "key")

    of, plain = evaluator()
    assert plain.score is None and (plain.at_once, plain.threshold, plain.key) == (8, 0.75, "key")
    assert plain.score_right.shape == of.shapes.held_out and plain.collect == "collect" and plain.task is TASK
    assert evaluator(experience={"replay": {"capacity": 4}})[1].score == "score"
    right = plain.right(list(TASK.held_out))
    assert right.groups.rollouts.tokens.shape == (3, 6) and right.groups.rollouts.temperature.tolist() == [1.0] * 3


def test_a_right_response_is_scored_within_the_limit_of_its_row():
    of = blueprint(rollout={"prompts": 8, "samples": 4, "max_new_tokens": 6, "min_new_tokens": 1})
    rows = [dataclasses.replace(row, max_new_tokens=n) for row, n in zip(TASK.held_out, (None, 3, 5), strict=True)]
    codes = make_evaluator(of, TASK, None, None, None).right(rows).groups.rollouts.control_state
    ends_masked = np.array([True, True, True])
    np.testing.assert_array_equal(codes[:, 0], encode(np.zeros(3, np.int32), np.array([6, 3, 5]), ends_masked))


def test_publishing_takes_the_configs_format_and_the_states_version(monkeypatch):
    made = []
    monkeypatch.setattr(build, "publisher", lambda *args: made.append(args) or (lambda *given: ("policy", *given)))
    of = blueprint(rollout={"prompts": 8, "samples": 4, "engine": {"weights": "int8"}})
    publish = make_publisher(of)
    assert made == [(of.model, of.train, of.decode, "int8")]
    assert publish(TrainState("params", "moments", "version"), None) == ("policy", "params", "version", None)


def test_nothing_is_compiled_by_making_roles():
    counter = CompileCounter()
    of, _ = learner_of(warm_start={"steps": 2})
    make_supervised(of, TASK), make_scorer(of, of.shapes.experience), make_publisher(of)
    make_evaluator(of, TASK, None, None, None)
    assert counter.take()["compiles"] == 0


def test_supervised_training_takes_its_own_numbers():
    of = blueprint(warm_start={"steps": 2, "rows": 6, "noise": 0.25}, seed=9)
    supervised = make_supervised(of, TASK)
    assert supervised.cfg is of.cfg.warm_start and supervised.seed == 9 and supervised.shape.rows == 6
    assert supervised.right(list(TASK.train[:2])).groups.rollouts.tokens.shape == (2, 6)
