"""Learning-rate schedules: multipliers of the peak learning rate by step."""

from dataclasses import dataclass

import jax.numpy as jnp
import optax

from attnlab.errors import check_fields


@dataclass(frozen=True)
class Constant:
    """Linear warmup over `warmup` steps, then a constant rate."""

    warmup: int = 0

    def __post_init__(self):
        check_fields(self, "warmup", least=0)

    def factor(self, steps: int) -> optax.Schedule:
        """Return the schedule that maps a step to its multiplier of the peak rate."""
        del steps
        return _after_warmup(self.warmup, optax.constant_schedule(1.0))


@dataclass(frozen=True)
class Cosine:
    """Linear warmup, then cosine decay to `final` times the peak rate (arXiv 1608.03983)."""

    warmup: int = 50
    final: float = 0.1

    def __post_init__(self):
        check_fields(self, "warmup", "final", least=0)

    def factor(self, steps: int) -> optax.Schedule:
        """Return the schedule that maps a step to its multiplier of the peak rate."""
        return _after_warmup(
            self.warmup, optax.cosine_decay_schedule(1.0, max(1, steps - self.warmup), self.final)
        )


@dataclass(frozen=True)
class WarmupStableDecay:
    """Linear warmup, constant rate, then linear decay (arXiv 2404.06395).

    Attributes:
      warmup: number of warmup steps.
      decay: fraction of all steps that the final decay takes.
      final: multiplier of the peak rate at the end.
    """

    warmup: int = 50
    decay: float = 0.2
    final: float = 0.0

    def __post_init__(self):
        check_fields(self, "warmup", "final", least=0)
        check_fields(self, "decay", least=0, most=1)

    def factor(self, steps: int) -> optax.Schedule:
        """Return the schedule that maps a step to its multiplier of the peak rate."""
        fall = max(1, round(steps * self.decay))
        tail = optax.linear_schedule(1.0, self.final, fall)
        stable = max(0, steps - self.warmup - fall)
        return _after_warmup(
            self.warmup, optax.join_schedules([optax.constant_schedule(1.0), tail], [stable])
        )


@dataclass(frozen=True)
class InverseSquareRoot:
    """Linear warmup over `warmup` steps, then sqrt(warmup / step) times the peak rate.

    Vaswani et al. 2017, equation 3, scaled to the peak rate.
    """

    warmup: int = 100

    def __post_init__(self):
        check_fields(self, "warmup", least=0)

    def factor(self, steps: int) -> optax.Schedule:
        """Return the schedule that maps a step to its multiplier of the peak rate."""
        del steps
        start = max(1, self.warmup)
        # During warmup `join_schedules` evaluates this schedule at negative steps and discards the
        # value.
        return _after_warmup(self.warmup, lambda step: (start / (jnp.maximum(step, 0) + start)) ** 0.5)


def _after_warmup(warmup: int, schedule: optax.Schedule) -> optax.Schedule:
    if warmup == 0:
        return schedule
    # The last warmup step has the full rate.
    rise = optax.linear_schedule(1 / warmup, 1.0, max(1, warmup - 1))
    return optax.join_schedules([rise, schedule], [warmup])


Schedule = Constant | Cosine | WarmupStableDecay | InverseSquareRoot
