"""What `jaxrl plan` says of this machine is what `jaxrl train` does here: the memory of each program, and one definition of MFU."""

import numpy as np
import pytest

from jaxrl_llm import train
from jaxrl_llm.config.loading import validate
from jaxrl_llm.parallel.compiled_ahead import CompiledAhead
from jaxrl_llm.perf import chips, utilization
from jaxrl_llm.perf.work import TrainFlops
from jaxrl_llm.plan import command, memory, predict
from jaxrl_llm.plan.programs import compile_all, make_checked_run
from jaxrl_llm.roles.memory_check import resident_bytes
from jaxrl_llm.rollout.programs import Programs

MODEL = {"layers": 2, "d_model": 64, "heads": 4, "kv_heads": 4, "head_dim": 16, "d_mlp": 256, "vocab_size": 64}
CONFIGS = {
    "plain": {"mesh": {"fsdp": 4, "tensor": 2}, "update": {"micro_batches": 2}},
    "adapters, bfloat16, a reference": {
        "mesh": {"data": 2, "fsdp": 2, "tensor": 2}, "model": MODEL | {"compute": "bfloat16"}, "lora": {"rank": 4},
        "objective": {"preset": "trl:grpo", "loss": {"kl": {"kind": "k3", "weight": 0.1}}},
    },
    "shared prompts, two minibatches, truncated": {
        "mesh": {"fsdp": 8}, "update": {"minibatches": 2, "packing": {"kind": "shared_prefix"}},
        "rollout": {"prompts": 16, "samples": 4, "max_new_tokens": 32, "top_p": 0.9, "max_kept_tokens": 8},
    },
}  # fmt: skip


def config(name: str, run_dir: str):
    base = {
        "run_dir": run_dir, "steps": 1, "task": {"kind": "arithmetic"}, "model": MODEL,
        "rollout": {"prompts": 16, "samples": 4, "max_new_tokens": 32, "min_new_tokens": 32},
        "reward": {"graders": ["exact_match"], "workers": 1},
        "metrics": {"tensorboard": False, "rollouts_every": 0, "samples_every": 0},
    }  # fmt: skip
    return validate(base | CONFIGS[name], name)


@pytest.fixture
def compiled(monkeypatch):
    """Bytes per device of the programs that training compiles, by name; the largest of each kind."""
    found: dict[str, int] = {}

    def keep(name, program):
        of = program.memory_analysis()
        size = of.argument_size_in_bytes + of.output_size_in_bytes + of.temp_size_in_bytes - of.alias_size_in_bytes
        found[name] = max(found.get(name, 0), size)
        return program

    engine, ahead = Programs._compile, CompiledAhead._compile
    monkeypatch.setattr(Programs, "_compile", lambda self, params, name: keep(name[0], engine(self, params, name)))
    monkeypatch.setattr(CompiledAhead, "_compile", lambda self: keep("update", ahead(self)))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["plain", *(pytest.param(name, marks=pytest.mark.soak) for name in [*CONFIGS][1:])])
def test_planned_memory_is_that_of_the_programs_of_training(name, compiled, tmp_path):
    """Within 5 %: a plan has the model's whole vocabulary, training the tokenizer's."""
    cfg = config(name, str(tmp_path / "run"))
    with train.open_run(cfg, False, None, False) as run:
        run.learner.compile()
        state, policy, _ = train.start(run)
        train.step(run.learner, run.source, state, policy, np.random.default_rng(0))
        slots, devices = run.task.prompt_slots, list(run.blueprint.train.mesh.devices.flat)
    planned = make_checked_run(cfg, cfg.model, slots, devices)
    programs = compile_all(planned)
    for phase in memory.phases(planned, programs):
        if phase.name not in compiled:
            continue
        program, want = programs[phase.name], compiled[phase.name]
        got = program.passed + program.temporaries
        print(f"{phase.name}: planned {got / 1e6:.2f} MB, trained {want / 1e6:.2f} MB, phase {phase.total / 1e6:.2f}")
        assert got == pytest.approx(want, rel=0.05), phase
        # In memory are also what the program does not read, the last layer's second half in a prefill, and what it is not given.
        unused = sum(resident_bytes(planned)[phase.name].other.values())
        assert phase.total >= got + unused * 0.95
        if phase.name != "prefill":
            assert phase.total == pytest.approx(want + unused, rel=0.05), phase
    assert {"prefill", "decode_chunk", "update"} <= compiled.keys()


def test_mfu_of_plan_and_metrics_is_one_number(monkeypatch, tmp_path):
    """By hand: F model FLOPs in t seconds on n chips with a peak of p are F / (t n p), whatever is computed again beside them."""
    cfg = config("plain", str(tmp_path / "run"))
    devices, _ = command.devices_of(command.Target())
    planned = make_checked_run(cfg, cfg.model, 7, devices)
    chip = chips.Chip("test", 1e9, flops=1e9, hbm=1e9, wire=1e9)
    found, flops = predict.predict(planned, chip), sum(predict.update_flops(planned))
    seconds = predict.update_time(planned, chip, None).total
    by_hand = flops / (seconds * 8 * 1e9)
    assert found.mfu == pytest.approx(by_hand) and 0 < by_hand < 0.75, "recomputed layers are no model FLOPs"
    monkeypatch.setattr(chips, "lookup", lambda kind: chip)
    work = TrainFlops(*predict.update_flops(planned))
    logged = utilization.describe_updates(work, seconds, None, planned.train)
    assert logged == {"update/flops_per_s": flops / seconds, "update/mfu": pytest.approx(by_hand)}
