"""Training speed, and the other numbers of a run that go with the metrics of a step."""

from typing import Any

import jax
import numpy as np

from attnlab.train import flops, optimizers
from attnlab.train.goodput import Goodput
from attnlab.train.session import Session


class Meter:
    """Training speed since the last reading, excluding compilation, evaluation and saving.

    The speed counts every input token that is not padding, whether or not its target has a weight.
    Model FLOPs are those of these tokens. In data with a source per row, the cost of the source is
    spread over a whole row, so there the FLOPs count all positions of the row.
    """

    def __init__(self, session: Session, goodput: Goodput):
        e, self._session, self._goodput = session.experiment, session, goodput
        model_flops = e.model.token_flops(session.tokenizer.vocab_size, e.data.sequence_length)
        self._flops_per_token = model_flops.training
        self._positions_per_step = e.data.batch_size * e.data.sequence_length
        self._peak = flops.peak_flops(session.mesh.devices.flat[0]) * session.mesh.size
        self._counts: list[jax.Array] = []  # input tokens of each step, copied to the host when read
        self._read = self._times()

    def _times(self) -> tuple[float, float]:
        """Return the seconds since the start that count for the speed, and those for input."""
        seconds = self._goodput.seconds
        excluded = sum(seconds[part] for part in ("compile", "checkpoint", "evaluation"))
        return self._goodput.total() - excluded, seconds["input"]

    def count(self, metrics: dict[str, Any]) -> None:
        """Add the tokens of a step."""
        self._counts.append(metrics["input_tokens"])

    def read(self, step: int, metrics: dict[str, Any]) -> dict[str, float]:
        """Return the scalar metrics of a step with the training speed, and reset the timers."""
        times = self._times()
        seconds, waited = (now - before for now, before in zip(times, self._read, strict=True))
        seconds = max(seconds, 1e-9)
        e = self._session.experiment
        positions = tokens = sum(map(int, jax.device_get(self._counts)))
        if e.data.source_shape:
            positions = len(self._counts) * self._positions_per_step
        rate = optimizers.learning_rate(e.optimizer, e.train.steps)(step - 1)
        scalars = {name: float(value) for name, value in metrics.items() if np.ndim(value) == 0}
        scalars.pop("is_finite", None)
        if not scalars["bytes"]:
            del scalars["bits_per_byte"]  # undefined: the targets are not text
        self._read, self._counts = times, []
        speed = {
            "learning_rate": float(rate),
            "tokens_per_second": tokens / seconds,
            "model_flops_per_second": (model_flops := positions / seconds * self._flops_per_token),
            "model_flops_utilization": model_flops / self._peak,
            "input_wait": min(1.0, waited / seconds),
        }
        devices = self._session.mesh.local_devices
        return scalars | speed | self._goodput.metrics() | device_memory(devices)


def device_memory(devices: list[jax.Device]) -> dict[str, float]:
    """Return the largest memory in use and its peak over the devices, in bytes.

    The result is empty where the platform does not count its memory, as on CPUs.
    """
    found = [stats for device in devices if (stats := device.memory_stats())]
    names = {"device_memory_bytes": "bytes_in_use", "device_memory_peak_bytes": "peak_bytes_in_use"}
    return {
        name: float(max(stats[key] for stats in found))
        for name, key in names.items()
        if found and all(key in stats for stats in found)
    }
