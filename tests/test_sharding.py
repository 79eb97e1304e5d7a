import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab.sharding import (
    BATCH_AXES,
    check_divisible,
    format_mesh,
    gathered_param_spec,
    make_mesh,
    num_slices,
    param_spec,
    parse_mesh,
    spec,
)


@pytest.mark.parametrize(
    "text, devices, sizes",
    [
        ("single", 8, (1, 1, 1, 1, 1)),
        ("data", 8, (8, 1, 1, 1, 1)),
        ("fsdp", 6, (1, 6, 1, 1, 1)),
        ("tensor", 4, (1, 1, 1, 1, 4)),
        ("fsdp_tensor", 8, (1, 4, 1, 1, 2)),
        ("fsdp_tensor", 16, (1, 4, 1, 1, 4)),
        ("fsdp_tensor", 6, (1, 3, 1, 1, 2)),
        ("fsdp_tensor", 7, (1, 7, 1, 1, 1)),
        ("fsdp_tensor", 1, (1, 1, 1, 1, 1)),
        ("data:2,fsdp:2,tensor:2", 8, (2, 2, 1, 1, 2)),
        ("tensor:2", 8, (1, 1, 1, 1, 2)),
        (" fsdp:4, data:2", 8, (2, 4, 1, 1, 1)),
        ("auto", 8, (1, 8, 1, 1, 1)),
        ("sequence", 4, (1, 1, 1, 4, 1)),
        ("fsdp:2,tensor:2,sequence:2", 8, (1, 2, 1, 2, 2)),
        ("expert", 8, (1, 1, 8, 1, 1)),
        ("tensor:2,expert:4,data:2", 16, (2, 1, 4, 1, 2)),
    ],
)
def test_parse_mesh_accepts_presets_and_sizes(text, devices, sizes):
    assert tuple(parse_mesh(text, devices).values()) == sizes


class Device:
    """A device of a process, as `create_hybrid_device_mesh` sees it."""

    platform, device_kind = "cpu", "cpu"

    def __init__(self, index, per_process):
        self.id, self.process_index = index, index // per_process


def test_slow_axes_are_multiplied_and_cross_slices():
    sizes = parse_mesh("dcn_data:2,data:2,fsdp:2,tensor:2", 16, num_slices=2)
    assert sizes == {"data": 4, "fsdp": 2, "expert": 1, "sequence": 1, "tensor": 2, "dcn_data": 2}
    auto = parse_mesh("auto", 16, num_slices=2)
    assert auto == {"data": 2, "fsdp": 8, "expert": 1, "sequence": 1, "tensor": 1, "dcn_data": 2}
    devices = [Device(i, 8) for i in range(16)]
    assert num_slices(devices) == 2
    grid = make_mesh(sizes, devices).devices
    processes = np.vectorize(lambda device: device.process_index)(grid)
    assert (processes[:2] == 0).all() and (processes[2:] == 1).all()


@pytest.mark.parametrize(
    "text, devices, words",
    [
        ("fdsp:8", 8, ["--mesh=fdsp:8", "data, fsdp, expert, tensor, sequence, fsdp_tensor"]),
        ("", 8, ["expected one of"]),
        ("fsdp:0", 8, ["size of fsdp", "at least 1"]),
        ("fsdp:-1", 8, ["size of fsdp"]),
        ("fsdp:x", 8, ["size of fsdp"]),
        ("fsdp:²", 8, ["size of fsdp"]),
        ("data:2,data:4", 8, ["data twice"]),
        ("fsdp:8,tensor:2", 8, ["needs 16 devices", "are 8", "single, data:8, fsdp:8, fsdp:4,tensor:2"]),
        ("data:2", 1, ["needs 2 devices", "is 1", "these fit: single"]),
        ("dcn_data:2,fsdp:4", 8, ["has 2 slices, and there are 1"]),
        ("dcn_tensor:2", 8, ["axes data, fsdp, expert, sequence, tensor, dcn_data, dcn_fsdp"]),
    ],
)
def test_parse_mesh_rejects_invalid_meshes(refuses, text, devices, words):
    with refuses(*words):
        parse_mesh(text, devices)


@pytest.mark.parametrize("text", ["single", "fsdp:8", "data:2,expert:2,tensor:2", "tensor:4"])
def test_format_mesh_is_inverse_of_parse_mesh(text):
    mesh = make_mesh(parse_mesh(text, 8))
    assert format_mesh(mesh) == text
    assert all(kind == jax.sharding.AxisType.Explicit for kind in mesh.axis_types)


def test_specs_of_activations_and_parameters(mesh_of):
    with jax.set_mesh(mesh_of("data:2,fsdp:2,tensor:2")):
        assert spec("batch", "sequence", "heads", None) == P(BATCH_AXES, None, "tensor", None)
        assert param_spec((512, 64), ("vocab", "embed")) == P("tensor", "fsdp")
        assert gathered_param_spec((512, 64), ("vocab", "embed")) == P("tensor", None)
        assert param_spec((257, 64), ("vocab", "embed")) == P(None, "fsdp")
        assert param_spec((64, 4, 16), ("embed", "heads", "head_dim")) == P("fsdp", "tensor", None)


def test_check_divisible_names_field_and_valid_sizes(refuses):
    sizes = {"data": 2, "fsdp": 4, "tensor": 4}
    check_divisible(sizes, {"batch": ("batch", 16), "width": ("embed", 12), "heads": ("heads", 4)})
    with refuses("data.batch=12", "8 ways", "data x fsdp", "a multiple of 8", "1 or 2 or 3 or 4 or 6"):
        check_divisible(sizes, {"data.batch": ("batch", 12)})
    with refuses("model.width=10", "4 ways over mesh axes fsdp", "fsdp of 1 or 2"):
        check_divisible(sizes, {"model.width": ("embed", 10)})
    with refuses("experts=6", "4 ways over mesh axes expert", "a multiple of 4, or expert of 1 or 2 or 3"):
        check_divisible({"expert": 4}, {"experts": ("experts", 6)})
    with refuses("kv_heads=2", "tensor of 1 or 2"):
        check_divisible(sizes, {"kv_heads": ("kv_heads", 2)})
