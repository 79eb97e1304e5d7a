"""Where arrays live: one table from logical axis names to mesh axes, and the meshes themselves.

Every mesh has the same named axes, most of them of size 1, with Explicit axis types: an array's
sharding is part of its type. Code speaks of logical axes ("batch", "heads"); only the table below
knows the mesh.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor")
PRESETS = ("single", "data", "fsdp", "tensor", "fsdp_tensor")

# logical axis -> mesh axes of (an activation, a stored parameter).
# Parameters are stored in pieces over fsdp and gathered just before use, so an activation's
# "embed" is whole while a parameter's is not.
LOGICAL_AXIS_RULES: dict[str, tuple] = {
    "batch": (("data", "fsdp"), None),
    "sequence": (None, None),
    "embed": (None, "fsdp"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "experts": ("tensor", "tensor"),
    "expert_mlp": (None, None),  # the experts themselves are cut
    "vocab": ("tensor", "tensor"),
    "norm": (None, None),
    "state": (None, None),  # of a recurrent layer
    "window": (None, None),  # what a patch or a convolution reads at once: pixels, taps, mels
}


def spec(*names: str | None) -> P:
    """PartitionSpec of an activation whose dimensions have these logical names."""
    return P(*(LOGICAL_AXIS_RULES[name][0] if name else None for name in names))


def param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """PartitionSpec a parameter is stored with; a vocabulary that does not divide stays whole."""
    mesh = jax.sharding.get_abstract_mesh()
    return P(
        *(
            _param_mesh_axis(mesh, n, size, LOGICAL_AXIS_RULES[n][1])
            for n, size in zip(names, shape, strict=True)
        )
    )


def gathered_param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """PartitionSpec a parameter is used with: as stored, but gathered over fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(shape, names)))


def _param_mesh_axis(mesh, name: str, size: int, axis: str | None) -> str | None:
    # The tokenizer, not the person, decides the vocabulary: 257 bytes cannot be halved.
    if name == "vocab" and axis in mesh.shape and size % mesh.shape[axis]:
        return None
    return axis


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x` laid out as its logical axes say; unchanged outside a mesh."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.sharding.reshard(x, spec(*names))


def out_sharding(*names: str | None) -> P | None:
    """The `out_sharding=` argument for a result with these logical axes; None outside a mesh."""
    return None if jax.sharding.get_abstract_mesh().empty else spec(*names)


def batch_zeros(shape: Sequence[int], dtype) -> jax.Array:
    """Zeros of this shape, the first dimension that of the batch."""
    return jnp.zeros(shape, dtype, out_sharding=out_sharding("batch", *(None,) * (len(shape) - 1)))


def parse_mesh(text: str, num_devices: int) -> dict[str, int]:
    """Axis sizes that a preset name or `axis:size,...` means on `num_devices` devices.

    Raises:
      InputError: an unknown preset or axis, a bad size, or more devices than there are.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    if text in PRESETS:
        return sizes | _preset(text, num_devices)
    given: set[str] = set()
    for part in text.split(","):
        axis, colon, size = part.strip().partition(":")
        if not colon or axis not in MESH_AXES:
            raise InputError(
                f"--mesh={text}: expected one of {', '.join(PRESETS)}, or sizes of the axes "
                f"{', '.join(MESH_AXES)} as in data:2,fsdp:2,tensor:2"
            )
        if axis in given:
            raise InputError(f"--mesh={text} names {axis} twice")
        given.add(axis)
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--mesh={text}: the size of {axis} must be a whole number of at least 1")
        sizes[axis] = int(size)
    needed = math.prod(sizes.values())
    if needed > num_devices:
        raise InputError(
            f"--mesh={text} needs {needed} devices and there {'is' if num_devices == 1 else 'are'} "
            f"{num_devices}; these fit: {', '.join(_suggested_meshes(num_devices))}"
        )
    return sizes


def _preset(name: str, n: int) -> dict[str, int]:
    if name == "single":
        return {}
    if name == "fsdp_tensor":
        tensor = 1 << (int(math.log2(n)) // 2)  # the largest power of two up to the square root
        while n % tensor:
            tensor //= 2
        return {"fsdp": n // tensor, "tensor": tensor}
    return {name: n}


def _suggested_meshes(n: int) -> list[str]:
    if n == 1:
        return ["single"]
    both = _preset("fsdp_tensor", n)
    mixed = [f"fsdp:{both['fsdp']},tensor:{both['tensor']}"] if both["tensor"] > 1 else []
    return ["single", f"data:{n}", f"fsdp:{n}", *mixed]


def make_mesh(sizes: dict[str, int], devices: Sequence | None = None) -> Mesh:
    """An Explicit mesh of these axis sizes over the first devices there are."""
    shape = tuple(sizes[axis] for axis in MESH_AXES)
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    return jax.make_mesh(shape, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape), devices=devices)


def check_divisible(sizes: dict[str, int], dimensions: dict[str, tuple[str, int]]) -> None:
    """Checks that dimensions can be cut as the mesh asks.

    Args:
      sizes: mesh axis sizes.
      dimensions: config field -> (logical axis, size).

    Raises:
      InputError: naming the field, the mesh axes and the sizes that would do.
    """
    for field, (logical, size) in dimensions.items():
        for axes in {a for a in LOGICAL_AXIS_RULES[logical] if a}:
            axes = (axes,) if isinstance(axes, str) else axes
            pieces = math.prod(sizes[a] for a in axes)
            if size % pieces:
                smaller = [d for d in range(1, size + 1) if size % d == 0 and d < pieces]
                raise InputError(
                    f"{field}={size} cannot be cut into {pieces} pieces over mesh axes {' x '.join(axes)}: "
                    f"use a multiple of {pieces}, or {' x '.join(axes)} of {' or '.join(map(str, smaller))}"
                )


def format_mesh(mesh: Mesh) -> str:
    """The mesh in one line, as `--mesh` would take it."""
    used = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "single"


def named_sharding(mesh: Mesh, partition: P) -> NamedSharding:
    """The sharding of `partition` on `mesh`."""
    return NamedSharding(mesh, partition)
