"""Settings of hints: refused where a number would say something else than it seems to; a stage that learns nothing is named."""

import pytest

from jaxrl_llm.config.consistency import cautions, training_problems
from jaxrl_llm.config.loading import validate
from jaxrl_llm.roles import inputs

TRAINED = {"kind": "cosine", "train": True}
SHAPED = {"loss": {"shaping": 0.1}}


def of(hints, **values):
    experience = {"hints": hints} | values.pop("experience", {})
    return validate({"rollout": {"prompts": 8, "samples": 4}, "experience": experience} | values, "x")


@pytest.mark.parametrize(
    ("hints", "message"),
    [
        ({"kind": "stages", "until": [4]}, "until: got 1 steps, want 2, one for each of shares"),
        ({"kind": "stages", "until": [4, 4]}, "until: got [4, 4], want ascending steps"),
        (
            TRAINED,
            "train: got true without objective.loss.shaping, want false, or shaping 0.1 of the loss policy_gradient",
        ),
    ],
)
def test_settings_of_their_own_are_refused(hints, message):
    [found] = training_problems(of(hints))
    assert found.startswith(f"experience.hints.{message}")


ROUNDS = {"kind": "rounds", "per_round": 2, "rounds": 2}


@pytest.mark.parametrize("budget", [ROUNDS, ROUNDS | {"kind": "reinforce_ada"}, {"kind": "screening", "initial": 2}])
def test_budgets_in_rounds_are_refused_beside_them(budget):
    [found] = training_problems(of("cosine", experience={"budget": budget}))
    assert found.startswith(f"experience.hints: got cosine beside the budget {budget['kind']}, want one of the two")
    assert training_problems(of("cosine", experience={"budget": "vip"})) == []


def test_pairs_of_responses_are_refused_beside_them():
    dpo = {"advantage": {"kind": "best_worst"}, "loss": {"kind": "dpo"}}
    [found] = training_problems(of("levels", objective=dpo, update={"packing": {"kind": "shared_prefix"}}))
    assert found.startswith("experience.hints: got levels with the loss dpo, want another loss")


# What compares with the sampler's log-probs, of which tokens of hints have none, and what is of a whole sequence.
NOT_TRAINED_WITH = {
    "objective.loss.ratio sequence, want token": {"objective": {"loss": {"shaping": 0.1, "ratio": "sequence"}}},
    "objective.loss.surrogate gmpo": {"objective": {"loss": {"shaping": 0.1, "surrogate": {"kind": "gmpo"}}}},
    "objective.loss.correction second_moment": {
        "objective": {"loss": {"shaping": 0.1, "correction": {"kind": "second_moment"}}}
    },
    "objective.loss.correction masked_importance": {
        "objective": {"loss": {"shaping": 0.1, "correction": {"kind": "masked_importance", "level": "geometric"}}}
    },
    "objective.loss.kl, want to: reference": {
        "objective": {"loss": {"shaping": 0.1, "kl": {"weight": 1, "to": "behavior"}}}
    },
    "objective.reward_kl, want weight 0": {"objective": SHAPED | {"reward_kl": {"weight": 0.1}}},
    "objective.advantage gae, want one without": {"objective": SHAPED | {"advantage": {"kind": "gae"}}},
    "rollout.top_p, top_k or min_p": {"objective": SHAPED, "rollout": {"prompts": 8, "samples": 4, "top_p": 0.9}},
    "update.ess_scaling": {"objective": SHAPED, "update": {"ess_scaling": {}}},
}


@pytest.mark.parametrize("what", NOT_TRAINED_WITH)
def test_what_tokens_of_hints_cannot_be_trained_with_is_refused(what):
    values = NOT_TRAINED_WITH[what]
    found = [line for line in training_problems(of(TRAINED, **values)) if line.startswith("experience.hints.train")]
    assert len(found) == 1 and f"got true with {what}" in found[0]
    # As context they do no harm.
    assert not [line for line in training_problems(of("cosine", **values)) if "hints" in line]


def test_what_they_can_be_trained_with_is_not_refused():
    assert training_problems(of(TRAINED, objective=SHAPED)) == []
    assert not [line for line in cautions(of(TRAINED, objective=SHAPED)) if "shaping" in line]
    [unused] = [line for line in cautions(of("cosine", objective=SHAPED)) if "shaping" in line]
    assert "experience.hints trains on none of its tokens" in unused


def test_a_stage_that_sees_no_response_without_a_hint_is_warned_about():
    stages = {"curriculum": "unsolved", "gate": "greso", "filter": "success"}
    found = [line for line in cautions(of("stages", experience=stages)) if "hint" in line]
    assert [line.split(":")[0] for line in found] == ["experience.curriculum", "experience.gate"]
    assert "learns nothing meanwhile; experience.hints.samples can leave some without" in found[0]
    for hints in ({"kind": "stages", "samples": 3}, "cosine", "levels", "none"):
        assert not [line for line in cautions(of(hints, experience=stages)) if "hint" in line]


def test_responses_that_are_too_short_for_a_hint_are_refused(tmp_path):
    """One token and the end token; and none known."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(f'{{"prompt": "<{i}>", "answer": "{i}"}}\n' for i in range(9)))
    task = {"kind": "file", "path": str(path), "held_out": 2}
    for response, tokens in (("{answer}", 2), ("", 0)):
        found = inputs.read(of("cosine", task=task | {"response": response}), trains=True)
        [line] = [line for line in found.problems if "task.response" in line]
        assert line.startswith(
            f"task.response: got {tokens} tokens at most, want 3 or more, end token included, of some row"
        )
    assert not inputs.read(of("cosine", task=task | {"response": "{answer}{answer}"}), trains=True).problems
