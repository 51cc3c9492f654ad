"""A device whose answers are known: each number of an output is the sum of its input.

It takes the time of an emulated GPU, and so needs no real one. On any machine one can check that every client
gets its own answers.
"""

from collections.abc import Sequence

import numpy as np

from slosched.config import WorkerConfig
from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.emulated import EmulatedBackend


class SumsBackend(EmulatedBackend):
    """Inputs and outputs are float32. `config.gpus` and `config.profile` are as for emulated GPUs."""

    interface = 1
    device_name = "sums"

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self._sums: dict[
            int, list[np.float32]
        ] = {}  # by action: one for each request with an input

    def describe(self) -> str:
        return f"{super().describe()}, answering with sums"

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._sums[action_id] = [np.frombuffer(each, np.float32).sum() for each in frames]

    def drop_inputs(self, action_id: int) -> None:
        self._sums.pop(action_id, None)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        given = [size for size in sizes if size]  # requests without an input get no output
        sums = self._sums.pop(action_id, [])
        return [
            np.full(size // 4, each, np.float32).tobytes()
            for size, each in zip(given, sums, strict=True)
        ]
