"""Mesh axes over which values vary inside `jax.shard_map`, which its `check_vma` tracks in types.

Loop carries must keep their type, and a custom VJP must return cotangents of its primals' types. So
the backends first make all operands of a loop or of a custom VJP vary over the same axes. The
transpose of that cast sums the gradient over the axes that it added.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core


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
