"""The training step, a pure function (state, batch) -> (state, metrics)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from attnlab import sharding
from attnlab.attention.backends.registry import only_shapes
from attnlab.data import Batch
from attnlab.data.batch import batch_from_spec
from attnlab.sharding import out_sharding
from attnlab.train.experiment import Experiment, SpikeSkip
from attnlab.train.loss import token_sums
from attnlab.train.optimizers import widened
from attnlab.train.partition import merged_params, partition_trainable

StepMetrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossHistory:
    """Running mean and variance of the loss, and the number of steps they cover."""

    mean: Array
    variance: Array
    count: Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """The training state, which a checkpoint saves completely.

    Attributes:
      step: number of steps done.
      params: nested dict of the trained parameters.
      opt_state: optimizer state.
      ema: exponential moving average of `params`, in at least float32, or None.
      history: loss statistics for the detection of spikes, or None.
      rng: raw PRNG key data; each step folds in its step number.
      frozen: nested dict of the frozen parameters, or None.
    """

    step: Array
    params: Any
    opt_state: Any
    ema: Any
    history: LossHistory | None
    rng: Array
    frozen: Any = None


def init_params(model: nn.Module, experiment: Experiment):
    """Initialize the model's parameters from the experiment's seed, sharded over the mesh."""
    batch = batch_from_spec(experiment.data.element_spec(), sharding.batch_zeros)
    with only_shapes():  # parameters do not depend on activations
        return model.init(_keys(experiment)[0], **batch.inputs)["params"]


def init_trainable(experiment: Experiment, params: Any) -> tuple[Any, Any]:
    """Partition the model's parameters into trained and frozen ones; see `partition_trainable`."""
    return partition_trainable(experiment, params, jax.random.fold_in(_keys(experiment)[0], 0))


def _keys(experiment: Experiment):
    """Return the PRNG keys of parameter initialization and of the training steps."""
    return jax.random.split(jax.random.key(experiment.seed))


def init_state(experiment: Experiment, optimizer: optax.GradientTransformation, params: Any) -> TrainState:
    """Return the state before the first step, with the given parameters of the model."""
    params, frozen = init_trainable(experiment, params)
    train = experiment.train
    zero = jnp.zeros((), jnp.float32)
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        opt_state=optimizer.init(params),
        ema=jax.tree.map(jnp.copy, widened(params)) if train.ema else None,
        history=LossHistory(zero, zero, zero) if train.spike_skip else None,
        rng=jax.random.key_data(_keys(experiment)[1]),
        frozen=frozen,
    )


