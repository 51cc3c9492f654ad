"""Random inputs for the requests of a load, made once and sent again and again."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from slosched.errors import InvalidConfig
from slosched.messages import ModelInfo

_POOL_BYTES = 16 * 1024 * 1024
_POOL_ARRAYS = 32


class InputPool:
    """Random inputs, sent without a copy.

    Floats are standard normal, integers within 0..255, as a model's input shape and dtype ask.
    Models of equal shape and dtype share their arrays. Raises InvalidConfig for a dtype that numpy
    has not.
    """

    def __init__(self, models: Sequence[ModelInfo], *, seed: int = 0) -> None:
        self._frames: dict[int, list[memoryview]] = {}
        made: dict[tuple[tuple[int, ...], str], list[memoryview]] = {}
        generator = np.random.default_rng(seed)
        for info in models:
            key = (info.input_shape, info.input_dtype)
            if key not in made:
                made[key] = _random_frames(info, generator)
            self._frames[info.model_id] = made[key]

    def frame(self, model_id: int, seq: int) -> memoryview:
        """The input of the `seq`-th request: bytes in C order."""
        frames = self._frames[model_id]
        return frames[seq % len(frames)]


def _random_frames(info: ModelInfo, generator: np.random.Generator) -> list[memoryview]:
    try:
        dtype = np.dtype(info.input_dtype)
    except TypeError:
        raise InvalidConfig(
            f"model {info.name!r} takes {info.input_dtype}, which numpy cannot make; "
            "use --no-inputs"
        ) from None
    nbytes = max(1, int(np.prod(info.input_shape)) * dtype.itemsize)
    count = max(2, min(_POOL_ARRAYS, _POOL_BYTES // nbytes))
    frames = []
    for _ in range(count):
        if dtype.kind == "f":
            values = generator.standard_normal(info.input_shape).astype(dtype)
        else:
            high = 2 if dtype.kind == "b" else 128 if dtype == np.int8 else 256
            values = generator.integers(0, high, info.input_shape).astype(dtype)
        frames.append(memoryview(values.tobytes()))
    return frames
