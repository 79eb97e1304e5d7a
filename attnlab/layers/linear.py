"""Parameters and their initialisation, linear maps, embedding tables, logits and dropout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from attnlab import sharding
from attnlab.attention.arrays import wide
from attnlab.errors import InputError, check_fields
from attnlab.layers.products import QUANTIZED, quantized_product
from attnlab.sharding import (
    BATCH_AXES,
    axis_size,
    constrain,
    has_rules,
    is_sharded_over,
    length_axes,
    out_sharding,
    spec,
)

MAX_DIMENSION, MAX_ELEMENTS = 2**31 - 1, 2**40  # of a parameter


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a model.

    Attributes:
      param: dtype of stored parameters.
      compute: dtype of activations and matrix products.
      logits: dtype of the logits.
      products: precision of the products of `Linear`: "compute", or with qwix "int8" or "fp8"; see
        `quantized_product`.
    """

    param: str = "float32"
    compute: str = "float32"
    logits: str = "float32"
    products: str = "compute"

    def __post_init__(self):
        for name in ("param", "compute", "logits"):
            if (dtype := getattr(self, name)) not in ("float32", "bfloat16", "float16", "float64"):
                raise ValueError(f"{name} dtype must be float32, bfloat16, float16 or float64, not {dtype}")
        if self.products not in ("compute", *QUANTIZED):
            raise ValueError(f"products must be compute, {' or '.join(QUANTIZED)}, not {self.products}")


def parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    dtypes: Dtypes,
    *,
    std: float = 0.0,
    mean: float | np.ndarray = 0.0,
    wide: bool = False,
    gather: bool = True,
) -> Array:
    """Declare a parameter with a normal initialisation and return it in the compute dtype.

    The parameter is stored sharded over the mesh according to its logical axes. The returned array
    is gathered over the fsdp axis, so that callers can ignore parameter sharding, unless `gather`
    is false. With `wide` it has at least float32, for values that scale or shift whole activations,
    scores or logits.
    """

    def init(key):
        dtype = jnp.dtype(dtypes.param)
        spec = sharding.param_spec(shape, axes) if sharding.has_rules() else None
        if std == 0.0:
            return jnp.broadcast_to(jnp.asarray(mean, dtype), shape, out_sharding=spec)
        return mean + std * jax.random.normal(key, shape, dtype, out_sharding=spec)

    # XLA aborts the process for much larger arrays.
    if max(shape, default=0) > MAX_DIMENSION or math.prod(shape) > MAX_ELEMENTS:
        raise InputError(
            f"the parameter {'/'.join((*module.path, name))} would have the shape {tuple(shape)}: a "
            f"dimension can be at most {MAX_DIMENSION:,}, and the number of elements at most {MAX_ELEMENTS:,}"
        )
    dtype = jnp.promote_types(dtypes.compute, jnp.float32) if wide else dtypes.compute
    value = module.param(name, init).astype(dtype)
    if not gather or not sharding.has_rules():
        return value
    return jax.sharding.reshard(value, sharding.gathered_param_spec(shape, axes))


