"""Floating-point operations of a model, counted from its config, and what a device can do at best."""

import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from attnlab.layers import Experts, GatedMLP
from attnlab.models import DecoderConfig

# Dense bfloat16 matrix products of one device, FLOP/s, from the makers' data sheets.
PEAK = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
    "TPU7x": 2307e12,
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
}


@dataclass(frozen=True)
class TokenFlops:
    """Forward operations for one token: a multiply and an add count as two."""

    weights: float
    attention: float

    @property
    def training(self) -> float:
        """Forward and backward, which is twice the forward."""
        return 3 * (self.weights + self.attention)


def token_flops(config: DecoderConfig, vocab_size: int, length: int) -> TokenFlops:
    """Operations for each token of full rows of this length (Kaplan et al. 2020, arXiv 2001.08361, table 1).

    Attention counts only the pairs that its masks allow, and experts only those that a token goes to.
    """
    heads, d = config.attention.heads, config.head_dim
    projections = config.width * d * (2 * heads + 2 * config.kv_heads)
    weights = config.depth * (projections + _feed_forward(config)) + vocab_size * config.width
    # Pairs for each token, counted once for each kind of layer.
    seen = {kind: length * kind.mask().density(length, length) for kind in set(config.kinds)}
    pairs = sum(seen[kind] for kind in config.kinds)
    return TokenFlops(weights=2.0 * weights, attention=4.0 * heads * d * pairs)


def _feed_forward(config: DecoderConfig) -> int:
    """Weights of a feed-forward layer that a token is multiplied with."""
    layer, matrix = config.feed_forward, config.width * config.feed_forward.hidden(config.width)
    if isinstance(layer, Experts):
        return layer.experts * config.width + 3 * layer.top_k * matrix
    return (3 if isinstance(layer, GatedMLP) else 2) * matrix


def idle_parameters(config: DecoderConfig) -> int:
    """Parameters of the experts that a token does not go to, in all layers."""
    layer, hidden = config.feed_forward, config.feed_forward.hidden(config.width)
    if not isinstance(layer, Experts):
        return 0
    biases = 2 * hidden + config.width if layer.bias else 0
    return config.depth * (layer.experts - layer.top_k) * (3 * config.width * hidden + biases)


def peak_flops(device: jax.Device) -> float:
    """The most FLOP/s of this device, over all simulated devices together on a CPU; nan where unknown.

    Accelerators are looked up by their kind; a CPU is measured by a float32 matrix product.
    """
    if device.platform == "cpu":
        return _measured() / len(jax.local_devices(backend="cpu"))
    known = [name for name in PEAK if device.device_kind.startswith(name)]
    return PEAK[max(known, key=len)] if known else float("nan")


def _measured(size: int = 1536, repeats: int = 5) -> float:
    device = jax.local_devices(backend="cpu")[0]
    x = jax.device_put(jnp.ones((size, size), jnp.float32), device)
    product = jax.jit(jnp.matmul)
    jax.block_until_ready(product(x, x))
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(product(x, x))
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
