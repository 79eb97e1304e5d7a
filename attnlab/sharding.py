"""Sharding: the table from logical axis names to mesh axes, and the construction of meshes.

Every mesh has the same named axes, most of size 1, with Explicit axis types: an array's sharding is
part of its type. Code uses logical axes ("batch", "heads"); only the table below refers to mesh
axes.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import jax
import jax.numpy as jnp
from jax.experimental import mesh_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from attnlab.errors import InputError

# Devices that differ only in the last axis are nearest to each other. So the axes are ordered by
# the number of collectives: gradients once a step over data, to activations several times a layer
# over tensor. The axes of the batch come first, so that each process holds consecutive rows.
MESH_AXES = ("data", "fsdp", "expert", "sequence", "tensor")
BATCH_AXES = ("data", "fsdp", "expert")
PRESETS = ("auto", "single", "data", "fsdp", "expert", "tensor", "sequence", "fsdp_tensor")
# Parts of the axes that cross the slow network between TPU slices, GPU nodes or processes. Only
# axes with few collectives a step are worth it.
SLOW_AXES = {"dcn_data": "data", "dcn_fsdp": "fsdp"}

# logical axis -> mesh axes of (an activation, a stored parameter).
# Parameters are stored sharded over fsdp and gathered just before use, so "embed" is sharded in
# parameters but not in activations.
LOGICAL_AXIS_RULES: dict[str, tuple] = {
    "batch": (BATCH_AXES, None),
    "sequence": (("sequence",), None),
    # Of activations of the model's width E, between products that are sharded over tensor
    # (sequence parallelism, Korthikanti et al. 2022, arXiv 2205.05198).
    "residual": (("sequence", "tensor"), None),
    "embed": (None, "fsdp"),
    "heads": ("tensor", "tensor"),
    "kv_heads": ("tensor", "tensor"),
    "head_dim": (None, None),
    "mlp": ("tensor", "tensor"),
    "experts": ("expert", "expert"),
    "expert_mlp": ("tensor", "tensor"),
    "vocab": ("tensor", "tensor"),
    "norm": (None, None),
    "state": (None, None),  # of a recurrent layer
    "window": (None, None),  # input of a patch or convolution: pixels, taps, mels
}


def has_rules() -> bool:
    """Return whether the table applies to the current mesh: one with Explicit axes of these names.

    In another mesh, such as that of a user's own model, arrays keep the shardings of their types.
    """
    explicit_axes = jax.sharding.get_abstract_mesh().explicit_axes
    return set(MESH_AXES) <= set(explicit_axes)


# False where the length is not sharded, see `set_mesh_of_rows`.
_shards_sequences = jax.make_user_context(True)


@contextmanager
def set_mesh_of_rows(mesh: Mesh) -> Iterator[None]:
    """Use a mesh without sharding the length of activations, as for generation from a cache."""
    with jax.set_mesh(mesh), _shards_sequences(False):
        yield


def axis_size(axis: str) -> int:
    """Return the size of an axis of the current mesh; 1 if there is none."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def num_batch_shards(mesh: Mesh | AbstractMesh) -> int:
    """Return the number of parts of the rows of a batch on a mesh."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def has_sharded_length(x: jax.Array) -> bool:
    """Return whether the second dimension of an array of activations is sharded."""
    return has_rules() and jax.typeof(x).sharding.spec[1] is not None


def gather_length(x: jax.Array) -> jax.Array:
    """Return activations with the whole length on every device that has a part of it."""
    if not has_sharded_length(x):
        return x
    batch, _, *others = jax.typeof(x).sharding.spec
    return jax.sharding.reshard(x, P(batch, None, *others))


def length_axes(name: str, length: int) -> str | tuple[str, ...] | None:
    """Return the mesh axes of a length: those of the rules of "sequence" or "residual".

    An axis is left out if its size is 1 or does not divide the (rest of the) length.
    """
    axes: tuple[str, ...] = ()
    for axis in LOGICAL_AXIS_RULES[name][0] if has_rules() and _shards_sequences.value else ():
        size = axis_size(axis)
        if size > 1 and length % size == 0:
            axes, length = (*axes, axis), length // size
    return axes if len(axes) > 1 else next(iter(axes), None)


def spec(*names: str | None, shape: Sequence[int] | None = None) -> P:
    """Return the PartitionSpec of an activation whose dimensions have these logical names.

    Dimensions named "sequence" or "residual" are sharded only if `shape` is given, see
    `length_axes`. A single key head is not sharded.
    """

    def axes(i: int, name: str | None):
        if name in ("sequence", "residual"):
            return length_axes(name, shape[i]) if shape else None
        if name == "kv_heads" and shape and shape[i] == 1:
            return None
        return LOGICAL_AXIS_RULES[name][0] if name else None

    return P(*(axes(i, name) for i, name in enumerate(names)))


def is_sharded_over(axis: str, names: Sequence[str]) -> bool:
    """Return whether activations with these logical axes are sharded over a mesh axis."""
    return any(LOGICAL_AXIS_RULES[name][0] == axis for name in names)


def param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """Return the PartitionSpec of a stored parameter.

    A single key head, and a vocabulary that its mesh axis does not divide, are not sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return P(
        *(
            _param_mesh_axis(mesh, n, size, LOGICAL_AXIS_RULES[n][1])
            for n, size in zip(names, shape, strict=True)
        )
    )


