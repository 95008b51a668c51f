"""`jaxrl plan` with the real compilers: the command and its report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from programs import only_gpu, only_tpu

from jaxrl_llm.config.loading import validate
from jaxrl_llm.plan import sweep
from jaxrl_llm.plan.command import Target

pytestmark = pytest.mark.timeout(1200)
ROOT = Path(__file__).parents[2]
SMALL = {
    "task": {"kind": "arithmetic"},
    "model": {
        "vocab_size": 256, "layers": 2, "d_model": 256, "heads": 4, "kv_heads": 2, "head_dim": 64, "d_mlp": 512,
        "compute": "bfloat16",
    },
    "mesh": {"fsdp": 2, "tensor": 2},
    "rollout": {"prompts": 8, "samples": 4, "max_new_tokens": 64},
    "update": {"micro_batches": 2},
}  # fmt: skip
# 24 layers of 8192 and 32768: 29 billion parameters, 87 GB of state and 14 GB of policy on each of four chips.
LARGE = SMALL["model"] | {"layers": 24, "d_model": 8192, "heads": 64, "kv_heads": 8, "head_dim": 128, "d_mlp": 32768}


# Four chips.
NAMES = {"tpu": "v5e:2x2", "gpu": "h100:4"}


def jaxrl_plan(topology, folder: Path, values: dict, *args: str) -> str:
    path = folder / "config.yaml"
    path.write_text(json.dumps(values))
    command = [sys.executable, "-m", "jaxrl_llm.cli", "plan", str(path), "--topology", NAMES[topology.of], *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert done.returncode == 0, done.stderr
    return done.stdout


def tables(text: str) -> list[list[str]]:
    return [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in text.splitlines() if "| " in line]


def test_a_small_model_fits(topology, tmp_path):
    """By hand, on four chips: the state except norms is split over all, the policy over two."""
    text = jaxrl_plan(topology, tmp_path, SMALL)
    rows = tables(text)
    header = next(row for row in rows if row[0] == "MB per chip")
    assert set(header[1:]) == {"prefill", "decode_chunk", "publish", "update"}
    masters = next(row for row in rows if row[0] == "master parameters")
    layer = 256 * 2 * 4 * 64 + 4 * 64 * 256 + 3 * 256 * 512
    matrices = 256 * 256 + 2 * layer
    assert {float(x) for x in masters[1:]} == {round(4 * (matrices / 4 + 5 * 256) / 1e6, 1)}
    policy = next(row for row in rows if row[0] == "policy")
    assert {float(x) for x in policy[1:]} == {round((2 * matrices / 2 + 5 * 256 * 2) / 1e6, 1)}
    total = next(row for row in rows if row[0] == "total")
    assert all(0 < float(x) < 1000 for x in total[1:])
    traffic = [row for row in rows if len(row) == 7 and row[0] in ("decode_chunk", "publish", "update")]
    assert {row[2] for row in traffic if row[0] == "publish" and row[1] == "all-gather"} == {"bf16"}
    # Weights are gathered in the loop over layers, inside the loop over micro-batches.
    assert any(row[0] == "update" and row[1] == "all-gather" and row[2:4] == ["bf16", "2 x 2"] for row in traffic)
    assert "*predicted*: " in text and "MFU of the update" in text
    assert text.splitlines()[-1].startswith("fits: 0.0")


def test_a_large_model_does_not_fit_and_changes_are_suggested(topology, tmp_path):
    """Too large even without temporaries, so nothing is compiled."""
    text = jaxrl_plan(topology, tmp_path, SMALL | {"model": LARGE})
    assert "Not compiled: temporaries are estimated." in text
    verdict = text[text.index("does not fit: needs about") :].splitlines()
    assert (
        verdict[0].endswith("; change")
        and {"tpu": "GB of 16", "gpu": "GB of 60 that JAX takes of 80"}[topology.of] in verdict[0]
    )
    assert "--" in verdict[1] and verdict[-1] == "  and use more chips: that alone does not suffice"


@only_tpu
def test_a_program_that_the_compiler_refuses_does_not_fit(topology, tmp_path):
    """The arrays fit, the temporaries do not: all rows of 32,768 slots in one micro-batch."""
    values = SMALL | {
        "model": SMALL["model"] | {"layers": 1},
        "rollout": {"prompts": 64, "samples": 16, "max_new_tokens": 8192, "engine": {"max_concurrent_prompts": 8}},
        "update": {"micro_batches": 1, "attention": "plain"},
    }
    found = json.loads(jaxrl_plan(topology, tmp_path, values, "--json"))
    assert not found["fits"] and found["programs"]["update"]["refused"]
    assert found["peak"]["phase"] == "update" and found["peak"]["bytes"] > 16e9
    assert any("--update.micro_batches" in advice["flags"] for advice in found["advice"])


@only_gpu
def test_hosts_share_a_network(topology, tmp_path):
    """Two hosts of two GPUs, `tensor` within a host: weights and gradients cross the network, activations do not."""
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(SMALL))
    command = [sys.executable, "-m", "jaxrl_llm.cli", "plan", str(path), "--topology", "h100:2x2"]
    found = subprocess.run([*command, "--json"], capture_output=True, text=True, cwd=ROOT, timeout=900)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    network = {name: [t for t in p["traffic"] if t["network"]] for name, p in report["programs"].items()}
    large = [t for t in report["programs"]["decode_chunk"]["traffic"] if t["dtype"] == "bf16"]
    assert large and not any(t["network"] for t in large)
    kinds = {t["kind"] for t in network["update"] if t["bytes"] > 1e5}
    assert kinds & {"all-gather"} and kinds & {"reduce-scatter", "all-reduce"}, network["update"]
    assert all(t["network"] <= t["bytes"] for traffic in network.values() for t in traffic)


def test_the_sweep_compiles_the_fastest_of_those_that_fit(topology, monkeypatch):
    """Estimates choose, in order of predicted time; the compiled results are ranked."""
    asked = []

    def compiled(command: list[str], candidate: sweep.Candidate) -> dict:
        asked.append(candidate)
        predicted = {"step_seconds": 9.0 - len(asked), "mfu": 0.1}
        return {
            "flags": " ".join(candidate.flags), "fits": len(asked) != 1, "predicted": predicted,
            "mesh": dict(zip("abcd", candidate.mesh, strict=True)), "micro_batches": candidate.micro_batches, "peak": {"bytes": 1},
        }  # fmt: skip

    monkeypatch.setattr(sweep, "compile_candidate", compiled)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    cfg = validate(SMALL, "test")
    found = sweep.sweep(cfg, Target(NAMES[topology.of]), [], 3)
    # 2 x 2 devices on four axes: ten meshes; valid are five, without expert axis and without tensor 4 (kv_heads is 2).
    assert (found["meshes"], found["possible"]) == (10, 5)
    assert len({candidate.mesh for candidate in asked}) == 3 and [f.seconds for f in asked] == sorted(
        f.seconds for f in asked
    )
    # The first did not fit; of the others the faster comes first.
    assert [r["fits"] for r in found["compiled"]] == [True, True, False]
    assert found["compiled"][0]["flags"] == " ".join(asked[2].flags)
