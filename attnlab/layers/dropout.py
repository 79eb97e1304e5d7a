"""Dropout whose mask has the sharding of the activations."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


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
