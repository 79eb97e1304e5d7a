"""Recommended flags of XLA for each kind of accelerator, set by `--xla_flags=recommended`."""

import os
from typing import NamedTuple

import jax
from jax._src import xla_bridge

from attnlab.errors import InputError
from attnlab.train.targets import GPUS

# The training scripts of MaxText (github.com/AI-Hypercomputer/maxtext) in src/maxtext/configs.
SOURCES = {
    "v5e": "tpu/v5e/llama2_7b.sh",
    "v5p": "tpu/v5p/llama2_7b.sh",
    "v6e": "tpu/v6e/llama2_7b_4096.sh",
    "gpu": "gpu/a3/llama_2_7b/1vm.sh",
}


class XlaFlag(NamedTuple):
    """A flag, its recommended value, and the kinds of accelerators that it is recommended for."""

    name: str
    value: str
    kinds: tuple[str, ...]


TPUS, GPU = ("v5e", "v5p", "v6e"), ("gpu",)
FLAGS = (
    XlaFlag("xla_enable_async_all_gather", "true", TPUS),
    XlaFlag("xla_tpu_enable_async_collective_fusion", "true", TPUS),
    # MaxText sets it for v5p and v6e too, where libtpu 0.0.52 refuses to start with it.
    XlaFlag("xla_tpu_enable_async_collective_fusion_fuse_all_gather", "true", ("v5e",)),
    XlaFlag("xla_tpu_enable_async_collective_fusion_multiple_steps", "true", TPUS),
    XlaFlag("xla_tpu_overlap_compute_collective_tc", "true", TPUS),
    XlaFlag("xla_tpu_enable_data_parallel_all_reduce_opt", "true", ("v5e", "v5p")),
    XlaFlag("xla_tpu_data_parallel_opt_different_sized_ops", "true", ("v5e", "v5p")),
    XlaFlag("xla_tpu_enable_ag_backward_pipelining", "true", ("v5p",)),
    XlaFlag("xla_enable_async_collective_permute", "true", ("v5p",)),
    XlaFlag("xla_tpu_megacore_fusion_allow_ags", "false", ("v5p",)),
    XlaFlag("xla_tpu_scoped_vmem_limit_kib", "98304", ("v6e",)),
    XlaFlag("xla_gpu_enable_latency_hiding_scheduler", "true", GPU),
    XlaFlag("xla_gpu_enable_triton_gemm", "false", GPU),
    XlaFlag("xla_gpu_enable_pipelined_all_gather", "true", GPU),
    XlaFlag("xla_gpu_enable_pipelined_reduce_scatter", "true", GPU),
    XlaFlag("xla_gpu_enable_pipelined_all_reduce", "true", GPU),
    XlaFlag("xla_gpu_enable_while_loop_double_buffering", "true", GPU),
    XlaFlag("xla_gpu_enable_all_gather_combine_by_dim", "false", GPU),
    XlaFlag("xla_gpu_enable_reduce_scatter_combine_by_dim", "false", GPU),
    XlaFlag("xla_gpu_all_reduce_combine_threshold_bytes", "134217728", GPU),
    XlaFlag("xla_gpu_all_gather_combine_threshold_bytes", "134217728", GPU),
    XlaFlag("xla_gpu_reduce_scatter_combine_threshold_bytes", "67108864", GPU),
)


def recommended(kind: str | None) -> dict[str, str]:
    """Return {flag: value} for a kind of accelerator, a key of `SOURCES`."""
    return {flag.name: flag.value for flag in FLAGS if kind in flag.kinds}


def variable(kind: str) -> str:
    """Return the environment variable of these flags; libtpu has one of its own."""
    return "XLA_FLAGS" if kind == "gpu" else "LIBTPU_INIT_ARGS"


def local_kind() -> str | None:
    """Return the kind of this machine's accelerators, a key of `SOURCES`; None for all others.

    It does not start JAX, which reads the flags when it starts.
    """
    from jax._src import hardware_utils  # deferred: a private module, which other runs do not need

    platforms = (jax.config.values["jax_platforms"] or "tpu,cuda").split(",")
    _, version = hardware_utils.num_available_tpu_chips_and_device_id()
    if version is not None and "tpu" in platforms:
        return version.name if version.name in SOURCES else None
    uses_gpu = "cuda" in platforms or "gpu" in platforms
    return "gpu" if uses_gpu and hardware_utils.has_visible_nvidia_gpu() else None


def target_kind(target: str) -> str | None:
    """Return the kind of a target of mode describe, such as "v5e:4x4" or "h100:8"."""
    name = target.partition(":")[0]
    return "gpu" if name in GPUS else name if name in SOURCES else None


def apply(kind: str | None) -> None:
    """Add the recommended flags to the environment; flags that it already has keep their values.

    Raises:
      InputError: JAX has already started without them.
    """
    if kind is None:
        return
    given = _given(kind)
    added = [f"--{name}={value}" for name, value in recommended(kind).items() if name not in given]
    if not added:  # also in later runs of a sweep
        return
    if xla_bridge.backends_are_initialized():
        raise InputError("--xla_flags=recommended: JAX has already started in this process; start a new one")
    os.environ[variable(kind)] = " ".join([*os.environ.get(variable(kind), "").split(), *added])


def summary(kind: str | None) -> str:
    """Return the effect of `apply` for the line of a run that names its devices."""
    if kind is None:
        return "no recommended XLA flags"
    kept = sum(_given(kind).get(name) != value for name, value in recommended(kind).items())
    text = f"{len(recommended(kind)) - kept} recommended XLA flags"
    return f"{text}; {kept} kept as set in {variable(kind)}" if kept else text


def table(kind: str | None) -> str:
    """Return the recommended flags, one a line, with those that the environment sets otherwise."""
    if kind is None:
        return "XLA flags\n  none are recommended for this platform"
    given = _given(kind)
    lines = []
    for name, value in recommended(kind).items():
        current = given.get(name, value)
        lines.append(f"  --{name}={current}" + (f"  recommended: {value}" if current != value else ""))
    return "\n".join([f"XLA flags for {kind}, in {variable(kind)}", *lines])


def _given(kind: str) -> dict[str, str]:
    """Return {flag: value} of the environment; a flag without a value is true."""
    words = os.environ.get(variable(kind), "").split()
    pairs = (word.lstrip("-").partition("=") for word in words)
    return {name: value if equals else "true" for name, equals, value in pairs}
