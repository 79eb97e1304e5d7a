"""Low-rank adapters (LoRA): a frozen weight matrix plus a trained product of two thin matrices."""

import math
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

from attnlab.errors import InputError, check_fields
from attnlab.train.optimizers import check_pattern, matrix_axes

PREFIX = "lora"  # the adapters of x/y/kernel are lora/x/y/kernel/a and lora/x/y/kernel/b


@dataclass(frozen=True)
class LoRA:
    """Low-rank adapters: trains A and B of W + (alpha / rank) A B, while W stays frozen.

    A has the input axes of W and a normal initialization. B has the output axes of W and starts at
    zero, so the initial model equals the one without adapters (Hu et al. 2021, arXiv 2106.09685,
    section 4.1).

    The model receives the sum, so its layers need no changes. A training step therefore stores the
    sums and their gradients for all matrices with adapters, in addition to A, B and their optimizer
    state.

    Attributes:
      rank: number of columns of A and rows of B.
      alpha: the product is scaled by alpha / rank.
      rule: regular expression that selects the parameters with adapters by name.
      full: regular expression that selects parameters to train in full, such as a new head.
    """

    rank: int = 8
    alpha: float = 16.0
    rule: str = r"attention/(query|value)/kernel$"
    full: str | None = None

    def __post_init__(self):
        check_fields(self, "rank", least=1)
        check_fields(self, "alpha", above=0)
        check_pattern("lora.rule", self.rule)
        check_pattern("lora.full", self.full or "")

    def trains(self, name: str) -> bool:
        """Return whether the parameter of this name is trained."""
        return name.startswith(f"{PREFIX}/") or (self.full is not None and bool(re.search(self.full, name)))


def add_adapters(config: LoRA, params: Any, key: Array) -> Any:
    """Return the parameters together with float32 adapters, sharded like their matrices.

    Raises:
      InputError: a regular expression matches no parameter, or `rule` matches one that is not a
        matrix.
    """
    flat = dict(flatten_dict(params))
    names = {path: "/".join(path) for path in flat}
    if config.full is not None and not any(re.search(config.full, name) for name in names.values()):
        raise InputError(f"lora.full: {config.full!r} matches no parameter")
    chosen = [path for path, name in sorted(names.items()) if re.search(config.rule, name)]
    if not chosen:
        raise InputError(
            f"lora.rule: {config.rule!r} matches no parameter; names are like {min(names.values())}"
        )
    for number, path in enumerate(chosen):
        w, axes = flat[path], matrix_axes(names[path], flat[path].ndim)
        if axes is None:
            raise InputError(f"lora.rule: {config.rule!r} matches {names[path]}, which is not a matrix")
        first, middle = axes

        def factor_axes(sizes: tuple, rank: int | None, first=first, middle=middle) -> tuple[tuple, tuple]:
            """Return the entries of a tuple over the axes of W for the axes of A and of B."""
            return (*sizes[:middle], rank), (*sizes[:first], rank, *sizes[middle:])

        a_shape, b_shape = factor_axes(w.shape, config.rank)
        a_spec, b_spec = (jax.P(*spec) for spec in factor_axes(_spec(w), None))
        a = jax.random.normal(
            jax.random.fold_in(key, number), a_shape, jnp.float32, out_sharding=_out_sharding(a_spec)
        )
        flat[PREFIX, *path, "a"] = a / math.prod(w.shape[first:middle]) ** 0.5
        flat[PREFIX, *path, "b"] = jnp.zeros(b_shape, jnp.float32, out_sharding=_out_sharding(b_spec))
    return unflatten_dict(flat)


def merge_adapters(config: LoRA, params: Any) -> Any:
    """Return the model's parameters, with (alpha / rank) A B added to each matrix with adapters."""
    flat = flatten_dict(params)
    merged = {}
    for path, w in flat.items():
        if path[0] == PREFIX:
            continue
        if (a := flat.get((PREFIX, *path, "a"))) is not None:
            axes = matrix_axes("/".join(path), w.ndim)
            assert axes is not None
            product = _product(a, flat[PREFIX, *path, "b"], *axes, jax.P(*_spec(w)))
            w = (w + config.alpha / config.rank * product).astype(w.dtype)
        merged[path] = w
    return unflatten_dict(merged)


def _product(a: Array, b: Array, first: int, middle: int, spec: jax.P) -> Float[Array, "..."]:
    """Return A B, batched over the leading axes and sharded by `spec`."""
    letters = "abcdefgh"[: len(spec)]
    terms = f"{letters[:middle]}r,{letters[:first]}r{letters[middle:]}->{letters}"
    return jnp.einsum(terms, a, b, precision="highest", out_sharding=_out_sharding(spec))


def _spec(w: Array) -> tuple:
    """Return the PartitionSpec of an array with one entry per axis."""
    spec = () if jax.sharding.get_abstract_mesh().empty else tuple(jax.typeof(w).sharding.spec)
    return spec + (None,) * (w.ndim - len(spec))


def _out_sharding(spec: jax.P) -> jax.P | None:
    return None if jax.sharding.get_abstract_mesh().empty else spec
