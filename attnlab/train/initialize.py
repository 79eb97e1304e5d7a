"""Parameters of one run as the start of another."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from attnlab.errors import InputError
from attnlab.train.optimizers import parameter_name
from attnlab.train.session import Session
from attnlab.train.step import State


def start_from(
    session: Session, theirs: Any, rules: Sequence[tuple[str, str]], say: Callable[[str], None]
) -> State:
    """A new state with the parameters of another run where names agree after renaming.

    Args:
      session: of the new state; a parameter that finds no counterpart starts as it would without this.
      theirs: the other run's parameters.
      rules: (regular expression, replacement), applied in order to the other run's names.
      say: takes a line on what was taken.

    Raises:
      InputError: a rule that matches nothing, a name two parameters are renamed to, a shape that differs,
        or no name in common.
    """
    found: dict[str, jax.Array] = {}
    used = dict.fromkeys((pattern for pattern, _ in rules), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(theirs):
        name = parameter_name(path)
        for pattern, replacement in rules:
            name, count = re.subn(pattern, replacement, name)
            used[pattern] += count
        if name in found:
            raise InputError(f"--init_rules: two parameters are renamed to {name}")
        found[name] = leaf
    for pattern, count in used.items():
        if not count:
            raise InputError(f"--init_rules: {pattern!r} matches no parameter of --init_from")

    taken = 0

    def take(path, ours):
        nonlocal taken
        name = parameter_name(path)
        if name not in found:
            return ours
        if found[name].shape != ours.shape:
            raise InputError(f"--init_from: {name} has shape {found[name].shape} there and {ours.shape} here")
        taken += 1
        # Copied, for the new state uses its parameters up.
        return jax.device_put(jnp.array(found[name], ours.dtype, copy=True), ours.sharding)

    params = jax.tree_util.tree_map_with_path(take, session.new_params())
    total = len(jax.tree.leaves(params))
    if not taken:
        raise InputError(
            f"--init_from: no parameter there has a name that is here, such as {next(iter(found))}"
        )
    say(f"started {taken} of {total} parameters from the other run")
    return session.new_state(params)
