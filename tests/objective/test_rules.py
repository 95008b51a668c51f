"""Incompatible parts of an objective, and the reasons in the messages."""

import dataclasses

import pytest
from pydantic import TypeAdapter

from jaxrl_llm.objective.config import ObjectiveConfig
from jaxrl_llm.objective.presets import PRESETS, with_preset
from jaxrl_llm.objective.rules import drops_equal_rewards, refusals

CLIP = {"preset": "trl:grpo"}


def objective(given):
    return TypeAdapter(ObjectiveConfig).validate_python(with_preset(given, dataclasses.asdict(ObjectiveConfig())))


def of_loss(preset, **loss):
    return {"preset": preset, "loss": loss}


SEQUENCE_RATIO = "objective.loss.aggregation: got {}, want sequence: with a ratio of whole sequences"
REFUSED = {
    "GSPO, token mean": (of_loss("paper:gspo", aggregation="token"), SEQUENCE_RATIO.format("token")),
    "GSPO, constant (a sum)": (of_loss("trl:gspo", aggregation="constant"), SEQUENCE_RATIO.format("constant")),
    "GSPO, sum": (of_loss("trl:gspo", aggregation="sequence_sum"), SEQUENCE_RATIO.format("sequence_sum")),
    "RLOO's product, token mean": (of_loss("trl:rloo", aggregation="token"), SEQUENCE_RATIO.format("token")),
    "GMPO, token mean": (of_loss("paper:gmpo", aggregation="token"), SEQUENCE_RATIO.format("token")),
    "GSPO-token, sum": (of_loss("verl:gspo", aggregation="token_sum"), "got token_sum, want sequence or token: sums undo"),
    "CISPO of sequences": (
        of_loss("trl:cispo", ratio="sequence", aggregation="sequence"), "surrogate cispo, want token: only clip is defined"),
    "REINFORCE of sequences": (
        of_loss("verl:gpg", ratio="sequence", aggregation="sequence"), "with the surrogate reinforce, want token: only clip"),
    "dual clip of sequences (T25)": (
        of_loss("verl:grpo", ratio="sequence", aggregation="sequence"), "objective.loss.surrogate.dual: got 3.0, want null"),
    "CISPO by PPO's bounds (T5)": (
        of_loss("trl:cispo", surrogate={"low": 0.2, "high": 0.2}), "want less than high (0.2): bounds of the ratio itself"),
    "the mismatch twice": (
        of_loss("paper:decoupled_ppo", anchor="behavior"), "want proximal: the ratio to the sampler already contains the weight"),
    "IcePop's weight twice": (of_loss("paper:icepop", anchor="behavior"), "which would count twice"),
    "a floor above the cap": (
        of_loss("trl:grpo", correction={"kind": "truncated_importance", "floor": 3.0}), "want less than cap (2.0)"),
    "a mask that keeps nothing": (
        of_loss("trl:grpo", correction={"kind": "masked_importance", "low": 6.0}), "high (5.0): else nothing is kept"),
    "k1 in the loss (#10)": (
        of_loss("trl:grpo", kl={"kind": "k1", "weight": 0.1, "times": "one"}), "the mean gradient of k1 alone is 0"),
    "k2 times the ratio": (
        of_loss("trl:grpo", kl={"kind": "k2", "weight": 0.1, "times": "ratio"}), "its gradient is right without a factor"),
    "k3+ times the score": (
        of_loss("trl:grpo", kl={"kind": "k3_plus", "weight": 0.1, "times": "score"}), "got score with k3_plus, want one"),
    "exact KL to the sampler": (
        of_loss("verl:grpo", kl={"kind": "full", "weight": 0.1, "to": "behavior"}), "the sampler's logits are not kept"),
    "a length that nothing reads": (of_loss("trl:grpo", length=512), "want null: only the aggregation constant reads it"),
    "supervised in RL": ({"loss": {"kind": "cross_entropy"}}, "it uses no reward; warm_start is supervised"),
    "DPO of all samples": ({"loss": {"kind": "dpo"}}, "objective.advantage.kind: got grpo, want best_worst"),
    "the batch's mean by a group's std": ({"advantage": {"mean_over": "batch"}}, "got group with mean_over batch, want batch"),
    "two pairs in one group": (
        {"preset": "paper:dpo", "reused_rows": "split"}, "objective.reused_rows: got split with the loss dpo"
    ),
    "pairs for a policy gradient": ({"advantage": {"kind": "best_worst"}}, "best_worst, which is for the loss dpo"),
    "late KL of token returns": (
        {"preset": "openrlhf:reinforce_pp", "reward_kl": {"to": "advantage"}}, "got advantage with the advantage reinforce_pp"),
    "a reference from nowhere": ({"reference": {"kind": "pretrained"}}, "objective.reference.path: got nothing"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    given, words = REFUSED[name]
    found = refusals(objective(given), samples=4, packing="shared_prefix")
    assert len(found) == 1, found
    assert words in found[0]


ONE_SAMPLE = ("paper:reinforce", "paper:ppo", "verl:ppo", "verl:reinforce_pp", "openrlhf:reinforce_pp", "areal:grpo")


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_a_group_of_one_is_refused_where_samples_are_compared(name):
    """T14: some frameworks then give the raw score, some 0."""
    found = refusals(objective({"preset": name}), samples=1, packing="shared_prefix")
    if name in ONE_SAMPLE:
        assert found == []
    else:
        assert len(found) == 1 and "with rollout.samples 1, want 2 or more samples: a group of one" in found[0]


def test_statistics_over_the_batch_need_no_group():
    over = {"advantage": {"mean_over": "batch", "std_over": "batch"}}
    assert refusals(objective(CLIP | over), samples=1, packing="none") == []


def test_dpo_needs_its_pair_in_one_row():
    (found,) = refusals(objective({"preset": "paper:dpo"}), samples=4, packing="plain")
    assert "update.packing.kind: got plain, want shared_prefix" in found


def test_a_mask_alone_may_stand_beside_the_ratio_to_the_sampler():
    """It weighs nothing, so nothing counts twice."""
    for correction in ({"kind": "second_moment"}, {"kind": "masked_importance", "weight": "one"}):
        given = of_loss("trl:grpo", anchor="behavior", correction=correction)
        assert refusals(objective(given), samples=4, packing="none") == []


def test_every_fault_is_named_at_once():
    given = of_loss("verl:grpo", ratio="sequence", length=5, kl={"kind": "full", "weight": 0.1, "to": "behavior"})
    found = refusals(objective(given), samples=1, packing="none")
    assert [line.split(":")[0] for line in found] == [
        "objective.advantage.kind",
        "objective.loss.aggregation",
        "objective.loss.surrogate.dual",
        "objective.loss.kl.to",
        "objective.loss.length",
    ]


# objective, graders -> whether `experience.filter: auto` drops groups of equal rewards, and why that is refused ("": it may).
FILTERS = {
    "grpo": ({}, 1, True, ""),
    "grpo with KL in the loss": ({"loss": {"kl": {"weight": 0.01}}}, 1, False, ""),
    "grpo with an entropy bonus": ({"loss": {"entropy": 0.01}}, 1, False, ""),
    "grpo with KL in the reward": (
        {"reward_kl": {"weight": 0.01}},
        1,
        False,
        "objective.reward_kl gives each token",
    ),
    "grpo over the batch": ({"advantage": {"mean_over": "batch"}}, 1, False, "compares groups with each other"),
    "grpo scaled over the batch": ({"advantage": {"std_over": "batch"}}, 1, False, ""),
    "rloo": ({"advantage": {"kind": "rloo"}}, 1, True, ""),
    "raw": ({"advantage": {"kind": "raw"}}, 1, False, "objective.advantage raw has no baseline"),
    "gae": ({"advantage": {"kind": "gae"}}, 1, False, "objective.advantage gae compares with other groups or states"),
    "reinforce++": ({"advantage": {"kind": "reinforce_pp"}}, 1, False, "objective.advantage reinforce_pp compares"),
    "reinforce++ with a baseline": ({"advantage": {"kind": "reinforce_pp", "baseline": True}}, 1, False, ""),
    "gdpo of one grader": ({"advantage": {"kind": "gdpo"}}, 1, False, ""),
    "gdpo of two": ({"advantage": {"kind": "gdpo"}}, 2, False, "normalizes each grader by itself"),
    "distillation": ({"loss": {"kind": "distillation"}}, 1, False, "objective.loss distillation reads no reward"),
    "a source that does not filter": ({"preset": "verl:grpo"}, 1, False, ""),
    "a source that does": ({"preset": "paper:dapo"}, 1, True, ""),
    "a part in its place that needs all": (
        {"preset": "paper:dapo", "advantage": {"kind": "raw"}},
        1,
        False,
        "no baseline",
    ),
}


@pytest.mark.parametrize("name", FILTERS)
def test_the_filter_follows_from_the_gradient_of_equal_rewards(name):
    given, graders, want, why = FILTERS[name]
    asked = objective(given)
    assert drops_equal_rewards(asked, graders) == want
    found = refusals(asked, samples=4, packing="none", judged_by="reward", graders=graders)
    start = "experience.filter: got signal by reward, want auto or none: "
    messages = [line for line in found if line.startswith(start)]
    assert [why in line for line in messages] == ([True] if why else [])


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_no_presets_own_filter_is_refused(name):
    asked = objective({"preset": name})
    drops = drops_equal_rewards(asked, 1)
    assert drops == (name in ("paper:dapo", "verl:dapo", "prime:rl", "prime:dppo"))
    assert refusals(asked, samples=4, packing="shared_prefix", judged_by="reward" if drops else "") == []
