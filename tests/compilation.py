"""Flags with which XLA compiles the programs of tests faster, at the cost of their speed."""

import os
from importlib.metadata import version

# On one core, a decoder's gradient compiles in 5.6 s instead of 11.4 s. XLA would also split each
# program to compile its parts in parallel, which takes more CPU time; other tests use the cores.
FAST_COMPILATION = "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 12):  # later versions have no such flag
    FAST_COMPILATION += " --xla_cpu_use_fusion_emitters=false"


def default_environment() -> dict[str, str]:
    """Return the environment variables without XLA_FLAGS: libtpu has other flags, and aborts."""
    return {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
