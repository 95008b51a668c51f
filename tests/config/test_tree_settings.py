"""Settings of trees: what does not fit together is refused by name, with what to do."""

import pytest

from jaxrl_llm.config.consistency import training_problems
from jaxrl_llm.config.loading import validate

TREE = {"kind": "points", "roots": 2}
WITH = {"rollout": {"tree": TREE, "samples": 8, "max_new_tokens": 8}}


def problems(rollout=WITH["rollout"], **more):
    base = {"task": {"kind": "arithmetic"}, "reward": {"grader": "exact_match"}}
    return training_problems(validate({**base, "rollout": rollout, **more}, "test"))


REFUSED = {
    "no branch": (
        {"rollout": {"tree": {"kind": "points", "roots": 8}, "samples": 8}},
        "rollout.tree.roots: got 8, want less than rollout.samples (8): the rest are branches",
    ),
    "no rule": (
        {"rollout": {"tree": {"kind": "points", "by": "entropi"}}},
        'rollout.tree.by: got "entropi", want one of: entropy, surprisal, random; or "module:function". Perhaps you meant ',
    ),
    "long segments": (
        {"rollout": {"tree": {"kind": "segments", "tokens": 8}, "max_new_tokens": 8}},
        "rollout.tree.tokens: got 8, want less than rollout.max_new_tokens (8): no row would reach the end of a segment",
    ),
    "segments under a control": (
        {
            "rollout": {
                "tree": {"kind": "segments", "tokens": 4},
                "max_new_tokens": 8,
                "control": {"kind": "regex", "pattern": "[0-9]+"},
            }
        },
        "rollout.tree.kind: got segments under rollout.control.kind regex, want points: a control ends each row within its limit",
    ),
    "no tree": (
        {"rollout": {}, "objective": {"advantage": {"kind": "tree_rl"}}},
        "objective.advantage.kind: got tree_rl without rollout.tree, want one, or grpo: ",
    ),
    "rounds of a budget": (
        {"experience": {"budget": {"kind": "rounds"}}},
        "experience.budget: got rounds beside rollout.tree, want one of the two, or a budget without rounds: ",
    ),
    "hints": (
        {"experience": {"hints": {"kind": "cosine"}}},
        "experience.hints: got cosine beside rollout.tree, want one of the two: ",
    ),
    "joined rows": (
        {"experience": {"replay": {"capacity": 8, "join": {}}}},
        "experience.replay.join: got one beside rollout.tree, want none: ",
    ),
    "stored rows": (
        {"experience": {"replay": {"capacity": 8, "start": "x.jsonl"}}},
        "experience.replay.start: got 'x.jsonl' beside rollout.tree, want none: ",
    ),
    "pass@k": (
        {"objective": {"advantage": {"kind": "pass_at_k"}}},
        "objective.advantage.kind: got pass_at_k with rollout.tree, want tree_rl, tree_po, spo or tree_rpo: it counts on whole "
        "groups of independent responses",
    ),
    "lengths of whole responses": (
        {"objective": {"advantage": {"kind": "opo"}}},
        "objective.advantage.kind: got opo with rollout.tree, want tree_rl, tree_po, spo or tree_rpo: ",
    ),
    "sample size per response": (
        {"update": {"ess_scaling": {}}},
        "update.ess_scaling: got one beside rollout.tree, want none: ",
    ),
    "KL in the reward": (
        {"objective": {"reward_kl": {"weight": 0.1}}},
        "objective.reward_kl.weight: got 0.1 with rollout.tree, want 0, and objective.loss.kl: ",
    ),
    "baseline over kept rows": (
        {"objective": {"advantage": {"kind": "spo"}, "baseline_over": "kept"}},
        "objective.baseline_over: got kept with spo, want sampled: ",
    ),
    "a ratio per sequence": (
        {"objective": {"loss": {"ratio": "sequence"}}},
        "objective.loss.ratio: got sequence with rollout.tree, want token: a row has a part of a response",
    ),
    "a correction per sequence": (
        {"objective": {"loss": {"correction": {"kind": "truncated_importance", "level": "sequence"}}}},
        "objective.loss.correction.level: got sequence with rollout.tree, want token: a row has a part of a response",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    given, message = REFUSED[name]
    found = problems(**given)
    assert any(text.startswith(message) for text in found), found


@pytest.mark.parametrize("advantage", ["tree_rl", "tree_po", "spo", "tree_rpo", "grpo", "rloo"])
def test_what_fits(advantage):
    assert problems(objective={"advantage": {"kind": advantage}}) == []


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"kind": "points", "roots": 0}, "rollout.tree.roots: got 0"),
        ({"kind": "segments", "width": 1}, "rollout.tree.width: got 1"),
        ({"kind": "bush"}, "rollout.tree.kind: got 'bush'"),
    ],
)
def test_values_of_no_meaning(tree, message):
    from jaxrl_llm.errors import UserError

    with pytest.raises(UserError) as error:
        problems({"tree": tree})
    assert message in str(error.value)
