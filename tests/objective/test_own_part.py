"""Functions of one's own, named in a config: what they compute, what is measured beside them, every mistake before JAX."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from estimator_inputs import to_groups
from test_losses import batch_of

from jaxrl_llm import cli
from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.config.own_part import own_problems
from jaxrl_llm.config.saved_config import to_yaml
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import AdvantageError, UserError
from jaxrl_llm.metrics.json_lines import read_jsonl
from jaxrl_llm.objective.advantages import OwnAdvantage
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.credit import NO_SCORES, make_advantage
from jaxrl_llm.objective.loss_config import NoCorrection, OwnLoss, resolve_correction, scores_proximal
from jaxrl_llm.objective.losses import as_loss, make_loss, with_own_columns
from jaxrl_llm.objective.rules import drops_equal_rewards
from jaxrl_llm.types import Credit, Experience, OwnColumn, Scores
from jaxrl_llm.update.batch import fill_batch
from jaxrl_llm.update.packing import BatchShape

HERE = Path(__file__).parent
MASK = np.array([[False, True, True]])
NOW, BEHAVIOR, REFERENCE = (np.log(np.float32([p])) for p in ([0.9, 0.5, 0.2], [0.9, 0.25, 0.2], [0.9, 0.5, 0.1]))
ADVANTAGE = np.float32([[0, 1, -2]])
SCORES = TokenScores(jnp.asarray(NOW), jnp.float32([[0.0, 0.3, 0.4]]))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(HERE)


def read(loss, *args):
    return validate({"objective": {"loss": loss}}, "a.yaml", args).objective


def made(loss, **more):
    return make_loss(read(loss), **more)


def terms_of(loss):
    return made(loss).terms(SCORES, batch_of(MASK, BEHAVIOR, ADVANTAGE, REFERENCE))


PULLED = {"function": "own_parts:pulled", "columns": ["reference_logprobs"]}


def test_one_term_per_token_by_hand():
    found = terms_of(PULLED | {"options": {"strength": 0.5}})
    # -A log p: ln 2, and 2 ln 0.2. The pull: 0, and half of ln(0.2 / 0.1)^2.
    np.testing.assert_allclose(found.loss[0, 1:], [np.log(2), 2 * np.log(0.2) + np.log(2) ** 2 / 2], rtol=1e-6)


def test_how_far_the_sampler_is_is_measured_for_it():
    found = terms_of("own_parts:pulled")
    np.testing.assert_allclose(found.maxima["ratio/max"][0, 1:], [2, 1], rtol=1e-6)
    np.testing.assert_allclose(found.maxima["ratio/-min"][0, 1:], [-2, -1], rtol=1e-6)
    # d = ln 2: e^d - 1 - d.
    np.testing.assert_allclose(found.means["mismatch/kl"][0, 1:], [1 - np.log(2), 0], atol=1e-6)
    np.testing.assert_array_equal(found.means["entropy"], SCORES.entropy)


def test_what_its_own_terms_name_stands():
    found = terms_of({"function": "own_parts:Margin", "options": {"target": 0.5}})
    np.testing.assert_allclose(found.loss[0, 1:], [0, 0.045], atol=1e-7)
    np.testing.assert_allclose(found.means["off"][0, 1:], [0, -0.3], atol=1e-7)
    np.testing.assert_array_equal(found.maxima["ratio/max"], [[7, 7, 7]])
    assert {"entropy", "mismatch/kl"} <= found.means.keys() and "ratio/-min" in found.maxima


def test_a_mean_is_no_loss():
    with pytest.raises(
        UserError, match=r"the loss averaged: got terms of shape \[\], want one term per token, \[1, 3\]"
    ):
        terms_of("own_parts:averaged")


def test_what_it_is_averaged_over_and_what_it_reads():
    assert made("own_parts:pulled")[1:] == ("token", 1, (), (), None)
    constant = {"function": "own_parts:pulled", "aggregation": "constant"}
    assert made(constant, max_new_tokens=9)[1:3] == ("constant", 9)
    assert made(constant | {"length": 4}, max_new_tokens=9)[1:3] == ("constant", 4)
    assert made(PULLED).columns == ("reference_logprobs",)
    assert read(PULLED).has_reference and not read("own_parts:pulled").has_reference
    proximal = read({"function": "own_parts:pulled", "columns": ["proximal_logprobs"]}).loss
    assert scores_proximal(proximal, NoCorrection(), 1) and not scores_proximal(read(PULLED).loss, NoCorrection(), 9)
    assert resolve_correction(proximal, "int8", "int8") == NoCorrection()
    value = as_loss(lambda scores, batch: scores.logprobs, "sequence", columns=("values", "returns"))
    assert value[1:] == ("sequence", 1, ("values", "returns"), (), None)


def test_a_column_of_its_own():
    """A function, under its name; or an `OwnColumn` with dtype and fill."""
    [column] = made({"function": "own_parts:weighed", "own_columns": ["own_parts:once"]}).own
    assert (column.name, column.dtype, column.fill) == ("once", np.float32, 0)
    groups = to_groups([[1.0, 0.0]])
    odd = OwnColumn("odd", lambda groups, scores: groups.rollouts.tokens % 2, np.int32, -1)
    loss = as_loss(lambda scores, batch: batch.own["odd"] * scores.logprobs, own=(odd, column.make))
    scores = with_own_columns(Scores(), groups, loss.own)
    np.testing.assert_array_equal(scores.own["odd"], groups.rollouts.tokens % 2)
    experience = Experience(groups, scores, Credit(np.zeros((2, 3), np.float32)))
    batch, _ = fill_batch(experience, BatchShape("none", 2, 5, 1), 0, own=loss.own)
    # The prompt has one token, the completions three.
    np.testing.assert_array_equal(batch.own["odd"], [[-1, 0, 1, 0, -1], [-1, 1, 0, 1, -1]])
    assert batch.own["odd"].dtype == np.int32 and batch.own["once"].tolist() == [[0, 1, 1, 1, 0]] * 2
    with pytest.raises(UserError, match=r"the column per_row of the loss: got float32\[2\], want .*, \[2, 3\]"):
        with_own_columns(
            Scores(), groups, made({"function": "own_parts:weighed", "own_columns": ["own_parts:per_row"]}).own
        )


def custom_credit(advantage, groups, scores=NO_SCORES):
    objective = validate({"objective": {"advantage": advantage}}, "a.yaml").objective
    return make_advantage(objective, [1.0])(groups, scores)


def test_an_advantage_per_row_is_that_of_each_token_that_teaches():
    """Rewards 1, 0 and 3, 3 of completions of three tokens; the second group is not kept."""
    groups = to_groups([[1.0, 0.0], [3.0, 3.0]])
    groups = groups.replace(keep=np.array([True, True, False, False]))
    found = custom_credit({"function": "own_parts:above_mean", "options": {"scale": 2}}, groups)
    np.testing.assert_array_equal(found.advantage, [[1] * 3, [-1] * 3, [0] * 3, [0] * 3])
    assert found.advantage.dtype == np.float32 and found.returns is found.keep is None
    assert OwnAdvantage("own_parts:above_mean")(groups).advantage[0, 0] == 0.5


def test_an_advantage_per_token():
    found = custom_credit("own_parts:Halved", to_groups([[1.0, 2.0]]))
    np.testing.assert_array_equal(found.advantage, [[1, 0.5, 0.25], [2, 1, 0.5]])


def test_an_advantage_may_leave_rows_out():
    groups = to_groups([[1.0, 0.0], [3.0, 3.0]])
    credit = custom_credit("own_parts:first_rows", groups)
    mask = Experience(groups, NO_SCORES, credit).loss_mask
    np.testing.assert_array_equal(mask.all(axis=1), [True, False, True, False])


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "of_no_shape",
            UserError,
            r"of_no_shape: got float32\[2, 2\], want one number per row, \[4\]",
        ),
        ("too_large", AdvantageError, r"got an advantage of 1e\+39, want a number that float32 holds"),
        ("with_returns", UserError, r"got returns, want None: only the advantage gae has a critic"),
    ],
)
def test_a_wrong_advantage_ends_the_run_by_name(name, error, message):
    with pytest.raises(error, match=message):
        custom_credit(f"own_parts:{name}", to_groups([[1.0, 0.0], [1.0, 0.0]]))


def test_what_an_advantage_reads_and_what_does_not_go_with_it():
    cfg = validate({"objective": {"advantage": "own_parts:above_mean"}, "rollout": {"samples": 1}}, "a.yaml")
    assert cfg.objective.advantage == OwnAdvantage("own_parts:above_mean") and not cfg.objective.has_reference
    assert training_problems(cfg) == [] and not drops_equal_rewards(cfg.objective, 1)
    reads = {"function": "own_parts:above_mean", "columns": ["reference_logprobs"]}
    assert validate({"objective": {"advantage": reads}}, "a.yaml").objective.reads_reference_logprobs
    paid = validate({"objective": {"advantage": reads, "reward_kl": {"weight": 0.1}}}, "a.yaml")
    [message] = training_problems(paid)
    assert message.startswith("objective.reward_kl.weight: got 0.1 with a custom advantage, want 0")
    [message] = training_problems(validate({"objective": {"advantage": reads, "baseline_over": "kept"}}, "a.yaml"))
    assert message.startswith("objective.baseline_over: got kept with a custom advantage, want sampled")
    assert own_problems(validate({"objective": {"advantage": "own_parts:above"}}, "a.yaml")) == [
        'objective.advantage.function: got "own_parts:above", but "own_parts" has no "above". Perhaps you meant "above_mean"'
    ]


@pytest.mark.parametrize("preset", ["", "verl:dapo"])
def test_own_loss_in_a_config(preset):
    plain = OwnLoss("own_parts:pulled")
    assert read("own_parts:pulled").loss == read({"function": "own_parts:pulled"}).loss == plain
    given = {"objective": {"preset": preset, "loss": PULLED | {"options": {"strength": 2}}}}
    cfg = validate(given, "a.yaml")
    assert cfg.objective.loss == OwnLoss("own_parts:pulled", options={"strength": 2}, columns=("reference_logprobs",))
    assert validate(yaml.safe_load(to_yaml(cfg)), "again") == cfg
    flags = ("--objective.loss", "own_parts:pulled", "--objective.loss.options.strength", "0.5")
    assert validate({"objective": preset}, "a.yaml", flags).objective.loss.options == {"strength": 0.5}


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"kind": "own"}, "a.yaml: objective.loss.function: got nothing, want a value"),
        ({"function": 3}, "a.yaml: objective.loss.function: got 3, want text"),
        (
            {"function": "a:f", "colums": []},
            "objective.loss.colums: no such key, perhaps you meant objective.loss.columns",
        ),
        ({"function": "a:f", "columns": ["refs"]}, "got 'refs', want 'reference_logprobs' or 'proximal_logprobs'"),
        (
            {"function": "a:f", "aggregation": "mean"},
            "objective.loss.aggregation: got 'mean', want 'token', 'sequence',",
        ),
    ],
)
def test_a_wrong_section_is_an_error(loss, message):
    with pytest.raises(UserError) as error:
        read(loss)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ("own_parts:pulled", ""),
        ({"function": "own_parts:Margin", "options": {"target": 1}}, ""),
        (
            "own_parts:puled",
            'objective.loss.function: got "own_parts:puled", but "own_parts" has no "puled". Perhaps',
        ),
        ("no_losses:f", 'objective.loss.function: got "no_losses:f", and importing "no_losses" failed: ModuleNotFound'),
        ("own_parts:__doc__", "which is a str; want a function of scores and batch"),
        (
            "own_parts:Margin",
            'objective.loss.options: "own_parts:Margin" takes (target): missing a required argument',
        ),
        (
            {"function": "own_parts:weighed", "own_columns": ["own_parts:once", "own_parts:__doc__"]},
            'objective.loss.own_columns.1: got "own_parts:__doc__", which is a str; want a function of groups and scores, or',
        ),
        ({"function": "own_parts:weighed", "own_columns": ["own_parts:twice"]}, "objective.loss.own_columns.0: got "),
        ({"function": "own_parts:pulled", "options": {"power": 2}}, "got an unexpected keyword argument 'power'"),
    ],
)
def test_a_wrong_function_is_an_error(loss, message):
    found = own_problems(validate({"objective": {"loss": loss}}, "a.yaml"))
    assert len(found) == bool(message) and (not message or message in found[0]), found


def test_a_length_that_nothing_reads_is_refused():
    cfg = validate({"objective": {"loss": {"function": "own_parts:pulled", "length": 3}}}, "a.yaml")
    assert training_problems(cfg) == ["objective.loss.length: got 3, want null: only the aggregation constant reads it"]


def test_of_what_it_teaches_nothing_is_known():
    """So no group is dropped by itself, and the user may."""
    own = read("own_parts:pulled")
    assert drops_equal_rewards(ObjectiveConfig(), 1) and not drops_equal_rewards(own, 1)


def test_a_wrong_name_is_reported_before_jax_is_loaded(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\nobjective: {{loss: 'own_parts:puled'}}\n")
    code = (
        "import sys; from jaxrl_llm.roles import inputs; from jaxrl_llm.config import loading; from pathlib import Path\n"
        "found = inputs.read(loading.load(Path(sys.argv[1])), trains=True)\n"
        "print(found.missing, 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=HERE, timeout=120
    )
    assert 'objective.loss.function: got "own_parts:puled"' in done.stdout and done.stdout.endswith("False\n"), done


@pytest.mark.slow
def test_a_run_with_parts_of_ones_own_is_that_of_the_built_in_ones(tmp_path):
    """Rewards of 0 and 1 in fours have exact means; a column of ones changes nothing."""

    def trained(name, objective):
        path = tmp_path / f"{name}.yaml"
        small = {
            "steps": 3, "model": {"layers": 1, "d_model": 32, "heads": 8, "kv_heads": 8, "head_dim": 8, "d_mlp": 64},
            "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 4}, "task": {"kind": "arithmetic", "held_out": 8},
            "reward": {"workers": 1, "grader": "row_graders:odd_if_readable"}, "evaluation": {"every": 100},
            "mesh": {"data": 8}, "experience": {"filter": "none"}, "update": {"minibatches": 2},
            "metrics": {"tensorboard": False, "samples_every": 0, "rollouts_every": 0},
        }  # fmt: skip
        path.write_text(yaml.safe_dump(small | {"objective": objective}))
        assert cli.main(["train", str(path), "--run-dir", str(tmp_path / name)]) == 0
        return [row for row in read_jsonl(tmp_path / name / "metrics.jsonl") if row["step"]]

    mine = {
        "advantage": "own_parts:above_mean",
        "loss": {"function": "own_parts:weighed", "own_columns": ["own_parts:once"]},
    }
    theirs = {"advantage": {"kind": "mean_only"}, "loss": {"surrogate": {"kind": "reinforce"}}}
    got, want = trained("mine", mine), trained("theirs", theirs)
    assert len(got) == len(want) == 3 and any(row["grad_norm"] > 0 for row in want)
    for a, b in zip(got, want, strict=True):
        for name in ("loss", "grad_norm", "entropy", "ratio/max", "mismatch/kl", "completions/crc32", "reward"):
            assert a[name] == b[name], name
