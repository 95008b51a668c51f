"""A run before any array exists: what its config asks for, in specs and shapes, and what is refused before anything compiles."""

import dataclasses

import jax
import pytest
from fakes import MODEL, VALUES, blueprint, config, sums

from jaxrl_llm.config import consistency
from jaxrl_llm.errors import UserError
from jaxrl_llm.model import lora
from jaxrl_llm.model import params as model_params
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles.blueprint import (
    Shapes,
    blueprint_of,
    device_problems,
    group_sizes,
    loss_of,
    make_blueprint,
    optimizer_of,
    problems,
    shapes_of,
    uses_of,
)
from jaxrl_llm.rollout.sample import Vocabulary
from jaxrl_llm.update.optimizer.config import AdamW
from jaxrl_llm.update.packing import BatchShape, GroupSizes


def paths(specs):
    leaves = jax.tree_util.tree_leaves_with_path(specs, is_leaf=model_params.is_spec)
    return {jax.tree_util.keystr(path) for path, _ in leaves}


@pytest.mark.parametrize(
    ("changes", "uses"),
    [
        ({}, ()),
        ({"rollout": VALUES["rollout"] | {"top_p": 0.9}}, ("truncation",)),
        ({"rollout": VALUES["rollout"] | {"min_new_tokens": 2}}, ("control",)),
        ({"rollout": VALUES["rollout"] | {"top_k": 4, "raw_logprobs": True}}, ("truncation", "raw_logprobs")),
        ({"objective": {"reward_kl": {"weight": 0.1}}}, ("reference",)),
        # The update runs the reference itself, and no column of a batch holds it.
        ({"objective": {"loss": {"kl": {"weight": 0.1, "kind": "full"}}}}, ()),
        ({"objective": {"loss": {"anchor": "proximal"}}, "update": {"minibatches": 2}}, ("proximal",)),
        ({"objective": {"loss": {"anchor": "proximal"}}}, ()),
        ({"objective": "paper:m2po"}, ("proximal",)),
        ({"objective": "verl:ppo"}, ("critic",)),
    ],
)
def test_columns_that_a_run_uses(changes, uses):
    assert uses_of(config(**changes)) == uses


def test_shapes_by_hand():
    """Prompts of 5 slots, responses of 6; 8 groups of 4."""
    update = {"minibatches": 2, "micro_batches": 4}
    found = shapes_of(config(update=update, warm_start={"rows": 24}), 5, 1)
    # 16 rows per minibatch in 4 parts; a step's 32 rows in the same parts of 4 rows; 8 prompts with one response each.
    assert found == Shapes(
        BatchShape("none", 16, 11, 4),
        BatchShape("none", 32, 11, 8),
        BatchShape("none", 24, 11, 1),
        BatchShape("none", 8, 11, 1),
    )
    packed = shapes_of(config(update=update | {"packing": {"kind": "shared_prefix"}}), 5, 1)
    # A prompt and its four responses: 5 + 4 x 6 slots.
    assert (packed.update, packed.experience) == (
        BatchShape("shared_prefix", 4, 29, 4),
        BatchShape("shared_prefix", 8, 29, 8),
    )
    # What is supervised is never packed.
    assert packed.held_out == found.held_out
    # Rows are a multiple of parts and devices.
    assert shapes_of(config(warm_start={"rows": 6}), 5, 4).supervised.rows == 8


def test_rl_trains_the_policy_or_its_adapters_and_a_critic():
    plain = blueprint()
    assert plain.learner_specs == plain.specs and plain.changed(plain.learner_specs) == plain.specs
    critic = blueprint(objective="verl:ppo")
    assert paths(critic.learner_specs) - paths(critic.specs) == {"['value']['kernel']", "['value']['bias']"}
    # A critic is no part of the policy, so no reference holds it.
    assert paths(critic.changed(critic.learner_specs)) == paths(critic.specs)
    adapters = blueprint(lora={"rank": 2})
    trained, frozen = lora.split(adapters.learner_specs)
    assert paths(adapters.changed(adapters.learner_specs)) == paths(trained)
    assert all(path.endswith((".a", ".b")) for path in paths(trained))
    assert (
        paths(lora.without_adapters(adapters.learner_specs))
        == paths(plain.specs)
        == {path.removesuffix(".base") for path in paths(frozen)}
    )


@pytest.mark.parametrize(
    ("objective", "lora_cfg", "want"),
    [
        ({}, {}, None),
        ({"reward_kl": {"weight": 0.1}}, {}, "policy"),
        ({"reward_kl": {"weight": 0.1}}, {"rank": 2}, "adapters"),
        ({"reward_kl": {"weight": 0.1}, "reference": {"kind": "pretrained", "path": "x"}}, {"rank": 2}, "policy"),
    ],
)
def test_what_a_reference_holds(objective, lora_cfg, want):
    of = blueprint(objective=objective, lora=lora_cfg)
    held = {None: None, "policy": of.specs, "adapters": of.changed(of.learner_specs)}[want]
    assert of.reference_specs == held


