"""Attention maps of a model: which token every head attends to, layer by layer."""

import operator
import re
from collections.abc import Mapping
from functools import partial, reduce

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float

from attnlab.errors import InputError
from attnlab.sharding import constrain

BLOCK_GROUPS = ("first", "periods", "tail")  # where a stack keeps its blocks


def attention_maps(
    model: nn.Module, params, stack: str = "layers", branch: str = "attention", **inputs
) -> Float[np.ndarray, "L B H T S"]:
    """Return the attention weights of every layer and head for these inputs, first layer first.

    The `reference` backend computes the weights: capturing them changes the path, not the result.

    Args:
      model: a model with a stack of blocks.
      params: its parameters.
      stack: the path of the stack, where the model has several: "encoder/layers", for example.
      branch: "attention" or "cross_attention".
      **inputs: arrays by name, as in `Batch.inputs`: `tokens=...`.

    Raises:
      InputError: an input is no array or has no name, or the model has no such stack or branch.
    """
    for name, value in {"stack": stack, "branch": branch}.items():
        if not isinstance(value, str):
            raise InputError(
                f"attention_maps(model, params, tokens=...) takes its inputs by name: got "
                f"{type(value).__name__} as {name}"
            )
    for name, value in inputs.items():
        if value is not None and not isinstance(value, np.ndarray | jax.Array):
            raise InputError(f"{name} must be an array, got {type(value).__name__}: pass np.asarray({name})")
    return jax.device_get(_maps(model, stack, branch, params, inputs))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _maps(model: nn.Module, stack: str, branch: str, params, inputs) -> Float[Array, "L B H T S"]:
    _, captured = model.apply({"params": params}, **inputs, mutable=["intermediates"], method="hidden")
    branches = _captured_branches(captured.get("intermediates", {}))
    if branch not in branches.get(stack, ()):
        there = "; ".join(f"stack {name!r}: {', '.join(sorted(found))}" for name, found in branches.items())
        raise InputError(f"no branch {branch!r} in stack {stack!r}; the model has {there or 'no attention'}")
    layers = reduce(operator.getitem, stack.split("/"), captured["intermediates"])
    return in_order(layers, branch, "attention_weights")


def _captured_branches(intermediates: Mapping) -> dict[str, set[str]]:
    """Return the branches that captured attention weights, by the path of their stack."""
    found: dict[str, set[str]] = {}
    for path in flatten_dict(intermediates):
        if path[-1] == "attention_weights":
            ends = [i for i, part in enumerate(path) if part in BLOCK_GROUPS]
            stack = path[: ends[0]] if ends else path[:-2]
            found.setdefault("/".join(stack), set()).add(path[-2])
    return found


def in_order(layers: dict, *path: str) -> Float[Array, "L ..."]:
    """Return what each layer of a stack captured under this path, first layer first.

    A recurrent stack has one layer.
    """
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
    # Scanned and unscanned layers are sharded differently: replicate both before joining them.
    return jnp.concatenate([constrain(x, *[None] * x.ndim) for x in found])


def _blocks(blocks: dict, path: tuple[str, ...]) -> list[Array]:
    names = sorted(blocks, key=lambda name: int(re.sub(r"\D", "", name)))
    return [reduce(operator.getitem, path, blocks[name])[0] for name in names]
