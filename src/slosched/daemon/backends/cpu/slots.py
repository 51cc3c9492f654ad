"""Memory for one batch, which the worker shares with the process of a model: no row crosses a socket.

A slot belongs to the worker from the input copy until the outputs were read, but for the time of the exec,
when the model's process reads inputs and writes outputs. Its size is sealed: if a
process could shrink it, its readers would end with SIGBUS.
"""

from __future__ import annotations

import fcntl
import mmap
import os

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
#: Outputs begin at a multiple of this: as each row of both kinds of numbers may need.
_ALIGN = 64


class Slot:
    """Memory for `batch` rows of `input_bytes`, and behind them as many of `output_bytes`.

    `generation` is that of the process it is shared with (processes.py). Raises OSError or ValueError
    if there is no memory.
    """

    def __init__(
        self, number: int, batch: int, input_bytes: int, output_bytes: int, generation: int
    ) -> None:
        self.number, self.batch, self.generation = number, batch, generation
        self.output_bytes = output_bytes
        self._input_bytes = input_bytes
        self.outputs_at = -(-batch * input_bytes // _ALIGN) * _ALIGN
        self.nbytes = max(self.outputs_at + batch * output_bytes, 1)
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

    def write(self, row: int, data: bytes | memoryview) -> None:
        """Set the input of `row`. Raises ValueError for another size than an input's."""
        if len(data) != self._input_bytes:
            raise ValueError(f"an input of {len(data)} bytes; {self._input_bytes} are expected")
        begin = row * self._input_bytes
        self._memory[begin : begin + self._input_bytes] = data

    def read(self, row: int) -> bytes:
        """The output of `row`."""
        begin = self.outputs_at + row * self.output_bytes
        return self._memory[begin : begin + self.output_bytes]

    def close(self) -> None:
        self._memory.close()
        os.close(self.fd)
