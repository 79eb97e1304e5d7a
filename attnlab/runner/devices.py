"""The devices of a run, and the options of JAX that depend on them."""

import contextlib
import importlib.util
import math
import os
import re

import jax
from absl import logging
from etils import epath
from jax._src import xla_bridge
from jax.experimental.compilation_cache import compilation_cache

from attnlab import sharding
from attnlab.distributed.job import Job
from attnlab.errors import InputError
from attnlab.runner import xla_flags
from attnlab.runner.flag_values import make_writable_folder
from attnlab.runner.request import Request

DUMP_FLAG = "--xla_dump_to"
MAX_SIMULATED = 8  # CPU devices simulated for a mesh with explicit sizes


def configure_jax(request: Request, job: Job | None) -> None:
    """Configure JAX: XLA's flags and dumps, NaN checks, and simulated devices, which a job shares.

    Raises:
      InputError: `--dump_hlo` or `--xla_flags` comes too late, because JAX has started.
    """
    if request.dump_hlo is not None:
        _dump_hlo(request.dump_hlo, job)
    # Libraries raise their errors, which are reported once here, so their own logs are not needed.
    logging.set_verbosity(logging.FATAL)
    _use_cpu_without_tpu()
    if request.xla_flags == "recommended":
        xla_flags.apply(xla_flags.local_kind())
    sizes = [int(size) for size in re.findall(r":(\d+)", request.mesh)]
    count = 1
    for size in sizes:
        count *= size
    count = -(-count // (1 if job is None else job.num_processes))
    if 1 < count <= MAX_SIMULATED and "host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # already initialized by an earlier run of a sweep
            jax.config.update("jax_num_cpu_devices", count)  # no effect on other platforms
    jax.config.update("jax_debug_nans", request.debug_nans)


def _dump_hlo(folder: epath.Path, job: Job | None) -> None:
    """Let XLA write the programs that it compiles; each process of a job has its own folder."""
    own = folder if job is None else folder / f"process_{job.process_id}"
    flag, flags = f"{DUMP_FLAG}={own}", os.environ.get("XLA_FLAGS", "").split()
    if flag in flags:  # an earlier run of a sweep
        return
    if xla_bridge.backends_are_initialized():
        raise InputError(f"--dump_hlo={folder}: JAX has already started in this process; start a new one")
    make_writable_folder(own)
    os.environ["XLA_FLAGS"] = " ".join([*flags, flag])  # XLA reads them when the first device starts


def _use_cpu_without_tpu() -> None:
    """Select the CPU where libtpu is installed only to compile for TPUs, to avoid its warnings."""
    no_chip = os.environ.get("TPU_SKIP_MDS_QUERY")  # set by JAX if there is no TPU
    plugins = importlib.util.find_spec("jax_plugins")
    if no_chip and plugins is None and importlib.util.find_spec("libtpu"):
        jax.config.update("jax_platforms", jax.config.values["jax_platforms"] or "cpu")


def devices() -> list[jax.Device]:
    """Return the devices of all processes."""
    try:
        return jax.devices()
    except RuntimeError as error:
        raise InputError(f"JAX found no devices: {error}") from error


def make_mesh(text: str) -> jax.sharding.Mesh:
    """Return the mesh of `--mesh`; "auto" means one device on a machine with only a CPU.

    Raises:
      InputError: the mesh does not fit the devices, or a process of the job has no part in it.
    """
    found, jobs = devices(), jax.process_count()
    alone = text == "auto" and found[0].platform == "cpu" and jobs == 1
    sizes = sharding.parse_mesh("single" if alone else text, len(found), sharding.num_slices(found))
    used = math.prod(sizes[axis] for axis in sharding.MESH_AXES)
    if jobs > 1 and used < len(found):
        raise InputError(
            f"--mesh={text} uses {used} of the {len(found)} devices of {jobs} processes; a job of several "
            "processes uses all of them"
        )
    return sharding.make_mesh(sizes)


def enable_compilation_cache(mesh: jax.sharding.Mesh) -> None:
    """Enable the persistent compilation cache, except for simulated devices and `--dump_hlo`.

    A cached program for simulated devices hangs in its collectives until XLA aborts (jax 0.10.2).
    XLA does not dump a cached program.
    """
    simulated = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    dumped = DUMP_FLAG in os.environ.get("XLA_FLAGS", "")
    jax.config.update("jax_enable_compilation_cache", not simulated and not dumped)
    if not jax.config.values["jax_compilation_cache_dir"]:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        jax.config.update("jax_compilation_cache_dir", os.path.join(home, "attnlab", "xla"))
    compilation_cache.reset_cache()  # JAX reads these options only once per process
