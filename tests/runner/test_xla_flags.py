"""Recommended flags of XLA: compilers accept them, flags of the environment take precedence."""

import os
from types import SimpleNamespace

import pytest
from jax._src import hardware_utils

from attnlab.runner import xla_flags
from tests.programs import ROOT, run_python_json
from tests.train.test_tpu import needs_libtpu, run_program

KINDS = tuple(xla_flags.SOURCES)
NAME = "xla_tpu_scoped_vmem_limit_kib"


def command_line(kind):
    return " ".join(f"--{name}={value}" for name, value in xla_flags.recommended(kind).items())


@pytest.fixture
def environment(monkeypatch):
    """Remove the variables of this process, and pretend that JAX has not started."""
    for kind in KINDS:
        monkeypatch.setenv(xla_flags.variable(kind), "")
    monkeypatch.setattr(xla_flags.xla_bridge, "backends_are_initialized", lambda: False)
    return monkeypatch


@pytest.mark.parametrize("kind", KINDS)
def test_all_flags_are_set(environment, kind):
    xla_flags.apply(kind)
    assert os.environ[xla_flags.variable(kind)] == command_line(kind)
    assert xla_flags.summary(kind) == f"{len(xla_flags.recommended(kind))} recommended XLA flags"
    assert xla_flags.table(kind).split()[-1] == command_line(kind).split()[-1]


def test_flags_of_the_environment_take_precedence(environment):
    environment.setenv("LIBTPU_INIT_ARGS", f"--other --{NAME}=1024")
    xla_flags.apply("v6e")
    flags = os.environ["LIBTPU_INIT_ARGS"].split()
    assert flags[:2] == ["--other", f"--{NAME}=1024"]
    assert sorted([*flags[2:], f"--{NAME}=98304"]) == sorted(command_line("v6e").split())
    assert xla_flags.summary("v6e").endswith("; 1 kept as set in LIBTPU_INIT_ARGS")
    assert f"  --{NAME}=1024  recommended: 98304" in xla_flags.table("v6e").splitlines()
    assert os.environ["XLA_FLAGS"] == ""


def test_flags_after_the_start_of_jax_are_refused(environment, refuses):
    xla_flags.apply("gpu")
    environment.setattr(xla_flags.xla_bridge, "backends_are_initialized", lambda: True)
    xla_flags.apply("gpu")  # the second run of a sweep finds them
    environment.setenv("XLA_FLAGS", "")
    with refuses("--xla_flags=recommended", "JAX has already started"):
        xla_flags.apply("gpu")


def test_accelerator_is_found_before_jax_starts(monkeypatch):
    version, tpu = hardware_utils.TpuVersion, "num_available_tpu_chips_and_device_id"
    values = {"jax_platforms": ""}
    monkeypatch.setattr(xla_flags, "jax", SimpleNamespace(config=SimpleNamespace(values=values)))
    monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: False)
    for found, kind in [(version.v5e, "v5e"), (version.v6e, "v6e"), (version.v3, None), (None, None)]:
        monkeypatch.setattr(hardware_utils, tpu, lambda found=found: (4, found))
        assert xla_flags.local_kind() == kind
    monkeypatch.setattr(hardware_utils, "has_visible_nvidia_gpu", lambda: True)
    assert xla_flags.local_kind() == "gpu"
    values["jax_platforms"] = "cpu"
    assert xla_flags.local_kind() is None
    xla_flags.apply(None)
    assert xla_flags.summary(None) == "no recommended XLA flags"


def test_targets_have_kinds():
    kinds = {"v5e:4x4": "v5e", "v5p:2x2x1": "v5p", "v4:2x2x1": None, "h100:8": "gpu"}
    assert {target: xla_flags.target_kind(target) for target in kinds} == kinds


def test_xla_accepts_the_flags_of_gpus():
    """XLA aborts at an unknown flag; it parses those of GPUs on every platform."""
    program = "import jax; print(jax.device_count())"
    flags = {"XLA_FLAGS": command_line("gpu"), "JAX_PLATFORMS": "cpu"}
    assert run_python_json(program, **flags) == 1


PROGRAM = """
import os

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from attnlab import sharding

devices = topologies.get_topology_desc(topology_name=os.environ["SLICE"], platform="tpu").devices
mesh = sharding.make_mesh({"fsdp": 4}, devices=devices)
rows = jax.NamedSharding(mesh, jax.P("fsdp", None))
x = jax.ShapeDtypeStruct((512, 512), jnp.bfloat16, sharding=rows)
with jax.set_mesh(mesh):
    run = jax.jit(lambda x, w: x @ jax.sharding.reshard(w, jax.P()))
    print(run.lower(x, x).compile().as_text().count("all-gather") > 0 and 1)
"""


@pytest.mark.preflight
@needs_libtpu
@pytest.mark.parametrize(("kind", "slice_"), [("v5e", "v5e:2x2"), ("v5p", "v5p:2x2x1"), ("v6e", "v6e:2x2")])
def test_libtpu_accepts_the_flags_of_tpus(kind, slice_):
    assert run_program(PROGRAM, LIBTPU_INIT_ARGS=command_line(kind), SLICE=slice_) == 1


def test_documented_table_lists_every_flag():
    table = (ROOT / "docs" / "launch.md").read_text().partition("<!-- flags -->")[2].strip().split("\n\n")[0]
    rows = [tuple(c.strip() for c in row.strip("|").split("|")) for row in table.splitlines()[2:]]
    assert rows == [
        (f"`{flag.name}`", *(flag.value if kind in flag.kinds else "" for kind in KINDS))
        for flag in xla_flags.FLAGS
    ]
    text = (ROOT / "docs" / "launch.md").read_text()
    assert all(f"`{source}`" in text for source in xla_flags.SOURCES.values())