def parameter_name(path) -> str:
    """A parameter's path as rules see it: layers/periods/block0/attention/out/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


@dataclass(frozen=True)
class Normal:
    """Normal initialisation with one standard deviation for all weights.

    The last map of each residual branch is initialised sqrt(2 L) smaller (GPT-2, section 2.3).
    """

    std: float = 0.02

    def __post_init__(self):
        check_fields(self, "std", least=0)

    def hidden_std(self, width: int) -> float:
        """Return the standard deviation of weights inside blocks."""
        del width
        return self.std

    def readout_scale(self, width: int) -> float:
        """Return the factor of the activations before the logits."""
        del width
        return 1.0

    def attention_scale(self, head_dim: int) -> float | None:
        """Return the factor of the attention scores; None means 1 / sqrt(D)."""
        del head_dim
        return None

    def learning_rate(self, width: int) -> float:
        """Return the learning-rate multiplier of weights inside blocks."""
        del width
        return 1.0


@dataclass(frozen=True)
class MuP(Normal):
    """Maximal-update parametrisation (muP) for Adam (Yang et al. 2022, arXiv 2203.03466, table 8).

    The learning rate tuned for a model of `base_width` and `base_head_dim` transfers to any width.
    """

    base_width: int = 128
    base_head_dim: int = 32

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "base_width", "base_head_dim", least=1)

    def hidden_std(self, width: int) -> float:
        """Return the standard deviation of weights inside blocks, ~ 1 / sqrt(width)."""
        return self.std * (self.base_width / width) ** 0.5

    def readout_scale(self, width: int) -> float:
        """Return the factor of the activations before the logits, ~ 1 / width."""
        return self.base_width / width

    def attention_scale(self, head_dim: int) -> float:
        """Return the factor of the scores, ~ 1 / D, which equals 1 / sqrt(D) at the base."""
        return self.base_head_dim**0.5 / head_dim

    def learning_rate(self, width: int) -> float:
        """Return the learning-rate multiplier of weights inside blocks, ~ 1 / width."""
        return self.base_width / width


class Linear(nn.Module):
    """y = x W + b over groups of dimensions, such as (embed) -> (heads, head_dim) or the reverse.

    Attributes:
      inputs: sizes of the contracted trailing dimensions.
      outputs: sizes of the new dimensions.
      axes: logical axis names of inputs, then outputs.
      std: standard deviation of the initial weights.
      bias: whether to add a bias b, which starts at zero.
      dtypes: dtypes of parameters and computation.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    axes: tuple[str, ...]
    std: float
    bias: bool
    dtypes: Dtypes

    @nn.compact
    def __call__(self, x: Float[Array, "B T *inputs"]) -> Float[Array, "B T *outputs"]:
        """Return x W + b."""
        kernel = parameter(
            self, "kernel", (*self.inputs, *self.outputs), self.axes, self.dtypes, std=self.std
        )
        out_axes = self.axes[len(self.inputs) :]
        # The model width is sharded in parameters only, never in activations.
        y = contract(x, kernel, len(self.inputs), out_axes, self.dtypes.products)
        return add_bias(self, y, self.outputs, out_axes, self.dtypes) if self.bias else y


def contract(
    x: Float[Array, "B T *inputs"],
    kernel: Float[Array, "..."],
    num_inputs: int,
    out_axes: tuple[str, ...],
    products: str = "compute",
) -> Float[Array, "B T *outputs"]:
    """Contract the last `num_inputs` dimensions of `x` with the first ones of `kernel`.

    Batch and length are merged into one dimension, because XLA's CPU backend is slow with two.
    Other backends are not affected. In a mesh without the table of logical axes, the result is
    sharded like the rows of `x` and the outputs of `kernel`, where these use different mesh axes.
    """
    b, t = x.shape[:2]
    if _has_other_mesh():
        rows = jax.typeof(x).sharding.spec
        used = {axis for entry in rows for axis in _mesh_axes(entry)}
        columns = [
            None if used & set(_mesh_axes(entry)) else entry
            for entry in jax.typeof(kernel).sharding.spec[num_inputs:]
        ]
        kernel = jax.sharding.reshard(kernel, jax.P(*rows[2:], *columns))
        where = jax.P(*rows[:2], *columns)
        return _product(x, kernel, num_inputs, where, products)
    sizes = kernel.shape[num_inputs:]
    x, length = _length_of_product(x, out_axes)
    if length is not None:  # two sharded dimensions cannot be merged
        where = jax.P(spec("batch")[0], length, *spec(*out_axes, shape=sizes))
        return _product(x, kernel, num_inputs, where, products)
    rows = x.reshape(b * t, *x.shape[2:])
    of_rows = out_sharding("batch", *out_axes, shape=(b * t, *sizes))
    y = _product(rows, kernel, num_inputs, of_rows, products)
    return y.reshape(b, t, *sizes, out_sharding=out_sharding("batch", None, *out_axes, shape=(b, t, *sizes)))


