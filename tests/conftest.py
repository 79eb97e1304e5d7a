"""Every test runs on 8 simulated CPU devices, with no silent rank promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax

# By config and not by XLA_FLAGS: a test that runs a program of its own decides its devices itself.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
