"""Notices that a worker's loop stands still for ever, says where, and ends the process.

The loop waits for nothing for long, but it runs other people's code: a model whose forward never returns, or
one that holds a lock that the loop needs while its thread is stopped (backends/cuda/background.py). To its
controller such a worker is silent, and its GPU would stay dark until an operator looks.

A stop of the whole process (SIGSTOP, a suspended machine) is none of that: the thread counts periods that it
slept itself, and two of them must pass without a round of the loop. Code that never gives the
interpreter back stops this thread, too.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
from collections.abc import Callable
from contextlib import suppress

from slosched.daemon.traceback_file import INTERNAL_ERROR
from slosched.units import NS_PER_S, format_duration

#: No wait of the loop is a hundredth as long.
PERIOD_S = 10.0


class Watchdog:
    """A context: while it lasts, `rounds()` must change within two periods, or `end` is called.

    `end` is called with the reason, in this object's thread, and by default ends the process.
    """

    def __init__(
        self,
        rounds: Callable[[], int],
        *,
        period_s: float = PERIOD_S,
        say: Callable[[str], None] | None = None,
        end: Callable[[], None] | None = None,
    ) -> None:
        self._rounds, self._period_s = rounds, period_s
        self._say = say or _say
        self._end = end or _end
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="slosched-watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()

    def _run(self) -> None:
        seen, still = self._rounds(), 0
        while not self._ended.wait(self._period_s):
            rounds = self._rounds()
            seen, still = rounds, still + 1 if rounds == seen else 0
            if still == 1:
                stood = format_duration(round(self._period_s * NS_PER_S))
                self._say(f"the worker's loop has stood still for {stood}; its threads are here:")
            elif still == 2:
                self._say("the worker's loop still stands still: this process ends, for a new one")
                self._end()
                return


def _say(line: str) -> None:
    # Not through sys.stderr, whose lock may be what the loop waits for.
    with suppress(OSError, ValueError, AttributeError):
        os.write(2, f"{line}\n".encode())
        if line.endswith(":"):
            faulthandler.dump_traceback(sys.stderr, all_threads=True)


def _end() -> None:
    os._exit(INTERNAL_ERROR)
