"""`python -m benchmarks.aot --shape DIR --topology v5e:4x4 --mesh 2,2,4 [--layout wide]`: decoding under the TPU compiler.

One program of the engine, compiled ahead of time from shapes alone with the real TPU compiler; no TPU is needed. Adds one JSON
object to --out: bytes per chip (as compiled, and as `plan.decode_memory` predicts), collectives by location (`step`, in the inner
loop; `interval`, between two checks for active rows; `chunk`, once), with the bytes of their results per chip, and copied arrays of
a cache's or a weight's size.

--layout   of the policy: replicated, wide, or the sizes of separate axes, as 8,1,2
--program  decode_chunk (default), prefill or publish
--options  compiler options as JSON
--layers   number of layers, by default all of the model's
"""

import argparse
import dataclasses
import datetime
import json
import os
import time
from collections import defaultdict
from pathlib import Path

# Before libtpu loads: no requests to a metadata server, and no lock against other compilations.
os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from jax.experimental import topologies
from jax.stages import Compiled, Lowered

from jaxrl_llm.model import params as model_params
from jaxrl_llm.model.config import ModelConfig
from jaxrl_llm.model.hf.config import read_config
from jaxrl_llm.model.publish import abstract_policy, jit_publish
from jaxrl_llm.parallel.config import MeshConfig
from jaxrl_llm.parallel.layout import TRAIN, Layout
from jaxrl_llm.parallel.mesh import make_mesh
from jaxrl_llm.perf.hlo import HloModule, Instruction, collectives
from jaxrl_llm.perf.work import bytes_per_device
from jaxrl_llm.plan.decode_memory import decode_memory
from jaxrl_llm.rollout.config import EngineConfig, RolloutConfig
from jaxrl_llm.rollout.engine import Engine, EngineModel
from jaxrl_llm.rollout.programs import Programs
from jaxrl_llm.rollout.sample import Vocabulary

VMEM = "S(1)"
PLACES = ("chunk", "interval", "step")


def lowered(args: argparse.Namespace, cfg: ModelConfig, train: Layout, decode: Layout) -> Lowered:
    policy = abstract_policy(cfg, decode)
    if args.program == "publish":
        masters = model_params.abstract(model_params.specs(cfg), train)
        return jit_publish(cfg, train, decode).lower(masters, policy.version, policy)
    sizes = (args.prompts, args.slots if args.program == "prefill" else args.window)
    return programs_of(args, cfg, decode).lower(policy.params, args.program, *sizes)


def programs_of(args: argparse.Namespace, cfg: ModelConfig, decode: Layout) -> Programs:
    vocab = Vocabulary(size=cfg.vocab_size, pad=0, eos=(1,))
    engine = EngineConfig(decode_chunk=args.chunk)
    rollout = RolloutConfig(prompts=args.prompts, samples=args.samples, max_new_tokens=args.window, engine=engine)
    return Engine(EngineModel(cfg, decode, vocab), rollout, args.slots).programs


def bytes_of(compiled: Compiled) -> dict[str, int]:
    memory = compiled.memory_analysis()
    parts = {
        "arguments": memory.argument_size_in_bytes,
        "outputs": memory.output_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "aliased": memory.alias_size_in_bytes,
    }
    return {"chip": parts["arguments"] + parts["outputs"] + parts["temporaries"] - parts["aliased"], **parts}


def moved(module: HloModule) -> dict[str, dict[str, dict[str, int]]]:
    """Collectives by location and kind: count, and bytes of their results per chip."""
    found: dict = {place: defaultdict(lambda: {"count": 0, "bytes": 0}) for place in PLACES}
    for i in collectives(module.all):
        entry = found[PLACES[module.loops[i.computation]]][i.kind]
        entry["count"] += 1
        entry["bytes"] += sum(a.bytes for a in i.arrays)
    return found


def copied(module: HloModule, sizes: set[int]) -> dict[str, int]:
    """Count, by location, arrays of these sizes in bytes that are copied within main memory, or back into it from on-chip memory.

    Instructions inside a fusion allocate no array.
    """
    found: dict[str, int] = defaultdict(int)

    def counts(i: Instruction) -> bool:
        into = i.line.split(f" {i.opcode}(")[0]
        return i.opcode in ("copy", "copy-done") and VMEM not in into and i.arrays[0].bytes in sizes

    for name, depth in module.loops.items():
        for i in module.computations.get(name, ()):
            if name not in module.fused and counts(i):
                how = "copied" if i.opcode == "copy" else "moved back"
                found[f"{PLACES[depth]} {how} {i.arrays[0]}"] += 1
    return found


def report(args: argparse.Namespace, cfg: ModelConfig, train: Layout, decode: Layout) -> dict:
    start = time.monotonic()
    program = lowered(args, cfg, train, decode)
    traced = time.monotonic()
    compiled = program.compile(compiler_options=json.loads(args.options))
    took = {"trace": round(traced - start, 1), "compile": round(time.monotonic() - traced, 1)}
    module = HloModule(compiled.as_text())
    given = {
        "shape": args.shape.name, "layers": cfg.layers, "topology": args.topology, "mesh": args.mesh, "layout": args.layout,
        "program": args.program, "options": json.loads(args.options), "jax": jax.__version__,
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    sizes = {name: getattr(args, name) for name in ("prompts", "samples", "slots", "window", "chunk")}
    found = {**given, "sizes": sizes, "seconds": took, "bytes": bytes_of(compiled), "collectives": moved(module)}
    if args.program == "decode_chunk":
        params = abstract_policy(cfg, decode).params
        predicted = decode_memory(programs_of(args, cfg, decode), params, args.prompts, args.window)
        layer = {bytes_per_device(x) for x in params["layers"][0].values() if x.ndim > 1}
        caches = {n // (2 * cfg.layers) for n in (predicted.prompt, predicted.suffix)}
        tables = {bytes_per_device(params[name]) for name in ("embed", "head") if name in params}
        found["predicted"] = {"chip": predicted.total, **predicted._asdict()}
        found["off"] = round(predicted.total / found["bytes"]["chip"] - 1, 4)
        found["copied"] = {"caches": copied(module, caches), "weights": copied(module, (layer | tables) - caches)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=Path, required=True)
    parser.add_argument("--topology", default="v5e:4x4")
    parser.add_argument("--mesh", default="2,2,4")
    parser.add_argument("--layout", default="replicated")
    parser.add_argument("--program", default="decode_chunk", choices=("decode_chunk", "prefill", "publish"))
    parser.add_argument("--options", default="{}")
    parser.add_argument("--layers", type=int)
    for name, default in (("prompts", 64), ("samples", 8), ("slots", 1024), ("window", 1024), ("chunk", 128)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    cfg = read_config(args.shape, "bfloat16")
    cfg = dataclasses.replace(cfg, layers=args.layers or cfg.layers)
    devices = topologies.get_topology_desc(platform="tpu", topology_name=args.topology).devices
    train = Layout(make_mesh(*map(int, args.mesh.split(",")), devices=devices), TRAIN)
    choice = args.layout if args.layout.isalpha() else MeshConfig(*map(int, args.layout.split(",")))
    found = report(args, cfg, train, train.for_decode(choice))
    print(json.dumps(found))
    if args.out:
        before = json.loads(args.out.read_text()) if args.out.exists() else []
        args.out.write_text("[\n" + ",\n".join(json.dumps(x) for x in [*before, found]) + "\n]\n")


if __name__ == "__main__":
    main()
