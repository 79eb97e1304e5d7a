"""Training speed, and the memory of devices."""

import time
from types import SimpleNamespace

import numpy as np
import pytest

from attnlab.layers import AttentionConfig
from attnlab.models import CaptionerConfig, ViTConfig
from attnlab.train import flops
from attnlab.train.goodput import Goodput
from attnlab.train.meter import Meter, device_memory
from tests.train.small import TOKENIZER, make_experiment, make_session


@pytest.fixture
def clock(monkeypatch):
    """Return a clock that the test moves."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(flops, "peak_flops", lambda device: 1e9)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    return clock


def test_speed_counts_input_tokens_whatever_their_weights(clock):
    session = make_session(make_experiment())
    meter = Meter(session, Goodput())
    clock.now += 2.0
    for tokens in (100, 28):
        meter.count({"input_tokens": np.int32(tokens), "tokens": np.float32(3)})
    speed = meter.read(1, {"loss": np.float32(1), "bytes": np.float32(0), "bits_per_byte": np.float32(0)})
    flops = session.experiment.model.token_flops(TOKENIZER.vocab_size, 16).training
    assert speed["tokens_per_second"] == 64
    assert speed["model_flops_per_second"] == pytest.approx(64 * flops)


def test_model_flops_of_rows_with_a_source_do_not_depend_on_padding(clock):
    vit = ViTConfig(image=(8, 8, 1), patch=(4, 4), depth=1, width=8, attention=AttentionConfig(2), classes=0)
    model = CaptionerConfig(encoder=vit, decoder=make_experiment().model)
    data = SimpleNamespace(batch_size=4, sequence_length=16, source_shape=(8, 8, 1))
    experiment = SimpleNamespace(
        model=model, data=data, optimizer=make_experiment().optimizer, train=make_experiment().train
    )
    mesh = make_session(make_experiment()).mesh
    meter = Meter(SimpleNamespace(experiment=experiment, tokenizer=TOKENIZER, mesh=mesh), Goodput())
    clock.now += 2.0
    meter.count({"input_tokens": np.int32(10)})
    speed = meter.read(1, {"bytes": np.float32(1)})
    assert speed["tokens_per_second"] == 5
    row = 16 * model.token_flops(TOKENIZER.vocab_size, 16).training
    assert speed["model_flops_per_second"] == pytest.approx(4 * row / 2)


def test_memory_is_the_largest_of_the_devices_that_count_it():
    def device(**stats):
        return SimpleNamespace(memory_stats=lambda: stats or None)

    used = [device(bytes_in_use=5, peak_bytes_in_use=7), device(bytes_in_use=3, peak_bytes_in_use=9)]
    assert device_memory(used) == {"device_memory_bytes": 5, "device_memory_peak_bytes": 9}
    assert device_memory([device(bytes_in_use=5)]) == {"device_memory_bytes": 5}
    assert device_memory([device(), device()]) == {}  # CPUs
