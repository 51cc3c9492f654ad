"""One architecture on a GPU: the one place its weights run from, and a way to run each batch class.

Instances of an architecture share a program. Their weights lie in pages of the cache and are copied into
`active` on the device just before each exec (51 MB: 32 us of 909, H200; docs/adr/0001). A batch class has
two buffer sets, so that one batch's inputs arrive, and another's outputs leave, while a third runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Protocol

from slosched.daemon.backends.cuda.driver import Block, Stream


class Use(Enum):
    """Whose data a buffer set holds: nobody's, inputs that wait for their exec, outputs of one."""

    FREE = 0
    INPUTS = 1
    OUTPUTS = 2


@dataclass(slots=True, eq=False)
class BufferSet:
    """The static inputs and outputs of one batch class, where a graph reads and writes them.

    `input` (batch x row_in bytes) and `output` (batch x row_out) are on the device, `staged_in` and
    `staged_out` their counterparts in pinned memory. `row_in` and `row_out` are bytes of one request.
    """

    batch: int
    input: int
    output: int
    row_in: int
    row_out: int
    staged_in: Block
    staged_out: Block
    use: Use = Use.FREE


class Program(Protocol):
    """What runs. `launch` is called by the loop's thread; the rest belongs to preparation."""

    @property
    def name(self) -> str: ...

    @property
    def weights_bytes(self) -> int: ...

    @property
    def active(self) -> int:
        """Address of the `weights_bytes` from which it runs."""

    @property
    def classes(self) -> tuple[int, ...]:
        """Batch classes that can run, ascending."""

    def sets(self, batch: int) -> tuple[BufferSet, ...]:
        """The buffer sets of a class."""

    def captured(self, batch: int) -> bool:
        """True for a CUDA graph; False: it is run by plain execution."""

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        """Begin to run `buffers` with the active weights on `stream`. May raise what a model raises."""
