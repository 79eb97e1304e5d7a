"""Base classes of masks and scores: functions of a (query, key) pair that may hold arrays.

A `PairwiseFn` names the dimensions of its arrays, so that a backend can slice them to one block of
the scores, pad them, and shard them like the scores.
"""

import dataclasses
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array, Int

from attnlab.errors import InputError

Dims = tuple[str | None, ...]
T = TypeVar("T")


class PairIndices(NamedTuple):
    """Indices of the batch rows, query heads, queries and keys of a block of scores, (B, H, T, S).

    The indices are global: they count over the whole batch, all heads and the whole sequence, also
    on a device that holds only a shard. Each is a four-dimensional array that broadcasts against
    the scores, so masks and scores can be written as formulas: `at.kv <= at.q`.
    """

    b: Int[Array, "B 1 1 1"]
    h: Int[Array, "1 H 1 1"]
    q: Int[Array, "1 1 T 1"]
    kv: Int[Array, "1 1 1 S"]


def pair_indices(*indices: int | Int[Array, " N"]) -> PairIndices:
    """Return the indices of these batch rows, heads, queries, keys; an int n means 0 to n - 1."""
    arrays = (jnp.arange(x) if isinstance(x, int) else x for x in indices)
    return PairIndices(
        *(jnp.expand_dims(x, [i for i in range(4) if i != axis]) for axis, x in enumerate(arrays))
    )


def block_indices(offset: Sequence[int | Array], shape: Sequence[int]) -> PairIndices:
    """Return the indices of a block with this shape and this (batch, head, query, key) offset."""
    return pair_indices(*(start + jnp.arange(n) for start, n in zip(offset, shape, strict=True)))


def eval_at_trace_time(function: Callable[[], T]) -> T:
    """Call `function` eagerly, even under a trace, and return its result as NumPy arrays.

    `function` must not close over tracers. It runs in a separate thread, which has neither a trace
    nor a mesh. `jax.ensure_compile_time_eval` would run on the devices of the mesh instead, which
    may belong to other hosts or, for ahead-of-time compilation, not exist.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, function())).result()


class PairwiseFn:
    """Base class of masks and scores. Subclasses are frozen dataclasses, registered by `pytree`.

    Attributes:
      dims: names of the dimensions of each array field: "batch", "heads", "queries", "keys" or
        None. A named dimension has length 1 or the length of that dimension of the scores. Backends
        slice named dimensions to the block they evaluate and shard them like the scores. Unnamed
        dimensions are never sliced or sharded.
    """

    dims: ClassVar[dict[str, Dims]] = {}

    def map_arrays(self, change: Callable[[Array, Dims], Any]) -> Self:
        """Return a copy in which every array `x` is replaced by `change(x, dims of x)`."""

        def visit(value, dims=None):
            if isinstance(value, PairwiseFn):
                return value.map_arrays(change)
            if isinstance(value, STATIC_TYPES):
                return value
            if isinstance(value, list):
                return [visit(v) for v in value]
            return change(value, (None,) * jnp.ndim(value) if dims is None else dims)

        names = [f.name for f in dataclasses.fields(self)]  # type: ignore[arg-type]  # by `pytree`
        return type(self)(**{name: visit(getattr(self, name), self.dims.get(name)) for name in names})

    def slice_block(self, **ranges: tuple[int | Array, int]) -> Self:
        """Return a copy with named dimensions sliced to `(start, length)`: `queries=(64, 32)`."""

        def change(x, dims):
            for axis, name in enumerate(dims):
                if name in ranges and x.shape[axis] > 1:
                    x = jax.lax.dynamic_slice_in_dim(x, *ranges[name], axis)
            return x

        return self.map_arrays(change)

    def pad_to(self, **lengths: int) -> Self:
        """Return a copy with named dimensions padded to these lengths with their last value."""

        def change(x, dims):
            padding = [
                lengths.get(name, n) - n if n > 1 else 0 for name, n in zip(dims, x.shape, strict=True)
            ]
            return jnp.pad(x, [(0, n) for n in padding], mode="edge") if any(padding) else x

        return self.map_arrays(change)


@dataclass(frozen=True)
class TracedFn:
    """A function of one pair, traced once with scalars.

    The arrays that the function captured are returned separately by `trace` and passed to every
    call, so that they get gradients.

    Attributes:
      jaxpr: the traced function.
      uses: for each argument, whether the result depends on it.
    """

    jaxpr: Any
    uses: tuple[bool, ...]

    @staticmethod
    def trace(function: Callable, arguments: Sequence[Array], name: str) -> "tuple[TracedFn, list[Array]]":
        """Trace a function with scalar arguments; return it and the arrays that it captured.

        Args:
          function: the function of one pair.
          arguments: scalars of the dtypes it is called with.
          name: name of the function in the error message, such as "a mask function".

        Raises:
          InputError: the function does not return exactly one scalar.
        """
        # Trace without a mesh, so that the function can run both on a shard (inside shard_map) and
        # on whole arrays. An inner jit would record the current mesh, so jit is disabled too.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.disable_jit():
            closed = jax.make_jaxpr(function)(*arguments)
        if len(closed.out_avals) != 1 or closed.out_avals[0].shape:
            shapes = ", ".join(map(str, closed.out_avals))
            raise InputError(f"{name} must map the indices of one pair to one scalar; it returns {shapes}")
        used = {v for equation in closed.jaxpr.eqns for v in equation.invars if isinstance(v, core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, core.Var)}
        return TracedFn(closed.jaxpr, tuple(v in used for v in closed.jaxpr.invars)), list(closed.consts)

    def __call__(self, captured: Sequence[Array], *arguments: Array) -> Array:
        """Return the value at every pair; arguments and result broadcast to (B, H, T, S)."""
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, list(captured)))
        inputs = [x if uses else x[:1, :1, :1, :1] for x, uses in zip(arguments, self.uses, strict=True)]

        def mapped(*scalars):
            return function(*scalars)[0]

        for axis in reversed(range(4)):
            mapped = _map_first_axis(mapped, [x.shape[axis] > 1 for x in inputs])
        return mapped(*inputs)


def _map_first_axis(function, is_mapped: Sequence[bool]):
    """Return `function` mapped over the first axis of the mapped arguments.

    The first axis of the other arguments has length 1 and is squeezed.
    """

    def call(*xs):
        if not any(is_mapped):
            return function(*(x[0] for x in xs))[None]
        inputs = [x if mapped else x[0] for x, mapped in zip(xs, is_mapped, strict=True)]
        return jax.vmap(function, in_axes=[0 if mapped else None for mapped in is_mapped])(*inputs)

    return call


STATIC_TYPES = (bool, int, float, str, tuple, type(None), TracedFn)


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """Make a class a frozen dataclass and register it as a pytree.

    Python numbers, strings, tuples and None are static (part of the tree structure); all other
    values are leaves. So `CausalMask(3)` is static under `jax.jit`, while
    `CausalMask(jnp.int32(3))` is traced.
    """
    cls = dataclass(frozen=True, eq=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # a dataclass since the line above

    def flatten(x):
        static = tuple((n, getattr(x, n)) for n in names if isinstance(getattr(x, n), STATIC_TYPES))
        dynamic = tuple(n for n in names if not isinstance(getattr(x, n), STATIC_TYPES))
        return [(jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in dynamic], (static, dynamic)

    def unflatten(aux, data):
        static, dynamic = aux
        return cls(**dict(static), **dict(zip(dynamic, data, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls
