"""Configs of optimizers, and the Optax transformations they build.

Every optimizer is one chain: direction, weight decay, learning-rate multipliers by parameter name,
learning rate. The training step clips the gradient by its global norm before the chain, since it
reports the norm anyway. The states of all optimizers have at least float32.
"""

import math
import re
from dataclasses import dataclass, field
from typing import Any

import jax
import optax
from optax import contrib

from attnlab.attention.arrays import wide
from attnlab.errors import InputError, check_fields
from attnlab.layers.linear import parameter_name
from attnlab.train.schedules import Constant, Cosine, Schedule


@dataclass(frozen=True)
class Rule:
    """Multipliers of the learning rate and weight decay of the parameters that match a pattern.

    A learning rate of 0 freezes a parameter: it needs neither a gradient nor optimizer state.

    Attributes:
      pattern: regular expression to search for in the parameter's name.
      learning_rate: multiplier of the learning rate.
      weight_decay: multiplier of the weight decay.
    """

    pattern: str
    learning_rate: float = 1.0
    weight_decay: float = 1.0

    def __post_init__(self):
        check_pattern("optimizer.rules", self.pattern)
        check_fields(self, "learning_rate", "weight_decay", least=0)


def check_pattern(field: str, pattern: str) -> None:
    """Check that `pattern` is a regular expression.

    Raises:
      InputError: it is not; the message names `field`.
    """
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{field}: {pattern!r} is not a regular expression: {error}") from error


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Base class of the optimizer configs.

    Attributes:
      learning_rate: peak learning rate.
      schedule: learning-rate schedule over the run.
      weight_decay: decoupled weight decay, multiplied by the learning rate.
      clip_norm: maximum global norm of the gradient; None disables clipping.
      rules: multipliers by parameter name, such as layers/periods/block0/attention/out/kernel. The
        multipliers of all matching rules are multiplied.
    """

    learning_rate: float = 1e-3
    schedule: Schedule = field(default_factory=Cosine)
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    rules: tuple[Rule, ...] = (Rule(r"(scale|bias)$", weight_decay=0.0),)

    def __post_init__(self):
        check_fields(self, "learning_rate", "weight_decay", least=0)
        check_fields(self, "clip_norm", above=0)

    def direction(self) -> optax.GradientTransformation:
        """Return the transformation from gradients to an ascent direction of unit learning rate."""
        raise NotImplementedError

    def chain(self, rate: optax.Schedule, factors: dict[str, Any]) -> optax.GradientTransformation:
        """Return the transformation from clipped gradients to updates.

        Args:
          rate: the learning-rate schedule.
          factors: trees of multipliers under "learning_rate" and "weight_decay".
        """
        return optax.chain(self.direction(), *_decay_and_rate(self, rate, factors))

    def eval_params(self, opt_state, params):
        """Return the parameters to evaluate."""
        del opt_state
        return params


def _decay_and_rate(config: Optimizer, rate: optax.Schedule, factors: dict[str, Any]):
    decays = jax.tree.map(lambda f: config.weight_decay * f, factors["weight_decay"])
    decay = optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda u, p, d: u + (d * p).astype(u.dtype) if d else u, updates, params, decays
        )
    )
    by_name = optax.stateless(
        lambda updates, _: jax.tree.map(
            lambda u, f: u if f == 1 else u * f, updates, factors["learning_rate"]
        )
    )
    return decay, by_name, optax.scale_by_learning_rate(rate)


@dataclass(frozen=True, kw_only=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay.

    Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2.
    """

    b1: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "b1", "b2", least=0, under=1)
        check_fields(self, "epsilon", least=0)

    def direction(self):
        """See `Optimizer.direction`."""
        return optax.scale_by_adam(self.b1, self.b2, self.epsilon)


@dataclass(frozen=True, kw_only=True)
class Lion(Optimizer):
    """Lion, the sign of the momentum (Chen et al. 2023, arXiv 2302.06675, algorithm 2)."""

    learning_rate: float = 1e-4
    b1: float = 0.9
    b2: float = 0.99

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "b1", "b2", least=0, under=1)

    def direction(self):
        """See `Optimizer.direction`."""
        return optax.scale_by_lion(self.b1, self.b2)


@dataclass(frozen=True, kw_only=True)
class Adafactor(Optimizer):
    """Adafactor: factored second moments, updates scaled by parameter norm (arXiv 1804.04235)."""

    learning_rate: float = 1e-2
    decay_rate: float = 0.8
    momentum: float | None = None
    min_dim_size_to_factor: int = 128

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "decay_rate", above=0, most=1)
        check_fields(self, "momentum", least=0, under=1)
        check_fields(self, "min_dim_size_to_factor", least=1)

    def direction(self):
        """See `Optimizer.direction`."""
        downhill = optax.adafactor(
            learning_rate=None,
            decay_rate=self.decay_rate,
            momentum=self.momentum,
            min_dim_size_to_factor=self.min_dim_size_to_factor,
        )
        return optax.chain(downhill, optax.scale(-1.0))


@dataclass(frozen=True, kw_only=True)
class SGD(Optimizer):
    """Stochastic gradient descent with momentum (Sutskever et al. 2013)."""

    learning_rate: float = 0.1
    momentum: float = 0.9
    nesterov: bool = False

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "momentum", least=0, under=1)

    def direction(self):
        """See `Optimizer.direction`."""
        return optax.trace(self.momentum, self.nesterov)


