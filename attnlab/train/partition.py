"""Which parameters are trained, and which stay: two trees that are the model's parameters together."""

import re
from typing import Any

from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array

from attnlab.errors import InputError
from attnlab.train.experiment import Experiment
from attnlab.train.lora import add_adapters, merge_adapters


def partition_trainable(experiment: Experiment, params: Any, key: Array) -> tuple[Any, Any]:
    """What is trained of a model's parameters, adapters included, and what stays; None where all are trained.

    A parameter stays by a rule of the optimizer whose learning rate is 0, or for having adapters beside it.

    Args:
      experiment: whose rules and adapters.
      params: of the model.
      key: of the adapters.

    Raises:
      InputError: nothing is left to train, or what `add_adapters` refuses.
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
    """One tree of the two that `partition_trainable` made."""
    if frozen is None:
        return trained
    return unflatten_dict(flatten_dict(trained) | flatten_dict(frozen))


def merged_params(experiment: Experiment, trained: Any, frozen: Any) -> Any:
    """The model's parameters, of what `partition_trainable` made: adapters are added to their matrices."""
    params = combine(trained, frozen)
    return params if experiment.lora is None else merge_adapters(experiment.lora, params)
