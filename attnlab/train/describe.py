"""Summary of an experiment before training: parameters, FLOPs, memory and input shapes."""

import math
from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AbstractMesh

from attnlab import sharding
from attnlab.layers.linear import parameter_name
from attnlab.train.attention_backends import LayerBackend, layer_backends
from attnlab.train.partition import combine
from attnlab.train.session import Session


def describe(session: Session) -> str:
    """Return a text: parameters, FLOPs per token, bytes per device, batch and attention backends.

    Each parameter is listed with its shape, dtype, PartitionSpec and size. The memory of
    activations comes from the compiled training step; an abstract mesh cannot compile it. Each
    attention layer is listed with its spec, queries x keys, its backend, and the refusals of the
    backends before it.
    """
    e, state = session.experiment, session.abstract_state
    flops = e.model.token_flops(session.tokenizer.vocab_size, e.data.sequence_length)
    forward = flops.weights + flops.attention
    activations = [("activations and temporaries", "unknown without the devices")]
    if not isinstance(session.mesh, AbstractMesh):
        memory = session.compile_train_step().memory_analysis()
        size = _bytes(memory.temp_size_in_bytes) if memory else "unknown"
        activations = [("activations and temporaries", size)]
        if memory and memory.host_temp_size_in_bytes:
            activations.append(("activations in host memory", _bytes(memory.host_temp_size_in_bytes)))
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
                    f"{session.mesh.size} of {sharding.mesh_device(session.mesh).device_kind}",
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
                *activations,
            ],
        ),
        ("batch", batch),
    ]
    text = "\n\n".join(f"{title}\n{table(rows)}" for title, rows in sections)
    layers = layer_backends(session)
    return f"{text}\n\nattention\n{_attention(layers)}" if layers else text


def _attention(layers: list[LayerBackend]) -> str:
    """Return a line for each layer, with the refusals below."""
    shapes = [(layer.selection.query[1], layer.selection.keys[1]) for layer in layers]
    lines = table(
        (layer.layer, layer.spec, f"{queries} x {keys}", str(layer.selection))
        for layer, (queries, keys) in zip(layers, shapes, strict=True)
    ).splitlines()
    return "\n".join(
        "\n    ".join([line, *layer.refusals]) for line, layer in zip(lines, layers, strict=True)
    )


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
