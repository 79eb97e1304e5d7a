"""Workdirs in a bucket: with an in-memory fsspec file system and with a local GCS emulator."""

import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest
from etils import epath
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry
from matplotlib.figure import Figure

from attnlab import config, provenance
from attnlab.inspect import figures
from attnlab.paths import move_folder, resolve_path, write_atomically
from attnlab.train.metrics import JsonLines, TensorBoard, read_metrics
from tests.programs import ROOT, environment, write_tiny

STEPS = 4


class Bucket(MemoryFileSystem):
    """The fsspec file system of gs:// in these tests."""

    protocol = ("gcs", "gs")
    store, pseudo_dirs = {}, [""]

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(re.sub(r"^(gs|gcs)://", "/", os.fspath(path)))


@pytest.fixture
def bucket(monkeypatch, tmp_path):
    """Return a workdir in an in-memory bucket; check that no local file is written."""
    for protocol in Bucket.protocol:
        monkeypatch.setitem(_registry, protocol, Bucket)
    monkeypatch.setattr(Bucket, "store", {})
    monkeypatch.setattr(Bucket, "pseudo_dirs", [""])
    backend.fsspec_backend._get_filesystem.cache_clear()
    Bucket.clear_instance_cache()
    monkeypatch.chdir(tmp_path)
    yield epath.Path("gs://bucket/run")
    backend.fsspec_backend._get_filesystem.cache_clear()
    assert list(tmp_path.iterdir()) == []


def test_metrics_file_in_bucket(bucket):
    lines = JsonLines(bucket / "metrics.jsonl")
    for step in (1, 2, 3):
        lines.write(step, "train", {"loss": 1.0 / step})
    lines = JsonLines(bucket / "metrics.jsonl")  # as a resumed run
    lines.truncate_after(2)
    lines.write(3, "train", {"loss": 0.5})
    assert [(row["step"], row["loss"]) for row in read_metrics(bucket / "metrics.jsonl")] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.5),
    ]


def test_tensorboard_in_bucket(bucket):
    from tests.train.test_metrics import scalars

    board = TensorBoard(bucket / "tensorboard", resume=0)
    board.write(1, "train", {"loss": 2.5})
    board.close()
    assert scalars(bucket / "tensorboard") == [(1, "train/loss", 2.5)]


def test_figures_in_bucket(bucket, tmp_path_factory):
    local = tmp_path_factory.mktemp("local")
    remote, local_files = (
        figures.save(Figure(), path) for path in (bucket / "figures" / "one", local / "one")
    )
    assert [str(path) for path in remote] == [
        "gs://bucket/run/figures/one.png",
        "gs://bucket/run/figures/one.svg",
    ]
    assert [path.read_bytes() for path in remote] == [path.read_bytes() for path in local_files]


def test_config_and_versions_in_bucket(bucket, tmp_path_factory):
    file = tmp_path_factory.mktemp("mine") / "toy.py"
    file.write_text(
        "from dataclasses import dataclass\nimport beside\n\n@dataclass(frozen=True)\nclass Toy:\n    depth: int = 1\n"
        "\ndef get_config():\n    return Toy(beside.DEPTH)\n"
    )
    (file.parent / "beside.py").write_text("DEPTH = 3\n")
    loaded = config.load(str(file))
    config.save(bucket, loaded, loaded.config, {})
    provenance.save_versions(bucket, 0, loaded.path)
    run = config.load_workdir(bucket)
    assert (run.config.depth, set(run.neighbours)) == (3, {"beside"})
    before = (bucket / "versions.json").read_text()
    provenance.save_versions(bucket, 2, run.path)  # as a resumed run without any change
    assert (bucket / "versions.json").read_text() == before


def test_paths_in_bucket(bucket):
    write_atomically(bucket / "deep" / "file.txt", "text")
    assert resolve_path("gs://bucket/run/deep/file.txt").read_text() == "text"
    assert {path.name for path in (bucket / "deep").iterdir()} == {"file.txt"}


def test_move_folder_in_bucket(bucket):
    for name in ("a", "deeper/b"):
        write_atomically(bucket / "1" / name, name)
    move_folder(bucket / "1", bucket / "damaged" / "1")
    assert not (bucket / "1").exists()
    assert [(bucket / "damaged" / "1" / name).read_text() for name in ("a", "deeper/b")] == ["a", "deeper/b"]


def test_missing_package_names_extra(monkeypatch, refuses):
    backend.fsspec_backend._get_filesystem.cache_clear()
    monkeypatch.delitem(_registry, "gcs", raising=False)
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with refuses('gs://bucket/run requires a package: pip install "attnlab[gcs]"'):
        resolve_path("gs://bucket/run")


# The whole program; TensorStore writes checkpoints with its own driver for gs:// ---------------


@pytest.fixture(scope="module")
def emulator(tmp_path_factory):
    """Return the environment variables that select the bucket `bucket` of a local emulator."""
    pytest.importorskip("gcp_storage_emulator", reason="needs gcp-storage-emulator (extra `test`)")
    pytest.importorskip("gcsfs", reason="needs gcsfs (extra `gcs`)")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = (
        "import sys; from gcp_storage_emulator.server import create_server as c; "
        "s = c('localhost', int(sys.argv[1]), in_memory=True, default_bucket='bucket'); s.start(); "
        "sys.stdin.read(); s.stop()"
    )
    server = subprocess.Popen(
        [sys.executable, "-c", code, str(port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    address = f"http://localhost:{port}"
    for _ in range(200):
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", port)) == 0:
                break
        time.sleep(0.05)
    yield {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address, "NO_GCE_CHECK": "true"}
    server.stdin.close()
    server.wait(timeout=20)


# One process, since each start costs seconds; every command opens the workdir anew.
RUN_AND_LIST = """
import json, sys
from etils import epath
from attnlab.runner import cli

for arguments in json.loads(sys.argv[1]):
    code = cli.main(["run.py", *arguments, "--workdir=gs://bucket/run"])
    assert code == 0, code
print(*(path.name for path in epath.Path("gs://bucket/run").iterdir()))
"""


@pytest.mark.slow
def test_run_trains_resumes_and_evaluates_in_bucket(emulator, tmp_path):
    write_tiny(tmp_path / "mine")
    (tmp_path / "elsewhere").mkdir()

    config = f"--config={tmp_path / 'mine' / 'tiny.py'}"
    commands = [[config, "--max_steps=2", "--profile=1:2"], [], ["--mode=eval"]]
    done = subprocess.run(
        [sys.executable, "-c", RUN_AND_LIST, json.dumps(commands)],
        cwd=tmp_path / "elsewhere",
        env=environment(**emulator) | {"PYTHONPATH": f"{ROOT}/tests/without_torch:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "max steps at step 2" in done.stdout
    assert "resuming at step 2" in done.stdout
    assert re.search(r"^step 4: loss \d", done.stdout, re.MULTILINE)
    assert list((tmp_path / "elsewhere").iterdir()) == []
    expected = {"config.json", "experiment.py", "versions.json", "tokenizer.json", "metrics.jsonl"}
    expected |= {"tensorboard", "checkpoints", "profile", "data_fingerprint.json"}
    assert set(done.stdout.splitlines()[-1].split()) == expected
