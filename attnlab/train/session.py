"""`Session`: the model, optimizer and compiled steps of an experiment on a mesh."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from attnlab import sharding
from attnlab.attention.fallback import Fallback
from attnlab.config.types import short_name
from attnlab.data import Batch, Tokenizer
from attnlab.data.batch import batch_from_spec, source_kind
from attnlab.distributed.collectives import one_at_a_time, row_share
from attnlab.distributed.start import progress
from attnlab.errors import InputError
from attnlab.layers.remat import check_host_memory
from attnlab.train import optimizers
from attnlab.train.experiment import Experiment
from attnlab.train.partition import merged_params
from attnlab.train.step import (
    TrainState,
    init_params,
    init_state,
    init_trainable,
    make_eval_step,
    make_train_step,
)


@dataclass(frozen=True)
class Session:
    """An experiment on a device mesh. It holds no arrays; the training state is passed around.

    Attributes:
      experiment: the experiment config.
      mesh: the device mesh. An abstract mesh only traces programs; it cannot compile or run any.
      tokenizer: the tokenizer, whose vocabulary size the model gets.
    """

    experiment: Experiment
    mesh: Mesh
    tokenizer: Tokenizer

    def __post_init__(self):
        e = self.experiment
        dimensions = e.model.sharded_dimensions() | {
            "data.batch_size": ("batch", e.data.batch_size // e.train.microbatches),
        }
        if e.data.packs:
            dimensions["data.sequence_length"] = ("sequence", e.data.sequence_length)
        sharding.check_divisible(dict(self.mesh.shape), dimensions)
        if not isinstance(self.mesh, AbstractMesh):
            check_host_memory(e.model, sharding.mesh_device(self.mesh))
        model_source, data_source = _source_name(e.model.source_shape), _source_name(e.data.source_shape)
        if model_source != data_source:
            model, data = short_name(type(e.model)), short_name(type(e.data))
            raise InputError(
                f"model={model} takes {model_source} in addition to tokens, but data={data} provides "
                f"{data_source}: change one"
            )

    def use_mesh(self):
        """Return the context in which the experiment's functions are traced."""
        if isinstance(self.mesh, AbstractMesh):
            return jax.sharding.use_abstract_mesh(self.mesh)
        return jax.set_mesh(self.mesh)

    @cached_property
    def model(self) -> nn.Module:
        """The Flax module, built for the tokenizer's vocabulary."""
        return self.experiment.model.build(self.tokenizer.vocab_size)

    @cached_property
    def _initial_params(self) -> Callable[[], Any]:
        # Jitted, so that a session traces the initialization once, however often it is used.
        return jax.jit(lambda: init_params(self.model, self.experiment), inline=True)

    @cached_property
    def optimizer(self) -> optax.GradientTransformation:
        """The Optax transformation, with rules checked against the parameter names."""
        e = self.experiment
        with self.use_mesh():
            params, frozen = jax.eval_shape(lambda: init_trainable(e, self._initial_params()))
        factors = e.model.learning_rate_multipliers()
        rules = tuple(optimizers.Rule(name, learning_rate=factor) for name, factor in factors.items())
        return optimizers.make_optimizer(e.optimizer, params, e.train.steps, rules, frozen)

    @cached_property
    def abstract_state(self) -> TrainState:
        """Shapes, dtypes and shardings of the training state."""
        optimizer = self.optimizer
        return self._abstract(lambda: init_state(self.experiment, optimizer, self._initial_params()))

    @cached_property
    def abstract_params(self) -> Any:
        """Shapes, dtypes and shardings of the model's parameters."""
        return self._abstract(self._initial_params)

    def _abstract(self, function) -> Any:
        with self.use_mesh():
            shapes = jax.eval_shape(function)

        def with_sharding(x):
            # A constant, such as the step count of an optimizer, has no sharding and is replicated.
            where = sharding.named_sharding(self.mesh, x.sharding.spec if x.sharding else P())
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

        return jax.tree.map(with_sharding, shapes)

    def new_state(self, params: Any = None) -> TrainState:
        """Return the state before the first step, with each array created on its own devices.

        Args:
          params: initial parameters of the model, which are donated. None initializes them from the
            experiment's seed.
        """
        optimizer = self.optimizer

        def init(params):
            return init_state(
                self.experiment, optimizer, self._initial_params() if params is None else params
            )

        return self._on_mesh(jax.jit(init, donate_argnums=0))(params)

    def new_params(self) -> Any:
        """Return the model's parameters, initialized from the experiment's seed."""
        return self._on_mesh(self._initial_params)()

    @cached_property
    def train_step(self):
        """The jitted training step, (state, batch) -> (state, metrics), which donates the state."""
        step = make_train_step(self.model, self.experiment, self.optimizer)
        donated = () if jax.config.jax_debug_nans else (0,)  # jax_debug_nans reruns the step
        return self._on_mesh(partial(self.fallback, jax.jit(step, donate_argnums=donated)))

    @cached_property
    def eval_step(self):
        """The jitted evaluation step, (params, batch) -> sums over tokens."""
        return self._on_mesh(partial(self.fallback, jax.jit(make_eval_step(self.model))))

    @cached_property
    def fallback(self) -> Fallback:
        """Compiles steps again without the attention kernels that the compiler refuses."""
        return Fallback(print)

    def _on_mesh(self, function):
        def call(*args):
            with self.use_mesh():
                return one_at_a_time(function(*args))

        return call

    def compile_train_step(self) -> jax.stages.Compiled:
        """Compile the training step ahead of time; the mesh's devices need not be available."""
        step = make_train_step(self.model, self.experiment, self.optimizer)
        state, batch = self.abstract_state, self.abstract_batch
        with self.use_mesh():
            return self.fallback(lambda: jax.jit(step, donate_argnums=0).lower(state, batch).compile())

    @cached_property
    def abstract_batch(self) -> Batch:
        """Shapes, dtypes and shardings of a training batch."""

        def array(shape, dtype):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=self._batch_sharding(len(shape)))

        return batch_from_spec(self.experiment.data.element_spec(), array)

    def _batch_sharding(self, ndim: int):
        return sharding.named_sharding(self.mesh, P(sharding.spec("batch")[0], *(None,) * (ndim - 1)))

    @cached_property
    def batch_shard(self) -> dict[str, int]:
        """The part of each batch's rows that this process holds, as arguments of `Data`.

        Processes whose devices differ only in axes that do not shard the rows hold the same part.
        """
        shard, num_shards = row_share(self._batch_sharding(1), self.experiment.data.batch_size)
        return {"shard": shard, "num_shards": num_shards}

    def put_whole(self, batch: Batch) -> Batch:
        """Return a whole batch, which every process has, as global arrays over the mesh."""

        def put(x):
            return jax.make_array_from_callback(x.shape, self._batch_sharding(x.ndim), x.__getitem__)

        return jax.tree.map(put, batch)

    def to_devices(self, batch: Batch) -> Batch:
        """Return this process's rows of a batch as global arrays, sharded over the mesh."""
        return jax.tree.map(
            lambda x: jax.make_array_from_process_local_data(self._batch_sharding(x.ndim), x), batch
        )

    def eval_params(self, state: TrainState) -> Any:
        """Return the model's parameters to evaluate: the EMA if enabled, with adapters merged.

        They have the dtypes of the parameters.
        """
        trained = state.ema
        if trained is None:
            with self.use_mesh():
                trained = self.experiment.optimizer.eval_params(state.opt_state, state.params)
        if jax.tree.map(jnp.result_type, trained) != jax.tree.map(jnp.result_type, state.params):
            trained = jax.tree.map(lambda x, p: x.astype(p.dtype), trained, state.params)
        return trained if state.frozen is None else self._merged_params(trained, state.frozen)

    @cached_property
    def _merged_params(self):
        return self._on_mesh(jax.jit(partial(merged_params, self.experiment)))

    def evaluate(self, params: Any, batches: Iterable[Batch]) -> dict[str, float]:
        """Return the loss in nats per token, accuracy and bits per byte over `batches`.

        Bits per byte is absent if the targets are not text.

        Raises:
          InputError: the batches contain no target token.
        """
        results: list[dict[str, Any]] = []
        for batch in batches:
            progress("evaluating")
            results.append(self.eval_step(params, self.to_devices(batch)))
            if len(results) > 2:  # the device does not wait for the host, nor hold many batches
                jax.block_until_ready(results[-3])
        sums: dict[str, float] = {}
        for result in jax.device_get(results):
            for name, value in result.items():
                sums[name] = sums.get(name, 0.0) + float(value)
        if not sums.get("tokens"):
            raise InputError("cannot evaluate: the split contains no target token")
        metrics = {"loss": sums["nats"] / sums["tokens"], "accuracy": sums["correct"] / sums["tokens"]}
        if sums["bytes"]:
            metrics["bits_per_byte"] = sums["nats"] / np.log(2) / sums["bytes"]
        return metrics


def _source_name(source_shape: tuple[int, ...] | None) -> str:
    names = {None: "no source", "text": "text", "audio": "audio", "image": "images"}
    return names[source_kind(source_shape)]
