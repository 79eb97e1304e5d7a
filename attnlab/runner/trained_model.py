"""A trained model in hand: predict, read its attention maps, generate, and save figures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np
from etils import epath
from jaxtyping import Float, Int

from attnlab.data import Batch
from attnlab.data.batch import source_kind
from attnlab.generation import Completion, Generator
from attnlab.inspect import figures
from attnlab.inspect.maps import attention_maps
from attnlab.runner.claims import Claim, Comparison
from attnlab.train.experiment import Experiment
from attnlab.train.session import Session

FIGURES = "figures"
PRETRAINED = "pretrained"  # where a run's folder has the small files of the checkpoint that it began as


@dataclass(frozen=True)
class TrainedModel:
    """What an experiment's `report(trained)` is given at the end of a run.

    Attributes:
      session: the experiment on its mesh.
      params: the parameters to evaluate.
      workdir: the run's folder.
      metrics: of its last evaluation.
      log: takes lines for the person.
      claims: every claim that `claim` has checked, in order.
    """

    session: Session
    params: Any
    workdir: epath.Path
    metrics: Mapping[str, float] = field(default_factory=dict)
    log: Callable[[str], None] = print
    claims: list[Claim] = field(default_factory=list)

    @property
    def experiment(self) -> Experiment:
        """The run's config."""
        return self.session.experiment

    @property
    def tokenizer(self):
        """The run's tokenizer."""
        return self.session.tokenizer

    def batches(self, split: str, limit: int | None = None) -> list[Batch]:
        """The batches of a split, every target once."""
        return list(self.experiment.data.eval_batches(split, self.tokenizer, limit=limit))

    def predict(self, batch: Batch) -> Int[np.ndarray, "B T"]:
        """The most probable target of each position."""
        with jax.set_mesh(self.session.mesh):
            return jax.device_get(_predict(self.session.model, self.params, self.session.to_devices(batch)))

    def apply(self, batch: Batch, method: str) -> Any:
        """What a method of the model gives for a batch, on the host."""
        with jax.set_mesh(self.session.mesh):
            batch = self.session.to_devices(batch)
            return jax.device_get(_apply(self.session.model, method, self.params, batch.inputs))

    def attention(
        self, batch: Batch, stack: str = "layers", branch: str = "attention"
    ) -> Float[np.ndarray, "L B H T S"]:
        """Where each position of a batch looks, in every layer and head; see `attention_maps`."""
        with jax.set_mesh(self.session.mesh):
            inputs = self.session.to_devices(batch).inputs
            return attention_maps(self.session.model, self.params, stack, branch, **inputs)

    def generator(self) -> Generator:
        """Generates with this model; see `Generator`."""
        length = self.experiment.data.sequence_length
        return Generator(self.session.model, self.params, self.tokenizer, length, self.session.mesh)

    def as_generator_inputs(self, texts: Sequence[str]) -> dict[str, Any]:
        """Texts as what a `Generator` takes: the sources of a model that reads texts, else prompts."""
        reads_text = source_kind(self.experiment.model.source_shape) == "text"
        return {"prompts": None, "sources": texts} if reads_text else {"prompts": texts}

    def generate(self, texts: Sequence[str], **options) -> list[Completion]:
        """Completions of texts, as of `as_generator_inputs`; options as of `Generator`."""
        return self.generator()(**self.as_generator_inputs(texts), **options)

    def attention_of_tokens(self, tokens: Sequence[int]) -> Float[np.ndarray, "L H T S"]:
        """Where each token of one text looks, in every layer and head."""
        return self.attention(self.batch_from_tokens(tokens))[:, 0]

    def batch_from_tokens(self, tokens: Sequence[int]) -> Batch:
        """A text as a batch, in every row of as many as the mesh needs."""
        rows = self.session.mesh.shape["data"] * self.session.mesh.shape["fsdp"]
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
        """Compare a measured value with its threshold, print whether the claim holds, record it.

        `report.json` lists every claim; see `Claim`. A claim that fails does not change the exit code.
        """
        claim = Claim(text, float(value), comparison, float(threshold))
        self.claims.append(claim)
        self.log(str(claim))

    def save_figure(self, figure, name: str) -> None:
        """Saves a figure as PNG and SVG under the run's `figures`, and says where."""
        paths = figures.save(figure, self.workdir / FIGURES / name)
        self.log(f"figure: {', '.join(str(path) for path in paths)}")


@partial(jax.jit, static_argnums=(0, 1))
def _apply(model, method: str, params, inputs):
    return model.apply({"params": params}, **inputs, method=method)


@partial(jax.jit, static_argnums=0)
def _predict(model, params, batch: Batch):
    logits = model.apply({"params": params}, **batch.inputs)
    return logits.argmax(axis=-1)