def make_train_step(
    model: nn.Module, experiment: Experiment, optimizer: optax.GradientTransformation
) -> Callable[[TrainState, Batch], tuple[TrainState, StepMetrics]]:
    """Return the training step of an experiment, to be jitted with the state donated.

    The gradient is that of the weighted mean loss over the tokens of the whole batch, for any
    number of microbatches; gradients are accumulated in at least float32. A batch without weighted
    targets has loss 0 and, except for the losses of layers, gradient 0. An update is skipped if its
    loss or gradient is not finite, or if its loss is a spike.
    """
    train, clip = experiment.train, experiment.optimizer.clip_norm

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, StepMetrics]:
        key = jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step)
        grads, sums, layer_losses = _gradients(model, experiment, state, batch, key)
        tokens = _or_one(sums["tokens"])
        loss = sums["nats"] / tokens
        leaf_norms = jnp.stack([_norm(g) for g in jax.tree.leaves(grads)])
        grad_norm = jnp.sqrt(jnp.sum(leaf_norms**2))
        is_finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        has_loss = is_finite & (sums["tokens"] != 0)
        spike, history = _detect_spike(train.spike_skip, state.history, loss, has_loss)

        def update(state: TrainState):
            scaled = grads
            if clip is not None:
                scaled = jax.tree.map(lambda g: g * jnp.minimum(1.0, clip / grad_norm).astype(g.dtype), grads)
            updates, opt_state = optimizer.update(scaled, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            ema = state.ema
            if ema is not None:
                # A smaller decay in the first steps: min(ema, (1 + t) / (10 + t)).
                decay = jnp.minimum(train.ema or 0.0, (1 + state.step) / (10 + state.step))
                ema = jax.tree.map(lambda e, p: (decay * e + (1 - decay) * p).astype(e.dtype), ema, params)
            new = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
            return new, _norm(updates)

        applied = is_finite & ~spike
        frozen, state = state.frozen, dataclasses.replace(state, frozen=None)
        no_update = jnp.zeros_like(grad_norm)
        state, update_norm = jax.lax.cond(applied, update, lambda s: (s, no_update), state)
        metrics = {
            "loss": loss,
            "accuracy": sums["correct"] / tokens,
            "bits_per_byte": _bits_per_byte(sums["nats"], sums["bytes"]),
            "grad_norm": grad_norm,
            "update_norm": update_norm,
            "param_norm": _norm(state.params),
            "tokens": sums["tokens"],
            "input_tokens": jnp.sum(batch.segments > 0, dtype=jnp.int32),
            "bytes": sums["bytes"],
            "skipped": 1.0 - applied.astype(jnp.float32),
            "is_finite": is_finite,
            "leaf_norms": leaf_norms,
        }
        metrics |= layer_losses
        return dataclasses.replace(state, step=state.step + 1, history=history, frozen=frozen), metrics

    return train_step


def make_eval_step(model: nn.Module) -> Callable[[Any, Batch], StepMetrics]:
    """Return the evaluation step, which sums nats, correct predictions, tokens and bytes."""

    def eval_step(params, batch: Batch) -> StepMetrics:
        terms, _ = _loss_terms(model, params, batch, None)
        return token_sums(terms, jnp.asarray(batch.weights)) | _counts(batch)

    return eval_step


def _gradients(model, experiment: Experiment, state: TrainState, batch: Batch, key):
    """Accumulate over microbatches: gradient of the mean loss, token sums, and losses of layers."""
    params = state.params
    counts = _counts(batch)
    count = experiment.train.microbatches
    uses_dropout = experiment.model.uses_dropout

    def objective(params, batch, key):
        params = merged_params(experiment, params, state.frozen)
        terms, layer_losses = _loss_terms(model, params, batch, key if uses_dropout else None)
        total = experiment.loss(terms, batch.weights) / _or_one(counts["tokens"])
        layer_losses = jax.tree.map(lambda x: x / count, layer_losses)
        return total + sum(layer_losses.values()), (token_sums(terms, batch.weights), layer_losses)

    gradient = jax.grad(objective, has_aux=True)
    if count == 1:
        grads, (sums, layer_losses) = gradient(params, batch, key)
        return widened(grads), sums | counts, layer_losses

    # Microbatch i has rows i, i + count, i + 2 count, ..., so that it stays sharded over all
    # devices.
    pieces = jax.tree.map(lambda x: jnp.moveaxis(_to_microbatches(x, count), 1, 0), batch)

    def add(carry, piece):
        batch, i = piece
        grads, sums = gradient(params, batch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, widened(grads)), sums

    zeros = jax.tree.map(jnp.zeros_like, widened(params))
    grads, parts = jax.lax.scan(add, zeros, (pieces, jnp.arange(count)))
    sums, layer_losses = jax.tree.map(lambda x: x.sum(axis=0), parts)
    return grads, sums | counts, layer_losses


def _to_microbatches(x: Array, count: int) -> Array:
    rest = (None,) * (x.ndim - 1)
    return x.reshape(
        x.shape[0] // count, count, *x.shape[1:], out_sharding=out_sharding("batch", None, *rest)
    )


def _loss_terms(model, params, batch: Batch, dropout_key):
    """Return the `LossTerms` of a batch and the sown losses, by name and summed over layers."""
    rngs = {} if dropout_key is None else {"dropout": dropout_key}
    terms, sown = model.apply(
        {"params": params},
        targets=batch.targets,
        **batch.inputs,
        deterministic=dropout_key is None,
        rngs=rngs,
        method="loss_terms",
        mutable=["losses"],
    )
    layer_losses: StepMetrics = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown.get("losses", {})):
        name = path[-2].key  # path[-1] indexes the tuple in which Flax collects sown values
        layer_losses[name] = layer_losses.get(name, 0.0) + value.sum()
    return terms, layer_losses


def _counts(batch: Batch) -> StepMetrics:
    return {"tokens": batch.weights.sum(), "bytes": batch.num_bytes.sum()}


def _or_one(weight: Array) -> Array:
    """Return the total weight of a batch's targets, or 1 if it is 0, to divide by."""
    return jnp.where(weight == 0, 1.0, weight)


def _bits_per_byte(nats: Array, num_bytes: Array) -> Array:
    return nats / jnp.log(2.0) / jnp.maximum(num_bytes, 1.0)


def _norm(tree: Any) -> Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(widened(tree))))


def _detect_spike(config: SpikeSkip | None, history: LossHistory | None, loss: Array, valid: Array):
    """Return whether the loss is a spike, and the history, updated unless spike or not valid."""
    if config is None or history is None:
        return jnp.zeros((), bool), history
    deviation = jnp.sqrt(history.variance)
    is_full = history.count >= config.window
    spike = is_full & (loss > history.mean + config.sigmas * deviation)
    rate = jnp.maximum(1 / config.window, 1 / (history.count + 1))  # plain mean until the window is full
    difference = loss - history.mean
    new = LossHistory(
        history.mean + rate * difference,
        (1 - rate) * (history.variance + rate * difference**2),
        history.count + 1,
    )
    keep = valid & ~spike
    return spike, jax.tree.map(lambda n, o: jnp.where(keep, n, o), new, history)
