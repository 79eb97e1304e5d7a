"""A trained model for reports: predictions, attention maps, generation, claims and figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from attnlab import sharding
from attnlab.data import Batch
from attnlab.data.batch import source_kind
from attnlab.distributed.collectives import to_host
from attnlab.distributed.job import is_main_process
from attnlab.generation import Completion, Generator
from attnlab.inspect.maps import attention_maps
from attnlab.runner.claims import Claim, Comparison
from attnlab.train.experiment import Experiment
from attnlab.train.session import Session

FAST_BATCHES, FAST_RECORDS, FAST_TOKENS = 1, 64, 8  # limits of a report in a fast_dev_run
FIGURES = "figures"
PRETRAINED = "pretrained"  # subfolder with the config and tokenizer files of an imported checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """A trained model and its run: the argument of an experiment's `report(trained)`.

    Attributes:
      session: the experiment on its mesh.
      params: the parameters used for evaluation.
      workdir: the run's folder.
      metrics: the metrics of the last evaluation.
      log: prints a line.
      claims: the claims recorded by `claim`, in order.
      fast: whether this is a `--fast_dev_run`, which limits `batches`, `records` and `generate`
        and disables `claim`.
      poll: called before each computation; it raises `Terminated` if a signal stops the report.
    """

    session: Session
    params: Any
    workdir: epath.Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    log: Callable[[str], None] = print
    claims: list[Claim] = field(default_factory=list)
    fast: bool = False
    poll: Callable[[], None] = lambda: None

    @property
    def experiment(self) -> Experiment:
        """The run's config."""
        return self.session.experiment

    @property
    def tokenizer(self):
        """The run's tokenizer."""
        return self.session.tokenizer

    def batches(self, split: str, limit: int | None = None) -> list[Batch]:
        """Return the whole batches of a split, in which each target occurs once.

        The result has at most `limit` batches, and at most `FAST_BATCHES` if `fast`.
        """
        if self.fast:
            limit = FAST_BATCHES if limit is None else min(limit, FAST_BATCHES)
        return list(self.experiment.data.eval_batches(split, self.tokenizer, limit=limit))

    def records(self, split: str) -> Sequence[Any]:
        """Return the records of a split, or only the first `FAST_RECORDS` if `fast`."""
        records = self.experiment.data.records(split)
        return [records[i] for i in range(min(len(records), FAST_RECORDS))] if self.fast else records

    def predict(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        """Return the most probable target at each position."""
        self.poll()
        with sharding.set_mesh_of_rows(self.session.mesh):
            return to_host(_predict(self.session.model, self.params, self.session.put_whole(batch)))

    def apply(self, batch: Batch, method: str) -> Any:
        """Return the output of a method of the model on a batch, on the host."""
        self.poll()
        with sharding.set_mesh_of_rows(self.session.mesh):
            inputs = self.session.put_whole(batch).inputs
            return to_host(_apply(self.session.model, method, self.params, inputs))

    def attention(
        self, batch: Batch, stack: str = "layers", branch: str = "attention"
    ) -> Float[np.ndarray, "L B H T S"]:
        """Return the attention weights of a batch in every layer and head; see `attention_maps`."""
        self.poll()
        with sharding.set_mesh_of_rows(self.session.mesh):
            inputs = self.session.put_whole(batch).inputs
            return attention_maps(self.session.model, self.params, stack, branch, **inputs)

    def generator(self, kv_cache: str = "contiguous") -> Generator:
        """Return a `Generator` for this model, with this kind of KV cache."""
        self.poll()
        length = self.experiment.data.sequence_length
        return Generator(self.session.model, self.params, self.tokenizer, length, self.session.mesh, kv_cache)

    def as_generator_inputs(self, texts: Sequence[str]) -> dict[str, Any]:
        """Return texts as arguments of a `Generator`.

        Texts are `sources` for a model with text input, else `prompts`.
        """
        reads_text = source_kind(self.experiment.model.source_shape) == "text"
        return {"prompts": None, "sources": texts} if reads_text else {"prompts": texts}

    def generate(self, texts: Sequence[str], **options) -> list[Completion]:
        """Return a completion of each text, of at most `FAST_TOKENS` new tokens if `fast`.

        Args:
          texts: prompts or sources; see `as_generator_inputs`.
          **options: keyword arguments of `Generator.__call__`.
        """
        if self.fast:
            options["max_new_tokens"] = min(options.get("max_new_tokens", FAST_TOKENS), FAST_TOKENS)
        return self.generator()(**self.as_generator_inputs(texts), **options)

    def attention_of_tokens(self, tokens: Sequence[int]) -> Float[np.ndarray, "L H T S"]:
        """Return the attention weights of one sequence of tokens in every layer and head."""
        return self.attention(self.batch_from_tokens(tokens))[:, 0]

    def batch_from_tokens(self, tokens: Sequence[int]) -> Batch:
        """Return a batch of one sequence, repeated once per data shard of the mesh."""
        rows = sharding.num_batch_shards(self.session.mesh)
        ids = np.tile(np.asarray(tokens, np.int32), (rows, 1))
        zero, one = np.zeros_like(ids), np.ones_like(ids)
        return Batch(
            ids,
            zero,
            zero.astype(np.float32),
            one,
            zero + np.arange(ids.shape[1], dtype=np.int32)[None],
            np.zeros(rows, np.float32),
        )

    def claim(self, text: str, value: float, comparison: Comparison, threshold: float) -> None:
        """Compare a measured value with a threshold, print whether the claim holds, and record it.

        `report.json` lists every claim; see `Claim`. A failed claim does not change the exit code.
        It does nothing if `fast`, since two training steps are too few to decide a claim.
        """
        if self.fast:
            return
        claim = Claim(text, float(value), comparison, float(threshold))
        self.claims.append(claim)
        self.log(str(claim))

    def save_figure(self, figure, name: str) -> None:
        """Save a figure as PNG and SVG in `figures` of the workdir, and print the paths.

        Only process 0 of a job writes it.
        """
        if not is_main_process():
            return
        from attnlab.inspect import figures  # here, since matplotlib takes a second to import

        paths = figures.save(figure, self.workdir / FIGURES / name)
        self.log(f"figure: {', '.join(str(path) for path in paths)}")


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method: str, params, inputs):
    return model.apply({"params": params}, **inputs, method=method)


@partial(jax.jit, static_argnums=0)
def _predict(model, params, batch: Batch):
    logits = model.apply({"params": params}, **batch.inputs)
    return logits.argmax(axis=-1)
