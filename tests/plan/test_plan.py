"""`jaxrl plan` without the TPU compiler: reading collectives and loops, memory per chip, predictions, advice, the command."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxrl_llm import cli
from jaxrl_llm.config.loading import validate
from jaxrl_llm.distribution.score import TokenScores
from jaxrl_llm.errors import UserError
from jaxrl_llm.parallel.layout import TRAIN, WIDE
from jaxrl_llm.perf import chips
from jaxrl_llm.perf.hlo import HloModule
from jaxrl_llm.plan import advice, command, compilers, memory, predict, show, sweep, traffic
from jaxrl_llm.plan.command import Target
from jaxrl_llm.plan.programs import CompiledProgram, make_checked_run
from jaxrl_llm.plan.traffic import ProgramCost, Traffic
from jaxrl_llm.roles import inputs
from jaxrl_llm.roles import memory_check as least_memory
from jaxrl_llm.roles.abstract_run import AbstractRun, with_micro_batches
from jaxrl_llm.roles.blueprint import Blueprint, blueprint_of
from jaxrl_llm.roles.build import make_learner
from jaxrl_llm.roles.learner import Learner
from jaxrl_llm.roles.memory_check import Phase
from jaxrl_llm.types import Batch, Experience, Groups, Prompts, Rollouts, number_rows
from jaxrl_llm.update.batch import fill_batch, minibatches, ungraded

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "arithmetic.yaml")
MODEL = {"vocab_size": 32, "layers": 2, "d_model": 16, "heads": 4, "kv_heads": 2, "head_dim": 8, "d_mlp": 64}
# By hand: embedding 32 x 16; a layer's qkv 16 x 2 x 4 x 8, out 2 x 2 x 8 x 16, gate and up 2 x 16 x 64, down 64 x 16, two norms.
LAYER = 1024 + 512 + 2048 + 1024
PARAMS = 512 + 2 * (LAYER + 32) + 16
FLOPS = 12_914_688
"""FLOPs of one update of VALUES with responses of full length."""
VALUES = {
    "task": {"kind": "arithmetic", "terms": 3},
    "model": MODEL,
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 6},
    "update": {"minibatches": 2, "micro_batches": 2},
}


@pytest.fixture(scope="module")
def run() -> AbstractRun:
    devices, _ = command.devices_of(Target(chips=1))
    cfg = validate(VALUES, "test")
    return make_checked_run(cfg, cfg.model, 7, devices)


HLO = """HloModule jit_update, is_scheduled=true

