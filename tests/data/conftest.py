import itertools

import pytest

from attnlab.data.builtin import stdlib


@pytest.fixture(scope="session", autouse=True)
def data_dir(tmp_path_factory):
    """Use a temporary data directory for the whole test session instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("data")
        patch.setenv("ATTNLAB_DATA_DIR", str(path))
        patch.setenv("TFDS_DATA_DIR", str(path / "tfds"))
        yield path


@pytest.fixture
def small_library(monkeypatch, tmp_path):
    """Limit the standard library to its first 60 modules, prepared in a temporary directory."""
    monkeypatch.setenv("ATTNLAB_DATA_DIR", str(tmp_path))
    all_modules = stdlib.modules
    monkeypatch.setattr(stdlib, "modules", lambda: itertools.islice(all_modules(), 60))
