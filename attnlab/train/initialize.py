"""Parameters of one run as the start of another."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import InputError
from attnlab.layers.parameters import parameter_name
from attnlab.train.session import Session
from attnlab.train.step import TrainState


def init_from_run(
    session: Session, source_params: Any, rules: Sequence[tuple[str, str]], log: Callable[[str], None]
) -> TrainState:
    """A new state with the parameters of another run where names agree after renaming.

    Args:
      session: of the new state; a parameter that finds no counterpart starts as it would without this.
      source_params: the other run's parameters.
      rules: (regular expression, replacement), applied in order to the other run's names.
      log: takes a line on what was taken.

    Raises:
      InputError: a rule that matches nothing, a name two parameters are renamed to, a shape that differs,
        or no name in common.
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
                f"--init_from: {name} has shape {renamed[name].shape} there and {initial.shape} here"
            )
        copied += 1
        # Copied, for the new state uses its parameters up.
        return jax.device_put(jnp.array(renamed[name], initial.dtype, copy=True), initial.sharding)

    params = jax.tree_util.tree_map_with_path(copy_param, session.new_params())
    total = len(jax.tree.leaves(params))
    if not copied:
        raise InputError(
            f"--init_from: no parameter there has a name that is here, such as {next(iter(renamed))}"
        )
    log(f"started {copied} of {total} parameters from the other run")
    return session.new_state(params)
