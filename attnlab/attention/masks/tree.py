"""Trees of draft tokens, which speculative decoding checks in one call."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from attnlab.attention.arrays import check_array, check_index, is_array
from attnlab.attention.masks.base import Index, Mask
from attnlab.attention.masks.intervals import as_row_values, broadcast_rows
from attnlab.attention.pairwise import pytree
from attnlab.errors import InputError


@pytree
class TreeMask(Mask):
    """A tree of draft tokens: each node attends to the prefix, its ancestors and itself.

    The keys are the prefix followed by the nodes of the tree; the queries are the nodes (SpecInfer,
    arXiv 2305.09781, section 4.2). tree((-1, 0, 0, 1), prefix=2):

        keys  0 1 2 3 4 5
    query 0   x x x . . .
    query 1   x x x x . .
    query 2   x x x . x .
    query 3   x x x x . x

    Attributes:
      ancestors: whether node j is node i or an ancestor of it, (B or 1, N, N).
      prefix: number of prefix keys, an int or (B,).
    """

    ancestors: Bool[Array, "B N N"]
    prefix: Index = 0

    dims = {"ancestors": ("batch", None, None), "prefix": ("batch",)}

    def evaluate(self, at):
        """See `Mask.evaluate`."""
        ancestors, prefix = jnp.asarray(self.ancestors), broadcast_rows(self.prefix)
        node, count = at.kv - prefix, ancestors.shape[-1]
        row = jnp.arange(len(ancestors))[:, None, None, None]
        is_ancestor = ancestors[row, jnp.minimum(at.q, count - 1), jnp.clip(node, 0, count - 1)]
        return (node < 0) | ((node < count) & is_ancestor)


def tree(parents: tuple[int, ...] | Int[Array, "*B N"], prefix: Index | Int[Array, " B"] = 0) -> Mask:
    """Return the tree-attention mask: each draft token attends to the prefix and its ancestors.

    Args:
      parents: index of each node's parent, which must precede the node; -1 for children of the
        prefix. (N,), or (B, N) for one tree per batch row.
      prefix: number of keys before the tree, an int or (B,).

    Raises:
      InputError: a parent is not an integer or does not precede its node, or `prefix` is negative.
    """
    check_array(
        "tree: parents", parents if is_array(parents) else np.asarray(parents), "integer", range(1, 3)
    )
    check_index("tree", 1, 0, prefix=prefix)
    if not isinstance(parents, jax.core.Tracer):
        array = np.asarray(parents)
        if (array >= np.arange(array.shape[-1])).any() or (array < -1).any():
            raise InputError(f"tree: each parent must be an earlier node or -1; got {array.tolist()}")
    with jax.ensure_compile_time_eval():
        parents = jnp.asarray(parents)
        return TreeMask(_ancestors(parents.reshape(-1, parents.shape[-1])), as_row_values(prefix))


def _ancestors(parents: Array) -> Array:
    """Return whether node j is node i or an ancestor of it.

    Repeated squaring of the parent relation: each round doubles the number of steps.
    """
    nodes = jnp.arange(parents.shape[-1])
    reached = (parents[..., None] == nodes[None, None]) | (nodes[:, None] == nodes[None, :])[None]
    for _ in range(len(nodes).bit_length()):
        reached = (reached[..., None] & reached[:, None]).any(2)
    return reached
