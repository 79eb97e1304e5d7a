"""An experiment as one typed value: what `get_config()` of an experiment file returns."""

from dataclasses import dataclass, field
from pathlib import Path

from attnlab.data import Data
from attnlab.models import ModelConfig
from attnlab.paths import absolute
from attnlab.train.lora import LoRA
from attnlab.train.loss import Loss
from attnlab.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon, ScheduleFree


@dataclass(frozen=True)
class SpikeSkip:
    """Skips an update whose loss is `sigmas` deviations over its running mean of `window` steps."""

    sigmas: float = 6.0
    window: int = 128

    def __post_init__(self):
        if self.sigmas <= 0 or self.window < 2:
            raise ValueError("sigmas must be over 0 and window at least 2")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long to train, and what happens along the way; lengths in steps.

    Attributes:
      steps: length of the run and of its learning-rate schedule.
      microbatches: pieces a batch is cut into, their gradients added: less memory, the same update.
      ema: decay of an average of the parameters that evaluation then uses; None is none.
      spike_skip: when to skip an update; None is never.
      log_every: between lines of metrics.
      eval_every: between evaluations on the validation split.
      eval_batches: first batches of the validation split that each evaluation reads; None is all of it.
      checkpoint_every: between checkpoints; one is always made at the end.
      keep: latest checkpoints kept, beside the best.
    """

    steps: int = 1000
    microbatches: int = 1
    ema: float | None = None
    spike_skip: SpikeSkip | None = None
    log_every: int = 10
    eval_every: int = 100
    eval_batches: int | None = None
    checkpoint_every: int = 100
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError("eval_batches must be at least 1, or none")
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError("ema must be between 0 and 1, or none")


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Everything that decides a run's numbers, apart from the machine it runs on.

    Attributes:
      model: what is trained; with `init`, as the checkpoint has it.
      data: what it is trained on; with `init`, by the checkpoint's tokenizer.
      optimizer: how parameters are updated.
      loss: what is minimised.
      train: how long, and what happens along the way.
      lora: what is trained in place of the parameters; None trains these.
      init: a checkpoint to start from, in Hugging Face's layout: a folder or a hub id. None starts anew.
      seed: of parameters, order of data and dropout.
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
        if self.init and Path(self.init).expanduser().is_dir():  # a hub id names no folder
            object.__setattr__(self, "init", absolute(self.init))
        if self.data.batch_size % self.train.microbatches:
            rows, pieces = self.data.batch_size, self.train.microbatches
            raise ValueError(f"data.batch_size={rows} is no multiple of train.microbatches={pieces}")
        self.model.check_length(self.data.sequence_length)
        if self.data.source_shape is not None:
            self.model.check_source_length(self.data.source_shape[0])
