"""The compilers of accelerators that need not exist here: what each needs, and the devices that it compiles for.

Importing this does not import jax: the compilers' environment variables must be set before.
"""

import importlib.metadata
import importlib.util
import os
from typing import TYPE_CHECKING, NamedTuple

from jaxrl_llm.errors import UserError
from jaxrl_llm.perf.chips import Topology

if TYPE_CHECKING:
    import jax

# No local accelerator is used. JAX can write programs for a topology to its cache, but not read them back.
ENVIRONMENT = {"JAX_ENABLE_COMPILATION_CACHE": "false", "TF_CPP_MIN_LOG_LEVEL": "3"}
# No query to a metadata server, no lock against other compilations, no search for workers.
OF_TPUS = {
    "TPU_SKIP_MDS_QUERY": "1",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
}
GPU_COMPILERS = ("jax-cuda12-plugin", "jax-cuda13-plugin")


class Gpu(NamedTuple):
    """A GPU as XLA describes it to its compiler (openxla/xla, xla/backends/gpu/target_config/specs)."""

    description: str
    capability: int
    """Major version of the compute capability."""
    cores: int
    """Streaming multiprocessors."""
    fpus_per_core: int
    clock_ghz: float
    memory: int
    """Bytes."""
    bandwidth: int
    """Bytes per second."""
    l2_cache: int
    """Bytes."""
    shared_per_core: int = 233472
    """Bytes."""
    shared_per_block: int = 232448
    """Bytes at most."""

    @property
    def target_config(self) -> str:
        """A GpuTargetConfigProto as text. Without autotuning nothing is timed, so only sizes and the kind of chip matter."""
        accelerated = "ACCELERATED_FEATURES" if self.capability >= 9 else "NONE"
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {self.shared_per_core}
  shared_memory_per_block_optin: {self.shared_per_block}
  core_count: {self.cores} fpus_per_core: {self.fpus_per_core} clock_rate_ghz: {self.clock_ghz}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} device_memory_size: {self.memory} l2_cache_size: {self.l2_cache}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  cuda_compute_capability {{ major: {self.capability} feature_extension: {accelerated} }}
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 8 }}
device_description_str: "{self.description}"
"""


# By the name of the chip in `perf.chips`.
GPUS = {
    "A100 80GB": Gpu(
        "NVIDIA A100-SXM4-80GB", 8, 108, 64, 1.41, 85_100_068_864, 2_039_040_000_000, 41_943_040, 167_936, 166_912
    ),
    "H100": Gpu("NVIDIA H100 80GB HBM3", 9, 132, 128, 1.98, 84_942_979_072, 3_352_320_000_000, 52_428_800),
    "H200": Gpu("NVIDIA H200 141GB HBM3e", 9, 132, 128, 1.98, 151_397_597_184, 4_800_000_000_000, 52_428_800),
    "B200": Gpu("NVIDIA B200", 10, 148, 128, 1.965, 191_514_411_008, 7_672_320_000_000, 132_644_864),
}


def prepare(topology: Topology) -> None:
    """Set environment variables, before jax is imported. Raises UserError if the topology's compiler is not installed."""
    check(topology)
    os.environ["JAX_PLATFORMS"] = "cpu"
    for name, value in (ENVIRONMENT | ({} if topology.has_gpus else OF_TPUS)).items():
        os.environ.setdefault(name, value)


def check(topology: Topology) -> None:
    """Raise UserError if the topology's compiler is not installed."""
    if topology.has_gpus:
        _check_gpu_compiler()
    elif importlib.util.find_spec("libtpu") is None:
        raise UserError("--topology: got no TPU compiler, want libtpu: pip install 'jaxrl-llm[tpu]'; it needs no TPU")


def _check_gpu_compiler() -> None:
    want = importlib.metadata.version("jax")
    found = {name: version for name in GPU_COMPILERS if (version := _version(name))}
    if want not in found.values():
        got = ", ".join(f"{name} {version}" for name, version in found.items()) or "no GPU compiler"
        raise UserError(
            f"--topology: got {got}, want the one of jax {want}: pip install 'jaxrl-llm[plan-gpu]' jax-cuda12-plugin=={want}; it "
            "needs no GPU and no driver"
        )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def devices_of(topology: Topology, name: str) -> "list[jax.Device]":
    """Return the devices of a topology, those of each host together. Raises UserError if the compiler refuses it.

    Args:
        topology: of TPUs or GPUs.
        name: its name.
    """
    import jax
    from jax.experimental import topologies

    if topology.has_gpus:
        gpus, hosts = topology.sizes
        options = {"platform": "cuda", "topology_name": name, "topology": f"1x{hosts}x{gpus}"}
        options["target_config"] = GPUS[topology.chip.name].target_config
    else:
        options = {"platform": "tpu", "topology_name": name}
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except jax.errors.JaxRuntimeError as error:
        compiler = "XLA:GPU" if topology.has_gpus else "libtpu"
        raise UserError(f"--topology: got {name}, which {compiler} refuses: {str(error).splitlines()[0]}") from None
