"""A loss of one's own, named in a config: what it computes, what is measured beside it, and every mistake before JAX is loaded."""

import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from test_losses import batch_of

from jaxrl_llm.config import dump, training_problems, validate
from jaxrl_llm.errors import UserError
from jaxrl_llm.model.distribution import TokenScores
from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.loss_config import NoCorrection, OwnLoss, correction_of, scores_proximal
from jaxrl_llm.objective.losses import as_loss, make_loss
from jaxrl_llm.objective.rules import filter_of, own_problems

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


PULLED = {"function": "own_losses:pulled", "columns": ["reference_logprobs"]}


def test_one_term_per_token_by_hand():
    found = terms_of(PULLED | {"options": {"strength": 0.5}})
    # -A log p: ln 2, and 2 ln 0.2. The pull: 0, and half of ln(0.2 / 0.1)^2.
    np.testing.assert_allclose(found.loss[0, 1:], [np.log(2), 2 * np.log(0.2) + np.log(2) ** 2 / 2], rtol=1e-6)


def test_how_far_the_sampler_is_is_measured_for_it():
    found = terms_of("own_losses:pulled")
    np.testing.assert_allclose(found.maxima["ratio/max"][0, 1:], [2, 1], rtol=1e-6)
    np.testing.assert_allclose(found.maxima["ratio/-min"][0, 1:], [-2, -1], rtol=1e-6)
    # d = ln 2: e^d - 1 - d.
    np.testing.assert_allclose(found.means["mismatch/kl"][0, 1:], [1 - np.log(2), 0], atol=1e-6)
    np.testing.assert_array_equal(found.means["entropy"], SCORES.entropy)


def test_what_its_own_terms_name_stands():
    found = terms_of({"function": "own_losses:Margin", "options": {"target": 0.5}})
    np.testing.assert_allclose(found.loss[0, 1:], [0, 0.045], atol=1e-7)
    np.testing.assert_allclose(found.means["off"][0, 1:], [0, -0.3], atol=1e-7)
    np.testing.assert_array_equal(found.maxima["ratio/max"], [[7, 7, 7]])
    assert {"entropy", "mismatch/kl"} <= found.means.keys() and "ratio/-min" in found.maxima


def test_a_mean_is_no_loss():
    with pytest.raises(
        UserError, match=r"the loss averaged: got terms of shape \[\], want one term per token, \[1, 3\]"
    ):
        terms_of("own_losses:averaged")


def test_what_it_is_averaged_over_and_what_it_reads():
    assert made("own_losses:pulled")[1:] == ("token", 1, (), None)
    constant = {"function": "own_losses:pulled", "aggregation": "constant"}
    assert made(constant, max_new_tokens=9)[1:3] == ("constant", 9)
    assert made(constant | {"length": 4}, max_new_tokens=9)[1:3] == ("constant", 4)
    assert made(PULLED).columns == ("reference_logprobs",)
    assert read(PULLED).has_reference and not read("own_losses:pulled").has_reference
    proximal = read({"function": "own_losses:pulled", "columns": ["proximal_logprobs"]}).loss
    assert scores_proximal(proximal, NoCorrection(), 1) and not scores_proximal(read(PULLED).loss, NoCorrection(), 9)
    assert correction_of(proximal, "int8", "int8") == NoCorrection()
    value = as_loss(lambda scores, batch: scores.logprobs, "sequence", columns=("values", "returns"))
    assert value[1:] == ("sequence", 1, ("values", "returns"), None)


@pytest.mark.parametrize("preset", ["", "verl:dapo"])
def test_as_a_config_says_it(preset):
    plain = OwnLoss("own_losses:pulled")
    assert read("own_losses:pulled").loss == read({"function": "own_losses:pulled"}).loss == plain
    given = {"objective": {"preset": preset, "loss": PULLED | {"options": {"strength": 2}}}}
    cfg = validate(given, "a.yaml")
    assert cfg.objective.loss == OwnLoss("own_losses:pulled", options={"strength": 2}, columns=("reference_logprobs",))
    assert validate(yaml.safe_load(dump(cfg)), "again") == cfg
    flags = ("--objective.loss", "own_losses:pulled", "--objective.loss.options.strength", "0.5")
    assert validate({"objective": preset}, "a.yaml", flags).objective.loss.options == {"strength": 0.5}


@pytest.mark.parametrize(
    ("loss", "told"),
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
def test_a_wrong_section_is_told(loss, told):
    with pytest.raises(UserError) as error:
        read(loss)
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("loss", "told"),
    [
        ("own_losses:pulled", ""),
        ({"function": "own_losses:Margin", "options": {"target": 1}}, ""),
        (
            "own_losses:puled",
            'objective.loss.function: got "own_losses:puled", but "own_losses" has no "puled". Perhaps',
        ),
        ("no_losses:f", 'objective.loss.function: got "no_losses:f", and importing "no_losses" failed: ModuleNotFound'),
        ("own_losses:__doc__", "which is a str; want a function of TokenScores and a Batch"),
        (
            "own_losses:Margin",
            'objective.loss.options: "own_losses:Margin" takes (target): missing a required argument',
        ),
        ({"function": "own_losses:pulled", "options": {"power": 2}}, "got an unexpected keyword argument 'power'"),
    ],
)
def test_a_wrong_function_is_told(loss, told):
    found = own_problems(read(loss))
    assert len(found) == bool(told) and (not told or told in found[0]), found


def test_a_length_that_nothing_reads_is_refused():
    cfg = validate({"objective": {"loss": {"function": "own_losses:pulled", "length": 3}}}, "a.yaml")
    assert training_problems(cfg) == ["objective.loss.length: got 3, want null: only the aggregation constant reads it"]


def test_of_what_it_teaches_nothing_is_known():
    """So no group is dropped by itself, and the user may."""
    own = read("own_losses:pulled")
    assert filter_of("auto", ObjectiveConfig(), 1) == "has_signal"
    assert filter_of("auto", own, 1) == "none" and filter_of("has_signal", own, 1) == "has_signal"


def test_a_wrong_name_is_told_before_jax_is_loaded(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"run_dir: {tmp_path}/run\nobjective: {{loss: 'own_losses:puled'}}\n")
    code = (
        "import sys; from jaxrl_llm import config, sources; from pathlib import Path\n"
        "found = sources.read(config.load(Path(sys.argv[1])), trains=True)\n"
        "print(found.missing, 'jax' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=HERE, timeout=120
    )
    assert 'objective.loss.function: got "own_losses:puled"' in done.stdout and done.stdout.endswith("False\n"), done
