"""`Experiment`, the config that `get_config()` of an experiment file returns."""

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
    """Length of training, and intervals of logging, evaluation and checkpoints, in steps.

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
    keep: int = 2

    def __post_init__(self):
        for name in ("steps", "microbatches", "log_every", "eval_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1")
        if self.eval_batches is not None and self.eval_batches < 1:
            raise ValueError("eval_batches must be at least 1 or None")
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
        if self.init and Path(self.init).expanduser().is_dir():  # otherwise a hub id
            object.__setattr__(self, "init", absolute(self.init))
        if self.data.batch_size % self.train.microbatches:
            rows, pieces = self.data.batch_size, self.train.microbatches
            raise ValueError(f"data.batch_size={rows} is not a multiple of train.microbatches={pieces}")
        self.model.check_length(self.data.sequence_length)
        if self.data.source_shape is not None:
            self.model.check_source_length(self.data.source_shape[0])
