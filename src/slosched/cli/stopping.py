"""Ctrl-C and SIGTERM during a simulation: it is asked to stop, and leaves valid partial runs."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

import typer

from slosched.cli.output import warn


class Stopping:
    """Which signal was caught, if any. Calling it says whether to stop."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self) -> bool:
        return self.number != 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number, as shells count; 0 without one."""
        return 128 + self.number if self.number else 0


@contextlib.contextmanager
def stopped_by_signals() -> Iterator[Stopping]:
    """Note SIGINT or SIGTERM in what is given; a second one has its usual effect.

    KeyboardInterrupt out of the block, where a signal was caught, ends the command with its exit code.
    """
    stopping = Stopping()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def give_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def on_signal(number: int, _: FrameType | None) -> None:
        stopping.number = number
        give_back()
        warn("stopping; press Ctrl-C again to stop immediately")

    for number in before:
        signal.signal(number, on_signal)
    try:
        yield stopping
    except KeyboardInterrupt:
        if not stopping():
            raise
        raise typer.Exit(stopping.exit_code) from None
    finally:
        give_back()
