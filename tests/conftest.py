"""Every test runs on 8 simulated CPU devices, with shapes checked and no silent rank promotion."""

import os
from importlib.util import find_spec
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
if "PYTEST_XDIST_WORKER" in os.environ:  # there is one for each core already
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of torch and scikit-learn

import jax
import pytest
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

# By config and not by XLA_FLAGS: a test that runs a program of its own decides its devices itself.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # what is run once should compile quickly
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before anything imports them: the shapes in signatures are checked at every call. Not of masks, scores
# and caches: JAX rebuilds a pytree with leaves that are no arrays, so its constructor must take them.
_CHECKED = (
    "attend",
    "backends.blockwise",
    "backends.reference",
    "context_parallel",
    "normalizers",
    "positions",
)
install_import_hook(
    [*(f"attnlab.attention.{name}" for name in _CHECKED), "attnlab.layers"], "beartype.beartype"
)

from attnlab import sharding  # noqa: E402
from attnlab.errors import InputError  # noqa: E402


def pytest_collection_modifyitems(items):
    """Skips what compares with torch and transformers where they are not."""
    lacking = [name for name in ("torch", "transformers") if find_spec(name) is None]
    for item in items:
        if lacking and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(lacking)} (extra `parity`)"))


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Forgets compiled programs when they are many: Linux gives a process 65,530 mappings of memory, each
    program holds some, and XLA crashes where it gets no more.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()


@pytest.fixture
def mesh_of():
    """Makes the mesh that `--mesh` would."""

    def make(text):
        return sharding.make_mesh(sharding.parse_mesh(text, len(jax.devices())))

    return make


@pytest.fixture
def refuses():
    """Asserts that a call raises an `InputError` of one line that has these words."""

    def check(*words):
        return _Refusal(words)

    return check


@pytest.fixture
def unchecked():
    """No runtime check of signatures: what a person meets who passes a wrong shape."""
    shape_checks.update("jaxtyping_disable", True)
    yield
    shape_checks.update("jaxtyping_disable", False)


class _Refusal:
    def __init__(self, words):
        self._words = words

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        assert kind is not None and issubclass(kind, InputError), f"no InputError but {error!r}"
        text = str(error)
        assert "\n" not in text
        for word in self._words:
            assert word in text, f"{word!r} is not in {text!r}"
        return True
