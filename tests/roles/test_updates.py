"""Updates of a step with a fake program: how often it runs, on what, and what is made of what it says."""

import numpy as np
import pytest
from fakes import PROMPT_SLOTS, SLOTS, groups_of, state_of
from setups import layouts

from jaxrl_llm.distribution.loss_terms import Loss
from jaxrl_llm.metrics.guards import Guards
from jaxrl_llm.objective.reward_kl import RewardKl
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead
from jaxrl_llm.perf.work import TrainFlops
from jaxrl_llm.roles.updates import UpdateMetrics, Updates, as_floats, is_old, over_updates, without_zero_gradients
from jaxrl_llm.types import Credit, Experience, OwnColumn, Scores
from jaxrl_llm.update.config import UpdateConfig
from jaxrl_llm.update.packing import batch_shape, equal_groups

QUIET = {"loss": 0.0, "grad_norm": 1.0, "nonfinite": 0.0, "ratio/min": 0.5, "ratio/max": 2.0}
ONES = QUIET | {"ratio/min": 1.0, "ratio/max": 1.0}


class Program:
    """Returns the given metrics in turn, the last ones forever; each call is one optimizer step."""

    def __init__(self, *says: dict[str, float]):
        self.says, self.seen, self.references = says, [], []

    def __call__(self, train, batch, reference, tables):
        at = min(len(self.seen), len(self.says) - 1)
        self.seen.append(batch)
        self.references.append(reference)
        return train.replace(step=train.step + 1), {name: np.float32(x) for name, x in self.says[at].items()}