def _product(x: Array, kernel: Array, num_inputs: int, where: Any, products: str) -> Array:
    if products != "compute":
        return quantized_product(x, kernel, num_inputs, where, products)
    rows, inputs = "bt"[: x.ndim - num_inputs], "hijk"[:num_inputs]
    outputs = "xyz"[: kernel.ndim - num_inputs]
    return jnp.einsum(f"{rows}{inputs},{inputs}{outputs}->{rows}{outputs}", x, kernel, out_sharding=where)


def _length_of_product(
    x: Float[Array, "B T *inputs"], out_axes: tuple[str, ...]
) -> tuple[Float[Array, "B T *inputs"], Any]:
    """Return the input of a product and the mesh axes of the length of its output.

    A product whose outputs are sharded over tensor gathers the parts of the length on that axis;
    one whose inputs are sharded over tensor scatters its sum.
    """
    if not has_rules():
        return x, None
    batch, length, *inputs = jax.typeof(x).sharding.spec
    if is_sharded_over("tensor", out_axes):
        length = "sequence" if "sequence" in _mesh_axes(length) else None
        return jax.sharding.reshard(x, jax.P(batch, length, *inputs)), length
    if any("tensor" in _mesh_axes(entry) for entry in inputs):
        return x, length_axes("residual", x.shape[1])
    return x, length


def add_bias(
    module: nn.Module,
    y: Float[Array, "B T *outputs"],
    outputs: tuple[int, ...],
    out_axes: tuple[str, ...],
    dtypes: Dtypes,
) -> Float[Array, "B T *outputs"]:
    """Return y + b for a parameter b of `module` that starts at zero.

    b is not sharded along the model width.
    """
    axes = tuple("norm" if a == "embed" else a for a in out_axes)
    bias = parameter(module, "bias", outputs, axes, dtypes)
    if _has_other_mesh():
        bias = jax.sharding.reshard(bias, jax.P(*jax.typeof(y).sharding.spec[2:]))
    return y + jnp.expand_dims(bias, (0, 1))


def _has_other_mesh() -> bool:
    """Return whether the mesh is Explicit, but not one of `attnlab.sharding`."""
    return bool(jax.sharding.get_abstract_mesh().explicit_axes) and not has_rules()


