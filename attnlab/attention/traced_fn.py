"""User-defined functions of one pair, traced once and evaluated on blocks of scores."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jaxtyping import Array

from attnlab.attention.arrays import eval_varying, varying_axes
from attnlab.errors import InputError


@dataclass(frozen=True, eq=False)
class TracedFn:
    """A function of one pair, traced once with scalars.

    The arrays that the function captured are returned separately by `trace` and passed to every
    call, so that they get gradients.

    Attributes:
      jaxpr: the traced function. Functions with the same operations are equal.
      uses: for each argument, whether the result depends on it.
    """

    jaxpr: Any
    uses: tuple[bool, ...]

    @cached_property
    def _key(self) -> Hashable:
        return jaxpr_key(self.jaxpr)

    def __eq__(self, other):
        return isinstance(other, TracedFn) and self._key == other._key

    def __hash__(self):
        return hash(self._key)

    @staticmethod
    def trace(
        function: Callable, arguments: Sequence[Array], name: str, result: Any
    ) -> "tuple[TracedFn, list[Array]]":
        """Trace a function with scalar arguments; return it and the arrays that it captured.

        Args:
          function: the function of one pair.
          arguments: scalars of the dtypes it is called with.
          name: name of the function in the error message, such as "a mask function".
          result: the abstract dtype that it must return: `jnp.bool_` or `jnp.floating`.

        Raises:
          InputError: the function does not return exactly one scalar of dtype `result`.
        """
        # Trace without a mesh, so that the function can run both on a shard (inside shard_map) and
        # on whole arrays. An inner jit would record the current mesh, so jit is disabled too.
        # Inside a user's shard_map, captured arrays have types of its mesh.
        mesh = jax.sharding.get_abstract_mesh()
        mesh = mesh if mesh.manual_axes else jax.sharding.AbstractMesh((), ())
        with jax.sharding.use_abstract_mesh(mesh), jax.disable_jit():
            closed = jax.make_jaxpr(function)(*arguments)
        if len(closed.out_avals) != 1 or closed.out_avals[0].shape:
            shapes = ", ".join(map(str, closed.out_avals))
            raise InputError(f"{name} must map the indices of one pair to one scalar; it returns {shapes}")
        if not jnp.issubdtype(closed.out_avals[0].dtype, result):
            kind = "True or False, as in q >= k" if result is jnp.bool_ else "a floating-point number"
            raise InputError(f"{name} must return {kind}; it returns {closed.out_avals[0].dtype}")
        used = {v for equation in closed.jaxpr.eqns for v in equation.invars if isinstance(v, core.Var)}
        used |= {v for v in closed.jaxpr.outvars if isinstance(v, core.Var)}
        return TracedFn(closed.jaxpr, tuple(v in used for v in closed.jaxpr.invars)), list(closed.consts)

    def __call__(self, captured: Sequence[Array], *arguments: Array) -> Array:
        """Return the value at every pair; arguments and result broadcast to (B, H, T, S)."""
        closed = core.ClosedJaxpr(self.jaxpr, list(captured))
        inputs = [x if uses else x[:1, :1, :1, :1] for x, uses in zip(arguments, self.uses, strict=True)]

        def mapped(*scalars):
            if varying_axes((list(captured), arguments)):
                return eval_varying(closed, *scalars)
            return core.jaxpr_as_fun(closed)(*scalars)[0]

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


def jaxpr_key(jaxpr: core.Jaxpr) -> Hashable:
    """Return a value that is equal for functions with the same operations, constants and types."""
    numbers: dict[Any, int] = {}

    def operand(x):
        if isinstance(x, core.Literal):
            return str(x.aval), np.asarray(x.val).tobytes()
        return numbers.setdefault(x, len(numbers)), str(x.aval)

    def equation(eqn):
        params = tuple((name, _value_key(value)) for name, value in sorted(eqn.params.items()))
        return eqn.primitive.name, tuple(map(operand, (*eqn.invars, *eqn.outvars))), params

    arguments = tuple(map(operand, (*jaxpr.constvars, *jaxpr.invars)))
    return arguments, tuple(map(equation, jaxpr.eqns)), tuple(map(operand, jaxpr.outvars))


def _value_key(value: Any) -> Hashable:
    """Return a key of a parameter of an operation: its content if known, else its identity."""
    match value:
        case core.ClosedJaxpr():
            return jaxpr_key(value.jaxpr), tuple(map(_value_key, value.consts))
        case core.Jaxpr():
            return jaxpr_key(value)
        case tuple() | list():
            return tuple(map(_value_key, value))
        case jax.core.Tracer():
            return _Identity(value)
        case np.ndarray() | jax.Array():
            array = np.asarray(value)
            return array.shape, array.dtype.name, array.tobytes()
        case bool() | int() | float() | complex() | str() | np.dtype() | None:
            return type(value), value
    return _hashable(value)


def _hashable(value: Any) -> Hashable:
    try:
        hash(value)
    except TypeError:
        return _Identity(value)
    return value


class _Identity:
    """A key that is equal only to a key of the same object."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other):
        return isinstance(other, _Identity) and self.value is other.value

    def __hash__(self):
        return id(self.value)
