"""Starting the processes of a job, and moving values between hosts and onto the mesh.

The host part of a step (prompts, rewards, filter, replay) runs on every process with equal values; there is no leader.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxrl_llm.errors import UserError
from jaxrl_llm.types import PyTree

# Set by launch/local.py, and on clusters that jax.distributed does not detect.
JOB_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAXRL_NUM_PROCESSES", "JAXRL_PROCESS_ID")
# Set to 1 on Slurm, Cloud TPU and GKE, where jax.distributed detects the other processes.
AUTODETECT = "JAXRL_DISTRIBUTED"


def start_distributed() -> None:
    """Join the job described by environment variables, if any. Call before anything touches a device."""
    given = [name for name in JOB_VARIABLES if os.environ.get(name)]
    if len(given) == len(JOB_VARIABLES):
        address = os.environ["JAX_COORDINATOR_ADDRESS"]
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=int(os.environ["JAXRL_NUM_PROCESSES"]),
            process_id=int(os.environ["JAXRL_PROCESS_ID"]),
            # Inside Slurm, detection would give each process one device only.
            cluster_detection_method="deactivate",
            # JAX listens on every interface by default.
            coordinator_bind_address=address if address.startswith("127.0.0.1:") else None,
        )
    elif os.environ.get(AUTODETECT) == "1":
        jax.distributed.initialize()
    elif given:
        missing = ", ".join(name for name in JOB_VARIABLES if name not in given)
        raise UserError(f"distributed start: got {', '.join(given)}, want {missing} as well")


def check_alive(name: str, tree: PyTree) -> None:
    """Raise UserError if a program has taken the buffers of `tree` for its result. `name`: in the message."""
    if any(isinstance(x, jax.Array) and x.is_deleted() for x in jax.tree.leaves(tree)):
        raise UserError(
            f"{name}: got arrays whose buffers update or publish has taken for its result, want that result: they donate the state "
            "and the policy that they get; a session gets its next policy by session.use(policy)"
        )


def put(tree: PyTree, sharding: Sharding | PyTree) -> PyTree:
    """Put NumPy arrays, equal on every host, onto the mesh; each host copies only the bytes of its devices."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: np.ndarray, where: Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    if isinstance(sharding, Sharding):
        return jax.tree.map(lambda x: place(x, sharding), tree)
    return jax.tree.map(place, tree, sharding)


def gather(tree: PyTree) -> PyTree:
    """Return global arrays as complete NumPy arrays, equal on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def each_from(tree: PyTree, owner: np.ndarray) -> PyTree:
    """Combine arrays of all hosts: entry i along the first axis is that of host `owner[i]`. The result is equal on every host."""
    if jax.process_count() == 1:
        return tree
    every = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x: x[owner, np.arange(len(owner))], every)


def all_agree(value: bool) -> bool:
    """Return True on every host if `value` is True on every host."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))
