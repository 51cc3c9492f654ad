"""Memory for one batch, which the worker shares with the process of a model: no row crosses a socket.

A slot belongs to the worker from the input copy until the outputs were read, but for the time of the exec,
when the model's process reads inputs and writes outputs. Its size is sealed: if a
process could shrink it, its readers would end with SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from collections.abc import Sequence

import numpy as np

from slosched.daemon.backends.layout import Array, Layout

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Outputs begin at a multiple of this: as each row of both kinds of numbers may need.
_ALIGN = 64


def outputs_begin(inputs_bytes: int) -> int:
    """Where the outputs of a batch lie, behind its inputs."""
    return -(-inputs_bytes // _ALIGN) * _ALIGN


class Slot:
    """Memory for `batch` rows of inputs, and behind them as many of outputs.

    `layouts` are those of both, in its length class. `generation` is that of the process it is shared with
    (processes.py). Raises OSError or ValueError if there is no memory.
    """

    def __init__(
        self, number: int, batch: int, layouts: tuple[Layout, Layout], generation: int
    ) -> None:
        self.number, self.batch, self.generation = number, batch, generation
        self._takes, self._gives = layouts
        self.length = self._takes.length
        self.outputs_at = outputs_begin(batch * self._takes.row_bytes)
        self.nbytes = max(self.outputs_at + batch * self._gives.row_bytes, 1)
        #: An exec in the process uses it; `dropped`: its answer is not wanted any more.
        self.running = self.dropped = False
        self.shared = False  # the process knows it
        self.fd = os.memfd_create("slosched-batch", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            # Without this a later write could end the process, for want of memory.
            os.posix_fallocate(self.fd, 0, self.nbytes)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
            self._memory = mmap.mmap(self.fd, self.nbytes)
        except BaseException:
            os.close(self.fd)
            raise

    def write(self, row: int, frame: bytes | memoryview, length: int) -> None:
        """Set the inputs of `row` from a frame of `length`. Raises ValueError for another frame."""
        size = self._takes.row_bytes
        if self._takes.plain and len(frame) == size:
            self._memory[row * size : (row + 1) * size] = frame
        else:
            self._takes.write(self._row(row, self._takes, 0), frame, length)

    def read(self, row: int, length: int) -> bytes | memoryview:
        """The frame of the outputs of `row`, for a request of `length`. Raises ValueError for broken texts."""
        size = self._gives.row_bytes
        if self._gives.plain:
            return self._memory[self.outputs_at + row * size : self.outputs_at + (row + 1) * size]
        return self._gives.read(self._row(row, self._gives, self.outputs_at), length)

    @property
    def scored(self) -> bool:
        return self._gives.scored

    def scores(self, given: Sequence[int]) -> tuple[float, ...]:
        """The scores of the first rows, one for each of `given`; NaN where that is 0."""
        rows: Array = np.frombuffer(self._memory, np.uint8, offset=self.outputs_at)
        return self._gives.scores(rows, given)

    def _row(self, row: int, layout: Layout, at: int) -> Array:
        size = layout.row_bytes
        whole: Array = np.frombuffer(self._memory, np.uint8, size, at + row * size)
        return whole

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)
