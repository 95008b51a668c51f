"""Processes of one job: how they start, and how values get from every host to all and from the host to the mesh.

The host's part of a step (prompts, rewards, filter, replay) runs on every process over equal values, so no process leads.
"""

import os

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Sharding

from jaxrl_llm.errors import UserError
from jaxrl_llm.types import PyTree

# Set by launch/local.py, and by anyone whose cluster jax.distributed does not know by itself.
DESCRIBED = ("JAX_COORDINATOR_ADDRESS", "JAXRL_NUM_PROCESSES", "JAXRL_PROCESS_ID")
# Set to 1 on Slurm, Cloud TPU and GKE, where jax.distributed finds the other processes by itself.
DETECTED = "JAXRL_DISTRIBUTED"


def start_distributed() -> None:
    """Join the job that the environment describes, before anything touches a device; alone if it describes none."""
    given = [name for name in DESCRIBED if os.environ.get(name)]
    if len(given) == len(DESCRIBED):
        address = os.environ["JAX_COORDINATOR_ADDRESS"]
        jax.distributed.initialize(
            coordinator_address=address,
            num_processes=int(os.environ["JAXRL_NUM_PROCESSES"]),
            process_id=int(os.environ["JAXRL_PROCESS_ID"]),
            # Inside Slurm, detection would still give each process one device only.
            cluster_detection_method="deactivate",
            # JAX's default listens on every interface.
            coordinator_bind_address=address if address.startswith("127.0.0.1:") else None,
        )
    elif os.environ.get(DETECTED) == "1":
        jax.distributed.initialize()
    elif given:
        missing = ", ".join(name for name in DESCRIBED if name not in given)
        raise UserError(f"distributed start: got {', '.join(given)}, want also {missing}")


def put(tree: PyTree, sharding: Sharding | PyTree) -> PyTree:
    """NumPy arrays, equal on every host, to global arrays; each host copies the bytes of its own devices only."""
    if jax.process_count() == 1:
        return jax.device_put(tree, sharding)

    def place(x: np.ndarray, where: Sharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    if isinstance(sharding, Sharding):
        return jax.tree.map(lambda x: place(x, sharding), tree)
    return jax.tree.map(place, tree, sharding)


def gather(tree: PyTree) -> PyTree:
    """Global arrays to whole NumPy arrays, equal on every host."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def each_from(tree: PyTree, owner: np.ndarray) -> PyTree:
    """Arrays whose entry i along the first axis is that of the host owner[i], equal on every host."""
    if jax.process_count() == 1:
        return tree
    every = multihost_utils.process_allgather(tree)
    return jax.tree.map(lambda x: x[owner, np.arange(len(owner))], every)


def all_agree(value: bool) -> bool:
    """True where it is true on every host."""
    if jax.process_count() == 1:
        return value
    return bool(np.all(multihost_utils.process_allgather(np.asarray(value))))
