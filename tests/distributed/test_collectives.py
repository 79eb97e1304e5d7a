"""The rows of a batch that each process of a job holds."""

import jax
import pytest

from attnlab import sharding
from attnlab.distributed.collectives import row_share


class Device:
    """A device of a process."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, index, per_process):
        self.id, self.process_index = index, index // per_process


@pytest.mark.parametrize(
    ("mesh", "per_process", "shares"),
    [
        ("expert:8", 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("data:2,expert:4", 4, [(0, 2), (1, 2)]),
        ("data:2,expert:4", 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("fsdp:2,expert:2,tensor:2", 2, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ("expert:2,tensor:4", 2, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ("expert:2,sequence:4", 4, [(0, 2), (1, 2)]),
    ],
)
def test_processes_hold_consecutive_rows_of_a_mesh_with_experts(monkeypatch, mesh, per_process, shares):
    devices = [Device(i, per_process) for i in range(8)]
    rows = jax.NamedSharding(
        sharding.make_mesh(sharding.parse_mesh(mesh, 8), devices), sharding.spec("batch")
    )
    found = []
    for process in range(8 // per_process):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        found.append(row_share(rows, 16))
    assert found == shares
