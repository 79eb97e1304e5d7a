"""Partition of a model's parameters into trained and frozen ones, and the way back."""

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from attnlab.errors import InputError
from attnlab.train.experiment import Experiment
from attnlab.train.lora import add_adapters, merge_adapters


def partition_trainable(experiment: Experiment, params: Any, key: Array) -> tuple[Any, Any]:
    """Return the trained parameters, including adapters, and the frozen ones; None if none are.

    An optimizer rule with a learning rate of 0 freezes the parameters that it matches. With LoRA,
    all parameters are frozen except the adapters and those that match `lora.full`.

    Args:
      experiment: provides the optimizer rules and LoRA config.
      params: the model's parameters.
      key: PRNG key for the initialization of the adapters.

    Raises:
      InputError: no parameter is left to train, or `add_adapters` raises it.
    """
    lora = experiment.lora
    if lora is not None:
        params = add_adapters(lora, params, key)
    rules = [rule.pattern for rule in experiment.optimizer.rules if rule.learning_rate == 0]

    def is_frozen(name: str) -> bool:
        return (lora is not None and not lora.trains(name)) or any(re.search(rule, name) for rule in rules)

    trained: dict[tuple[str, ...], Any] = {}
    frozen: dict[tuple[str, ...], Any] = {}
    for path, x in flatten_dict(params).items():
        (frozen if is_frozen("/".join(path)) else trained)[path] = x
    if not trained:
        raise InputError("optimizer.rules: a learning_rate of 0 for every parameter leaves nothing to train")
    return unflatten_dict(trained), unflatten_dict(frozen) if frozen else None


def combine(trained: Any, frozen: Any) -> Any:
    """Merge the two trees of `partition_trainable` into one tree that keeps adapters separate."""
    if frozen is None:
        return trained
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def merged_params(experiment: Experiment, trained: Any, frozen: Any) -> Any:
    """Return the model's parameters from the two trees, with adapters added to their matrices."""
    params = combine(trained, frozen)
    return params if experiment.lora is None else merge_adapters(experiment.lora, params)
