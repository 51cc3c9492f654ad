"""Random inputs for the requests of a load, made once and sent again and again."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from slosched.errors import InvalidConfig
from slosched.messages import ModelInfo
from slosched.signature import BYTES, ONLY_INPUT, Tensor, element_bytes, joined, row_bytes

_POOL_BYTES = 16 * 1024 * 1024
_POOL_FRAMES = 32
#: A text has no more bytes than this.
_TEXT_BYTES = 64
#: Frames of lengths beyond this number are made when they are asked for, and take the place of others.
_LENGTHS_KEPT = 1024


class InputPool:
    """Random inputs, sent without a copy.

    Floats are standard normal, integers within 0..255, texts of letters, as a model's inputs ask.
    Models of equal inputs share their frames. Raises InvalidConfig for a dtype that numpy has not.
    """

    def __init__(self, models: Sequence[ModelInfo], *, seed: int = 0) -> None:
        self._generator = np.random.default_rng(seed)
        self._tensors = {info.model_id: _inputs_of(info) for info in models}
        self._longest = {info.model_id: max(info.lengths, default=0) for info in models}
        self._made: dict[tuple[tuple[Tensor, ...], int], list[memoryview]] = {}
        for info in models:  # before the load begins
            self._frames(info.model_id, 0, info.name)

    def frame(self, model_id: int, seq: int, length: int = 0) -> memoryview:
        """The inputs of the `seq`-th request as one frame, at `length` (0: the greatest there is)."""
        frames = self._frames(model_id, length)
        return frames[seq % len(frames)]

    def _frames(self, model_id: int, length: int, name: str = "") -> list[memoryview]:
        tensors = self._tensors[model_id]
        key = (tensors, length or self._longest[model_id])
        frames = self._made.get(key)
        if frames is None:
            if len(self._made) >= _LENGTHS_KEPT:
                self._made.pop(next(iter(self._made)))
            frames = self._made[key] = self._random_frames(*key, name)
        return frames

    def _random_frames(
        self, tensors: tuple[Tensor, ...], length: int, name: str
    ) -> list[memoryview]:
        # The lengths of a model share the pool's bytes: most of them have a few frames.
        most = _POOL_FRAMES if not any(tensor.varies for tensor in tensors) else 4
        count = max(2, min(most, _POOL_BYTES // max(1, row_bytes(tensors, length))))
        return [
            memoryview(joined([self._random(tensor, length, name) for tensor in tensors]))
            for _ in range(count)
        ]

    def _random(self, tensor: Tensor, length: int, name: str) -> bytes:
        generator, shape = self._generator, tensor.shape_at(length)
        if tensor.dtype == BYTES:
            count = math.prod(shape)
            size = max(0, min(_TEXT_BYTES, tensor.max_bytes // count - 4))
            letters = generator.integers(97, 123, (count, size), dtype=np.uint8)
            return element_bytes([bytes(each) for each in letters])
        try:
            dtype = np.dtype(tensor.dtype)
        except TypeError:
            raise InvalidConfig(
                f"model {name!r} takes {tensor.dtype}, which numpy cannot make; use --no-inputs"
            ) from None
        if dtype.kind == "f":
            return generator.standard_normal(shape).astype(dtype).tobytes()
        high = 2 if dtype.kind == "b" else 128 if dtype == np.int8 else 256
        return generator.integers(0, high, shape).astype(dtype).tobytes()


def _inputs_of(info: ModelInfo) -> tuple[Tensor, ...]:
    return info.inputs or (Tensor(ONLY_INPUT, info.input_dtype, info.input_shape),)
