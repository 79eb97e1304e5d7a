"""Configuration: experiments are Python files that return a tree of frozen, typed dataclasses.

    loaded = load("experiments/lm_docs.py")
    config = override(loaded.config, "model.depth", "12")

This package does not import JAX, so that `--help` and errors in flags appear immediately.
"""

from attnlab.config.experiments import Loaded, available
from attnlab.config.loading import load
from attnlab.config.saved import from_dict, load_workdir, save, to_dict
from attnlab.config.text import render
from attnlab.config.tree import differences, flatten, override, override_all, show, sources

__all__ = [
    "Loaded",
    "available",
    "differences",
    "flatten",
    "from_dict",
    "load",
    "load_workdir",
    "override",
    "override_all",
    "render",
    "save",
    "show",
    "sources",
    "to_dict",
]