%cond (p: (s32[], bf16[8])) -> pred[] {
  %c = s32[] constant(3)
  %p = (s32[], bf16[8]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

%async_fusion (q: bf16[2,8]) -> bf16[8,8] {
  %q = bf16[2,8]{1,0} parameter(0)
  ROOT %ag.2 = bf16[8,8]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (p: (s32[], bf16[8])) -> (s32[], bf16[8]) {
  %p = (s32[], bf16[8]) parameter(0)
  %f = bf16[8,8]{1,0} fusion(%p), kind=kOutput, calls=%async_fusion, backend_config={"estimated_cycles":"100"}
  %ar = f32[16]{0} all-reduce(%p), channel_id=8, replica_groups={{0,1},{2,3},{4,5},{6,7}}, to_apply=%add
  %alone = f32[16]{0} all-reduce(%p), channel_id=9, replica_groups=[8,1]<=[8], to_apply=%add
  ROOT %t = (s32[], bf16[8]) tuple(%p, %f)
}

%live (p: (s32[], pred[])) -> pred[] {
  %p = (s32[], pred[]) parameter(0)
  ROOT %live = pred[] get-tuple-element(%p), index=1
}

%outer (p: (s32[], pred[])) -> (s32[], pred[]) {
  %p = (s32[], pred[]) parameter(0)
  %w = (s32[], bf16[8]) while(%p), condition=%cond, body=%body
  %start = (f32[4]{0}, f32[16]{0}) all-gather-start(%p), channel_id=10, replica_groups=mesh['a'=2,'b'=4] {'b'}, dimensions={0}
  %begin = bf16[8,8]{1,0} all-gather(%p), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %t = (s32[], pred[]) tuple(%p, %w)
}

%all-reduce-scatter.1 (p: f32[32]) -> f32[4] {
  %p = f32[32]{0} parameter(0)
  %r = f32[32]{0} all-reduce(%p), channel_id=11, replica_groups=[1,8]<=[8], to_apply=%add
  ROOT %s = f32[4]{0} dynamic-slice(%r)
}

ENTRY %main (a: f32[32]) -> f32[4] {
  %a = f32[32]{0} parameter(0)
  %w = (s32[], pred[]) while(%a), condition=%live, body=%outer
  %perm = (f32[4]{0}, f32[4]{0}, u32[], u32[]) collective-permute-start(%a), channel_id=12, source_target_pairs={{0,1},{1,0}}
  ROOT %s = f32[4]{0} fusion(%a), kind=kCustom, calls=%all-reduce-scatter.1, backend_config={"estimated_cycles":"7"}
}
"""


def test_traffic_multiplies_loops_and_counts_what_a_chip_receives():
    """The loop without a static trip count runs 5 times. By hand, on n chips: all-gather (n - 1) / n of its result, all-reduce
    twice that, reduce-scatter once. Channel 7 overlaps with matmuls of the inner loop, and starts outside of it."""
    cost = traffic.read_cost(HloModule(HLO), outer=5)
    assert set(cost.traffic) == {
        Traffic("all-gather", "bf16", (5,), 1, 5 * 128 * 3 // 4, 128),
        Traffic("all-gather", "f32", (5,), 1, 5 * 64 * 3 // 4, 64),
        Traffic("all-reduce", "f32", (5, 3), 1, 15 * 64, 64),
        Traffic("reduce-scatter", "f32", (), 1, 128 * 7 // 8, 128),
        Traffic("collective-permute", "f32", (), 1, 16, 16),
    }
    assert cost.cycles == 15 * 100 + 7 and cost.unknown == 0
    assert cost.received == 480 + 240 + 960 + 112 + 16
    assert next(t for t in cost.traffic if t.kind == "all-reduce").times == 15


def test_collectives_that_share_a_channel_are_several():
    """As all of a `shard_map` do on GPUs; XLA:GPU also combines collectives, here of two dtypes."""
    two = "((f32[4]{0}, bf16[4]{0}), (f32[16]{0}, bf16[16]{0})) all-gather-start(%p, %p)"
    text = HLO.replace("channel_id=9, replica_groups=[8,1]<=[8]", "channel_id=8, replica_groups=[4,2]<=[8]")
    text = text.replace("(f32[4]{0}, f32[16]{0}) all-gather-start(%p)", two)
    cost = traffic.read_cost(HloModule(text), outer=5)
    assert Traffic("all-reduce", "f32", (5, 3), 2, 30 * 64, 64) in cost.traffic
    assert Traffic("all-gather", "bf16", (5,), 2, 5 * (128 + 32) * 3 // 4, 128) in cost.traffic
    assert Traffic("all-gather", "f32", (5,), 1, 5 * 64 * 3 // 4, 64) in cost.traffic


def test_inner_loops_that_depend_on_the_batch_use_the_assumed_count():
    text = HLO.replace("compare(%i, %c), direction=LT", "get-tuple-element(%p), index=0")
    cost = traffic.read_cost(HloModule(text), outer=5, inner=2)
    assert cost.unknown == 1 and cost.cycles == 10 * 100 + 7


def test_instructions_without_an_estimate_are_left_out():
    """Their value is 2^63 - 1: seen in updates of Llama-3-70B, which were reported to take 42,163,986,464 s."""
    text = HLO.replace('"estimated_cycles":"7"', f'"estimated_cycles":"{2**63 - 1}"')
    assert text != HLO and traffic.read_cost(HloModule(text), outer=5).cycles == 15 * 100


@pytest.mark.parametrize(
    ("line", "want"),
    [
        ("all-gather(%p), replica_groups=[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("all-gather(%p), replica_groups=[4,2]<=[2,4]T(1,0)", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("all-gather(%p), replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("all-reduce(%p), replica_groups={{0,2},{1,3}}, to_apply=%add", [[0, 2], [1, 3]]),
        ("all-reduce(%p), replica_groups=@mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("all-reduce(%p), replica_groups=mesh['a'=2,'b'=1,'c'=2], device_ids=([2,2]T(1,0)) {'a'}", [[0, 1], [2, 3]]),
        ("all-reduce(%p), replica_groups=mesh['a'=2,'b'=2], device_ids=([4]) {'a'}", [[0, 2], [1, 3]]),
        ("collective-permute(%p), source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
        ("all-reduce(%p), to_apply=%add", None),
    ],
)
def test_the_groups_of_a_collective(line, want):
    found = traffic.groups(SimpleNamespace(line=line))
    assert (None if found is None else found.tolist()) == want


def test_bytes_from_other_hosts_by_hand():
    """Eight chips on two hosts of four. Each host receives what it lacks once, a quarter of it through each of its chips: of 800
    gathered bytes 400, so 100 per chip; twice that to add them; of a permutation and an exchange each chip its own."""
    hosts, all_chips = [0] * 4 + [1] * 4, np.arange(8)[None]
    of = lambda kind, made, groups: traffic.received_from_hosts(kind, made, groups, hosts)  # noqa: E731
    assert of("all-gather", 800, all_chips) == 100 and of("all-reduce", 800, all_chips) == 200
    assert of("reduce-scatter", 100, all_chips) == of(traffic.SCATTERED, 800, all_chips) == 100
    assert of("all-to-all", 800, all_chips) == 400
    # Over 8 + 4 chips the host with 4 lacks two thirds.
    assert traffic.received_from_hosts("all-gather", 1200, np.arange(12)[None], [0] * 8 + [1] * 4) == 200
    within, across = np.array([[0, 1], [4, 5]]), np.array([[0, 4], [1, 5]])
    assert of("all-gather", 800, within) == of("collective-permute", 800, within) == 0
    assert of("all-gather", 800, across) == 400 and of("collective-permute", 800, across) == 800
    assert traffic.received_from_hosts("all-gather", 800, across, ()) == of("all-gather", 800, None) == 0
    cost = traffic.read_cost(HloModule(HLO), 5, hosts=[0, 1] * 4)
    assert {t.kind: t.network for t in cost.traffic if t.dtype == "f32"} == {
        "all-gather": 5 * 64 // 4, "all-reduce": 15 * 64, "reduce-scatter": 128 // 8, "collective-permute": 16,
    }  # fmt: skip
    chip = chips.Chip("test", 1e9, wire=1e3, network=1e2)
    assert cost.wire_seconds(chip) == cost.received / 1e3 + sum(t.network for t in cost.traffic) / 1e2
    assert traffic.read_cost(HloModule(HLO), 5).wire_seconds(chip) == cost.received / 1e3


def test_estimated_gathers_cross_hosts_where_the_mesh_does():
    """tensor 4 within a host of 4, fsdp 2 over both: 1 of 2 parts through NVLink, half of it through the network."""
    places = [SimpleNamespace(process_index=n // 4) for n in range(8)]
    mesh = SimpleNamespace(
        devices=np.array(places).reshape(1, 2, 4, 1), axis_names=("data", "fsdp", "tensor", "expert")
    )
    mesh.shape = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    chip = chips.Chip("test", 1e9, wire=100.0, network=10.0)
    of = lambda rules, axis: predict.gather_seconds(SimpleNamespace(mesh=mesh, rules=rules), axis, chip)  # noqa: E731
    over = {axis: of(TRAIN, axis) for axis in ("data", "embed", "heads", "expert")}
    assert over == {"data": 0, "embed": 0.5 / 100 + 0.5 / 10, "heads": 0.75 / 100, "expert": 0}
    # Heads of a wide layout are split over both: each host lacks half, and its four chips fetch it.
    assert of(WIDE, "heads") == pytest.approx(0.875 / 100 + 0.5 / 4 / 10)


def test_a_gpu_gives_jax_a_fraction(monkeypatch):
    monkeypatch.delenv("XLA_PYTHON_CLIENT_MEM_FRACTION", raising=False)
    assert chips.granted(chips.H100) == 60e9 and chips.granted(chips.V5E) == 16e9
    assert chips.granted(chips.of_device("cpu", "cpu", 1)) == chips.host_memory()
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.9")
    assert chips.granted(chips.H100) == 72e9
    text = show.verdict(report(chip=chips.H100._asdict(), limit=72e9))
    for wrong in ("much", "", "0", "-1"):
        monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", wrong)
        with pytest.raises(UserError, match=r"XLA_PYTHON_CLIENT_MEM_FRACTION: got .*, want a positive number"):
            chips.granted(chips.H100)
    assert text == "fits: 12.00 GB of 72 that JAX takes of 80 (XLA_PYTHON_CLIENT_MEM_FRACTION), largest in update"


def test_a_topology_is_a_known_kind_and_sizes():
    assert chips.parse_topology("v5p:4x4x4") == (chips.V5P, (4, 4, 4))
    assert chips.parse_topology("h100:8") == (chips.H100, (8, 1)) and chips.parse_topology("b200:8x4").sizes == (8, 4)
    assert chips.parse_topology("a100:8").has_gpus and not chips.parse_topology("v5e:4x4").has_gpus
    assert {chip.name for chip in chips.GPUS.values()} == set(compilers.GPUS)
    for kind, gpu in compilers.GPUS.items():
        assert chips.lookup(gpu.description).name == kind, "the compiler's device is planned for as the real one"
    for wrong in ("v5x:2x2", "v5e", "v5e:2by2", "H100:2x2", "h100:", "h100:8x2x2", "h100:0", "h100:8x0", "v5e:²x2"):
        with pytest.raises(UserError, match=r"--topology: got .*, want a kind"):
            chips.parse_topology(wrong)
    with pytest.raises(UserError, match="want at most 8 GPUs of a host; two hosts of 8 are h100:8x2"):
        chips.parse_topology("h100:16")
    assert chips.of_device("gpu", "NVIDIA H200", 1).memory == 141e9
    assert chips.of_device("tpu", "TPU v5 lite", 8) == chips.V5E
    assert chips.of_device("cpu", "cpu", 2).memory == chips.of_device("cpu", "cpu", 1).memory / 2
    with pytest.raises(UserError, match="a chip that is not in the table of chips"):
        chips.of_device("gpu", "NVIDIA RTX 9000", 1)


def test_parts_of_memory_by_hand(run):
    """f32 masters and policy (compute float32), two moments and two counters; caches of 8 prompts of 7 slots and 32 rows of 6."""
    found = {phase.name: phase.parts for phase in memory.estimated(run)}
    assert set(found) == {"prefill", "decode_chunk", "publish", "update"}
    numbers = 2 * 2 * 2 * 8  # keys and values, 2 layers, 2 heads of 8
    for parts in found.values():
        assert parts[memory.MASTERS] == parts[memory.POLICY] == 4 * PARAMS
        assert 8 * PARAMS <= parts[memory.OPTIMIZER] <= 8 * PARAMS + 16
    assert found["decode_chunk"][memory.PROMPTS] == 4 * numbers * 8 * 7
    assert found["decode_chunk"][memory.ROWS] == 4 * numbers * 32 * 6
    assert found["update"][memory.ROWS] == 0 and found["prefill"][memory.ROWS] == 0
    # 16 rows of 13 slots: ten fields of 4 bytes and a mask of 1.
    assert found["update"][memory.BATCH] == 16 * 13 * 41
    assert found["update"][memory.GRADIENTS] == 4 * PARAMS


def compiled(**sizes: int) -> CompiledProgram:
    return CompiledProgram(
        sizes.get("arguments", 0), sizes.get("outputs", 0), sizes.get("temporaries", 0), sizes.get("aliased", 0),
        ProgramCost((), 0, 0), 1.0, sizes.get("refused", ""),
    )  # fmt: skip


def test_phases_add_temporaries_to_resident_arrays(run):
    programs = dict.fromkeys(("prefill", "decode_chunk", "publish"), compiled())
    expected = least_memory.resident_bytes(run)["update"]
    given = sum(expected.program.values())
    usual = compiled(arguments=given + 100, outputs=1000, aliased=900, temporaries=5 * PARAMS)
    found = memory.phases(run, programs | {"update": usual})[-1]
    assert found.parts[memory.REST] == 200
    assert (found.parts[memory.GRADIENTS], found.parts[memory.TEMPORARIES]) == (4 * PARAMS, PARAMS)
    assert found.total == given + 200 + 5 * PARAMS + 4 * PARAMS  # and the policy
    # Refused: the message names the temporaries, or all memory of the program.
    for refused, named in (("temporaries", 6 * PARAMS), ("all", given + 6 * PARAMS)):
        program = compiled(temporaries=named, refused=refused)
        assert memory.phases(run, programs | {"update": program})[-1].total == given + 10 * PARAMS


def test_predictions_by_hand(run):
    """16 rows of 7 + 6 tokens: 6 FLOPs per layer parameter and token, and per head parameter and completion token; 12 x heads x H
    per attention pair, of which there are 13 x 14 / 2 per row and layer. Decoding reads all weights every step."""
    flops = 6 * 2 * LAYER * 16 * 13 + 6 * 512 * 16 * 6 + 12 * 4 * 8 * 2 * 16 * 91
    assert sum(predict.update_flops(run)) == flops == FLOPS
    chip = chips.Chip("test", 1e9, flops=1e6, hbm=1e9, wire=1e3, clock=1e3)
    received = Traffic("all-gather", "f32", (), 1, 500, 500)
    one = compiled()._replace(cost=ProgramCost((received,), 2000, 0))
    found = predict.predict(run, chip, dict.fromkeys(("prefill", "decode_chunk", "publish", "update"), one))
    # With remat the forward pass is computed twice, that of the head always; two updates per step.
    assert found.update.compute == pytest.approx(2 * flops * 4 / 3 / 1e6)
    assert (found.update.wire, found.update.compiler) == (1.0, 4.0)
    assert found.mfu == pytest.approx(flops / 1e6 / (flops * 4 / 3 / 1e6 + 0.5))
    # One chunk of 6 steps, and the prompts.
    assert found.rollout.wire == pytest.approx(1.0) and found.rollout_tokens_per_s == pytest.approx(
        8 * 4 * 6 / found.rollout.total
    )
    assert found.rollout.memory >= 6 * 4 * PARAMS / 1e9
    assert predict.predict(run, chips.Chip("cpu", 1e9)) is None


OBJECTIVES = {
    "one m2po update": {"objective": "paper:m2po"},
    "m2po": {"objective": "paper:m2po", "update": {"minibatches": 2}},
    "grpo": {"objective": "trl:grpo", "update": {"minibatches": 2, "epochs": 2}},
    "anchored on the trainer": {
        "objective": {"preset": "trl:grpo", "loss": {"anchor": "proximal"}},
        "update": {"minibatches": 2, "packing": {"kind": "plain", "slots": 30}},
    },
    "masked and anchored on the sampler": {
        "objective": {
            "loss": {"anchor": "behavior", "correction": {"kind": "masked_importance", "weight": "one"}},
            "reward_kl": {"weight": 0.1},
        },
        "update": {"epochs": 2, "packing": {"kind": "shared_prefix"}},
    },
    "ppo": {"objective": "verl:ppo", "update": {"packing": {"kind": "shared_prefix", "slots": 20}}},
    "dpo": {"objective": "paper:dpo", "update": {"packing": {"kind": "shared_prefix"}}},
    "adapters": {"lora": {"rank": 2}, "objective": "prime:rl"},
    "truncated": {"rollout": VALUES["rollout"] | {"top_p": 0.9, "min_new_tokens": 2}},
    "truncated to few": {"rollout": VALUES["rollout"] | {"top_k": 3, "max_kept_tokens": 4}},
    "a window": {"model": MODEL | {"window": 3, "sliding": [True, False]}},
}


def longest(of: Blueprint) -> Groups:
    """Groups of prompts and responses of full length, as from the engine; rewards differ in each group."""
    cfg, prompts = of.cfg.rollout, of.cfg.rollout.prompts
    rows, full = prompts * cfg.samples, (prompts * cfg.samples, cfg.max_new_tokens)
    integers, numbers = np.ones(rows, np.int32), np.zeros(full, np.float32)
    slots, max_kept_tokens = of.prompt_slots, of.make_engine().decoding.max_kept_tokens
    tokens = np.zeros((prompts, slots), np.int32)
    prompt, sample = number_rows(np.full(prompts, cfg.samples))
    rollouts = Rollouts(
        prompts=Prompts(tokens, np.full(prompts, slots, np.int32), integers[:prompts], integers[:prompts]),
        prompt=prompt, sample=sample,
        tokens=np.zeros(full, np.int32), length=cfg.max_new_tokens * integers, sampled=np.ones(full, bool),
        behavior_logprobs=numbers, entropy=numbers, temperature=np.ones(rows, np.float32),
        version=np.zeros(full, np.int32), finish=integers,
        kept_tokens=np.zeros((*full, max_kept_tokens), np.int32) if max_kept_tokens else None,
        control_state=np.zeros(full, np.int32) if cfg.min_new_tokens else None,
    )  # fmt: skip
    reward = np.arange(rows, dtype=np.float32)
    return ungraded(rollouts).replace(reward=reward, components=reward[:, None])


@pytest.fixture(params=OBJECTIVES)
def both(request) -> tuple[AbstractRun, Learner, Batch]:
    """The planned run, the learner, and the learner's first batch of a step; scores are 0, nothing compiles."""
    cfg = validate(VALUES | {"reward": "exact_match", "update": {}} | OBJECTIVES[request.param], "test")
    of = blueprint_of(cfg, inputs.read(cfg))

    def score(params: object, groups: Groups) -> TokenScores:
        nothing = np.zeros(groups.rollouts.tokens.shape, np.float32)
        return TokenScores(nothing, nothing, nothing if cfg.objective.has_critic else None)

    learner, groups = make_learner(of, score, None), longest(of)
    train = SimpleNamespace(params=of.learner_specs)
    scores = learner.score(SimpleNamespace(train=train, reference=of.changed(of.learner_specs)), groups)
    experience = Experience(groups, scores, learner.advantage(groups, scores))
    part = next(minibatches(experience, cfg.update.minibatches, np.random.default_rng(0)))
    batch, _ = fill_batch(part, of.shapes.update, 0, of.loss.aggregation, of.loss.length, of.loss.own)
    return make_checked_run(cfg, cfg.model, of.prompt_slots, list(of.train.mesh.devices.flat)), learner, batch


def test_a_planned_batch_equals_that_of_training(both):
    """Columns, dtypes and shapes, including those of a proximal policy, a critic, a reference and truncation."""
    run, _, batch = both
    described = lambda tree: {  # noqa: E731
        jax.tree_util.keystr(path): (x.shape, x.dtype) for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }
    assert described(run.batch) == described(batch)


def test_planned_flops_equal_those_of_training(both):
    run, learner, batch = both
    assert predict.update_flops(run) == learner.update.flops(batch)


@pytest.mark.parametrize(
    ("name", "columns"), [("one m2po update", {"proximal_logprobs"}), ("dpo", {"reference_logprobs"})]
)
def test_columns_by_hand(name, columns):
    cfg = validate(VALUES | {"update": {}} | OBJECTIVES[name], "test")
    batch = make_checked_run(cfg, cfg.model, 7, command.devices_of(Target(chips=1))[0]).batch
    optional = ("reference_logprobs", "proximal_logprobs", "values", "returns", "kept_tokens", "control_state")
    assert {column for column in optional if getattr(batch, column) is not None} == columns


def test_advice_shrinks_the_largest_phase(run):
    """The compiler found ten times the estimated temporaries, so those after a change are multiplied by ten, too."""
    found = memory.estimated(run)
    real = [
        Phase(p.name, p.parts | {memory.TEMPORARIES: p.parts[memory.TEMPORARIES] * (10 if p.name == "update" else 1)})
        for p in found
    ]
    assert memory.peak(real).name == "update"
    four = memory.estimated_update(with_micro_batches(run, 4))
    limit = four.total + 9 * four.parts[memory.TEMPORARIES]
    best = advice.advise(run, real, limit)
    assert {"update.micro_batches": 4} in [a.overrides for a in best] and all(a.bytes <= limit for a in best)
    mended = next(a for a in best if a.overrides == {"update.micro_batches": 4})
    assert (mended.bytes, mended.flags) == (limit, "--update.micro_batches 4")
    # If nothing suffices: the best combination, with its memory.
    hopeless = advice.advise(run, real, 1)
    assert len(hopeless) == 1 and len(hopeless[0].overrides) > 1 and 1 < hopeless[0].bytes < limit


def report(**changes) -> dict:
    parts = dict.fromkeys(memory.PARTS, 0) | {memory.MASTERS: 3 * 10**9, memory.TEMPORARIES: 9 * 10**9}
    base = {
        "topology": "v5e:2x2", "chips": 4, "chip": chips.V5E._asdict(), "jax": "0", "parameters": 10**9,
        "mesh": {"data": 1, "fsdp": 2, "tensor": 2, "expert": 1}, "minibatches": 1, "micro_batches": 2, "rows": 64,
        "control": "none", "tree": "none", "reuse": "none", "slots": [7, 6],
        "phases": [{"name": "update", "total": 12 * 10**9, "parts": parts}],
        "peak": {"phase": "update", "bytes": 12 * 10**9}, "compiled": True, "fits": True, "advice": [], "predicted": None,
        "programs": {"update": {"refused": "", "received": 2000, "traffic": [
            {"kind": "all-gather", "dtype": "bf16", "loops": (2, 4), "count": 3, "times": 24, "bytes": 1990, "largest": 5 * 10**6},
            {"kind": "all-reduce", "dtype": "f32", "loops": (), "count": 1, "times": 1, "bytes": 10, "largest": 10},
        ]}},
    }  # fmt: skip
    return base | changes


def test_the_report_as_text():
    text = show.show(report())
    assert ": 4 chips of 16 GB" in text and "1 minibatch of 2 micro-batches" in text
    assert (
        "v5e:1x1: 1 chip of 16 GB" in show.show(report(topology="v5e:1x1", chips=1)) and "rollout.control" not in text
    )
    assert "\nrollout.control: regex is left out of the rollouts" in show.show(report(control="regex"))
    assert "\nrollout.tree: points: shown is how its roots are sampled" in show.show(report(tree="points"))
    assert "\nrollout.reuse: exact: shown is how responses are sampled from the start" in show.show(
        report(reuse="exact")
    )
    lines = [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    assert ["master parameters", "3.00"] in lines and ["**total**", "**12.00**"] in lines
    assert ["update", "all-gather", "bf16", "2 x 4", "24", "0.0", "5.0"] in lines
    assert ["update", "1 smaller kinds", "", "", "1", "0.0", ""] in lines
    assert "at most 5 MB at a time inside the loop over layers, at most 0 MB outside of it" in text
    assert text.splitlines()[-1] == "fits: 12.00 GB of 16, largest in update"
    too_much = report(
        fits=False, peak={"phase": "update", "bytes": 2 * 10**10},
        advice=[{"flags": "--update.micro_batches 4", "bytes": 10**10}],
    )  # fmt: skip
    assert show.show(too_much).splitlines()[-2:] == [
        "does not fit: needs 20.00 GB of 16, largest in update; change",
        "  --update.micro_batches 4    (about 10.00 GB)",
    ]


def test_all_meshes_of_eight_devices_and_their_micro_batches():
    found = list(sweep.meshes(8))
    # Three factors of two on four axes: 20 ways.
    assert len(found) == len(set(found)) == 20 and all(a * b * c * d == 8 for a, b, c, d in found)
    cfg = validate(VALUES, "test")
    assert sweep.micro_batches(cfg, (1, 2, 1, 1)) == [1, 2, 4, 8]
    assert sweep.micro_batches(
        dataclasses.replace(cfg, update=dataclasses.replace(cfg.update, micro_batches=3)), (2, 2, 1, 1)
    ) == [1, 2, 3, 4]


def test_candidates_are_compiled_until_one_fits(monkeypatch):
    """Two are asked for: the fastest crashes, the second does not fit, so a third is compiled; the fourth is not needed."""
    candidates = [sweep.Candidate((1, n, 1, 1), 1, 0, 0.1 * n) for n in (1, 2, 3, 4)]
    slower = sweep.Candidate((1, 1, 1, 1), 2, 0, 0.15)
    assert sweep.fastest([candidates[0], slower, *candidates[1:]]) == candidates

    def compiled(command: list[str], candidate: sweep.Candidate) -> dict:
        if candidate is candidates[0]:
            raise UserError("got no plan, want one: CHECK failed")
        return report(
            fits=candidate is candidates[2],
            predicted={"step_seconds": 2.0, "mfu": 0.25},
            mesh={"data": candidate.mesh[1]},
        )

    monkeypatch.setattr(sweep, "compile_candidate", compiled)
    done, failed = sweep.compile_best([], candidates, 2)
    assert [r["fits"] for r in done] == [False, True]
    assert [f["reason"] for f in failed] == ["got no plan, want one: CHECK failed"]
    text = show.sweep_table(
        {"meshes": 4, "chips": 4, "possible": 4, "tried": 5, "estimated": 5, "compiled": done[::-1], "failed": failed}
    )
    assert "| 3" in text and "| yes  | 2.0" in text and "not compiled: --mesh.data=1 --mesh.fsdp=1" in text
    assert (
        text.splitlines()[-1]
        == "best: --mesh.data=1 --mesh.fsdp=3 --mesh.tensor=1 --mesh.expert=1 --update.micro_batches=1"
    )


def test_bad_input_is_refused_before_anything_compiles(monkeypatch, capsys, tmp_path):
    def message(*args: str) -> str:
        assert cli.main(["plan", *args]) == 2
        return capsys.readouterr().err

    assert "want a kind (v4, v5e, v5p, v6e, a100, h100, h200, b200) and sizes" in message(
        CONFIG, "--topology", "v7:2x2"
    )
    assert "--chips: got 99999, want 1 to" in message(CONFIG, "--chips", "99999")
    assert "--topologi: no such flag, perhaps you meant --topology" in message(CONFIG, "--topologi", "v5e:2x2")
    path = tmp_path / "rows.yaml"
    path.write_text("task: {kind: file, path: rows.jsonl}\nmodel: {path: nowhere}\nreward: exact_match\n")
    assert "task.max_prompt_tokens: got 0" in message(str(path))
    for name, values, words in (
        ("alphabet", {"model": MODEL | {"vocab_size": 8}}, "model.vocab_size: got 8, want at least the tokenizer's 16"),
        (
            "packed",
            {"update": {"packing": {"kind": "plain", "slots": 5}}},
            "slots: got 5, want 0 or at least the 13 of one",
        ),
        ("tokenizer", {"tokenizer": {"path": "nowhere"}}, "--prompt-tokens: got nothing, want the longest prompt"),
    ):
        (tmp_path / f"{name}.yaml").write_text(json.dumps(VALUES | values))
        assert words in message(str(tmp_path / f"{name}.yaml"))
    assert "nowhere: got a path that does not exist" in message(str(path), "--prompt-tokens", "8")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert "got no TPU compiler, want libtpu: pip install" in message(CONFIG, "--topology", "v5e:2x2")
    monkeypatch.setattr(compilers, "_version", {"jax-cuda12-plugin": None, "jax-cuda13-plugin": None}.get)
    assert "got no GPU compiler, want the one of jax" in message(CONFIG, "--topology", "h100:8")
    monkeypatch.setattr(compilers, "_version", {"jax-cuda12-plugin": "0.1", "jax-cuda13-plugin": None}.get)
    assert "got jax-cuda12-plugin 0.1, want the one of jax" in message(CONFIG, "--topology", "h100:8")


@pytest.mark.slow
def test_plan_for_this_machine(capsys, tmp_path):
    """The real command on local devices: compiles all programs; the report is consistent."""
    path = tmp_path / "tiny.yaml"
    path.write_text(json.dumps(VALUES))
    assert cli.main(["plan", str(path), "--chips", "1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] and found["compiled"] and found["parameters"] == PARAMS
    assert set(found["programs"]) == {"prefill", "decode_chunk", "publish", "update"}
    for phase in found["phases"]:
        assert sum(phase["parts"].values()) == phase["total"]
    assert found["peak"]["bytes"] == max(phase["total"] for phase in found["phases"]) > 16 * PARAMS
    assert found["predicted"] is None and found["update_flops"] == FLOPS
    # The minimum checked by `jaxrl train` is below what the compiler needs.
    cfg = validate(VALUES, "test")
    run = make_checked_run(cfg, cfg.model, 7, command.devices_of(Target(chips=1))[0])
    least = {phase.name: phase.total for phase in least_memory.minimum(run, held_out=1, trains=True, num_sharing=0)}
    assert all(0 < least[phase["name"]] <= phase["total"] for phase in found["phases"])
