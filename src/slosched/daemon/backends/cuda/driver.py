"""What a GPU device needs of CUDA: streams, events, memory and copies by address, and nothing else.

`bindings.py` is the real one, `tests/fake_cuda.py` one in virtual time whose copies really move bytes, at
the time at which they would end: what overwrites a buffer too early is found out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from slosched.errors import OutOfResources, SloschedError

Bytes = npt.NDArray[np.uint8]
#: A stream and an event are whatever the driver makes of them.
Stream = Any
Event = Any


class OutOfDeviceMemory(OutOfResources):
    """The GPU (or the host, for pinned memory) has no room for what was asked. Nothing else is lost."""


class DeviceFault(SloschedError):
    """A CUDA call failed in a way that leaves no context to go on with."""


@dataclass(frozen=True, slots=True)
class Block:
    """`nbytes` of memory at `address`, on the device or pinned on the host (`host`: the bytes)."""

    address: int
    nbytes: int
    host: Bytes | None = None


class Graph(Protocol):
    """A captured graph that can be launched, and whose one copy to the active weights can be aimed.

    The first segment of a graph alone has that copy.
    """

    def aim(self, to: int, source: int, nbytes: int) -> None:
        """The next launch copies these. One that runs is not changed."""

    def launch(self, stream: Stream) -> None: ...

    def close(self) -> None:
        """It is launched no more: give back what it holds on the device."""


class Driver(Protocol):
    """One GPU. Every call returns at once, but for those that allocate and free.

    Anything may raise DeviceFault.
    """

    def stream(self, priority: int) -> Stream:
        """A stream that waits for no other. Priorities below 0 go first (an H200: 0 to -5)."""

    def event(self) -> Event:
        """An event that takes the time. One that was never recorded is done."""

    def record(self, event: Event, stream: Stream) -> None:
        """The event is done when everything given to `stream` so far is."""

    def record_inside(self, event: Event, stream: Stream) -> None:
        """In a capture: each launch of the graph records the event there."""

    def begin_capture(self, stream: Stream) -> None:
        """What this thread gives to `stream` from now on becomes a graph."""

    def end_capture(self, stream: Stream) -> Any:
        """What was captured, for `graph`. Raises DeviceFault if something in it cannot be."""

    def graph(self, captured: Any, active: int) -> Graph:
        """Make `captured` ready to be launched. Raises DeviceFault if it has no copy to `active`."""

    def part(self, captured: Any) -> Graph:
        """Make `captured`, which has no copy that is aimed, ready to be launched."""

    def chain(self, captured: Any) -> Sequence[Any] | None:
        """The nodes of what was captured, in the order in which they run; None where that is not a chain."""

    def segment(
        self, captured: Any, chain: Sequence[Any], begin: int, end: int, active: int | None
    ) -> Graph:
        """A graph of the nodes from `begin` to `end` of what was captured; it stays as it is.

        `active` is None where no copy is aimed. Raises ValueError if `begin` is 0 and there is no copy to
        `active`; OutOfDeviceMemory.
        """

    def done(self, event: Event) -> bool: ...

    def elapsed_ns(self, start: Event, end: Event) -> int:
        """Device time between two events that are done."""

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy between addresses of device or pinned memory, in stream order."""

    def device_block(self, nbytes: int) -> Block:
        """Raises OutOfDeviceMemory."""

    def pinned_block(self, nbytes: int) -> Block:
        """Host memory that copies can be made from and to beside inference. Raises OutOfDeviceMemory."""

    def free(self, block: Block) -> None:
        """Give a block back; nothing may use it any more. May wait for the device."""

    def free_bytes(self) -> int:
        """Free device memory."""
