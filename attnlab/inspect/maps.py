"""Attention maps of a model: which token every head looks at, layer by layer."""

import operator
import re
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from attnlab.sharding import constrain


def attention_maps(
    model: nn.Module, params, stack: str = "layers", branch: str = "attention", **inputs
) -> Float[np.ndarray, "L B H T S"]:
    """The weights of every layer and head for these inputs, first layer first.

    The weights come from the reference backend: capturing them changes the path, not the mathematics.

    Args:
      model: any that has a stack of blocks.
      params: its parameters.
      stack: which, where there are several: "encoder/layers", say.
      branch: "attention", or "cross_attention".
      **inputs: as of `Batch.inputs`.
    """
    return jax.device_get(_maps(model, stack, branch, params, inputs))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _maps(model: nn.Module, stack: str, branch: str, params, inputs) -> Float[Array, "L B H T S"]:
    _, captured = model.apply({"params": params}, **inputs, mutable=["intermediates"], method="hidden")
    layers = reduce(operator.getitem, stack.split("/"), captured["intermediates"])
    return in_order(layers, branch, "attention_weights")


def in_order(layers: dict, *path: str) -> Float[Array, "L ..."]:
    """What every layer of a stack captured under this name, first layer first; a recurrent one has one."""
    if path[0] in layers:
        return reduce(operator.getitem, path, layers)[0][None]
    found = []
    if "first" in layers:
        found.append(jnp.stack(_blocks(layers["first"], path)))
    if "periods" in layers:
        periods, axes = layers["periods"], 1
        if "shared" in periods:
            periods, axes = periods["shared"], 2
        blocks = _blocks(periods, path)  # each (periods, ...), or (groups, times, ...)
        found.append(jnp.stack(blocks, axes).reshape(-1, *blocks[0].shape[axes:]))
    if "tail" in layers:
        found.append(jnp.stack(_blocks(layers["tail"], path)))
    # Layers that are scanned over are laid out over a mesh otherwise than those that stand by themselves.
    return jnp.concatenate([constrain(x, *[None] * x.ndim) for x in found])


def _blocks(blocks: dict, path: tuple[str, ...]) -> list[Array]:
    names = sorted(blocks, key=lambda name: int(re.sub(r"\D", "", name)))
    return [reduce(operator.getitem, path, blocks[name])[0] for name in names]
