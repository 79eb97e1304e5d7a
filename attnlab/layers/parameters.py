"""Declaration of parameters by logical axis names, with their sharding."""

from collections.abc import Sequence
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from attnlab import sharding


@dataclass(frozen=True)
class Dtypes:
    """Dtypes of a model.

    Attributes:
      param: dtype of stored parameters.
      compute: dtype of activations and matrix products.
      logits: dtype of the logits.
    """

    param: str = "float32"
    compute: str = "float32"
    logits: str = "float32"

    def __post_init__(self):
        for name in ("param", "compute", "logits"):
            if (dtype := getattr(self, name)) not in ("float32", "bfloat16", "float16", "float64"):
                raise ValueError(f"{name} dtype must be float32, bfloat16, float16 or float64, not {dtype}")


def parameter(
    module: nn.Module,
    name: str,
    shape: Sequence[int],
    axes: Sequence[str],
    dtypes: Dtypes,
    *,
    std: float = 0.0,
    mean: float | np.ndarray = 0.0,
) -> Array:
    """Declare a parameter with a normal initialisation and return it in the compute dtype.

    The parameter is stored sharded over the mesh according to its logical axes. The returned array
    is gathered over the fsdp axis, so that callers can ignore parameter sharding.
    """

    def init(key):
        dtype = jnp.dtype(dtypes.param)
        spec = None if _no_mesh() else sharding.param_spec(shape, axes)
        if std == 0.0:
            return jnp.broadcast_to(jnp.asarray(mean, dtype), shape, out_sharding=spec)
        return mean + std * jax.random.normal(key, shape, dtype, out_sharding=spec)

    value = module.param(name, init).astype(dtypes.compute)
    return value if _no_mesh() else jax.sharding.reshard(value, sharding.gathered_param_spec(shape, axes))


def _no_mesh() -> bool:
    return jax.sharding.get_abstract_mesh().empty


def parameter_name(path) -> str:
    """A parameter's path as rules see it: layers/periods/block0/attention/out/kernel."""
    return jax.tree_util.keystr(path, simple=True, separator="/")
