"""Selects a backend by the platform of the arrays' devices."""

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jaxtyping import Array

from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import (
    PLAIN_JAX,
    AttentionArgs,
    AttentionResult,
    Backend,
    needs_only_shapes,
    report_selection,
    select_backend,
    zero_result,
)
from attnlab.attention.fallback import kernel_scope
from attnlab.attention.masks.blocks import BlockOffset
from attnlab.errors import InputError


def target_platforms(arrays: Sequence[Array]) -> tuple[str, ...]:
    """Return the platforms that may run a call with these arrays: "cpu", "gpu" or "tpu".

    It is the platform of the mesh, else of the device that an array is committed to, else of the
    default device. A function under `jax.jit` does not see where its arguments are: they may be on
    any platform of the process, most likely the default one, which comes first.
    """
    mesh_device = jax.sharding.get_abstract_mesh().abstract_device
    if mesh_device is not None:
        return (_platform_name(mesh_device),)
    concrete = [x for x in map(_concrete_value, arrays) if not isinstance(x, jax.core.Tracer)]
    placed = [x for x in concrete if getattr(x, "sharding", None) is not None]
    committed = [x for x in placed if getattr(x, "committed", True)]  # as is the shape of an array
    default = jax.config.jax_default_device  # type: ignore[attr-defined]  # defined at run time
    if committed or (placed and default is None):
        return (_platform_name(next(iter((committed or placed)[0].sharding.device_set))),)
    first = _platform_name(default or jax.default_backend())
    if len(concrete) == len(arrays):
        return (first,)
    others = [x for x in (_platform_name(jax.default_backend()), "cpu") if _has_devices(x)]
    return tuple(dict.fromkeys([first] * (default is not None) + others)) or (first,)


def _concrete_value(x: Any) -> Any:
    """Return the array in a tracer of `jax.grad` or `jax.vmap`, or the tracer of a `jax.jit`."""
    while isinstance(x, jax.core.Tracer):
        inner = getattr(x, "primal", getattr(x, "val", None))
        if not isinstance(inner, jax.Array | np.ndarray):
            break
        x = inner
    return x


def _has_devices(platform: str) -> bool:
    try:
        return bool(jax.devices(platform))
    except RuntimeError:
        return False


def _platform_name(device: Any) -> str:
    platform = device if isinstance(device, str) else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform


def select_run(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> Callable[[AttentionArgs, BlockOffset], AttentionResult]:
    """Return `run` of the selected backend.

    If "auto" selects different backends on these platforms, the compiler takes that of the platform
    it compiles for.
    """
    backends = select_backends(name_or_backend, args, platforms)

    for platform, backend in backends.items():
        report_selection(backend, dataclasses.replace(args, platform=platform))

    def run(args, offset):
        if needs_only_shapes():
            return zero_result(args)
        if 0 in args.score_shape:  # other backends do not support empty arrays
            return Reference().run(args, offset)
        runs = {
            platform: partial(_run, backend, dataclasses.replace(args, platform=platform), offset)
            for platform, backend in backends.items()
        }
        default = runs.pop(next(iter(runs)))
        if len({id(backend) for backend in backends.values()}) == 1:
            return default()
        if "gpu" in runs:  # the compiler's names of its two platforms
            runs["cuda"] = runs["rocm"] = runs.pop("gpu")
        return jax.lax.platform_dependent(default=default, **runs)

    return run


def _run(backend: Backend, args: AttentionArgs, offset: BlockOffset) -> AttentionResult:
    """Run a backend. The compiler's errors about a kernel contain the name of this scope."""
    if backend.name in PLAIN_JAX:
        return backend.run(args, offset)
    with jax.named_scope(kernel_scope(backend.name)):
        return backend.run(args, offset)


def select_backends(
    name_or_backend: str | Backend, args: AttentionArgs, platforms: Sequence[str]
) -> dict[str, Backend]:
    """Return the selected backend of each platform; of one platform if the backend is requested."""
    candidates = {platform: dataclasses.replace(args, platform=platform) for platform in platforms}
    if name_or_backend == "auto":
        return {platform: select_backend("auto", x) for platform, x in candidates.items()}
    # The requested backend runs on one of the platforms: take the first that it supports.
    supported = (p for p, x in candidates.items() if _is_supported(name_or_backend, x))
    platform = next(supported, platforms[0])
    return {platform: select_backend(name_or_backend, candidates[platform])}


def _is_supported(name_or_backend: str | Backend, args: AttentionArgs) -> bool:
    try:
        select_backend(name_or_backend, args)
    except InputError:
        return False
    return True
