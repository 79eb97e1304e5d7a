"""Checkpoints: retention, restoration onto other meshes, and recovery from damage."""

import errno
import gc
import hashlib
import json
import math
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.errors import InputError, StorageError
from attnlab.train import checkpoints as module
from attnlab.train import digests
from attnlab.train.checkpoints import Checkpoints, SaveFailed, has_checkpoint, params_sha256


def mesh(text):
    return sharding.make_mesh(sharding.parse_mesh(text, 8))


def state_on(text, seed=0):
    """Return arrays sharded like a model's, with the same values on every mesh."""
    rng = np.random.default_rng(seed)
    specs = {
        "kernel": P("fsdp", "tensor"),
        "experts": P("expert", "fsdp", "tensor"),
        "scale": P(None),
        "step": P(),
    }
    values = {
        "kernel": rng.normal(size=(16, 8)),
        "experts": rng.normal(size=(8, 8, 4)),
        "scale": rng.normal(size=(16,)),
        "step": np.array(seed),
    }
    return {
        n: jax.device_put(jnp.float32(x), sharding.named_sharding(mesh(text), specs[n]))
        for n, x in values.items()
    }


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def failing(function, times):
    """Return a function that raises an error of the storage the first times it is called."""
    calls = []

    def call(*arguments):
        calls.append(arguments)
        if len(calls) <= times:
            raise OSError(errno.EIO, "Input/output error")
        return function(*arguments)

    return call


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """Return a folder with checkpoints of steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("three")
    with Checkpoints(folder, keep=3) as checkpoints:
        for step in (1, 2, 3):
            checkpoints.save(step, state_on("fsdp:4,tensor:2", step), {"at": step}, {"loss": float(step)})
    return folder


def test_save_keeps_latest_and_best(tmp_path):
    losses = {0: 1.0, 1: 3.0, 3: 2.0, 4: None, 5: 2.5, 6: None}
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        for step, loss in losses.items():
            checkpoints.save(step, state_on("single", step), {}, None if loss is None else {"loss": loss})
        checkpoints.wait()
        assert checkpoints.steps() == [0, 5, 6]
        assert checkpoints.best() == 0
    with Checkpoints(tmp_path) as reader:
        like = abstract(state_on("single"))
        assert reader.restore(like, "best").step == 0
        assert reader.restore(like, "latest").step == 6
        assert reader.restore(like, "5").step == 5
        with pytest.raises(InputError, match="expected one of latest, best, 0, 5, 6"):
            reader.restore(like, "4")


@pytest.mark.parametrize(
    "text", ["single", "data:8", "fsdp:8", "data:2,fsdp:2,tensor:2", "expert:8", "fsdp:2,expert:2,tensor:2"]
)
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
            assert (restored.step == 2) == bool(messages) == (folder / "damaged" / "3").is_dir()
            assert not messages or messages[0].startswith("checkpoint 3 is damaged (")
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


@pytest.mark.parametrize(
    "where", ["state/d", "state/ocdbt.process_0/d", "data_position.json", "state/_METADATA"]
)
def test_flipped_bit_is_never_loaded(three, tmp_path, where):
    like, rng = abstract(state_on("single")), np.random.default_rng(1)
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    step_3 = tmp_path / "checkpoints" / "3"
    file = step_3 / where
    if file.is_dir():
        (file,) = (path for path in file.iterdir() if path.name != "commit_success.txt")
    content = file.read_bytes()
    for i in range(8):
        flipped = bytearray(content)
        flipped[rng.integers(len(content))] ^= 1 << i
        file.write_bytes(bytes(flipped))
        messages = []
        with Checkpoints(tmp_path, log=messages.append) as reader:  # as eval, sample, export, describe
            assert reader.restore(like).step == 2
            assert messages == [
                f"checkpoint 3 is damaged ({file.relative_to(step_3)} differs from its digest): "
                "restoring checkpoint 2 instead"
            ]
            with pytest.raises(InputError, match=r"^checkpoint 3 under .* is damaged \("):
                reader.restore(like, "3")
    assert not (tmp_path / "damaged").exists()


@pytest.mark.parametrize("text", ["{}", "[]", "5", "null", '{"at": NaN}', "[" * 9999], ids=lambda x: x[:9])
@pytest.mark.parametrize("name", ["data_position.json", "_CHECKPOINT_METADATA", "metrics.json"])
def test_restore_recovers_from_other_json(three, tmp_path, name, text):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "3" / name).write_text(text)
    messages = []
    with Checkpoints(tmp_path, keep=3, log=messages.append) as checkpoints:
        restored = checkpoints.restore(abstract(state_on("single")))
    assert (restored.step, restored.data) == (2, {"at": 2})
    assert len(messages) == 1
    assert f"checkpoint 3 is damaged ({name} " in messages[0]


def test_odd_names_beside_checkpoints_are_left_alone(three, tmp_path):
    shutil.copytree(three, tmp_path / "run")
    root = tmp_path / "run" / "checkpoints"
    odd = ["\u00b2", "\u0663", "007", "-1", "1.5", "8.orbax", "a" * 200, "tmp", "8.tmp.txt"]
    odd.append(os.fsdecode(b"\xff8"))  # not UTF-8
    for name in odd:
        (root / name).mkdir()
    (tmp_path / "kept").mkdir()
    # The remains of a save:
    (root / "9.orbax-checkpoint-tmp").write_text("a file")
    (root / "8.tmp").symlink_to(tmp_path / "nowhere")
    (root / "7.tmp").symlink_to(tmp_path / "kept")
    for _ in range(2):
        with Checkpoints(tmp_path / "run", keep=3) as checkpoints:
            assert checkpoints.steps() == [1, 2, 3]
            assert checkpoints.restore(abstract(state_on("single"))).step == 3
    assert {path.name for path in root.iterdir()} == {*odd, "1", "2", "3"}
    assert (tmp_path / "kept").is_dir()


@pytest.mark.parametrize("kind", ["file", "folder", "broken link", "without digests"])
def test_numbered_entry_without_digests_is_set_aside(three, tmp_path, kind):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoints" / ("9" * 30)
    if kind == "file":
        path.write_text("")
    elif kind == "broken link":
        path.symlink_to("nowhere")
    elif kind == "folder":
        path.mkdir()
    else:  # as versions before 0.2.0 wrote them
        shutil.copytree(three / "checkpoints" / "3", path)
        shutil.rmtree(path / "digests")
    messages = []
    with Checkpoints(tmp_path, keep=3, log=messages.append) as checkpoints:
        assert checkpoints.restore(abstract(state_on("single"))).step == 3
        assert checkpoints.steps() == [1, 2, 3]
    reason = "(digests is missing): restoring checkpoint 3 instead"
    assert messages == [f"checkpoint {path.name} is damaged {reason}"]
    assert os.path.lexists(tmp_path / "damaged" / path.name)


@pytest.mark.parametrize("name", ["damaged/3/old", "damaged/3", "damaged"])
def test_set_aside_replaces_an_earlier_checkpoint_or_names_the_file_in_the_way(three, tmp_path, name):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    os.truncate(tmp_path / "checkpoints" / "3" / "data_position.json", 1)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("")
    with Checkpoints(tmp_path, keep=3, log=list) as checkpoints:
        if name == "damaged":
            with pytest.raises(InputError, match="damaged is a file; remove it"):
                checkpoints.restore(abstract(state_on("single")))
            return
        assert checkpoints.restore(abstract(state_on("single"))).step == 2
    assert (tmp_path / "damaged" / "3" / "digests").is_dir()
    assert not (tmp_path / "damaged" / "3" / "old").exists()


@pytest.mark.parametrize("function", ["digests.check", "ocp.load"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (MemoryError(), "out of memory"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8"), "out of memory"),
        (OSError(errno.EIO, "Input/output error"), "Input/output error"),
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (ConnectionError("the bucket\ndoes not answer"), "the bucket does not answer"),
        (ValueError("another structure"), "another structure"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_only_damage_sets_a_checkpoint_aside(three, tmp_path, monkeypatch, error, reason, function):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)

    def fail(*_):
        raise error

    monkeypatch.setattr(f"attnlab.train.checkpoints.{function}", fail)
    before = sorted(tmp_path.rglob("*"))
    with Checkpoints(tmp_path, keep=3) as checkpoints, pytest.raises(InputError) as caught:
        checkpoints.restore(abstract(state_on("single")))
    assert str(caught.value) == f"checkpoint 3 under {tmp_path}/checkpoints could not be restored: {reason}"
    assert sorted(tmp_path.rglob("*")) == before


def test_best_ignores_damaged_metrics_with_one_line(three, tmp_path):
    shutil.copytree(three, tmp_path, dirs_exist_ok=True)
    (tmp_path / "checkpoints" / "1" / "metrics.json").write_text('{"loss": 9.0}')
    messages = []
    with Checkpoints(tmp_path, log=messages.append) as checkpoints:
        assert checkpoints.best() == checkpoints.best() == 2
    (message,) = messages
    assert message.startswith("the metrics of checkpoint 1 are damaged (metrics.json ")


def test_best_may_be_step_0_and_is_never_nan(tmp_path):
    x = {"x": jnp.zeros(1)}
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step, loss in enumerate([1.0, 2.0, math.nan]):
            checkpoints.save(step, x, {}, {"loss": loss})
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(x), "best").step == 0


@pytest.mark.parametrize(
    ("function", "steps"),
    [
        ("attnlab.train.digests.write", [1]),
        ("attnlab.train.digests.complete", [1]),
        ("attnlab.train.checkpoints.Checkpoints._delete_old", [1, 2]),
        ("attnlab.train.checkpoints.remove", [2]),
    ],
)
def test_crash_while_a_save_is_completed_leaves_intact_checkpoints(tmp_path, monkeypatch, function, steps):
    def crash(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with (
        pytest.raises(StorageError, match="checkpoint 2 could not be written under .*: No space left"),
        monkeypatch.context() as patched,
        Checkpoints(tmp_path, keep=1) as checkpoints,
    ):
        checkpoints.save(1, {"x": jnp.ones(1)}, {})
        checkpoints.wait()
        patched.setattr(function, crash)
        checkpoints.save(2, {"x": jnp.ones(1) * 2}, {})
    remains = any(path.name.endswith(".tmp") for path in (tmp_path / "checkpoints").iterdir())
    assert remains == (steps == [2])  # those of a failed save are removed at once
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == steps
        restored = checkpoints.restore(abstract({"x": jnp.ones(1)}))
        assert_same(restored.state, {"x": np.float32([restored.step])})
        assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == set(map(str, steps))


def test_failed_save_is_reported_once_and_can_be_repeated(tmp_path, monkeypatch):
    x, write = {"x": jnp.ones(1)}, digests.write
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        monkeypatch.setattr(digests, "write", failing(write, times=1))
        checkpoints.save(1, x, {"at": 1})
        while not checkpoints.failed():
            time.sleep(0.01)
        assert not checkpoints.failed()
        with pytest.raises(
            SaveFailed, match=r"checkpoint 1 could .*: Input/output.*; complete checkpoints: none"
        ):
            checkpoints.save(2, x, {"at": 2})
        checkpoints.save(1, x, {"at": 1})
        checkpoints.wait()
        assert not checkpoints.failed()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(abstract(x)).data == {"at": 1}


@pytest.mark.parametrize("index", [0, 1])
def test_all_processes_of_a_job_fail_a_save_that_one_cannot_write(tmp_path, monkeypatch, index):
    """Process 0 waits for the digests of the other process, which cannot write them."""
    votes = []

    def largest(number):
        votes.append(number)
        return 1 if len(votes) == 1 else number

    with Checkpoints(tmp_path, keep=3) as checkpoints:
        own = checkpoints._thread.submit(lambda: None)
        checkpoints._pending = pending = module._PendingSave(7, own)
        if index == 0:
            pending.whole = checkpoints._thread.submit(checkpoints._complete, pending)
        monkeypatch.setattr(module, "largest", largest)
        with pytest.raises(SaveFailed, match="checkpoint 7 .* another process could .* part") as failed:
            checkpoints.wait()
    assert not failed.value.own
    assert votes == [0]


def test_failed_removal_of_an_old_checkpoint_fails_the_next_save(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(errno.EIO, "Input/output error")

    x = {"x": jnp.ones(1)}
    with monkeypatch.context() as patched, Checkpoints(tmp_path, keep=1) as checkpoints:
        patched.setattr("attnlab.train.checkpoints.remove", fail)
        for step in (1, 2):
            checkpoints.save(step, x, {})
        checkpoints.wait()
        checkpoints.save(3, x, {})
        with pytest.raises(SaveFailed, match="checkpoint 3 could not be written under .*: Input/output"):
            checkpoints.wait()
        assert checkpoints.steps() == [2, 3]
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        assert checkpoints.steps() == [2, 3]  # the rest of checkpoint 1 is removed
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"2", "3"}


def test_large_states_are_written_in_several_files(tmp_path):
    arrays = {str(i): jax.random.normal(jax.random.key(i), (1 << 23,)) for i in range(5)}
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, arrays, {})
    folder = tmp_path / "checkpoints" / "1" / "state" / "ocdbt.process_0" / "d"
    assert len([file for file in folder.iterdir() if file.stat().st_size > 1 << 20]) > 1


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


def test_has_checkpoint_counts_only_complete_ones(three, tmp_path):
    assert has_checkpoint(epath.Path(three))
    assert not has_checkpoint(epath.Path(tmp_path))
    (tmp_path / "checkpoints" / "1.tmp").mkdir(parents=True)
    assert not has_checkpoint(epath.Path(tmp_path))
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(InputError, match="no checkpoint under"):
        checkpoints.restore(abstract(state_on("single")))


def test_params_sha256_hashes_names_and_bytes_in_order_of_names():
    params = {"b": {"kernel": jnp.arange(4.0).reshape(2, 2).T}, "a": jnp.ones(2, jnp.int32)}
    expected = hashlib.sha256()
    expected.update(b"a" + np.ones(2, np.int32).tobytes())
    expected.update(b"b/kernel" + np.array([0, 2, 1, 3], np.float32).tobytes())
    assert params_sha256(params) == expected.hexdigest()
    assert params_sha256(state_on("single")) == params_sha256(state_on("data:2,fsdp:2,tensor:2"))
    assert params_sha256(state_on("single")) != params_sha256(state_on("single", 1))


def test_data_position_is_a_json_file(three):
    file = three / "checkpoints" / "2" / "data_position.json"
    assert json.loads(file.read_text()) == {"at": 2}
