"""A small experiment, its session and random batches, shared by the training tests."""

import dataclasses

import jax
import numpy as np

from attnlab import sharding
from attnlab.data import Batch, Bytes, Text
from attnlab.layers import AttentionConfig, MLPConfig
from attnlab.models import DecoderConfig
from attnlab.train import AdamW, Experiment, Loss, Train
from attnlab.train.session import Session

TOKENIZER = Bytes().train([])


def make_experiment(
    *, optimizer=None, loss=None, dropout=0.0, batch_size=8, model=None, data="stdlib_docs", **train
):
    """Return an experiment with a two-layer decoder; `train` are fields of `Train`."""
    config = DecoderConfig(
        depth=2,
        width=16,
        attention=AttentionConfig(heads=4, kv_heads=2),
        feed_forward=MLPConfig(width=32),
        dropout=dropout,
    )
    return Experiment(
        model=dataclasses.replace(config, **(model or {})),
        data=Text(name=data, tokenizer=Bytes(), sequence_length=16, batch_size=batch_size),
        optimizer=optimizer or AdamW(),
        loss=loss or Loss(),
        train=Train(**({"steps": 20, "log_every": 1} | train)),
    )


def make_session(experiment, mesh="single"):
    """Return a session of the experiment on a mesh of the simulated devices."""
    return Session(experiment, sharding.make_mesh(sharding.parse_mesh(mesh, len(jax.devices()))), TOKENIZER)


def random_batch(seed=0, rows=8, length=16, uneven=False):
    """Return a batch of random tokens, which a model can memorize.

    `uneven` sets the weights of random targets and of two whole rows to 0.
    """
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 257, (rows, length), np.int32)
    targets = rng.integers(0, 257, (rows, length), np.int32)
    weights = np.ones((rows, length), np.float32)
    if uneven:
        weights = (rng.random((rows, length)) < 0.6).astype(np.float32)
        weights[1] = weights[4] = 0
    positions = np.tile(np.arange(length, dtype=np.int32), (rows, 1))
    return Batch(tokens, targets, weights, np.ones_like(tokens), positions, weights.sum(1) * np.float32(1))
