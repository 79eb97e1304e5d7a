"""The versions of attnlab and of the libraries that decide its numbers, read without importing them."""

import platform
from importlib import metadata

import attnlab

PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of attnlab, Python and `PACKAGES`, by name."""
    installed = {name: _version(name) for name in PACKAGES}
    return {"attnlab": attnlab.__version__, "python": platform.python_version()} | installed


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def version_line() -> str:
    """Return what `--version` prints: `attnlab 0.2.0 (jax 0.10.2, flax 0.12.8, Python 3.11.9)`."""
    found = versions()
    return f"attnlab {found['attnlab']} (jax {found['jax']}, flax {found['flax']}, Python {found['python']})"
