"""What masks and scores are made of: indices of pairs, arrays cut as scores are, traced functions."""

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
    """A rectangle of scores, (B, H, T, S): the indices of its batch rows, query heads, queries and keys.

    They count through the whole batch, model and sequence, also where a device holds a part. Each is an
    array of four dimensions that broadcasts against the scores, so that masks and scores are written as
    formulas: `at.kv <= at.q`.
    """

    b: Int[Array, "B 1 1 1"]
    h: Int[Array, "1 H 1 1"]
    q: Int[Array, "1 1 T 1"]
    kv: Int[Array, "1 1 1 S"]


def pair_indices(*indices: int | Int[Array, " N"]) -> PairIndices:
    """The rectangle of these batch rows, heads, queries and keys; a number stands for as many from 0 on."""
    arrays = (jnp.arange(x) if isinstance(x, int) else x for x in indices)
    return PairIndices(
        *(jnp.expand_dims(x, [i for i in range(4) if i != axis]) for axis, x in enumerate(arrays))
    )


def block_indices(offset: Sequence[int | Array], shape: Sequence[int]) -> PairIndices:
    """The rectangle of this shape whose first batch row, head, query and key are these."""
    return pair_indices(*(start + jnp.arange(n) for start, n in zip(offset, shape, strict=True)))


def eval_at_trace_time(function: Callable[[], T]) -> T:
    """What it returns, its arrays as NumPy's, also while a program is traced; it closes over known arrays.

    It runs in a thread of its own, where there is neither a trace nor a mesh: JAX's own evaluation at
    compile time runs on the devices of the mesh, which may belong to other hosts, or not be there yet.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, function())).result()


class PairwiseFn:
    """Base of masks and scores: a frozen dataclass that is a pytree, made by `pytree`.

    Attributes:
      dims: of each field that is an array, what its dimensions are: "batch", "heads", "queries", "keys",
        or None. A dimension with a name has the length of the scores', or 1; a backend cuts it to the
        rectangle that it asks about, and lays it out over devices as the scores. All others stay whole.
    """

    dims: ClassVar[dict[str, Dims]] = {}

    def map_arrays(self, change: Callable[[Array, Dims], Any]) -> Self:
        """With every array x within it replaced by `change(x, its dims)`."""

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
        """With the named dimensions of its arrays cut to `(start, length)`, as `queries=(64, 32)`."""

        def change(x, dims):
            for axis, name in enumerate(dims):
                if name in ranges and x.shape[axis] > 1:
                    x = jax.lax.dynamic_slice_in_dim(x, *ranges[name], axis)
            return x

        return self.map_arrays(change)

    def pad_to(self, **lengths: int) -> Self:
        """With the named dimensions of its arrays made that long, by repeating their ends."""

        def change(x, dims):
            padding = [
                lengths.get(name, n) - n if n > 1 else 0 for name, n in zip(dims, x.shape, strict=True)
            ]
            return jnp.pad(x, [(0, n) for n in padding], mode="edge") if any(padding) else x

        return self.map_arrays(change)


@dataclass(frozen=True)
class TracedFn:
    """A function of one pair, traced once: the arrays it captured are values beside it, with gradients.

    Attributes:
      jaxpr: the traced function.
      uses: which of its arguments it looks at.
    """

    jaxpr: Any
    uses: tuple[bool, ...]

    @staticmethod
    def trace(function: Callable, arguments: Sequence[Array], what: str) -> "tuple[TracedFn, list[Array]]":
        """The function traced with scalars like these, and the arrays it captured.

        Raises:
          InputError: it returns something other than one scalar.
        """
        # Of no mesh, so that it can be run on a device's part as well as on the whole; what is compiled
        # within it would remember one.
        with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())), jax.disable_jit():
            closed = jax.make_jaxpr(function)(*arguments)
        if len(closed.out_avals) != 1 or closed.out_avals[0].shape:
            shapes = ", ".join(map(str, closed.out_avals))
            raise InputError(f"{what} gets the indices of one pair and returns one scalar, not {shapes}")
        used = {v for equation in closed.jaxpr.eqns for v in equation.invars if isinstance(v, core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, core.Var)}
        return TracedFn(closed.jaxpr, tuple(v in used for v in closed.jaxpr.invars)), list(closed.consts)

    def __call__(self, captured: Sequence[Array], *arguments: Array) -> Array:
        """Its value at every pair; the arguments have four dimensions that broadcast, as the result has."""
        function = core.jaxpr_as_fun(core.ClosedJaxpr(self.jaxpr, list(captured)))
        inputs = [x if uses else x[:1, :1, :1, :1] for x, uses in zip(arguments, self.uses, strict=True)]

        def mapped(*scalars):
            return function(*scalars)[0]

        for axis in reversed(range(4)):
            mapped = _over(mapped, [x.shape[axis] > 1 for x in inputs])
        return mapped(*inputs)


def _over(function, moving: Sequence[bool]):
    """`function` mapped over the first dimension of those that move; that of the others is 1, and goes."""

    def call(*xs):
        if not any(moving):
            return function(*(x[0] for x in xs))[None]
        ready = [x if moves else x[0] for x, moves in zip(xs, moving, strict=True)]
        return jax.vmap(function, in_axes=[0 if moves else None for moves in moving])(*ready)

    return call


STATIC_TYPES = (bool, int, float, str, tuple, type(None), TracedFn)


@dataclass_transform(frozen_default=True)
def pytree(cls: type[T]) -> type[T]:
    """A frozen dataclass that is a pytree: numbers, text, tuples and None are its type, all else is data.

    So the compiler knows `CausalMask(3)`, while `CausalMask(jnp.int32(3))` may be traced.
    """
    cls = dataclass(frozen=True, eq=False)(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]  # it has just become one

    def flatten(x):
        static = tuple((n, getattr(x, n)) for n in names if isinstance(getattr(x, n), STATIC_TYPES))
        dynamic = tuple(n for n in names if not isinstance(getattr(x, n), STATIC_TYPES))
        return [(jax.tree_util.GetAttrKey(n), getattr(x, n)) for n in dynamic], (static, dynamic)

    def unflatten(aux, data):
        static, dynamic = aux
        return cls(**dict(static), **dict(zip(dynamic, data, strict=True)))

    jax.tree_util.register_pytree_with_keys(cls, flatten, unflatten)
    return cls
