"""Meshes of accelerators that are not here, to trace programs for them."""

import math
import re

from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from attnlab.errors import InputError
from attnlab.sharding import MESH_AXES, parse_mesh

# JAX's device kind of each accelerator.
TPUS = {"v4": "TPU v4", "v5e": "TPU v5 lite", "v5p": "TPU v5", "v6e": "TPU v6 lite"}
GPUS = {
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}


def target_mesh(target: str, mesh: str) -> AbstractMesh:
    """Return the mesh `mesh`, a value of `--mesh`, on a target such as "v5e:4x4" or "h100:8".

    Raises:
      InputError: the target has another form, or the mesh does not fit on it.
    """
    kind, _, size = target.partition(":")
    pattern = r"\d+(x\d+)*" if kind in TPUS else r"\d+"
    if kind not in TPUS | GPUS or not re.fullmatch(pattern, size) or "0" in size.split("x"):
        raise InputError(
            f"--target={target}: expected a TPU slice, such as v5e:4x4 ({', '.join(TPUS)}), or a number of "
            f"GPUs, such as h100:8 ({', '.join(GPUS)})"
        )
    sizes = parse_mesh(mesh, math.prod(map(int, size.split("x"))))
    platform = "tpu" if kind in TPUS else "gpu"
    device = AbstractDevice(device_kind=(TPUS | GPUS)[kind], num_cores=None, platform=platform)
    return AbstractMesh(
        tuple(sizes[axis] for axis in MESH_AXES),
        MESH_AXES,
        axis_types=(AxisType.Explicit,) * len(MESH_AXES),
        abstract_device=device,
    )
