"""Attention maps of a model: which token every head looks at, layer by layer."""

import operator
import re
from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab.models import Decoder

Ids = Int[Array, "B T"] | Int[np.ndarray, "B T"]


def attention_maps(
    model: Decoder,
    params,
    tokens: Ids,
    segment_ids: Ids | None = None,
    positions: Ids | None = None,
) -> Float[np.ndarray, "L B H T S"]:
    """The weights of every layer and head for these tokens, first layer first.

    The weights come from the reference backend: capturing them changes the path, not the mathematics.
    """
    return jax.device_get(_maps(model, params, tokens, segment_ids, positions))


@partial(jax.jit, static_argnums=0)
def _maps(model: Decoder, params, tokens, segment_ids, positions) -> Float[Array, "L B H T S"]:
    _, captured = model.apply(
        {"params": params}, tokens, segment_ids, positions, mutable=["intermediates"], method="hidden"
    )
    return in_order(captured["intermediates"]["layers"], "attention", "attention_weights")


def in_order(layers: dict, *path: str) -> Float[Array, "L ..."]:
    """What every layer of a stack captured under this name, first layer first."""
    found = []
    if "periods" in layers:
        blocks = _blocks(layers["periods"], path)  # each (periods, ...)
        found.append(jnp.stack(blocks, axis=1).reshape(-1, *blocks[0].shape[1:]))
    if "tail" in layers:
        found.append(jnp.stack(_blocks(layers["tail"], path)))
    return jnp.concatenate(found)


def _blocks(blocks: dict, path: tuple[str, ...]) -> list[Array]:
    names = sorted(blocks, key=lambda name: int(re.sub(r"\D", "", name)))
    return [reduce(operator.getitem, path, blocks[name])[0] for name in names]