def test_a_critic_is_the_first_parameter_group_of_the_optimizer():
    assert optimizer_of(config()) is not None and optimizer_of(config()).groups == ()
    groups = ({"match": "embed", "lr_scale": 0.5},)
    cfg = config(
        objective={"preset": "verl:ppo", "critic": {"lr_scale": 3.0}},
        update={"optimizer": {"kind": "adamw", "lr": 1e-3, "groups": groups}},
    )
    critic, own = optimizer_of(cfg).groups
    assert isinstance(optimizer_of(cfg), AdamW) and (critic.match, critic.lr_scale) == ("(value|critic)/", 3.0)
    assert (own.match, own.lr_scale) == ("embed", 0.5) and cfg.update.optimizer.groups == (own,)


def test_scoring_has_the_tokenizers_vocabulary_and_the_configs_forward_options():
    of = blueprint(update={"attention": "plain", "remat": "layer"})
    scoring = of.scoring
    assert (scoring.model, scoring.layout, scoring.num_tokens) == (of.model, of.train, 16)
    assert (scoring.forward.attention, scoring.forward.remat) == ("plain", "layer")
    assert of.loss.aggregation == loss_of(of.cfg).aggregation == "token"


def test_a_blueprint_uses_the_given_devices_and_is_frozen():
    of = blueprint()
    assert list(of.train.mesh.devices.flat) == list(of.decode.mesh.devices.flat) == jax.devices()[:1]
    all_of_them = make_blueprint(of.cfg, of.model, of.vocab, 5)
    assert all_of_them.train.mesh.size == jax.device_count()
    with pytest.raises(dataclasses.FrozenInstanceError):
        of.cfg = None
    # Derived once: programs that are made of it are compiled once.
    assert of.loss is of.loss and of.optimizer is of.optimizer and of.specs is of.specs


def test_a_blueprint_takes_vocabulary_and_prompt_length_from_the_task():
    cfg = config()
    given = inputs.read(cfg)
    of = blueprint_of(cfg, given)
    task = sums(held_out=8)
    assert of.vocab == Vocabulary(task.num_tokens, task.pad, task.eos) and of.prompt_slots == task.prompt_slots == 5


def test_everything_that_does_not_fit_is_reported_at_once_before_anything_compiles():
    cfg = config(model=MODEL | {"vocab_size": 8}, rollout=VALUES["rollout"] | {"prompts": 7, "samples": 3})
    given = inputs.read(cfg)
    found = problems(given)
    assert len(found) >= 2 and any("model.vocab_size: got 8" in line for line in found)
    with pytest.raises(UserError) as refused:
        blueprint_of(cfg, given)
    assert str(refused.value) == "\n".join(found)


def test_limits_of_devices_are_checked_for_the_slots_of_the_batches():
    cfg = config(update={"attention": "splash"})
    device, rows = (
        "update.attention: got splash on cpu, want a TPU",
        "update.attention: got splash for rows of 11 slots",
    )
    found = device_problems(cfg, cfg.model, 5, jax.devices())
    assert len(found) == 2 and found[0].startswith(device) and found[1].startswith(rows)
    # The devices are checked even if the prompts' length is not known.
    [line] = device_problems(cfg, cfg.model, None, jax.devices())
    assert line.startswith(device)
    assert device_problems(config(), cfg.model, 5, jax.devices()) == []
    assert found == [line for line in problems(inputs.read(cfg)) if line.startswith("update.attention")]


def test_a_replay_enlarges_the_batch_by_its_groups_and_by_the_rows_that_join():
    """8 groups of 4: with 2 stored groups 40 rows; with up to 3 stored rows per fresh group 64, of groups of up to 7."""
    of = lambda **replay: config(update={"minibatches": 2}, experience={"replay": {"capacity": 9} | replay})  # noqa: E731
    assert group_sizes(of()) == group_sizes(config()) == GroupSizes(8, 32, 4, equal=True)
    assert group_sizes(of(groups=2)) == GroupSizes(10, 40, 4, equal=True)
    assert group_sizes(of(groups=2, join={"most": 3})) == GroupSizes(10, 64, 7)
    assert group_sizes(of(groups=2, join={"most": 3, "swap": True})) == GroupSizes(10, 40, 4, equal=True)
    # Groups of a file may be smaller, where they come back as groups.
    assert group_sizes(of(start="x.jsonl")) == GroupSizes(8, 32, 4)
    assert group_sizes(of(start="x.jsonl", groups=2, replace_dropped=False)) == GroupSizes(10, 40, 4)
    assert group_sizes(of(start="x.jsonl", replace_dropped=False)).equal
    # Without a buffer nothing comes back, whatever else is said.
    assert group_sizes(of(capacity=0, groups=2, join={"most": 3})) == GroupSizes(8, 32, 4, equal=True)
    assert [shape.rows for shape in shapes_of(of(groups=2), 5, 1)[:2]] == [20, 40]
    refused = consistency.problems(of(groups=3), 1)
    assert refused == [
        "update.minibatches: got 2, want a divisor of rollout.prompts + experience.replay.groups (11): 1, 11"
    ]
