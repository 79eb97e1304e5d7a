"""Initialize a run from the parameters of another run."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import InputError
from attnlab.layers.linear import parameter_name
from attnlab.train.session import Session
from attnlab.train.step import TrainState


def init_from_run(
    session: Session, source_params: Any, rules: Sequence[tuple[str, str]], log: Callable[[str], None]
) -> TrainState:
    """Return a new state with the parameters of another run whose names match after renaming.

    Args:
      session: the session of the new state. A parameter without a counterpart keeps its random
        initialization.
      source_params: the parameters of the source run.
      rules: pairs (regular expression, replacement), applied in order to the source names.
      log: called with a message that reports the number of copied parameters.

    Raises:
      InputError: a rule matches no parameter, two parameters are renamed to the same name, shapes
        differ, or no names match.
    """
    renamed: dict[str, jax.Array] = {}
    matches = dict.fromkeys((pattern for pattern, _ in rules), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(source_params):
        name = parameter_name(path)
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            matches[pattern] += count
        if name in renamed:
            raise InputError(f"--init_rules: two parameters are renamed to {name}")
        renamed[name] = leaf
    for pattern, count in matches.items():
        if not count:
            raise InputError(f"--init_rules: {pattern!r} matches no parameter of --init_from")

    copied = 0

    def copy_param(path, initial):
        nonlocal copied
        name = parameter_name(path)
        if name not in renamed:
            return initial
        if renamed[name].shape != initial.shape:
            raise InputError(
                f"--init_from: {name} has shape {renamed[name].shape} in the source run "
                f"and {initial.shape} in this run"
            )
        copied += 1
        # Copied because `new_state` donates its parameters.
        return jax.device_put(jnp.array(renamed[name], initial.dtype, copy=True), initial.sharding)

    params = jax.tree_util.tree_map_with_path(copy_param, session.new_params())
    total = len(jax.tree.leaves(params))
    if not copied:
        raise InputError(
            f"--init_from: this run has no parameter with a name of the source run, "
            f"such as {next(iter(renamed))}"
        )
    log(f"initialized {copied} of {total} parameters from the source run")
    return session.new_state(params)
