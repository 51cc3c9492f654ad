"""One architecture on a GPU: the one place its weights run from, and a way to run each of its classes.

Instances of an architecture share a program. Their weights lie in pages of the cache and are copied into
`active` on the device as the first part of each exec (51 MB: 28 us of 880, H200; docs/adr/0001). A
class has two buffer sets, so that one batch's inputs arrive, and another's outputs leave, while a third
runs. Who owns each piece of memory, and until when, stands at the head of recorded.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple, Protocol

from slosched.daemon.backends.cuda.driver import Block, Event, Stream
from slosched.daemon.backends.layout import Layout

#: (to, from, bytes)
Copies = Sequence[tuple[int, int, int]]


class Class(NamedTuple):
    """What runs as one: a batch size, and the length class of its requests (0: the model has none)."""

    batch: int
    length: int = 0

    def __str__(self) -> str:
        return f"batch {self.batch}" + (f" length {self.length}" if self.length else "")


@dataclass(frozen=True, slots=True)
class Cut:
    """How a captured class runs in segments: cut before the nodes `bounds`, `in_flight` launched at a time.

    `segment_ns` is the measured time of each segment; `bubble_ns` is how long the GPU waits for the host at
    each boundary (0 where the next segment is launched already). `note` says in words what it lacks.
    """

    bounds: tuple[int, ...]
    segment_ns: tuple[int, ...]
    in_flight: int
    bubble_ns: int = 0
    note: str = ""

    @property
    def boundary_ns(self) -> int:
        """The longest time until a run can be interrupted."""
        times, ahead = self.segment_ns, self.in_flight
        return max(sum(times[i : i + ahead]) for i in range(len(times)))

    @property
    def bubbles_ns(self) -> int:
        """The sum over the boundaries of a whole run."""
        return self.bubble_ns * len(self.bounds)


class Use(Enum):
    """What a buffer set holds: nothing, inputs that wait for their exec, or outputs of an exec."""

    FREE = 0
    INPUTS = 1
    OUTPUTS = 2


@dataclass(slots=True, eq=False)
class BufferSet:
    """The static inputs and outputs of one class, where a graph reads and writes them.

    `input` (batch x row_in bytes) and `output` (batch x row_out) are on the device, `staged_in` and
    `staged_out` their counterparts in pinned memory. `row_in` and `row_out` are bytes of one request's row, as
    `takes` and `gives` lay it out.
    A run of the set records `started` and `ended`; what lies between them is its exec time.
    """

    batch: int
    takes: Layout
    gives: Layout
    input: int
    output: int
    row_in: int
    row_out: int
    staged_in: Block
    staged_out: Block
    started: Event
    ended: Event
    use: Use = Use.FREE
    aimed_for: object = None  # whose weights its next run copies: the last `aim` holds


def side_of(program: Program, priority: int, of: Class) -> Program:
    """What runs an exec of this priority: the program, or its urgent twin if that has the class."""
    twin = program.urgent if priority else None
    return program if twin is None or of not in twin.classes else twin


class Program(Protocol):
    """What runs. `aim` and `launch` are called by the loop's thread."""

    @property
    def name(self) -> str: ...

    @property
    def weights_bytes(self) -> int: ...

    @property
    def active(self) -> int:
        """Address of the `weights_bytes` from which it runs."""

    @property
    def keeps_weights(self) -> bool:
        """True if the model was seen to leave its weights and buffers as they were."""

    @property
    def classes(self) -> tuple[Class, ...]:
        """Classes that can run, ascending."""

    def class_of(self, batch_size: int, length: int) -> Class:
        """The smallest class of `length` that holds the batch; the largest if none does.

        Raises ValueError if there is none of that length.
        """

    def sets(self, of: Class) -> tuple[BufferSet, ...]:
        """The buffer sets of a class."""

    def captured(self, of: Class) -> bool:
        """True for a CUDA graph; False: it is run by plain execution."""

    def aim(self, buffers: BufferSet, copies: Copies) -> None:
        """Say what the next run of `buffers` copies first: an instance's weights, or nothing (they stay).

        Ahead of the launch, since it may take microseconds; again, if it has come otherwise.
        """

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        """Begin to run `buffers` on `stream`, copies first. May raise what a model raises."""

    @property
    def urgent(self) -> Program | None:
        """What runs in its place where a run interrupts another; its memory is all its own."""

    def cut_of(self, of: Class) -> Cut | None:
        """How a class is cut into segments; None: it runs as a whole."""

    def launch_segment(self, buffers: BufferSet, stream: Stream, index: int = 0) -> None:
        """Begin to run one segment; `launch` begins them all."""
