"""`python -m benchmarks.load [--megabytes N] [--files N] [--dtype D] [--out FILE.json]`: a sharded checkpoint onto 8 CPU devices.

Creates a Llama-shaped checkpoint of the given size in a temporary directory and times, each in a separate process:

    read    every byte of the files into memory, one file after another: the minimum of any loader
    load    `hf.load`, parameters split over the mesh (data 1, fsdp 4, tensor 2), dtype as in the files

Both cold (files dropped from the page cache) and warm, in turns; wall-clock and CPU seconds. Memory is the highest
RssAnon, sampled every 5 ms, and VmHWM, the kernel's peak of resident memory, mapped files included; each above
the memory before the load and above the parameters' bytes. The bound is 1.3 times the largest file.
"""

import argparse
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

HERE = Path(__file__).parent
BOUND = 1.3
SIZES = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16}
SIZES |= {"num_key_value_heads": 8, "head_dim": 128}
REPEATS = 3
LIMIT_S = 3600


def status(*names: str) -> dict[str, int]:
    """Return sizes in bytes from /proc/self/status."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {name: int(lines[name].split()[0]) * 1024 for name in names}


class Peak:
    """The highest RssAnon between enter and exit, sampled, and the kernel's VmHWM, each above its value at enter."""

    def __enter__(self) -> "Peak":
        # Resets VmHWM to the current size.
        Path("/proc/self/clear_refs").write_text("5")
        self.before, self.anon, self.done = status("RssAnon", "VmRSS"), 0, threading.Event()
        self.sampler = threading.Thread(target=self._sample)
        self.sampler.start()
        return self

    def _sample(self) -> None:
        while not self.done.wait(0.005):
            self.anon = max(self.anon, status("RssAnon")["RssAnon"])

    def __exit__(self, *_: object) -> None:
        self.done.set()
        self.sampler.join(timeout=1.0)
        self.anon = max(self.anon, status("RssAnon")["RssAnon"]) - self.before["RssAnon"]
        self.all = status("VmHWM")["VmHWM"] - self.before["VmRSS"]


