"""Masks: which (query, key) pairs may attend."""

from attnlab.attention.masks.base import Mask, mask_fn, per_head, shift_mask
from attnlab.attention.masks.basic import causal, segments, window
from attnlab.attention.masks.grids import neighbourhood, sliding_tile, tile_order
from attnlab.attention.masks.intervals import (
    block_causal,
    block_diffusion,
    chunked,
    islands,
    key_lengths,
    media,
    prefix,
    shared_prefix,
    sinks_and_window,
)
from attnlab.attention.masks.sparse import bigbird, blocks, dilated, global_tokens, strided
from attnlab.attention.masks.tree import tree

__all__ = [
    "Mask",
    "bigbird",
    "block_causal",
    "block_diffusion",
    "blocks",
    "causal",
    "chunked",
    "dilated",
    "global_tokens",
    "islands",
    "key_lengths",
    "mask_fn",
    "media",
    "neighbourhood",
    "per_head",
    "prefix",
    "segments",
    "shared_prefix",
    "shift_mask",
    "sinks_and_window",
    "sliding_tile",
    "strided",
    "tile_order",
    "tree",
    "window",
]
