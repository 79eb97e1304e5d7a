import itertools

import pytest

from attnlab.data.builtin import stdlib


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """A data directory for the whole run, and none of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("data")
        patch.setenv("ATTNLAB_DATA_DIR", str(path))
        patch.setenv("TFDS_DATA_DIR", str(path / "tfds"))
        yield path


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """The standard library cut to its first modules, prepared in a directory of its own."""
    monkeypatch.setenv("ATTNLAB_DATA_DIR", str(tmp_path))
    every = stdlib.modules
    monkeypatch.setattr(stdlib, "modules", lambda: itertools.islice(every(), 60))
