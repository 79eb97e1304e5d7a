"""Operations on arrays that several parts need: wide dtypes, slices, RMSNorm, varying mesh axes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array, Float

T = TypeVar("T")


def wide(x: Array) -> Any:
    """Return the dtype of sums and products of `x`: float32, or float64 if `x` is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    epsilon: float = 1e-6,
    axes: tuple[int, ...] = (-1,),
) -> Float[Array, "..."]:
    """Return scale * x / sqrt(mean(x^2) + epsilon), computed in at least float32.

    (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.) The mean is over `axes`; a
    scale with fewer dimensions than x broadcasts from the right.
    """
    y = x.astype(wide(x))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + epsilon)
    return (y * jnp.expand_dims(scale, range(x.ndim - scale.ndim))).astype(x.dtype)


def slice_at(x: Array, starts: Sequence, sizes: Sequence[int]) -> Array:
    """Return the slice of an array at these starts, integers of any types."""
    return jax.lax.dynamic_slice(x, as_starts(starts), sizes)


def as_starts(starts: Sequence) -> list[Array]:
    """Return the starts of a slice as int32, from integers of any types."""
    # With 64-bit types enabled, loop counters are int64 and the indices of a block mask int32.
    return [jnp.asarray(start, jnp.int32) for start in starts]


def eval_at_trace_time(function: Callable[[], T]) -> T:
    """Call `function` eagerly, even under a trace, and return its result as NumPy arrays.

    `function` must not close over tracers. It runs in a separate thread, which has neither a trace
    nor a mesh. `jax.ensure_compile_time_eval` would run on the devices of the mesh instead, which
    may belong to other hosts or, for ahead-of-time compilation, not exist.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(lambda: jax.tree.map(np.asarray, function())).result()


# Values may vary over mesh axes inside `jax.shard_map`, which its `check_vma` tracks in types. Loop
# carries must keep their type, and a custom VJP must return cotangents of its primals' types. So
# the backends first make all operands of a loop or of a custom VJP vary over the same axes. The
# transpose of that cast sums the gradient over the axes that it added.


def varying_axes(tree: Any) -> frozenset[str]:
    """Return the mesh axes over which any array of the tree varies; none outside `shard_map`."""
    return frozenset().union(*map(_axes_of, jax.tree.leaves(tree)))


def cast_varying(tree: Any, axes: frozenset[str]) -> Any:
    """Return the tree with every array varying over these axes and those over which it varies."""
    if not axes:
        return tree

    def cast(x):
        missing = tuple(sorted(axes - _axes_of(x)))
        return jax.lax.pcast(jnp.asarray(x), missing, to="varying") if missing else x

    return jax.tree.map(cast, tree)


def unify_varying(tree: Any) -> Any:
    """Return the tree with all arrays varying over the same axes."""
    return cast_varying(tree, varying_axes(tree))


def eval_varying(closed: core.ClosedJaxpr, *arguments: Any) -> Any:
    """Evaluate a traced function of one result whose arguments vary over any mesh axes.

    The types in a traced function say over which axes the values vary. Here every operation casts
    its own operands, so that the function also takes values that vary over other axes.
    """
    jaxpr = closed.jaxpr
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*closed.consts, *arguments), strict=True))

    def read(x):
        return x.val if isinstance(x, core.Literal) else values[x]

    for equation in jaxpr.eqns:
        operands = list(map(read, equation.invars))
        if equation.primitive.name in ("pcast", "pvary"):
            results = operands
        else:
            params = equation.primitive.get_bind_params(equation.params)
            results = equation.primitive.bind(*unify_varying(operands), **params)
            results = results if equation.primitive.multiple_results else [results]
        values.update(zip(equation.outvars, results, strict=True))
    return read(jaxpr.outvars[0])


def _axes_of(x: Any) -> frozenset[str]:
    # Only tracers vary: constants and `float0` cotangents are the same on every device.
    if not isinstance(x, jax.core.Tracer) or isinstance(x, np.ndarray):
        return frozenset()
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def named_output(*arrays: Array) -> tuple[Array, ...]:
    """Return the outputs of attention, named "attention_out" for policies of `jax.checkpoint`.

    In a forward rule these are the residuals. A policy that saves them, and the queries, keys and
    values, then does not repeat the forward pass.
    """
    return tuple(checkpoint_name(x, "attention_out") for x in arrays)
