"""Checks of arguments, and operations on arrays: wide dtypes, slices, RMSNorm, varying mesh axes.

Constructors of masks, scores and positions check their arguments; the classes do not, since JAX
rebuilds them with leaves that are not arrays. Traced values have no value yet: only their dtype and
number of dimensions are checked.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.extend import core
from jaxtyping import Array, Float

from attnlab.errors import InputError

T = TypeVar("T")

# Kinds of dtypes, with the hint that follows the error about another dtype.
_KINDS = {
    "floating": (jnp.floating, "convert it with .astype(jnp.float32)"),
    "integer": (jnp.integer, "convert it with .astype(jnp.int32)"),
    "boolean": (jnp.bool_, "compare it, as in x == 1"),
}


def is_array(x: Any) -> bool:
    """Return whether `x` is an array of JAX or NumPy, traced or not; a NumPy scalar is one."""
    return isinstance(x, jax.Array | np.ndarray | np.generic)


def is_integer(x: Any) -> bool:
    """Return whether `x` is an integer that is not traced, and not a bool."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def describe(x: Any) -> str:
    """Return a value for an error message: dtype and shape of an array, else a short text."""
    if is_array(x) and (jnp.ndim(x) or isinstance(x, jax.core.Tracer)):
        return f"an array of {x.dtype} {x.shape}"
    text = getattr(x, "__name__", None) or " ".join(repr(x).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def check_array(where: str, x: Any, kind: str, ndim: int | range | None = None, hint: str = "") -> None:
    """Raise InputError unless `x` is an array of this kind and number of dimensions.

    Args:
      where: function and argument, such as "segments: queries".
      x: the argument.
      kind: "floating", "integer" or "boolean".
      ndim: allowed numbers of dimensions. None allows any number.
      hint: how to pass the value instead, for a wrong dtype.
    """
    if not is_array(x):
        raise InputError(f"{where} must be an array of {kind} dtype, not {describe(x)}")
    dtype, default_hint = _KINDS[kind]
    if not jnp.issubdtype(x.dtype, dtype):
        raise InputError(f"{where} must be of {kind} dtype, not {describe(x)}; {hint or default_hint}")
    allowed = range(ndim, ndim + 1) if isinstance(ndim, int) else ndim
    if allowed is not None and jnp.ndim(x) not in allowed:
        numbers = " to ".join(str(n) for n in sorted({allowed[0], allowed[-1]}))
        plural = "" if numbers == "1" else "s"
        raise InputError(f"{where} must have {numbers} dimension{plural}, not {describe(x)}")


def check_at_least(least: int, where: str = "", **sizes: Any) -> None:
    """Raise InputError unless every size is an integer, not traced, of at least `least`."""
    for name, size in sizes.items():
        if not is_integer(size) or size < least:
            raise InputError(f"{where}{name} must be at least {least}, an integer; not {describe(size)}")


def check_index(where: str, ndim: int = 0, least: int | None = None, **indices: Any) -> None:
    """Raise InputError unless each index is an integer or an integer array, traced or not.

    Args:
      where: the function, such as "causal".
      ndim: maximum number of dimensions of an array.
      least: least value of an index that is a Python or NumPy integer.
      indices: the indices by name.
    """
    for name, index in indices.items():
        if is_integer(index):
            if least is not None and index < least:
                raise InputError(f"{where}: {name} must be at least {least}, not {index}")
        elif not (is_array(index) and jnp.issubdtype(index.dtype, jnp.integer) and jnp.ndim(index) <= ndim):
            form = "an integer" if ndim == 0 else f"an integer or an integer array of {ndim} dimension"
            raise InputError(f"{where}: {name} must be {form}, not {describe(index)}")


def check_number(where: str, above: float = -math.inf, **numbers: Any) -> None:
    """Raise InputError unless each number is real and finite, or a floating scalar array.

    Values that are not traced must be greater than `above`.
    """
    for name, x in numbers.items():
        if isinstance(x, jax.core.Tracer):
            is_real = jnp.ndim(x) == 0 and jnp.issubdtype(x.dtype, jnp.floating)
        else:
            is_real = isinstance(x, int | float | np.number) or (is_array(x) and jnp.ndim(x) == 0)
            is_real = is_real and not isinstance(x, bool | complex | np.complexfloating)
            is_real = is_real and jnp.result_type(x).kind in "iuf" and math.isfinite(x)
        if not is_real:
            raise InputError(f"{where}: {name} must be a finite number, not {describe(x)}")
        if not isinstance(x, jax.core.Tracer) and not x > above:
            raise InputError(f"{where}: {name} must be greater than {above:g}, not {describe(x)}")


def check_function(function: Callable, name: str, arguments: str) -> None:
    """Raise InputError unless a function can be called with `arguments`, such as "b, h, q, k"."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # a builtin without a signature
        return
    try:
        signature.bind(*arguments.split(", "))
    except TypeError:
        called = (
            "" if inspect.isfunction(function) and function.__name__ == "<lambda>" else describe(function)
        )
        raise InputError(
            f"{name} takes ({arguments}); {called or 'this function'} takes {signature}. "
            "If it makes a mask or a score, call it first: causal(), not causal"
        ) from None


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Check dtypes and shapes of query, key and value.

    Raises:
      InputError: an argument is not a floating-point array, or the shapes do not match.
    """
    for name, x in (("query", query), ("key", key), ("value", value)):
        check_array(f"attend: {name}", x, "floating")
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    if query.ndim < 3 or not query.ndim == key.ndim == value.ndim:
        raise InputError(f"attend takes (batch, length, heads, head_dim) arrays; got {shapes}")
    if key.shape[:-1] != value.shape[:-1] or query.shape[:-3] != key.shape[:-3]:
        raise InputError(f"attend: batch, length and heads of key and value must be equal; got {shapes}")
    if query.shape[-1] != key.shape[-1]:
        raise InputError(f"attend: query and key must have the same head_dim; got {shapes}")
    if query.shape[-1] == 0:
        raise InputError(f"attend: head_dim must be at least 1; got {shapes}")
    if query.shape[-2] % max(key.shape[-2], 1) or (key.shape[-2] == 0 and query.shape[-2]):
        hint = ""
        if key.shape[-3] and query.shape[-3] % key.shape[-3] == 0:
            hint = "; attend takes (batch, length, heads, head_dim), not (batch, heads, length, head_dim)"
        raise InputError(f"attend: query heads must be a multiple of key heads; got {shapes}{hint}")


def check_options(scale: Any, normalizer: Any) -> None:
    """Check the scale and the normalizer of `attend`.

    Raises:
      InputError: a value is of the wrong type or not finite.
    """
    if scale is not None:
        check_number("attend", scale=scale)
    if not callable(normalizer):
        raise InputError(f"attend: normalizer must be a function, not {describe(normalizer)}")


def check_positions(where: str, x: Any, positions: Any, ndim: int) -> None:
    """Raise InputError unless `x` is floating-point (B, T, H, D), and `positions` are numbers."""
    check_array(f"{where}: x", x, "floating", 4)
    kind = "floating" if is_array(positions) and jnp.issubdtype(positions.dtype, jnp.floating) else "integer"
    check_array(f"{where}: positions", positions, kind, ndim)


def check_window(where: str, left: Any, right: Any, offset: Any) -> None:
    """Raise InputError unless the limits of a window are None or integers of at least 0."""
    limits = {name: n for name, n in (("left", left), ("right", right)) if n is not None}
    check_at_least(0, f"{where}: ", **limits)
    check_index(where, offset=offset)


def wide(x: Array) -> Any:
    """Return the dtype of sums and products of `x`: float32, or float64 if `x` is float64."""
    return jnp.promote_types(x.dtype, jnp.float32)


def rms_norm(
    x: Float[Array, "..."],
    scale: Float[Array, "..."] | None,
    epsilon: float = 1e-6,
    axes: tuple[int, ...] = (-1,),
) -> Float[Array, "..."]:
    """Return scale * x / sqrt(mean(x^2) + epsilon), computed in at least float32.

    (Zhang and Sennrich 2019, arXiv 1910.07467, equation 4.) The mean is over `axes`; a
    scale with fewer dimensions than x broadcasts from the right, and None is a scale of 1.
    """
    y = x.astype(wide(x))
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=axes, keepdims=True) + epsilon)
    if scale is not None:
        y = y * jnp.expand_dims(scale, range(x.ndim - scale.ndim))
    return y.astype(x.dtype)


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
