"""Agreement between the processes of a job, and host values of arrays that span processes."""

import json
import time
from functools import cache
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def broadcast(value: Any) -> Any:
    """Return the value of process 0, which JSON can represent, in every process."""
    if jax.process_count() == 1:
        return value
    content = json.dumps(value).encode() if jax.process_index() == 0 else b""
    padded = np.zeros(largest(len(content)), np.int32)
    padded[: len(content)] = np.frombuffer(content, np.uint8)
    return json.loads(_processes().largest(padded).astype(np.uint8).tobytes())


def largest(number: int) -> int:
    """Return the largest number of all processes. Every process waits for the others."""
    if jax.process_count() == 1:
        return number
    return int(_processes().largest(np.array(number, np.int32)))


class _Processes:
    """Programs on one device of each process, so that no device is busy when a result is there."""

    def __init__(self) -> None:
        first: dict[int, Any] = {}
        devices: Any = jax.devices()
        for device in devices:
            first.setdefault(device.process_index, device)
        mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
        self._sharding = NamedSharding(mesh, P("process"))
        self._maximum = jax.jit(lambda x: x.max(axis=0), out_shardings=NamedSharding(mesh, P()))

    def start_largest(self, numbers: np.ndarray) -> jax.Array:
        """Start the elementwise maximum of the int32 arrays of all processes."""
        parts = jax.make_array_from_process_local_data(self._sharding, numbers[None])
        return self._maximum(parts)

    def largest(self, numbers: np.ndarray) -> np.ndarray:
        """Return the elementwise maximum of the int32 arrays of all processes."""
        return np.asarray(self.start_largest(numbers).addressable_data(0))


@cache
def _processes() -> _Processes:
    return _Processes()


def barrier() -> None:
    """Wait until every process has called it."""
    largest(0)


def one_at_a_time(tree: Any) -> Any:
    """Return the results of a program; in a job on CPUs, wait for all of them first.

    CPUs may run the next program at the same time, and the collectives of the two would mix.
    """
    if _may_mix():
        jax.block_until_ready(tree)
    return tree


def settle() -> None:
    """In a job on CPUs, wait for the small programs of a library, whose results are not known."""
    if _may_mix():
        time.sleep(0.1)


def _may_mix() -> bool:
    return jax.process_count() > 1 and jax.default_backend() == "cpu"


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
        return np.asarray(one_at_a_time(replicated).addressable_data(0))

    return jax.tree.map(fetch, tree)


class Vote:
    """The largest number of all processes, one call later, without waiting for them.

    Each call starts a small reduction on the devices, and returns the result of the previous one.
    All processes get the same results in the same order.
    """

    def __init__(self) -> None:
        self._previous: jax.Array | None = None

    def __call__(self, number: int, after: Any = None) -> int:
        """Return the largest number of the previous call; in a single process, this number.

        Args:
          number: this process's number, at least 0.
          after: arrays of the program that runs at the same time, such as those of a training step.
        """
        if jax.process_count() == 1:
            return number
        one_at_a_time(after)
        previous = self._previous
        self._previous = one_at_a_time(_processes().start_largest(np.array(number, np.int32)))
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
