"""Test setup: 8 simulated CPU devices, runtime shape checks, and rank promotion as an error."""

import gc
import os
from importlib.util import find_spec
from pathlib import Path

from tests.compilation import FAST_COMPILATION

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILATION}"
if "PYTEST_XDIST_WORKER" in os.environ:  # one worker per core is already running
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # for torch and scikit-learn

import jax
import pytest
from jaxtyping import config as shape_checks
from jaxtyping import install_import_hook

# The number of devices is set with jax.config instead of XLA_FLAGS, so that subprocesses of tests
# choose their own devices.
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_disable_most_optimizations", True)  # faster compilation
jax.config.update("jax_numpy_rank_promotion", "raise")

# The shapes in signatures of these modules are checked at every call. The hook has to be installed
# before they are imported. Masks, scores and caches are excluded: JAX rebuilds pytrees with leaves
# that are not arrays, which their constructors must accept.
_CHECKED = (
    "absolute_positions",
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

# The longest tests start first, so that no worker runs one alone at the end.
_LONGEST = ("test_docs.py::test_page_executes", "test_claims.py", "test_resume.py", "test_families.py")


def pytest_collection_modifyitems(items):
    """Order the longest tests first; skip the parity tests without torch or transformers."""
    items.sort(key=lambda item: next((i for i, x in enumerate(_LONGEST) if x in item.nodeid), len(_LONGEST)))
    missing = [name for name in ("torch", "transformers") if find_spec(name) is None]
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(pytest.mark.slow)
        if missing and item.get_closest_marker("parity"):
            item.add_marker(pytest.mark.skip(reason=f"needs {' and '.join(missing)} (extra `parity`)"))


def pytest_collection_finish():
    """Collect garbage rarely: tracing makes many objects, few of them garbage in cycles."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="session")
def compiled(tmp_path_factory):
    """Return the folder of the compiled programs that subprocesses of all workers share."""
    from tests.programs import COMPILED

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a folder of its own in this one
        folder = folder.parent
    os.environ[COMPILED] = str(folder / "compiled")
    return folder / "compiled"


@pytest.fixture(autouse=True, scope="module")
def room_for_programs():
    """Clear compiled programs if the process has many memory mappings.

    Linux limits a process to 65,530 mappings. Each compiled program holds some, and XLA crashes
    when it gets no more.
    """
    yield
    mappings = Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()


@pytest.fixture
def mesh_of():
    """Return a function that makes a mesh from the text of `--mesh`."""

    def make(text):
        return sharding.make_mesh(sharding.parse_mesh(text, len(jax.devices())))

    return make


@pytest.fixture
def refuses():
    """Return a context manager that expects an `InputError` of one line with the given words."""

    def check(*words):
        return _Refusal(words)

    return check


@pytest.fixture
def unchecked():
    """Disable the runtime shape checks, as for users of the library."""
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
