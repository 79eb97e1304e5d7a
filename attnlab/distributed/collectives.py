"""Agreement between the processes of a job, and host values of arrays that span processes."""

import json
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def broadcast(value: Any) -> Any:
    """Return the value of process 0, which JSON can represent, in every process."""
    if jax.process_count() == 1:
        return value
    content = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(content))))
    # Only the values of process 0 count, but the shapes must agree.
    padded = np.zeros(length, np.uint8)
    padded[: min(length, len(content))] = content[:length]
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def largest(number: int) -> int:
    """Return the largest number of all processes. Every process waits for the others."""
    if jax.process_count() == 1:
        return number
    return int(np.max(multihost_utils.process_allgather(np.int32(number))))


def barrier(name: str) -> None:
    """Wait until every process has reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def to_host(tree: Any) -> Any:
    """Return the arrays of a tree as NumPy arrays, whole in every process.

    Every process of the job must call it, because the parts of other processes are gathered.
    """

    def fetch(x):
        if not isinstance(x, jax.Array) or x.is_fully_addressable:
            return x if isinstance(x, np.ndarray) else jax.device_get(x)
        if x.is_fully_replicated:
            return np.asarray(x.addressable_data(0))
        replicated = jax.jit(lambda y: y, out_shardings=NamedSharding(x.sharding.mesh, P()))(x)
        return np.asarray(replicated.addressable_data(0))

    return jax.tree.map(fetch, tree)


class Vote:
    """The largest number of all processes, one call later, without waiting for them.

    Each call starts a small reduction on the devices, and returns the result of the previous one.
    All processes get the same results in the same order.
    """

    def __init__(self) -> None:
        self._previous: jax.Array | None = None
        if jax.process_count() == 1:
            return
        first: dict[int, Any] = {}
        devices: Any = jax.devices()
        for device in devices:
            first.setdefault(device.process_index, device)
        mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
        self._serial = mesh.devices.flat[0].platform == "cpu"
        self._sharding = NamedSharding(mesh, P("process"))
        self._largest = jax.jit(lambda x: x.max(), out_shardings=NamedSharding(mesh, P()))

    def __call__(self, number: int, after: Any = None) -> int:
        """Return the largest number of the previous call; in a single process, this number.

        Args:
          number: this process's number, at least 0.
          after: arrays of the program that runs at the same time, such as those of a training step.
        """
        if jax.process_count() == 1:
            return number
        numbers = jax.make_array_from_process_local_data(self._sharding, np.array([number], np.int32))
        if self._serial:  # the CPU may run two programs at once, and would mix their collectives
            jax.block_until_ready(after)
        previous, self._previous = self._previous, self._largest(numbers)
        if self._serial:
            jax.block_until_ready(self._previous)
        return 0 if previous is None else int(np.asarray(previous.addressable_data(0)))


def row_share(sharding: NamedSharding, num_rows: int) -> tuple[int, int]:
    """Return (index, count) of the equal parts of a batch's rows that this process holds.

    Processes whose devices differ only in axes that do not shard the rows hold the same part.

    Raises:
      ValueError: the processes do not hold equal, contiguous parts.
    """
    parts: dict[int, set[tuple[int, int]]] = {}
    indices: dict[Any, Any] = dict(sharding.devices_indices_map((num_rows,)))
    for device, index in indices.items():
        start, stop, _ = index[0].indices(num_rows)
        parts.setdefault(device.process_index, set()).add((start, stop))
    spans = {process: (min(rows)[0], max(rows)[1]) for process, rows in parts.items()}
    ordered = sorted(set(spans.values()))
    size = num_rows // len(ordered)
    if ordered != [(i * size, (i + 1) * size) for i in range(len(ordered))]:
        raise ValueError(f"the processes do not hold equal parts of the {num_rows} rows: {ordered}")
    return ordered.index(spans[jax.process_index()]), len(ordered)
