"""Training: experiment configs, the training step and loop, optimizers and checkpoints."""

from attnlab.train.experiment import Experiment, SpikeSkip, Train
from attnlab.train.lora import LoRA
from attnlab.train.loss import Loss
from attnlab.train.optimizers import SGD, Adafactor, AdamW, Lion, Muon, Rule, ScheduleFree
from attnlab.train.schedules import Constant, Cosine, InverseSquareRoot, WarmupStableDecay

__all__ = [
    "SGD",
    "Adafactor",
    "AdamW",
    "Constant",
    "Cosine",
    "Experiment",
    "InverseSquareRoot",
    "Lion",
    "LoRA",
    "Loss",
    "Muon",
    "Rule",
    "ScheduleFree",
    "SpikeSkip",
    "Train",
    "WarmupStableDecay",
]
