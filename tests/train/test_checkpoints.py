"""Checkpoints: retention, restoration onto other meshes, and recovery from damage."""

import gc
import hashlib
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.errors import InputError
from attnlab.train.checkpoints import Checkpoints, params_sha256


def mesh(text):
    return sharding.make_mesh(sharding.parse_mesh(text, 8))


def state_on(text, seed=0):
    """Return arrays sharded like a model's, with the same values on every mesh."""
    rng = np.random.default_rng(seed)
    specs = {"kernel": P("fsdp", "tensor"), "scale": P(None), "step": P()}
    values = {"kernel": rng.normal(size=(16, 8)), "scale": rng.normal(size=(16,)), "step": np.array(seed)}
    return {
        n: jax.device_put(jnp.float32(x), sharding.named_sharding(mesh(text), specs[n]))
        for n, x in values.items()
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return a folder with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_on("fsdp:4,tensor:2", step), {"at": step}, {"loss": float(step)})
    return folder


def test_save_keeps_latest_and_best(tmp_path):
    losses = {1: 3.0, 2: 1.0, 3: 2.0, 4: None, 5: 2.5, 6: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state_on("single", step), {}, None if loss is None else {"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 5, 6]
        assert checkpoints.best() == 2
    with Checkpoints(tmp_path) as reader:
        like = abstract(state_on("single"))
        assert reader.restore(like, "best").step == 2
        assert reader.restore(like, "latest").step == 6
        assert reader.restore(like, "5").step == 5
        with pytest.raises(InputError, match="expected one of latest, best, 2, 5, 6"):
            reader.restore(like, "4")


@pytest.mark.parametrize("text", ["single", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2"])
def test_restore_onto_another_mesh(three, text):
    wanted = state_on(text, 3)
    with Checkpoints(three) as checkpoints:
        restored = checkpoints.restore(abstract(wanted))
    assert (restored.step, restored.data) == (3, {"at": 3})
    assert_same(restored.state, wanted)
    for name, x in restored.state.items():
        assert x.sharding == wanted[name].sharding


def test_save_is_unaffected_by_donation_of_the_state(tmp_path):
    state = {"x": jnp.arange(2_000_000, dtype=jnp.float32)}
    expected = np.asarray(state["x"]).copy()
    overwrite = jax.jit(lambda s: {"x": s["x"] * 0 - 1}, donate_argnums=0)
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
        state = overwrite(state)
        jax.block_until_ready(state)
    with Checkpoints(tmp_path) as checkpoints:
        assert_same(checkpoints.restore(abstract(state)).state, {"x": expected})


def test_save_of_existing_step_does_nothing(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(3, state_on("single", 9), {"at": 9})
        assert checkpoints.has_metrics(3)
        assert not checkpoints.has_metrics(4)
        assert checkpoints.restore(abstract(state_on("single"))).data == {"at": 3}


@pytest.mark.parametrize("how", ["half", "empty", "gone", "noise"])
def test_restore_recovers_from_damage_of_any_file(three, tmp_path, how):
    """The damaged checkpoint is restored completely, or the one before it is."""
    like, rng = abstract(state_on("single")), np.random.default_rng(0)
    wanted = {step: state_on("single", step) for step in (1, 2, 3)}
    files = [p.relative_to(three) for p in (three / "checkpoints" / "3").rglob("*") if p.is_file()]
    assert len(files) > 8
    for i, name in enumerate(files):
        folder = tmp_path / str(i)
        shutil.copytree(three, folder)
        damage(folder / name, how, rng)
        messages = []
        with Checkpoints(folder, keep=3, log=messages.append) as checkpoints:
            restored = checkpoints.restore(like)
            assert_same(restored.state, wanted[restored.step])
            assert restored.step in (2, 3), name
            if restored.step == 2 and messages:
                assert messages[0].startswith("checkpoint 3 is damaged (")
                assert (folder / "damaged" / "3").is_dir()
            checkpoints.save(4, wanted[3], {"at": 4}, {"loss": 0.0})
        with Checkpoints(folder) as checkpoints:
            assert checkpoints.restore(like).step == 4


def damage(file: Path, how: str, rng):
    data = file.read_bytes()
    if how == "half":
        os.truncate(file, len(data) // 2)
    elif how == "gone":
        file.unlink()
    else:
        file.write_bytes(rng.bytes(len(data)) if how == "noise" else b"")


def test_restore_with_all_damaged_raises_and_moves_nothing(three, tmp_path, caplog):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    for file in (tmp_path / "checkpoints").rglob("d/*"):
        os.truncate(file, 1)
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(InputError, match="^checkpoint 3 under"):
        checkpoints.restore(abstract(state_on("single")))
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["1", "2", "3"]
    gc.collect()  # would make asyncio log the failed tasks of Orbax
    assert not caplog.records


def test_read_only_access_changes_nothing(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").mkdir()  # another process is writing it
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(state_on("single"))).step == 3
    assert (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").is_dir()
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        checkpoints.save(5, state_on("single"), {})  # the run that owns the folder cleans up first
    assert not (tmp_path / "checkpoints" / "4.orbax-checkpoint-tmp").exists()
    with pytest.raises(InputError, match="no checkpoint under"):
        Checkpoints(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_params_sha256_hashes_names_and_bytes_in_order_of_names():
    params = {"b": {"kernel": jnp.arange(4.0).reshape(2, 2).T}, "a": jnp.ones(2, jnp.int32)}
    expected = hashlib.sha256()
    expected.update(b"a" + np.ones(2, np.int32).tobytes())
    expected.update(b"b/kernel" + np.array([0, 2, 1, 3], np.float32).tobytes())
    assert params_sha256(params) == expected.hexdigest()
    assert params_sha256(state_on("single")) == params_sha256(state_on("data:2,fsdp:2,tensor:2"))
    assert params_sha256(state_on("single")) != params_sha256(state_on("single", 1))


def test_data_position_is_a_json_file(three):
    file = three / "checkpoints" / "2" / "data" / "process_0_of_1.json"
    assert json.loads(file.read_text()) == {"at": 2}
