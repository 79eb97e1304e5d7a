"""Dropout of activations, laid out over the mesh as they are."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Dropout(nn.Module):
    """Sets a share `rate` of the values to 0 and the others larger (Srivastava et al. 2014).

    Flax's own draws its mask whole on every device, and an Explicit mesh will not select by that.
    """

    rate: float

    @nn.compact
    def __call__(self, x: Float[Array, "..."], deterministic: bool) -> Float[Array, "..."]:
        """The thinned values; `x` itself if deterministic."""
        if self.rate == 0.0 or deterministic:
            return x
        where = None if jax.sharding.get_abstract_mesh().empty else jax.typeof(x).sharding.spec
        uniform = jax.random.uniform(self.make_rng("dropout"), x.shape, jnp.float32, out_sharding=where)
        return jnp.where(uniform >= self.rate, x / (1.0 - self.rate), jnp.zeros_like(x))
