"""Idle devices, and dumps of compiled programs."""

import os
from types import SimpleNamespace

import jax
import pytest
from etils import epath

from attnlab.distributed.job import Job
from attnlab.errors import InputError
from attnlab.runner import devices
from attnlab.runner.training import _describe_devices
from tests.train.small import make_experiment, make_session


@pytest.mark.parametrize(
    ("mesh", "text"),
    [
        ("single", "1 cpu device; idle: cpu 1-7"),
        ("data:2,fsdp:3", "6 cpu devices; idle: cpu 6-7"),
        ("fsdp", "8 cpu devices"),
    ],
)
def test_idle_devices_are_named(mesh, text):
    experiment = make_experiment(batch_size=24, model={"width": 24, "depth": 1})
    assert len(jax.devices()) == 8
    assert _describe_devices(make_session(experiment, mesh)) == text


@pytest.fixture
def request_with_dump(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_x=1")
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # nothing else changes in this process
    return SimpleNamespace(
        dump_hlo=epath.Path(tmp_path / "hlo"), mesh="single", debug_nans=False, xla_flags="none"
    )


def test_each_process_dumps_into_its_own_folder(request_with_dump, monkeypatch, tmp_path):
    started = iter([False, True])
    monkeypatch.setattr(devices.xla_bridge, "backends_are_initialized", lambda: next(started))
    for _ in range(2):  # the second run of a sweep finds the flag
        devices.configure_jax(request_with_dump, Job("node1:8476", 4, 3))
        assert os.environ["XLA_FLAGS"] == f"--xla_x=1 --xla_dump_to={tmp_path}/hlo/process_3"
    assert (tmp_path / "hlo" / "process_3").is_dir()


def test_dump_after_the_start_of_jax_is_refused(request_with_dump, tmp_path):
    with pytest.raises(InputError, match=r"--dump_hlo=.*: JAX has already started in this process"):
        devices.configure_jax(request_with_dump, None)
    assert os.environ["XLA_FLAGS"] == "--xla_x=1"
    assert not (tmp_path / "hlo").exists()
