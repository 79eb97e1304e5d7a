"""Peak FLOP/s of devices, for model FLOPs utilization (MFU)."""

import time
from functools import cache

import jax
import jax.numpy as jnp

# Dense bfloat16 matrix multiplication of one device, in FLOP/s, from the vendors' data sheets.
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


def peak_flops(device: jax.Device) -> float:
    """Return the peak FLOP/s of a device; NaN if unknown.

    Accelerators are looked up in `PEAK` by device kind. A CPU is measured with a float32 matrix
    product once per process, and the result is divided by the number of simulated devices that
    share the CPU.
    """
    if device.platform == "cpu":
        return _measure_cpu_flops() / len(jax.local_devices(backend="cpu"))
    kinds = [name for name in PEAK if device.device_kind.startswith(name)]
    return PEAK[max(kinds, key=len)] if kinds else float("nan")


@cache
def _measure_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
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
