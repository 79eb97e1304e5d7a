"""Attention maps of a model: the attention weights of every layer and head."""

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

from attnlab.distributed.collectives import to_host
from attnlab.errors import InputError
from attnlab.sharding import constrain

BLOCK_GROUPS = ("first", "periods", "tail")  # parameter groups of a stack that contain blocks


def attention_maps(
    model: nn.Module, params, stack: str = "layers", branch: str = "attention", **inputs
) -> Float[np.ndarray, "L B H T S"]:
    """Return the attention weights of every layer and head for these inputs, first layer first.

    Capturing runs attention on the `reference` backend; the results of the model do not change.

    Args:
      model: a model with a stack of blocks.
      params: its parameters.
      stack: the path of the stack, such as "encoder/layers" in an encoder-decoder model.
      branch: "attention" or "cross_attention".
      **inputs: arrays by name, as in `Batch.inputs`: `tokens=...`.

    Raises:
      InputError: an input is not an array or is passed by position, or the model has no such stack
        or branch.
    """
    for name, value in {"stack": stack, "branch": branch}.items():
        if not isinstance(value, str):
            raise InputError(
                f"attention_maps(model, params, tokens=...) takes inputs as keyword arguments: {name} "
                f"must be a string, got {type(value).__name__}"
            )
    for name, value in inputs.items():
        if value is not None and not isinstance(value, np.ndarray | jax.Array):
            raise InputError(f"{name} must be an array, got {type(value).__name__}: pass np.asarray({name})")
    return to_host(_maps(model, stack, branch, params, inputs))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _maps(model: nn.Module, stack: str, branch: str, params, inputs) -> Float[Array, "L B H T S"]:
    _, captured = model.apply({"params": params}, **inputs, mutable=["intermediates"], method="hidden")
    branches = _captured_branches(captured.get("intermediates", {}))
    if branch not in branches.get(stack, ()):
        available = "; ".join(
            f"stack {name!r}: {', '.join(sorted(names))}" for name, names in branches.items()
        )
        raise InputError(
            f"no branch {branch!r} in stack {stack!r}; the model has {available or 'no attention'}"
        )
    layers = reduce(operator.getitem, stack.split("/"), captured["intermediates"])
    return in_order(layers, branch, "attention_weights")


def _captured_branches(intermediates: Mapping) -> dict[str, set[str]]:
    """Return the names of the branches with captured weights, by the path of their stack."""
    branches: dict[str, set[str]] = {}
    for path in flatten_dict(intermediates):
        if path[-1] == "attention_weights":
            ends = [i for i, part in enumerate(path) if part in BLOCK_GROUPS]
            stack = path[: ends[0]] if ends else path[:-2]
            branches.setdefault("/".join(stack), set()).add(path[-2])
    return branches


def in_order(layers: dict, *path: str) -> Float[Array, "L ..."]:
    """Return the values captured under `path` by each layer of a stack, first layer first.

    A recurrent stack counts as one layer.
    """
    if path[0] in layers:
        return reduce(operator.getitem, path, layers)[0][None]
    groups = []
    if "first" in layers:
        groups.append(jnp.stack(_blocks(layers["first"], path)))
    if "periods" in layers:
        periods, axes = layers["periods"], 1
        if "shared" in periods:
            periods, axes = periods["shared"], 2
        blocks = _blocks(periods, path)  # each (periods, ...), or (groups, repeats, ...) if shared
        groups.append(jnp.stack(blocks, axes).reshape(-1, *blocks[0].shape[axes:]))
    if "tail" in layers:
        groups.append(jnp.stack(_blocks(layers["tail"], path)))
    # Scanned and unscanned layers are sharded differently: replicate both before joining them.
    return jnp.concatenate([constrain(x, *[None] * x.ndim) for x in groups])


def _blocks(blocks: dict, path: tuple[str, ...]) -> list[Array]:
    names = sorted(blocks, key=lambda name: int(re.sub(r"\D", "", name)))
    return [reduce(operator.getitem, path, blocks[name])[0] for name in names]