def updates_of(program, epochs=1, minibatches=1, groups=4, **changes):
    shape = batch_shape("none", equal_groups(groups // minibatches, 2), (PROMPT_SLOTS, SLOTS), 0, 1, 1)
    base = {
        "program": CompiledAhead(program), "loss": Loss(terms=None), "cfg": UpdateConfig(epochs=epochs, minibatches=minibatches),
        "shape": shape, "pad": 0, "rows": layouts()[0].sharding(("rows", None)), "anchored_on_proximal": False,
        "reads_distribution": False, "reward_kl": RewardKl(), "flops": lambda batch: TrainFlops(1, 10, 100),
    }  # fmt: skip
    return Updates(**base | changes)


def experience_of(reward=None, version=7, scores=None, length=None):
    """Four groups of two rows of two tokens."""
    groups = groups_of(np.array([[1.0, 0.0]] * 4) if reward is None else np.array(reward), length, version)
    return Experience(groups, scores or Scores(), Credit(np.ones(groups.rollouts.tokens.shape, np.float32)))


def learn(updates, experience=None, **state):
    return updates(state_of(**state), experience or experience_of(), np.random.default_rng(2))


def said_tokens(batch):
    """Tokens of the completions in the loss; those of row b are b + 1."""
    return sorted(set(np.asarray(batch.tokens)[np.asarray(batch.loss_mask)].tolist()))


def test_epochs_times_minibatches_each_group_once_per_epoch_in_random_order():
    program = Program(QUIET)
    train, learned = learn(updates_of(program, epochs=2, minibatches=2))
    assert len(program.seen) == 4 and int(train.step) == 7 + 4 and learned.metrics["updates"] == 4
    rng = np.random.default_rng(2)
    parts = [part for _ in range(2) for part in np.split(rng.permutation(4), 2)]
    want = [sorted(row + 1 for group in part for row in (2 * group, 2 * group + 1)) for part in parts]
    assert [said_tokens(batch) for batch in program.seen] == want
    assert want[0] != want[2] and sorted(want[0] + want[1]) == list(range(1, 9))


def test_means_are_over_tokens_sequences_or_updates_and_extremes_stay_extremes():
    """By hand: 3 and 1 tokens, 1 and 3 sequences."""
    first = {"loss": 1.0, "grad_norm": 4.0, "nonfinite": 0.0, "entropy": 2.0, "dpo/margin": 1.0, "ratio/min": 0.5}
    first |= {"ratio/max": 1.5, "mismatch/kl": 0.25, "ess/sequences": 1.0}
    second = {"loss": 2.0, "grad_norm": 0.0, "nonfinite": 1.0, "entropy": 4.0, "dpo/margin": 5.0, "ratio/min": 0.75}
    second |= {"ratio/max": 3.0, "mismatch/kl": 9.0, "ess/sequences": 0.5}
    each = [UpdateMetrics(first, tokens=3, sequences=1), UpdateMetrics(second, tokens=1, sequences=3)]
    want = {"loss": 1.5, "grad_norm": 2.0, "nonfinite": 0.5, "entropy": 2.5, "dpo/margin": 4.0}
    want |= {"ratio/min": 0.5, "ratio/max": 3.0, "ess/sequences": 0.75}
    # The first alone compares sampler and trainer at the same parameters, and only on fresh data.
    assert over_updates(each, old=False) == want | {"mismatch/kl": 0.25}
    assert over_updates(each, old=True) == want
    assert over_updates([], old=False) == {}


def test_what_a_mean_counts_is_counted_on_the_minibatch():
    """Rows of 2 and 1 tokens, and a group that is not kept: two sequences; in the other minibatch four, of 8 tokens."""
    program = Program(QUIET | {"entropy": 1.0, "dpo/x": 1.0}, QUIET | {"entropy": 8.0, "dpo/x": 2.0})
    one = np.random.default_rng(2).permutation(4)[:2]
    reward, length = np.array([[1.0, 0.0]] * 4), np.full((4, 2), 2)
    reward[one[0]], length[one[1]] = np.nan, [2, 1]
    experience = experience_of(reward, length=length.reshape(-1))
    _, learned = learn(updates_of(program, minibatches=2), experience)
    assert [int(np.asarray(batch.loss_mask).sum()) for batch in program.seen] == [3, 8]
    assert learned.metrics["entropy"] == pytest.approx((3 * 1 + 8 * 8) / 11)
    assert learned.metrics["dpo/x"] == pytest.approx((2 * 1 + 4 * 2) / 6)


def test_a_minibatch_without_a_token_runs_and_has_no_metrics():
    """The first epoch's two minibatches hold one group each, of which one was not graded."""
    loud = {name: 1e9 for name in QUIET} | {"zero_gradient/w": 1.0}
    experience = experience_of([[np.nan, np.nan], [1.0, 0.0]])
    order = np.random.default_rng(2).permutation(2).tolist()
    says = [loud, loud]
    says[order.index(1)] = QUIET | {"zero_gradient/w": 0.0}
    program = Program(*says)
    train, learned = learn(updates_of(program, minibatches=2, groups=2), experience)
    assert int(train.step) == 9 and len(program.seen) == 2
    assert [bool(np.asarray(batch.loss_mask).any()) for batch in program.seen] == [group == 1 for group in order]
    assert learned.metrics == QUIET | {"alarm/ratio": 0.0, "updates": 1}
    assert learned.zero_gradient == {"w": False} and learned.flops == TrainFlops(1, 10, 100)


def test_a_step_without_any_token_has_no_means():
    program = Program(ONES | {"zero_gradient/w": 1.0})
    experience = experience_of([[np.nan, np.nan]] * 4)
    _, learned = learn(updates_of(program, epochs=2), experience, guards=Guards(alarm=1))
    assert len(program.seen) == 2 and learned.metrics == {"alarm/ratio": 0.0, "updates": 0}
    assert (learned.alarm, learned.zero_gradient, learned.flops, learned.seconds) == (1, {}, TrainFlops(0, 0, 0), 0.0)


@pytest.mark.parametrize(
    ("epochs", "version", "proximal", "before", "streak", "rings"),
    [
        # Fresh: the first update has ratio 1 by right, and neither counts nor resets.
        (1, 7, False, 1, 1, 0.0),
        (2, 7, False, 0, 1, 0.0),
        (2, 7, False, 1, 2, 1.0),
        (3, 7, False, 0, 2, 1.0),
        # Old: the first counts too, unless the ratio is to the trainer of before these updates.
        (1, 6, False, 0, 1, 0.0),
        (1, 6, False, 1, 2, 1.0),
        (1, 6, True, 1, 1, 0.0),
        (2, 6, True, 1, 2, 1.0),
    ],
)
def test_the_alarm_continues_from_the_state_and_counts_stale_updates(epochs, version, proximal, before, streak, rings):
    updates = updates_of(Program(ONES), epochs=epochs, anchored_on_proximal=proximal)
    _, learned = learn(updates, experience_of(version=version), guards=Guards(alarm=before))
    assert (learned.alarm, learned.metrics["alarm/ratio"]) == (streak, rings)


def test_a_ratio_that_has_spread_resets_the_alarm_and_a_ring_stays_rung():
    _, learned = learn(updates_of(Program(ONES, ONES, ONES, QUIET), epochs=4))
    assert (learned.alarm, learned.metrics["alarm/ratio"]) == (0, 1.0)


def test_mismatch_is_measured_on_fresh_data_alone():
    says = QUIET | {"mismatch/kl": 0.125}
    assert learn(updates_of(Program(says)))[1].metrics["mismatch/kl"] == 0.125
    assert "mismatch/kl" not in learn(updates_of(Program(says)), experience_of(version=6))[1].metrics


def test_a_gradient_is_zero_where_it_was_in_every_finite_update():
    said = [
        QUIET | {"zero_gradient/a": 1.0, "zero_gradient/b": 1.0, "zero_gradient/c": 0.0},
        QUIET | {"zero_gradient/a": 1.0, "zero_gradient/b": 0.0, "zero_gradient/c": 1.0},
        # Not finite: nothing can be said of its gradients.
        QUIET | {"zero_gradient/a": 0.0, "zero_gradient/b": 0.0, "zero_gradient/c": 0.0, "nonfinite": 1.0},
    ]
    _, learned = learn(updates_of(Program(*said), epochs=3))
    assert learned.zero_gradient == {"a": True, "b": False, "c": False}
    assert learned.metrics["nonfinite"] == pytest.approx(1 / 3) and "zero_gradient/a" not in learned.metrics
    assert learn(updates_of(Program(said[2]), epochs=2))[1].zero_gradient == {}


def test_the_reference_goes_along_only_where_its_distribution_is_read():
    for reads, want in ((True, "reference"), (False, None)):
        program = Program(QUIET)
        learn(updates_of(program, epochs=2, reads_distribution=reads), reference="reference")
        assert program.references == [want, want]


def test_work_is_that_of_updates_with_a_token():
    _, learned = learn(updates_of(Program(QUIET), epochs=3))
    assert learned.flops == TrainFlops(3, 30, 300) and learned.seconds > 0


def test_a_kl_in_the_reward_is_logged_per_token():
    """Behavior log-probs are 0; the reference's are -0.5 in the first column and -1 in the other."""
    scores = Scores(np.tile(np.float32([-0.5, -1.0]), (8, 1)))
    updates = updates_of(Program(QUIET), reward_kl=RewardKl("k1", 0.1))
    assert learn(updates, experience_of(scores=scores))[1].metrics["reward_kl"] == pytest.approx(0.75)
    assert "reward_kl" not in learn(updates_of(Program(QUIET)), experience_of(scores=scores))[1].metrics


def test_the_batch_has_the_losss_mean_and_its_own_columns():
    loss = Loss(None, "sequence", own=(OwnColumn("mine", None, fill=-1),))
    program, own = Program(QUIET), np.arange(16, dtype=np.float32).reshape(8, 2)
    experience = experience_of(scores=Scores(own={"mine": own}), length=[2, 1, 2, 2, 2, 2, 2, 2])
    learn(updates_of(program, loss=loss), experience)
    [batch] = program.seen
    mask, weight, mine = (np.asarray(x) for x in (batch.loss_mask, batch.weight, batch.own["mine"]))
    # Eight sequences: 1/8 each, over two tokens or one.
    np.testing.assert_allclose(weight[mask], [1 / 16] * 2 + [1 / 8] + [1 / 16] * 12)
    np.testing.assert_array_equal(mine[mask], np.delete(own.reshape(-1), 3))
    assert (mine[~mask] == -1).all() and batch.tokens.sharding == updates_of(program).rows


def test_old_is_a_token_of_a_kept_row_that_an_earlier_policy_sampled():
    experience = experience_of([[1.0, 0.0], [np.nan, np.nan]], version=7)
    assert not is_old(experience, 7) and is_old(experience, 8)
    groups = experience.groups
    for row, want in ((1, True), (2, False)):
        version = groups.rollouts.version.copy()
        version[row, 1] = 6
        changed = groups.replace(rollouts=groups.rollouts.replace(version=version))
        assert is_old(experience._replace(groups=changed), 7) == want


def test_rows_of_a_file_are_old_whatever_their_version():
    """A buffer that starts with responses of others calls them as old as the first policy, whose samples they are not."""
    experience = experience_of([[1.0, 0.0], [np.nan, np.nan]], version=7)
    for row, want in ((1, True), (2, False)):
        groups = experience.groups.replace(reused=np.arange(4) == row)
        assert is_old(experience._replace(groups=groups), 7) == want
    says, mixed = QUIET | {"mismatch/kl": 2.5}, experience_of()
    mixed = mixed._replace(groups=mixed.groups.replace(reused=np.arange(8) == 1))
    assert "mismatch/kl" not in learn(updates_of(Program(says)), mixed)[1].metrics


def test_metrics_as_floats_and_gradients_apart():
    found, zero = without_zero_gradients(
        as_floats({"loss": np.float32(0.5), "zero_gradient/layers/up": np.float32(1), "zero_gradient/b": np.float32(0)})
    )
    assert found == {"loss": 0.5} and type(found["loss"]) is float and zero == {"layers/up": True, "b": False}