def gathered_param_spec(shape: Sequence[int], names: Sequence[str]) -> P:
    """Return the PartitionSpec of a parameter in use: as stored, but gathered over fsdp."""
    return P(*(None if axis == "fsdp" else axis for axis in param_spec(shape, names)))


def _param_mesh_axis(mesh, name: str, size: int, axis: str | None) -> str | None:
    # The vocabulary size comes from the tokenizer and may be odd, such as 257 for bytes. A single
    # key head serves all query heads (multi-query attention).
    is_whole = name == "vocab" or (name == "kv_heads" and size == 1)
    return None if is_whole and size % mesh.shape.get(axis, 1) else axis


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """Reshard `x` by its logical axes; returns `x` unchanged where `has_rules` is false."""
    return jax.sharding.reshard(x, spec(*names, shape=x.shape)) if has_rules() else x


def out_sharding(*names: str | None, shape: Sequence[int] | None = None) -> P | None:
    """Return the `out_sharding` for a result with these axes; None where `has_rules` is false.

    See `spec` for `shape`.
    """
    return spec(*names, shape=shape) if has_rules() else None


def batch_zeros(shape: Sequence[int], dtype) -> jax.Array:
    """Return zeros of this shape, whose first dimension is the batch."""
    return jnp.zeros(shape, dtype, out_sharding=out_sharding("batch", *(None,) * (len(shape) - 1)))


def parse_mesh(text: str, num_devices: int, num_slices: int = 1) -> dict[str, int]:
    """Return the axis sizes of a preset name or `axis:size,...` on `num_devices` devices.

    The sizes include those of `SLOW_AXES`, which are also returned by their own names if they are
    in the text: `dcn_data:2,fsdp:8` is {"data": 2, "fsdp": 8, "tensor": 1, "dcn_data": 2}.

    Raises:
      InputError: the preset, an axis or a size is invalid, or there are not enough devices.
    """
    sizes = dict.fromkeys(MESH_AXES, 1)
    if text in PRESETS:
        return sizes | _preset(text, num_devices, num_slices)
    given: dict[str, int] = {}
    for part in text.split(","):
        axis, colon, size = part.strip().partition(":")
        if not colon or axis not in (*MESH_AXES, *SLOW_AXES):
            raise InputError(
                f"--mesh={text}: expected one of {', '.join(PRESETS)}, or sizes of the axes "
                f"{', '.join((*MESH_AXES, *SLOW_AXES))} as in data:2,fsdp:2,tensor:2"
            )
        if axis in given:
            raise InputError(f"--mesh={text} names {axis} twice")
        if not size.isdecimal() or int(size) < 1:
            raise InputError(f"--mesh={text}: the size of {axis} must be a whole number of at least 1")
        given[axis] = int(size)
        sizes[SLOW_AXES.get(axis, axis)] *= int(size)
    sizes |= {axis: given[axis] for axis in SLOW_AXES if axis in given}
    slow = math.prod(given.get(axis, 1) for axis in SLOW_AXES)
    if slow not in (1, num_slices):
        raise InputError(
            f"--mesh={text} has {slow} slices, and there are {num_slices}: a slice is a TPU slice, a GPU "
            "node, or, on CPUs, a process"
        )
    needed = math.prod(sizes[axis] for axis in MESH_AXES)
    if needed > num_devices:
        raise InputError(
            f"--mesh={text} needs {needed} devices and there {'is' if num_devices == 1 else 'are'} "
            f"{num_devices}; these fit: {', '.join(_suggested_meshes(num_devices))}"
        )
    return sizes


