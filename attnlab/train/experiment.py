"""`Experiment`, the config that `get_config()` of an experiment file returns."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from attnlab.data import Data
from attnlab.errors import check_fields
from attnlab.models import ModelConfig
from attnlab.paths import absolute
from attnlab.train.lora import LoRA
from attnlab.train.loss import Loss
from attnlab.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon, ScheduleFree

MAX_SIZE = 2**31 - 1


@dataclass(frozen=True)
class SpikeSkip:
    """Skips updates whose loss exceeds its running mean by more than `sigmas` standard deviations.

    Attributes:
      sigmas: threshold in standard deviations of the running statistics.
      window: number of steps that the running mean and variance cover; none is skipped before that.
    """

    sigmas: float = 6.0
    window: int = 128

    def __post_init__(self):
        if self.sigmas <= 0 or self.window < 2:
            raise ValueError("sigmas must be greater than 0 and window at least 2")


@dataclass(frozen=True, kw_only=True)
class Train:
    """Length of training, and intervals of logging, evaluation and checkpoints.

    Attributes:
      steps: length of the run and of its learning-rate schedule.
      microbatches: number of microbatches per batch. Their gradients are accumulated, which needs
        less memory and gives the same update.
      ema: decay of an exponential moving average of the parameters, which evaluation then uses.
        None disables it.
      spike_skip: skips updates with a loss spike; None disables it.
      log_every: interval between lines of training metrics.
      eval_every: interval between evaluations on the validation split.
      eval_batches: number of validation batches per evaluation, from the start of the split. None
        uses the whole split.
      checkpoint_every: interval between checkpoints; the last step always gets one.
      checkpoint_minutes: time since the last checkpoint after which another one is written. None
        disables it.
      keep: number of latest checkpoints to keep, in addition to the best.
    """

    steps: int = 1000
    microbatches: int = 1
    ema: float | None = None
    spike_skip: SpikeSkip | None = None
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int | None = None
    checkpoint_every: int = 100
    checkpoint_minutes: float | None = None
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        check_fields(self, "eval_batches", least=1)
        check_fields(self, "checkpoint_minutes", above=0)
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError("ema must be between 0 and 1, or None")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that determines the results of a run, except the hardware.

    Attributes:
      model: the model config; with `init`, that of the checkpoint.
      data: the training and validation data; with `init`, encoded by the checkpoint's tokenizer.
      optimizer: the optimizer with its learning-rate schedule.
      loss: the training objective.
      train: length of training, and intervals of logging, evaluation and checkpoints.
      lora: low-rank adapters to train instead of the parameters; None trains the parameters.
      init: a Hugging Face checkpoint to start from, as a folder or a hub id. None initializes the
        parameters at random.
      seed: random seed of parameter initialization, data order and dropout.
    """

    model: ModelConfig
    data: Data
    optimizer: AdamW | Lion | Adafactor | Muon | SGD | ScheduleFree = field(default_factory=AdamW)
    loss: Loss = field(default_factory=Loss)
    train: Train = field(default_factory=Train)
    lora: LoRA | None = None
    init: str | None = None
    seed: int = 0

    def __post_init__(self):
        _check_numbers(self)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if self.init and Path(self.init).expanduser().is_dir():  # otherwise a hub id
            object.__setattr__(self, "init", absolute(self.init))
        if self.data.batch_size % self.train.microbatches:
            rows, pieces = self.data.batch_size, self.train.microbatches
            raise ValueError(f"data.batch_size={rows} is not a multiple of train.microbatches={pieces}")
        self.model.check_length(self.data.sequence_length)
        if self.data.source_shape is not None:
            self.model.check_source_length(self.data.source_shape[0])


def _check_numbers(config: Any) -> None:
    """Check that no number of a config is NaN, and no number of attnlab's classes too large.

    A class of an experiment file may give infinity a meaning. The integers of a model and of data
    are sizes and counts, which XLA limits.

    Raises:
      ValueError: names the field.
    """
    for path, value, owner in _numbers(config, "", type(config)):
        own = owner.__module__.partition(".")[0] == "attnlab"
        if math.isnan(value) or (own and math.isinf(value)):
            raise ValueError(f"{path} must be a finite number, not {value}")
        if own and isinstance(value, int) and value > MAX_SIZE and path.startswith(("model.", "data.")):
            raise ValueError(f"{path} must be at most {MAX_SIZE}, not {value}")


def _numbers(node: Any, path: str, owner: type) -> Iterator[tuple[str, float, type]]:
    """Yield every number in a config with its path and the class of its field."""
    if isinstance(node, int | float):
        yield path, node, owner
    elif isinstance(node, tuple):
        for index, item in enumerate(node):
            yield from _numbers(item, f"{path}.{index}", owner)
    elif is_dataclass(node) and not isinstance(node, type):
        for name in (field.name for field in fields(node)):
            yield from _numbers(getattr(node, name), f"{path}.{name}".lstrip("."), type(node))
