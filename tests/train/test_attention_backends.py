"""Backends of the layers of an experiment, warnings of slow ones, and steps that fall back."""

import dataclasses

import jax
import pytest

from attnlab.attention.backends.reference import Reference
from attnlab.attention.backends.registry import BACKENDS, register
from attnlab.layers import Causal, RelativeBias, Sliding
from attnlab.layers.linear import Dtypes
from attnlab.train.attention_backends import layer_backends, warn_of_slow_paths
from attnlab.train.describe import describe
from attnlab.train.session import Session
from attnlab.train.targets import target_mesh
from tests.train.small import TOKENIZER, make_experiment, make_session, random_batch


def target_session(target, mesh="single", length=256, **model):
    e = make_experiment(model=model)
    e = dataclasses.replace(e, data=dataclasses.replace(e.data, sequence_length=length))
    return Session(e, target_mesh(target, mesh), TOKENIZER)


def test_layers_of_one_spec_are_listed_once():
    pattern = (Causal(), Sliding(window=8), Causal())
    session = target_session("v5e:2x2", "fsdp:4", depth=3, pattern=pattern)
    layers = layer_backends(session)
    assert [layer.spec for layer in layers] == ["Causal()", "Sliding(window=8)"]
    assert {(layer.selection.backend, layer.selection.platform) for layer in layers} == {("splash", "tpu")}
    assert layers[0].selection.query == (2, 256, 4, 4)  # the rows of one device
    assert not any(layer.is_slow or layer.refusals for layer in layers)


def test_description_for_an_absent_device_gives_refusals():
    text = describe(target_session("v5e:2x2", "fsdp:2,tensor:2", length=16))
    sections = dict(part.split("\n", 1) for part in text.split("\n\n"))
    assert sections["mesh"].split() == ["fsdp:2,tensor:2", "4", "of", "TPU", "v5", "lite"]
    assert "unknown without the devices" in sections["bytes per device"]
    row, *refusals = sections["attention"].splitlines()
    assert row.split() == ["layers/periods/block0/attention", "Causal()", "16", "x", "16", "blockwise"]
    few = "it needs at least 128 queries and 128 keys"
    assert refusals == [f"    not splash: {few}", f"    not flash: {few}"]


@pytest.mark.parametrize("length, kernel", [(1024, "splash"), (512, "blockwise")])
def test_kernel_of_a_ring_depends_on_the_length_of_its_parts(length, kernel):
    """Each of four devices has two parts; `splash` needs 128 tokens."""
    (layer,) = layer_backends(target_session("v5e:2x2", "sequence:4", length=length))
    assert str(layer.selection) == f"ring ({kernel})"
    assert layer.is_slow == (kernel == "blockwise")
    assert layer.refusals == ["not splash: it needs at least 128 queries and 128 keys"] * layer.is_slow


@pytest.mark.parametrize(
    "target, model, reason",
    [
        ("h100:1", {}, "not cudnn: query, key and value must all be bfloat16 or all float16"),
        ("v5e:1x1", {"positions": RelativeBias()}, "not splash: the only score it supports is softcap"),
    ],
)
def test_slow_path_of_an_accelerator_is_warned_of_once(target, model, reason):
    lines = []
    # At this length the dense bias of a row and head takes 256 MiB; `flash` refuses over 1 GiB.
    session = target_session(target, length=8192, **model)
    warn_of_slow_paths(session, lines.append)
    assert len(lines) == 1 and reason in lines[0]
    assert lines[0].startswith("warning: layers/periods/block0/attention Causal(): blockwise, a slow path")


def test_no_warning_for_kernels_and_on_the_cpu():
    lines = []
    warn_of_slow_paths(target_session("v6e:1x1", dtypes=Dtypes(compute="bfloat16")), lines.append)
    warn_of_slow_paths(make_session(make_experiment()), lines.append)
    assert lines == []


@pytest.mark.parametrize("target", ["v5e", "v5e:0x4", "v5e:4x", "h100:2x4", "h100:", "cpu:8"])
def test_malformed_target_is_rejected(target, refuses):
    with refuses(f"--target={target}: expected a TPU slice, such as v5e:4x4", "h100:8"):
        target_mesh(target, "single")


def test_mesh_must_fit_on_the_target(refuses):
    with refuses("--mesh=fsdp:32 needs 32 devices and there are 16"):
        target_mesh("v5e:4x4", "fsdp:32")


class Kernel(Reference):
    """A kernel that the CPU's compiler refuses."""

    name = "kernel"

    def run(self, args, offset):
        result = super().run(args, offset)
        call = jax.ffi.ffi_call("mosaic_kernel", jax.typeof(result.lse))
        call = jax.custom_jvp(call)
        call.defjvp(lambda primals, tangents: (call(*primals), tangents[0]))
        return result._replace(lse=call(result.lse), out=result.out + 0 * call(result.lse)[..., None])


def test_steps_and_description_fall_back_from_a_refused_kernel(capsys):
    register(Kernel())
    try:
        session = make_session(make_experiment())
        state, _ = session.train_step(session.new_state(), random_batch())
        state, metrics = session.train_step(state, random_batch())
        assert session.evaluate(session.eval_params(state), [random_batch()])["loss"] > 0
        assert "not kernel: the compiler refused it: " in describe(session)
    finally:
        BACKENDS[:] = [backend for backend in BACKENDS if backend.name != "kernel"]
    assert metrics["skipped"] == 0 and int(state.step) == 2
    assert capsys.readouterr().out.count("attention: compiling again without kernel, refused with: ") == 1
