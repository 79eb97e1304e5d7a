"""Signals that end a command by an exception, as Ctrl-C does."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Terminated(BaseException):
    """A signal arrived in a part of a command that needs no checkpoint.

    Args:
      name: the name of the signal.
    """

    def __init__(self, name: str):
        super().__init__(name)
        self.name = name


@contextmanager
def raise_on_signal(*numbers: signal.Signals) -> Iterator[None]:
    """Raise `Terminated` at these signals, as Python raises KeyboardInterrupt at SIGINT."""

    def handle(number: int, _: object) -> None:
        raise Terminated(signal.Signals(number).name)

    with handlers(handle, *numbers):
        yield


@contextmanager
def handlers(handle: Callable[[int, Any], None], *numbers: signal.Signals) -> Iterator[None]:
    """Handle these signals within the context; does nothing outside of the main thread."""
    try:
        previous = {number: signal.signal(number, handle) for number in numbers}
    except ValueError:  # only the main thread may set signal handlers
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
