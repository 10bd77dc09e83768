"""Several processes as one run: joining them, placing arrays on devices of all of them, and agreeing on a number."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
FAILED = 1  # exit code of a process that cannot go on without its peers
_GRACE = 60  # seconds by which our own timeout precedes jax's, which aborts the process with a stack trace
_TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")


def connect(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None, timeout: int = 300
) -> None:
    """Joins the processes of one run; call it before anything touches a device.

    Arguments that are None are read from SLURM, Open MPI, GKE or the TPU. `timeout` (seconds) is how long peers may
    take to come, to end, and to stay silent before they count as dead; then this process ends with exit code 1 (134
    where jax's own watch finds a dead peer first), wherever it waits. Raises: ValueError where nothing says who the
    peers are.
    """
    if timeout < 1:
        raise ValueError(f"--timeout {timeout}: at least 1 second")
    # SIGTERM is answered by training.preemption; jax's service would take it for itself.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(timeout, f"not all processes of this run came together within {timeout} s (--timeout)"):
        try:
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                initialization_timeout=timeout + _GRACE,
                heartbeat_timeout_seconds=min(timeout, 100),
                shutdown_timeout_seconds=timeout,
            )
        except (ValueError, TypeError, RuntimeError, KeyError, OSError) as error:
            raise ValueError(
                f"the processes of this run cannot be joined ({str(error).strip().splitlines()[0]}); start it under "
                "SLURM, Open MPI or on a TPU slice, or give --coordinator HOST:PORT --processes N --process I"
            ) from error
        found = jax.process_count()  # starts the devices, which waits for those of all peers
    if processes is not None and found != processes:
        raise ValueError(f"--processes {processes}, but the devices belong to {found} processes")


def refuse_one_of_many() -> None:
    """ValueError in a process that a launcher started with others, but that was not told to join them."""
    counts = {name: os.environ.get(name, "1") for name in _TASKS}
    counts["TPU_WORKER_HOSTNAMES"] = str(len(os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")))
    for name, count in counts.items():
        if count != "1":
            raise ValueError(f"this is one of {count} processes ({name}): --distributed joins them to one run")


@contextmanager
def _deadline(seconds: float, message: str):
    """Ends the process with one line and exit code 1 if the block is not left in time, even inside a library call."""

    def end() -> None:
        sys.stderr.write(f"train.py: {message}\n")
        sys.stderr.flush()
        os._exit(FAILED)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def is_main() -> bool:
    """Whether this process writes the files that a run has once."""
    return jax.process_index() == 0


def wait_for_all(name: str) -> None:
    """Returns once every process is here."""
    multihost_utils.sync_global_devices(name)


def put(tree: PyTree, shardings: PyTree) -> PyTree:
    """Arrays that every process holds whole, placed by `shardings` (a tree alike), also on devices of other processes.

    `jax.device_put` does this within one process; between processes it refuses keys and leaves equal on all hosts.
    """
    if jax.process_count() == 1:
        return jax.device_put(tree, shardings)
    return jax.tree.map(_put, tree, shardings)


def _put(leaf: Any, sharding: NamedSharding) -> jax.Array:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding == sharding else jax.jit(lambda x: x, out_shardings=sharding)(leaf)
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    host = np.asarray(leaf)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def fetch(tree: PyTree) -> PyTree:
    """The tree as host arrays, leaf by leaf; a leaf split over processes is gathered, so all of them must call."""

    def one(leaf: Any) -> Any:
        if isinstance(leaf, jax.Array) and not (leaf.is_fully_addressable or leaf.is_fully_replicated):
            return multihost_utils.process_allgather(leaf, tiled=True)
        return jax.device_get(leaf)

    return jax.tree.map(one, tree)


def own_rows(batch: Mapping[str, Any]) -> dict[str, Any]:
    """This process's share of a global batch that every process holds."""
    index, count = jax.process_index(), jax.process_count()

    def share(leaf: np.ndarray) -> np.ndarray:
        rows = len(leaf) // count
        return leaf[index * rows : (index + 1) * rows]

    return jax.tree.map(share, dict(batch))


class Agreement:
    """The largest of one small number a process, known to all of them at the same call.

    With several processes a call answers for the numbers of the call before: the device finishes that exchange while
    the host prepares the next step, so nobody waits.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._before: jax.Array | None = None

    def __call__(self, number: int) -> int:
        if jax.process_count() == 1:
            return number
        own = np.full(len(self._mesh.local_devices), number, np.int32)
        over_all = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
        shared = jax.make_array_from_process_local_data(over_all, own)
        before, self._before = self._before, self._largest(shared)
        return 0 if before is None else int(before)
