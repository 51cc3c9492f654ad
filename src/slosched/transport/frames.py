"""The tensors that pass through a controller; what decides never sees them.

An input is kept from its arrival until its request is answered, because a failed action may need it again. An
output is only there in the step in which its result came. The live controller keeps bytes here, the
simulated one frames of the same sizes that carry marks.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence, Sized
from typing import Generic, TypeVar

F = TypeVar("F", bound=Sized)


def random_input(size: int) -> bytes:
    """`size` bytes that are small positive float32 values whatever the pattern: no NaN reaches a model."""
    return bytes(b & 0x3E for b in os.urandom(size))


class Frames(Generic[F]):
    """Inputs by request key, outputs by action id and place, and inputs made for those who sent none.

    `make(size)` makes an input for a client that sent none (option generate_inputs), once for each size.
    """

    def __init__(self, make: Callable[[int], F]) -> None:
        self._make = make
        self._inputs: dict[int, F] = {}
        self._arrived: dict[int, F] = {}  # inputs of this step, by input key
        self._next_input_key = 1
        self._outputs: dict[int, Sequence[F]] = {}
        self._generated: dict[int, F] = {}  # by size

    @property
    def kept(self) -> int:
        """Inputs of requests that have no answer yet."""
        return len(self._inputs)

    def input_came(self, frame: F) -> int:
        """Returns the frame's key. Each has its own: whatever a client repeats, no input is mistaken for
        another's.
        """
        key = self._next_input_key
        self._next_input_key += 1
        self._arrived[key] = frame
        return key

    def accept(self, input_key: int, key: int) -> None:
        """The input belongs to the request `key`; keep it until `drop`."""
        frame = self._arrived.pop(input_key, None)
        if frame is not None:
            self._inputs[key] = frame

    def drop(self, key: int) -> None:
        if self._inputs:
            self._inputs.pop(key, None)

    def inputs(self, keys: Sequence[int], sizes: Sequence[int]) -> list[F]:
        """The inputs of an Infer in the order of its requests; a size of 0 has no frame."""
        return [
            self._inputs.get(key) or self._made(size)
            for key, size in zip(keys, sizes, strict=True)
            if size
        ]

    def outputs_came(self, message: object, frames: Sequence[F]) -> None:
        """The frames behind a worker's message."""
        action_id = getattr(message, "action_id", None)
        if action_id is not None:
            self._outputs[action_id] = frames

    def output(self, action_id: int, index: int) -> list[F]:
        """The output at `index`, in a list; an empty one if the worker did not send it."""
        return [*self._outputs.get(action_id, ())[index : index + 1]]

    def step_ended(self) -> None:
        if self._arrived:
            self._arrived.clear()
        if self._outputs:
            self._outputs.clear()

    def _made(self, size: int) -> F:
        frame = self._generated.get(size)
        if frame is None:
            frame = self._generated[size] = self._make(size)
        return frame