def _preset(name: str, n: int, num_slices: int = 1) -> dict[str, int]:
    if name == "single":
        return {}
    if name == "auto":
        if num_slices == 1 or n % num_slices:
            return {"fsdp": n}
        return {"data": num_slices, "fsdp": n // num_slices, "dcn_data": num_slices}
    if name == "fsdp_tensor":
        tensor = 1 << (int(math.log2(n)) // 2)  # largest power of two up to sqrt(n)
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
    """Return an Explicit mesh with the axis sizes of `parse_mesh` over the first of `devices`.

    The slowest-varying part of an axis crosses slices, if `sizes` has one of `SLOW_AXES`.
    """
    shape = tuple(sizes.get(axis, 1) for axis in MESH_AXES)
    devices = list(jax.devices() if devices is None else devices)[: math.prod(shape)]
    slow = tuple(sizes.get(f"dcn_{axis}", 1) for axis in MESH_AXES)
    if math.prod(slow) > 1:
        fast = tuple(size // part for size, part in zip(shape, slow, strict=True))
        grid = mesh_utils.create_hybrid_device_mesh(
            fast,
            slow,
            devices,
            process_is_granule=_num_slices(devices) == 1,
            allow_split_physical_axes=True,
        )
    else:
        # An axis may need parts of several physical axes, such as 8 x 8 on a torus of 4 x 4 x 4.
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Explicit,) * len(shape))


def _num_slices(devices: Sequence) -> int:
    """Return the number of TPU slices or GPU nodes; 1 if the platform does not tell."""
    return len({getattr(device, "slice_index", 0) for device in devices})


def num_slices(devices: Sequence) -> int:
    """Return the number of groups of devices with fast links: slices, nodes, or else processes."""
    found = _num_slices(devices)
    return found if found > 1 else len({device.process_index for device in devices})


def check_divisible(sizes: dict[str, int], dimensions: dict[str, tuple[str, int]]) -> None:
    """Check that dimensions are divisible by the sizes of their mesh axes.

    Args:
      sizes: mesh axis sizes.
      dimensions: config field -> (logical axis, size).

    Raises:
      InputError: a dimension is not; the message names field, mesh axes and valid sizes.
    """
    for field, (logical, size) in dimensions.items():
        for axes in {a for a in LOGICAL_AXIS_RULES[logical] if a}:
            axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if sizes.get(a, 1) > 1)
            shards = math.prod(sizes[a] for a in axes)
            if size % shards:
                smaller = [d for d in range(1, size + 1) if size % d == 0 and d < shards]
                raise InputError(
                    f"{field}={size} cannot be sharded {shards} ways over mesh axes {' x '.join(axes)}: "
                    f"use a multiple of {shards}, or {' x '.join(axes)} of {' or '.join(map(str, smaller))}"
                )


def mesh_device(mesh: Mesh | AbstractMesh) -> jax.Device | AbstractDevice:
    """Return the first device of a mesh, which has a `platform` and a `device_kind`."""
    return mesh.abstract_device if isinstance(mesh, AbstractMesh) else mesh.devices.flat[0]


def format_mesh(mesh: Mesh | AbstractMesh) -> str:
    """Return the text form of a mesh that `parse_mesh` accepts."""
    used = [f"{axis}:{size}" for axis, size in mesh.shape.items() if size > 1]
    return ",".join(used) or "single"


def named_sharding(mesh: Mesh | AbstractMesh, partition: P) -> NamedSharding:
    """Return the NamedSharding of `partition` on `mesh`."""
    return NamedSharding(mesh, partition)
