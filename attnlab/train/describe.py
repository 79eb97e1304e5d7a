"""Summary of an experiment before training: parameters, FLOPs, memory and input shapes."""

import math
from collections.abc import Iterable

import jax
import numpy as np

from attnlab import sharding
from attnlab.layers.parameters import parameter_name
from attnlab.train.partition import combine
from attnlab.train.session import Session


def describe(session: Session) -> str:
    """Return a text with the parameters, FLOPs per token, bytes per device and batch of a session.

    Each parameter is listed with its shape, dtype, PartitionSpec and size. The memory of
    activations comes from the compiled training step.
    """
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
        parameters.append(("active per token", "", "", "", f"{num_params - idle:,}"))
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
            "FLOPs per token",
            [
                ("weights, forward", f"{flops.weights:,.0f}", f"{flops.weights / forward:.1%}"),
                ("attention, forward", f"{flops.attention:,.0f}", f"{flops.attention / forward:.1%}"),
                ("training", f"{flops.training:,.0f}", ""),
            ],
        ),
        (
            "bytes per device",
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
    """Return the bytes that a tree of abstract arrays takes on each device."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def table(rows: Iterable[tuple[str, ...]]) -> str:
    """Format rows as aligned columns, with numbers right-aligned."""
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