def _mesh_axes(entry: Any) -> tuple[str, ...]:
    """Return the mesh axes of one entry of a PartitionSpec."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


class Embedding(nn.Module):
    """An embedding table with one row of width E for each of `size` ids; see `parameter`."""

    size: int
    width: int
    axes: tuple[str, str]
    std: float
    dtypes: Dtypes
    wide: bool = False

    @nn.compact
    def __call__(
        self, ids: Int[Array, "B T"] | None = None, gather: bool = True
    ) -> Float[Array, "V E"] | Float[Array, "B T E"]:
        """Return the table, or with `ids` the row of each; see `look_up`.

        The table is gathered over the fsdp axis unless `gather` is false.

        With `ids` the table is not gathered: each device looks up its part of the width for the
        tokens of all devices of its fsdp axis, which then exchange the parts. This moves two
        activations a step, and the gathered table two tables: the table and its gradient.
        """
        gather = (gather and ids is None) or not has_rules() or axis_size("fsdp") == 1
        table = parameter(
            *(self, "table", (self.size, self.width), self.axes, self.dtypes),
            std=self.std,
            wide=self.wide,
            gather=gather,
        )
        if ids is None:
            return table
        if gather:
            return look_up(table, ids)
        length, width = length_axes("sequence", ids.shape[1]), jax.typeof(table).sharding.spec[1]
        batch = tuple(axis for axis in BATCH_AXES if axis != "fsdp")
        ids = jax.sharding.reshard(ids, jax.P(batch, length))
        rows = table.at[ids].get(mode="promise_in_bounds", out_sharding=jax.P(batch, length, width))
        return constrain(rows, "batch", "sequence", None)


class Bias(nn.Module):
    """A learned bias of logits for each of `size` ids, which starts at zero."""

    size: int
    dtypes: Dtypes

    @nn.compact
    def __call__(self) -> Float[Array, " V"]:
        """Return the biases."""
        return parameter(self, "bias", (self.size,), ("vocab",), self.dtypes, wide=True)


def check_ids(ids: Int[np.ndarray, "..."], rows: int) -> None:
    """Check that all ids have a row in a table of this length.

    Raises:
      InputError: an id is out of range.
    """
    if ids.size and (ids.min() < 0 or ids.max() >= rows):
        raise InputError(
            f"ids {ids.min()} to {ids.max()} are out of range: the table has rows 0 to {rows - 1}"
        )


def look_up(table: Float[Array, "V E"], ids: Int[Array, "B T"]) -> Float[Array, "B T E"]:
    """Return the table's row of each id, sharded as activations; ids must be in range.

    Raises:
      InputError: an id that is not traced is out of range.
    """
    if not isinstance(ids, jax.core.Tracer) and getattr(ids, "is_fully_addressable", True):
        check_ids(np.asarray(ids), len(table))  # jnp would trace the comparison under eval_shape
    rows = out_sharding("batch", "sequence", None, shape=ids.shape)
    return table.at[ids].get(mode="promise_in_bounds", out_sharding=rows)


def scaled(x: Float[Array, "..."], scale: float) -> Float[Array, "..."]:
    """Return x times a constant in the dtype of x, without rounding the constant to that dtype."""
    return (x * jnp.asarray(scale, wide(x))).astype(x.dtype)


def logits(
    x: Float[Array, "*rows E"],
    table: Float[Array, "V E"],
    bias: Float[Array, " V"] | None,
    softcap: float | None,
    dtype: str,
) -> Float[Array, "*rows V"]:
    """Return x table^T + bias, softcapped to softcap * tanh(. / softcap) if `softcap` is set."""
    table = gather_width(table)
    *rows, e = x.shape
    if len(rows) == 2:
        x = constrain(x, "batch", "sequence", None)
    where = whole = None
    if (batch := out_sharding("batch")) is not None:
        vocab = vocab_axis(table)
        where, whole = jax.P(batch[0], vocab), jax.P(*jax.typeof(x).sharding.spec[:-1], vocab)
    if whole is not None and any(whole[1:-1]):  # two sharded dimensions cannot be merged
        y = jnp.einsum("...e,ve->...v", x, table, preferred_element_type=dtype, out_sharding=whole)
    else:
        flat = x.reshape(math.prod(rows), e)
        y = jnp.einsum("ne,ve->nv", flat, table, preferred_element_type=dtype, out_sharding=where)
    bias = None if bias is None else bias.reshape(*[1] * (y.ndim - 1), -1)
    return bias_and_cap(y, bias, softcap).reshape(*rows, -1, out_sharding=whole)


def bias_and_cap(y: Array, bias: Array | None, softcap: float | None) -> Array:
    """Return y + bias, softcapped; the bias has the dimensions of y."""
    y = y if bias is None else y + bias.astype(y.dtype)
    return y if softcap is None else softcap * jnp.tanh(y / softcap)


def gather_width(table: Float[Array, "V E"]) -> Float[Array, "V E"]:
    """Return a table that may be sharded along its width as one that is not."""
    return jax.sharding.reshard(table, jax.P(vocab_axis(table), None)) if has_rules() else table


def vocab_axis(table: Array) -> Any:
    """Return the mesh axis of the first dimension."""
    return jax.typeof(table).sharding.spec[0]


class Dropout(nn.Module):
    """Sets a fraction `rate` of the values to 0 and divides the rest by 1 - rate.

    Srivastava et al. 2014. `flax.linen.Dropout` draws a mask replicated on every device, which an
    Explicit mesh rejects when the activations are sharded.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        """Return `x` with dropout applied, or `x` itself if deterministic."""
        if self.rate == 0.0 or deterministic:
            return x
        spec = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec
        uniform = jax.random.uniform(self.make_rng("dropout"), x.shape, jnp.float32, out_sharding=spec)
        return jnp.where(uniform >= self.rate, x / (1.0 - self.rate), jnp.zeros_like(x))
