"""Whether a mask is causal, which the models that generate text require."""

import jax.numpy as jnp
import numpy as np

from attnlab.attention.masks.base import Mask
from attnlab.attention.masks.basic import depends_on_batch_and_heads, normal_form
from attnlab.attention.pairwise import pair_indices

# Positions at which `is_causal` evaluates a mask: the first 64, and those around powers of two.
PROBED = np.unique([*range(64), *(2**n + i for n in range(6, 17) for i in (-1, 0, 1))])
PROBED_ROWS, PROBED_HEADS = 2, 64


def is_causal(mask: Mask | None) -> bool:
    """Return whether no query attends to a later key, for queries and keys in the same positions.

    The bounds of the normal form tell it for a mask of `causal` and `window`. Another mask is
    evaluated for all pairs of `PROBED` positions: 10 thousand, times 2 rows and 64 heads if it
    depends on them. A mask that holds an array over queries or keys is evaluated for all its pairs.

    Args:
      mask: a static mask.
    """
    form = normal_form(mask)
    if isinstance(form.right, int) and form.right <= 0:
        return True
    if mask is None or form.is_relative:
        return False
    lengths = _array_lengths(mask)
    default = np.arange(max(lengths.values())) if lengths else PROBED
    q, kv = (np.arange(lengths[name]) if name in lengths else default for name in ("queries", "keys"))
    by_row, by_head = depends_on_batch_and_heads(mask)
    rows, heads = np.arange(PROBED_ROWS if by_row else 1), np.arange(PROBED_HEADS if by_head else 1)
    at = pair_indices(*map(jnp.asarray, (rows, heads, q, kv)))
    return not (mask.evaluate(at) & (at.kv > at.q)).any().item()


def _array_lengths(mask: Mask) -> dict[str, int]:
    """Return the numbers of "queries" and "keys" of the arrays that a mask holds."""
    lengths: dict[str, int] = {}

    def add(x, dims):
        lengths.update({name: n for name, n in zip(dims, jnp.shape(x), strict=True) if n > 1})
        return x

    mask.map_arrays(add)
    return {name: n for name, n in lengths.items() if name in ("queries", "keys")}
