"""What an experiment is, before anything is trained: parameters, operations, memory, input."""

import math
from collections.abc import Iterable

import jax
import numpy as np

from attnlab import sharding
from attnlab.layers.parameters import parameter_name
from attnlab.train.partition import combine
from attnlab.train.session import Session


def describe(session: Session) -> str:
    """Parameters with shape, dtype and PartitionSpec; operations a token; bytes a device; the batch."""
    e, state = session.experiment, session.abstract_state
    flops = e.model.token_flops(session.tokenizer.vocab_size, e.data.sequence_length)
    forward = flops.weights + flops.attention
    memory = session.compile_train_step().memory_analysis()
    parameters: list[tuple[str, ...]] = [
        (parameter_name(path), _shape(x), str(x.dtype), _spec(x), f"{x.size:,}")
        for path, x in jax.tree_util.tree_leaves_with_path(combine(state.params, state.frozen))
    ]
    num_params = sum(x.size for x in jax.tree.leaves((state.params, state.frozen)))
    parameters.append(("total", "", "", "", f"{num_params:,}"))
    if state.frozen is not None:
        parameters.append(("trained", "", "", "", f"{sum(x.size for x in jax.tree.leaves(state.params)):,}"))
    if idle := e.model.inactive_expert_params():
        parameters.append(("active for a token", "", "", "", f"{num_params - idle:,}"))
    batch: list[tuple[str, ...]] = [
        (name, _dims(shape), str(dtype)) for name, (shape, dtype) in e.data.element_spec().items()
    ]
    sections: list[tuple[str, list[tuple[str, ...]]]] = [
        (
            "mesh",
            [
                (
                    sharding.format_mesh(session.mesh),
                    f"{session.mesh.size} of {session.mesh.devices.flat[0].device_kind}",
                )
            ],
        ),
        ("parameters", parameters),
        (
            "FLOPs a token",
            [
                ("weights, forward", f"{flops.weights:,.0f}", f"{flops.weights / forward:.1%}"),
                ("attention, forward", f"{flops.attention:,.0f}", f"{flops.attention / forward:.1%}"),
                ("training", f"{flops.training:,.0f}", ""),
            ],
        ),
        (
            "bytes a device",
            [
                ("parameters", _bytes(per_device((state.params, state.frozen)))),
                ("optimizer", _bytes(per_device(state.opt_state) + per_device(state.ema))),
                ("activations and temporaries", _bytes(memory.temp_size_in_bytes) if memory else "unknown"),
            ],
        ),
        ("batch", batch),
    ]
    return "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections)


def per_device(tree) -> int:
    """Bytes of a tree of abstract arrays on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Rows as aligned columns, numbers to the right."""
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(width) if cell[:1].isdigit() else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def _shape(x) -> str:
    return _dims(x.shape)


def _dims(shape) -> str:
    return "(" + ", ".join(map(str, shape)) + ")"


def _spec(x) -> str:
    return "P(" + ", ".join(repr(axis) if axis else "-" for axis in x.sharding.spec) + ")"


def _bytes(count: float) -> str:
    unit = int(np.log2(max(count, 1)) // 10)
    return f"{count / 1024**unit:,.1f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[unit]}"