@dataclass(frozen=True, kw_only=True)
class Muon(Optimizer):
    """Muon: orthogonalized momentum for the matrices of blocks, Adam for all other parameters.

    Jordan et al. 2024. Both use Nesterov momentum. Updates are scaled to a root mean square of 0.2
    (Liu et al. 2025, arXiv 2502.16982, section 2.2), so that both can use the same learning rate.
    """

    momentum: float = 0.95
    newton_schulz_steps: int = 5
    b1: float = 0.9
    b2: float = 0.95

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "momentum", "b1", "b2", least=0, under=1)
        check_fields(self, "newton_schulz_steps", least=1)

    def direction(self):
        """See `Optimizer.direction`."""
        downhill = contrib.muon(
            learning_rate=1.0,
            beta=self.momentum,
            ns_steps=self.newton_schulz_steps,
            adam_b1=self.b1,
            adam_b2=self.b2,
            consistent_rms=0.2,
            muon_weight_dimension_numbers=_muon_dimension_numbers,
        )
        return optax.chain(_with_auto_sharding(downhill), optax.scale(-1.0))


def _muon_dimension_numbers(params):
    """Return the input and output axes of each matrix of a block; None for all other parameters."""

    def numbers(path, leaf):
        name = parameter_name(path)
        axes = matrix_axes(name, leaf.ndim)
        if axes is None or "layers/" not in name or not name.endswith("/kernel"):
            return None
        first, middle = axes
        return contrib.MuonDimensionNumbers(tuple(range(first, middle)), tuple(range(middle, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(numbers, params)


def matrix_axes(name: str, ndim: int) -> tuple[int, int] | None:
    """Return the first input axis and first output axis of a matrix; None if it is not a matrix.

    The axes before the first input axis are batch axes (stacked layers, experts).

    Args:
      name: name of the parameter.
      ndim: its number of axes.
    """
    names = name.split("/")
    if not name.endswith(("kernel", "table")):
        return None
    # Feed-forward kernels may have an expert axis. The output of a projection to heads has two
    # axes.
    first = ndim - 2 if "feed_forward" in names else int("periods" in names)
    return first, first + 1 if names[-2] in ("query", "key", "value") else ndim - 1


def _with_auto_sharding(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Run an update under automatic sharding; its results get the shardings of its arguments.

    The products inside have no `out_sharding`, which Explicit mesh axes would require.
    """

    def update(updates, state, params):
        mesh = jax.sharding.get_abstract_mesh()
        if mesh.empty:
            return transformation.update(updates, state, params)
        specs = jax.tree.map(lambda x: jax.typeof(x).sharding.spec, (updates, state))
        return jax.sharding.auto_axes(transformation.update, out_sharding=specs)(updates, state, params)

    return optax.GradientTransformation(transformation.init, update)


@dataclass(frozen=True, kw_only=True)
class ScheduleFree(Optimizer):
    """Schedule-free Adam, evaluated at the averaged iterate.

    Defazio et al. 2024, arXiv 2405.15682.
    """

    schedule: Schedule = field(default_factory=lambda: Constant(warmup=50))
    interpolation: float = 0.9
    b2: float = 0.95
    epsilon: float = 1e-8

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, "interpolation", "b2", least=0, under=1)
        check_fields(self, "epsilon", least=0)

    def chain(self, rate, factors):
        """See `Optimizer.chain`."""
        base = optax.chain(
            optax.scale_by_adam(0.0, self.b2, self.epsilon), *_decay_and_rate(self, rate, factors)
        )
        return contrib.schedule_free(base, rate, self.interpolation)

    def eval_params(self, opt_state, params):
        """Return the averaged parameters, the sequence that converges."""
        return contrib.schedule_free_eval_params(opt_state, params)


def learning_rate(config: Optimizer, steps: int) -> optax.Schedule:
    """Return the learning-rate schedule of a run of `steps` steps."""
    factor = config.schedule.factor(steps)
    return lambda step: config.learning_rate * factor(step)


def make_optimizer(
    config: Optimizer, params, steps: int, model_rules: tuple[Rule, ...] = (), frozen=None
) -> optax.GradientTransformation:
    """Build the Optax transformation of `config` for a tree of parameters.

    Args:
      config: the optimizer.
      params: the parameters to train, or their shapes.
      steps: length of the run.
      model_rules: rules that the model's initialization requires (muP).
      frozen: the frozen parameters; rules of `config` may match their names as well.

    Raises:
      InputError: a rule of `config` matches no parameter.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params) + jax.tree_util.tree_leaves_with_path(frozen)
    names = [parameter_name(path) for path, _ in leaves]
    for rule in config.rules:
        if not any(re.search(rule.pattern, name) for name in names):
            raise InputError(
                f"optimizer.rules: {rule.pattern!r} matches no parameter; "
                f"names are like {names[0]}, {names[-1]}"
            )

    def factors(attribute: str):
        def product(path, _) -> float:
            name = parameter_name(path)
            matching = [rule for rule in (*config.rules, *model_rules) if re.search(rule.pattern, name)]
            return math.prod(getattr(rule, attribute) for rule in matching)

        return jax.tree_util.tree_map_with_path(product, params)

    by_name = {attribute: factors(attribute) for attribute in ("learning_rate", "weight_decay")}
    return _in_float32(config.chain(learning_rate(config, steps), by_name))


def widened(tree: Any) -> Any:
    """Return a tree of arrays with those of bfloat16 or float16 as float32."""
    return jax.tree.map(lambda x: x.astype(wide(x)), tree)


def _in_float32(transformation: optax.GradientTransformation) -> optax.GradientTransformation:
    """Keep the state and compute the updates in float32 if the parameters have fewer bits.

    In bfloat16 a moment stops changing as soon as 1 - decay is below its precision of 2^-8.
    """

    def update(updates, state, params):
        return transformation.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(lambda params: transformation.init(widened(params)), update)
