"""Values: bytes that outlive one step, and who owns them until when.

The brains see what a value is; its bytes stay with the shell. A value that comes with a message belongs to the
step in which it came, and is gone when that step ends, unless the scheduler has it kept (interface.Keep): then
the request that it names owns it, and it lives until that request is answered. So an input lives until its
request ends, because a failed action may need it again; an output lives for one step; the output of a stage
that may become the answer lives as long as an input.

    comes with a message -> PASSING --Keep--> KEPT by a request --RequestDone--> gone
                               +--- the step ends --> gone

On a worker's host and on its GPUs, actions and instances own the memory (daemon/backends/cuda/recorded.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from enum import IntEnum
from typing import Generic, TypeVar

import msgspec

F = TypeVar("F", bound=Sized)


class Place(IntEnum):
    """Where the bytes of a value are."""

    CONTROLLER = 0
    HOST = 1  # a worker's
    GPU = 2


class Value(msgspec.Struct, frozen=True, gc=False):
    """One value: its id, which is never used again, its size in bytes, and where it is."""

    value_id: int
    size: int
    place: Place = Place.CONTROLLER


class ValueStore(Generic[F]):
    """A controller's values. The live one keeps bytes here, the simulated one frames that carry marks.

    `make(size)` makes an input for a request that has none (option generate_inputs), once for each size.
    """

    def __init__(self, make: Callable[[int], F]) -> None:
        self._make = make
        self._passing: dict[int, F] = {}  # of this step, by value id
        self._kept: dict[int, F] = {}
        self._owned: dict[int, list[int]] = {}  # ids of what is kept, by the owner's key
        self._made: dict[int, F] = {}  # by size
        self._next_id = 1

    @property
    def owners(self) -> int:
        """Requests that own a value."""
        return len(self._owned)

    def came(self, frame: F) -> Value:
        """Take what came with a message; each gets an id of its own, whatever a peer repeats."""
        value_id = self._next_id
        self._next_id = value_id + 1
        self._passing[value_id] = frame
        return Value(value_id, len(frame))

    def keep(self, value_id: int, owner: int) -> None:
        """The request `owner` owns the value from now on; one that is not there is fine."""
        frame = self._passing.pop(value_id, None)
        if frame is not None:
            self._kept[value_id] = frame
            self._owned.setdefault(owner, []).append(value_id)

    def release(self, owner: int) -> None:
        """The request was answered: what it owned is gone."""
        for value_id in self._owned.pop(owner, ()):
            del self._kept[value_id]

    def get(self, value: Value | None) -> list[F]:
        """The bytes of a value, in a list; an empty one if there is no value, or it is gone."""
        if value is None:
            return []
        frame = self._kept.get(value.value_id)
        if frame is None:
            frame = self._passing.get(value.value_id)
        return [] if frame is None else [frame]

    def inputs(self, values: Sequence[Value | None], sizes: Sequence[int]) -> list[F]:
        """The inputs of an Infer in the order of its requests; a size of 0 has no frame. No values: no request
        has an input of its own.
        """
        found: list[F] = []
        for value, size in zip(values or [None] * len(sizes), sizes, strict=True):
            if size:
                found += self.get(value) or [self._made_of(size)]
        return found

    def step_ended(self) -> None:
        """What came in this step and was not kept is gone."""
        if self._passing:
            self._passing.clear()

    def _made_of(self, size: int) -> F:
        frame = self._made.get(size)
        if frame is None:
            frame = self._made[size] = self._make(size)
        return frame