def make(directory: Path, megabytes: int, files: int, dtype: str) -> None:
    """Write random tensors; all tensors of one shape are the same."""
    import ml_dtypes
    import numpy as np
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.numpy import save_file

    from jaxrl_llm.model import params
    from jaxrl_llm.model.hf.config import read_config
    from jaxrl_llm.model.hf.names import leaves, tensors

    width = {"float32": 4, "bfloat16": 2}[dtype]
    d, f, v = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    layers = max((megabytes * 10**6 // width - 2 * v * d) // (3 * d * f + 3 * d * d), 1)
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES, "num_hidden_layers": layers}
    (directory / "config.json").write_text(json.dumps(config))
    shapes = {n: leaf.shape(p) for n, leaf, p in tensors(leaves(params.specs(read_config(directory))))}
    rng = np.random.default_rng(0)
    kinds = {shape: rng.standard_normal(shape, dtype=np.float32) for shape in set(shapes.values())}
    kinds = {shape: x.astype(ml_dtypes.bfloat16) if width == 2 else x for shape, x in kinds.items()}
    total = sum(kinds[shape].nbytes for shape in shapes.values())
    plan = split_state_dict_into_shards_factory(
        shapes,
        get_storage_size=lambda shape: kinds[shape].nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=total // files + 2**24,
    )
    for file, names in plan.filename_to_tensors.items():
        save_file({name: kinds[shapes[name]] for name in names}, directory / file)
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def drop(directory: Path) -> None:
    """Drop the files from the page cache, so that the next reader waits for the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(directory: Path) -> dict:
    import numpy as np

    start, used = time.perf_counter(), time.process_time()
    held = [np.fromfile(path, np.uint8) for path in sorted(directory.glob("*.safetensors"))]
    seconds, cpu = time.perf_counter() - start, time.process_time() - used
    return {"seconds": seconds, "cpu_seconds": cpu, "bytes": sum(x.nbytes for x in held)}


def load(directory: Path, dtype: str) -> dict:
    import jax
    import numpy as np

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    from jaxrl_llm.model import params
    from jaxrl_llm.model.hf import load as loading
    from jaxrl_llm.model.hf.config import read_config
    from jaxrl_llm.parallel.layout import TRAIN, Layout
    from jaxrl_llm.parallel.mesh import make_mesh

    layout = Layout(make_mesh(1, 4, 2), TRAIN)
    specs = params.specs(read_config(directory))
    jax.block_until_ready(jax.device_put(np.zeros(8), layout.replicated))
    with Peak() as peak:
        start, used = time.perf_counter(), time.process_time()
        tree = jax.block_until_ready(loading.load(directory, specs, layout, np.dtype(dtype)))
        seconds, cpu = time.perf_counter() - start, time.process_time() - used
    # On all devices: a leaf that is not split is on all eight.
    own = sum(shard.data.nbytes for x in jax.tree.leaves(tree) for shard in x.addressable_shards)
    return {
        "seconds": seconds,
        "cpu_seconds": cpu,
        "parameter_bytes": own,
        "peak_anonymous_above_parameters": peak.anon - own,
        "peak_resident_above_parameters": peak.all - own,
    }


def fresh(what: str, directory: Path, dtype: str) -> dict:
    command = [sys.executable, "-m", "benchmarks.load", "--only", what, "--directory", str(directory), "--dtype", dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=LIMIT_S)
    return json.loads(done.stdout.splitlines()[-1])


def measure(directory: Path, dtype: str) -> dict:
    """Time cold and warm, read and load in turns."""
    found: dict[str, list[dict]] = {f"{what} {how}": [] for how in ("cold", "warm") for what in ("read", "load")}
    for _ in range(REPEATS):
        for how in ("cold", "warm"):
            for what in ("read", "load"):
                if how == "cold":
                    drop(directory)
                found[f"{what} {how}"].append(fresh(what, directory, dtype))
                print(what, how, found[f"{what} {how}"][-1], file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.load", description=__doc__.split("\n\n")[1])
    parser.add_argument("--megabytes", type=int, default=2000)
    parser.add_argument("--files", type=int, default=4)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--only", choices=("read", "load"), help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.only:
        print(json.dumps(read(given.directory) if given.only == "read" else load(given.directory, given.dtype)))
        return
    from benchmarks.machine import machine

    ran_on = machine()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        make(directory, given.megabytes, given.files, given.dtype)
        sizes = [path.stat().st_size for path in sorted(directory.glob("*.safetensors"))]
        found = measure(directory, given.dtype)
    best = {what: min(run["seconds"] for run in runs) for what, runs in found.items()}
    memory = {
        kind: max(run[f"peak_{kind}_above_parameters"] for what in ("load cold", "load warm") for run in found[what])
        for kind in ("anonymous", "resident")
    }
    result = {
        "date": datetime.date.today().isoformat(),
        "command": f"python -m benchmarks.load {' '.join(sys.argv[1:])}".strip(),
        "machine": ran_on | {"load_after": os.getloadavg()[0]},
        "checkpoint": {"dtype": given.dtype, "file_bytes": sizes, "devices": 8, "mesh": [1, 4, 2]},
        "best_seconds": best,
        "load_over_read": {how: best[f"load {how}"] / best[f"read {how}"] for how in ("cold", "warm")},
        "peak_above_parameters_over_largest_file": {kind: n / max(sizes) for kind, n in memory.items()},
        "bound": BOUND,
        "runs": found,
    }
    out = given.out or HERE / "results" / f"load-cpu-{result['date']}.json"
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(
        json.dumps(
            {k: result[k] for k in ("best_seconds", "load_over_read", "peak_above_parameters_over_largest_file")},
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
