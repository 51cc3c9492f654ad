"""Samples the power of one GPU in a process of its own, so that no model waits for NVML.

    python -m slosched.daemon.member.power --device cuda:0 --file power.jsonl [--interval-ms 50]

It prints one JSON line, {"problem": "", "gpu": .., "uuid": .., "driver": ..}, and then appends a PowerSample as
a JSON line to the file every interval, until its input ends or SIGTERM comes: give it a pipe as its input.
Without a card to ask, `problem` says why, and it ends at once with 0: a run without power is a run. The energy
counter is read five times a second only: on an H200 one reading takes 2.5 to 15 ms.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import select
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

import msgspec

from slosched.child_processes import end_with_parent
from slosched.clock import monotonic_ns
from slosched.daemon.backends.nvml import Nvml, cuda_bus_id
from slosched.units import NS_PER_MS, NS_PER_S

_CUDA = re.compile(r"cuda(?::([0-9]{1,3}))?")
#: How far apart readings of the energy counter are at most (by one interval more).
_COUNTER_NS = 200 * NS_PER_MS
#: Lower than any model's process.
_NICENESS = 10
_SHORTEST_MS, _LONGEST_MS = 10, 10_000


def card_of(device: str) -> Nvml:
    """The card behind `device` ("cuda:1": CUDA's second as this process sees them). See its `problem`."""
    match = _CUDA.fullmatch(device)
    if match is None:
        card = Nvml()
        card.close()
        card.problem = f"{device[:100]!r} is not a GPU; power is measured on cuda:N"
        return card
    ordinal = int(match[1] or 0)
    bus_id = cuda_bus_id(ordinal)
    card = Nvml(pci_bus_id=bus_id)
    if not bus_id and not card.problem.startswith(("nvidia-ml-py", "the driver")):
        card.problem = f"CUDA has no device {ordinal} for this process"
    return card


def sample(
    card: Nvml,
    file: BinaryIO,
    *,
    interval_ns: int,
    now_ns: Callable[[], int],
    wait: Callable[[float], bool],
) -> None:
    """Append samples until `wait(seconds)` says that the end has come. The last one has the counter too."""
    due_ns = now_ns()
    counter_ns = -_COUNTER_NS
    ended = False
    while True:
        at_ns = now_ns()
        counter = ended or at_ns - counter_ns >= _COUNTER_NS
        if counter:
            counter_ns = at_ns
        file.write(msgspec.json.encode(card.power(at_ns, counter=counter)) + b"\n")
        if ended or card.lost:
            return
        due_ns = max(due_ns + interval_ns, now_ns())
        ended = wait((due_ns - now_ns()) / NS_PER_S)


class _End:
    """Becomes true at SIGTERM, or when the input ends."""

    def __init__(self) -> None:
        self._read, self._write = os.pipe()
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the parent

    def _on_signal(self, _number: int, _frame: FrameType | None) -> None:
        os.write(self._write, b".")

    def within(self, seconds: float) -> bool:
        """Wait for the end, for `seconds` at most. What comes through the input is passed over."""
        deadline_ns = monotonic_ns() + round(seconds * NS_PER_S)
        while True:
            left = max(deadline_ns - monotonic_ns(), 0) / NS_PER_S
            ready, _, _ = select.select([self._read, sys.stdin.fileno()], [], [], left)
            if self._read in ready or (ready and not os.read(sys.stdin.fileno(), 4096)):
                return True
            if not left:
                return False


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="slosched.daemon.member.power")
    parser.add_argument("--device", required=True)
    parser.add_argument("--file", required=True, type=Path)
    parser.add_argument("--interval-ms", type=int, default=50)
    given = parser.parse_args(arguments)
    if not _SHORTEST_MS <= given.interval_ms <= _LONGEST_MS:
        parser.error(f"--interval-ms must be within {_SHORTEST_MS}..{_LONGEST_MS}")
    end_with_parent(signal.SIGKILL)
    with suppress(OSError):
        os.nice(_NICENESS)
    end = _End()
    card = card_of(given.device)
    about = {"problem": card.problem, "gpu": card.name, "uuid": card.uuid, "driver": card.driver}
    sys.stdout.write(json.dumps(about) + "\n")
    sys.stdout.flush()
    if card.problem:
        return 0
    try:
        with given.file.open("ab", buffering=0) as file:
            sample(
                card,
                file,
                interval_ns=given.interval_ms * NS_PER_MS,
                now_ns=monotonic_ns,
                wait=end.within,
            )
    except OSError as error:
        sys.stderr.write(f"cannot write {given.file}: {error.strerror}\n")
        return 1
    finally:
        card.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
