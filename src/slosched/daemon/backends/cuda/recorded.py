"""What torch's and CuPy's programs share: the memory of each batch class, and what a run does with it.

Who owns what, and until when. Memory that must outlive a run never lies where another run may write:

    a set's `input`, `staged_in`    the action whose inputs are copied there, from COPY_INPUT until its exec
                                    has ended; a run reads `input` and writes neither
    a set's `output`, `staged_out`  the same action, from the start of its exec until its rows were copied to
                                    the host; only the last node of the set's own run writes `output`
    `active` (weights)              the run under way. Each run begins with a copy of its instance's weights,
                                    so what a model writes there is gone at the next. The one exception
                                    (`Program.keeps_weights`) was compared byte by byte after its first runs
    pages of the cache              the instance that was loaded into them, until it is evicted; runs read them
    the graph pool, caching pools   the run under way: everything that a model allocates, its result included.
                                    All graphs of a process share one pool, and the next one writes over it
    pinned images                   the model's name; loads read them

All runs of a process go to one stream, the exec lane's, so one run is under way at a time. What prepares a
model eagerly beside them has a stream of its own, and with it its own workspaces of cuBLAS and its own part
of torch's caching allocator.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.driver import (
    Block,
    DeviceFault,
    Driver,
    OutOfDeviceMemory,
    Stream,
)
from slosched.daemon.backends.cuda.program import BufferSet, Copies
from slosched.daemon.backends.cuda.runs import GraphRun, PlainRun, Run

#: Buffer sets of a class: one batch's inputs arrive, and another's outputs leave, while a third runs.
SETS = 2
WARM_UPS = 3

Array = npt.NDArray[Any]


class RecordedProgram(ABC):
    """One architecture that runs from `active`, `weights_bytes` long. `add_class` makes a class.

    `place` is device memory that graphs are captured to copy weights from; a launch says from where.
    `capture` is the stream that captures are made on, of the exec lane's priority, since a graph's nodes
    keep the priority of that stream whatever they are replayed on. Nothing else runs on it.
    """

    #: "float32", "float16" or "bfloat16": what the model computes in, for comparisons.
    precision = "float32"

    def __init__(
        self, name: str, driver: Driver, capture: Stream, place: Block, weights_bytes: int
    ) -> None:
        self.name, self.weights_bytes = name, weights_bytes
        self._driver, self._capture_stream, self._place = driver, capture, place
        self._filling = driver.stream(0)
        self.active = 0
        self.keeps_weights = False
        #: Names of weights and buffers that a forward was seen to change, and what is not offered, and why.
        self.changed: tuple[str, ...] = ()
        self.left_out: tuple[str, ...] = ()
        self._sets: dict[int, tuple[BufferSet, ...]] = {}
        self._runs: dict[int, Run] = {}  # by id of the buffer set
        self._graphs: dict[int, bool] = {}
        self._class_blocks: dict[int, list[Block]] = {}  # of the driver's memory, by class
        self._kept: list[Any] = []  # what graphs need for as long as they live
        self.output_shape: tuple[int, ...] = ()
        self.output_dtype = "float32"
        #: Why a class is run by plain execution, in words; empty if every class was captured.
        self.not_captured = ""

    # ------------------------------------------------------------------------- the protocol

    @property
    def classes(self) -> tuple[int, ...]:
        return tuple(sorted(self._sets))

    def sets(self, batch: int) -> tuple[BufferSet, ...]:
        return self._sets[batch]

    def captured(self, batch: int) -> bool:
        return self._graphs[batch]

    def aim(self, buffers: BufferSet, copies: Copies) -> None:
        self._runs[id(buffers)].aim(copies)

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        self._runs[id(buffers)].launch(stream)

    # ------------------------------------------------------------------- what a library does

    @abstractmethod
    def sample_rows(self, batch: int, seed: int) -> Array:
        """Made-up rows (batch, *input_shape); the same for the same seed."""

    @abstractmethod
    def run_rows(self, rows: Array) -> Array:
        """A plain forward of `rows` with the active weights, beside whatever runs: (batch, *output_shape).

        Waits for its end. Raises what the model raises, and ModelRefused.
        """

    @abstractmethod
    def changed_weights(self, source: Block) -> tuple[str, ...]:
        """Which tensors of the active weights differ from those at `source`, by name."""

    @abstractmethod
    def restore_weights(self, source: Block) -> None:
        """Make the active weights those at `source`, before the next `run_rows`."""

    @abstractmethod
    def _view(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
        """The library's array of memory that is not its own."""

    @abstractmethod
    def _forward(self, inputs: Any) -> Any:
        """Run the model with the active weights on the library's current stream.

        It never writes `inputs`. The result is contiguous, (batch, *output_shape), and belongs to the pool.
        """

    @abstractmethod
    def _address(self, result: Any) -> int: ...

    @abstractmethod
    def _warm_up(self, inputs: Any) -> Array:
        """Run `_forward` a few times on the stream of preparation; returns the last result's copy."""

    def disturb(self, stream: Stream) -> None:  # noqa: B027 - a library without shared memory has nothing to do
        """Do to memory that runs share what other programs' runs may do to it (for the self-check)."""

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        """Within it the library's current stream is `stream`: the exec lane's, or the captures'."""
        yield

    def _begin_capture(self) -> Any:
        self._driver.begin_capture(self._capture_stream)
        return None

    def _end_capture(self, token: Any) -> Any:
        """What was captured, for `Driver.graph`."""
        return self._driver.end_capture(self._capture_stream)

    def _abandon(self, token: Any) -> None:
        """End a capture that failed, so that stream and memory pool can be used again."""
        self._driver.end_capture(self._capture_stream)

    # ------------------------------------------------------------------------ preparation

    def add_class(self, batch: int, *, capture: bool = True) -> None:
        """Make `batch` runnable. Raises what the model raises, ModelRefused or OutOfDeviceMemory.

        What cannot be captured is run by plain execution, and `not_captured` says why.
        """
        rows = self.sample_rows(batch, 0)
        try:
            self._add_class(batch, rows, capture=capture)
        except BaseException:
            self._free_class(batch)
            raise

    def _add_class(self, batch: int, rows: Array, *, capture: bool) -> None:
        sets = [self._set_for(batch, rows) for _ in range(SETS)]
        output = self._warm_up(self._view(sets[0].input, rows.shape, rows.dtype.name))
        self.output_shape, self.output_dtype = tuple(output.shape[1:]), output.dtype.name
        for buffers in sets:
            buffers.row_out = output.nbytes // batch
            buffers.output = self._block(batch, buffers.row_out * batch).address
            buffers.staged_out = self._pinned(batch, buffers.row_out * batch)
        runs: list[Run] = []
        if capture and not self.not_captured:
            try:
                runs = [self._captured(each, rows) for each in sets]
            except OutOfDeviceMemory:
                raise
            except Exception as error:  # each library has its own kinds, and NotImplementedError
                self.not_captured = f"batch {batch}: {first_line(error)}"
        self._graphs[batch] = bool(runs)
        for buffers, run in zip(sets, runs or [self._plain(e, rows) for e in sets], strict=True):
            buffers.started, buffers.ended = run.started, run.ended
            self._runs[id(buffers)] = run
        self._sets[batch] = tuple(sets)

    def _set_for(self, batch: int, rows: Array) -> BufferSet:
        """A set whose inputs are `rows`; its output is not known yet."""
        staged = self._pinned(batch, rows.nbytes)
        assert staged.host is not None
        staged.host[: rows.nbytes] = np.frombuffer(rows.tobytes(), np.uint8)
        block = self._block(batch, rows.nbytes)
        ended = self._driver.event()
        self._driver.copy(block.address, staged.address, rows.nbytes, self._filling)
        self._driver.record(ended, self._filling)
        while not self._driver.done(ended):
            pass
        return BufferSet(
            batch=batch,
            input=block.address,
            output=0,
            row_in=rows.nbytes // batch,
            row_out=0,
            staged_in=staged,
            staged_out=staged,
            started=ended,
            ended=ended,
        )

    def _steps(self, buffers: BufferSet, rows: Array, stream: Stream) -> None:
        """The model's part of a run, captured or not: from the set's input to its output."""
        result = self._forward(self._view(buffers.input, rows.shape, rows.dtype.name))
        nbytes = buffers.row_out * buffers.batch
        self._driver.copy(buffers.output, self._address(result), nbytes, stream)

    def _captured(self, buffers: BufferSet, rows: Array) -> GraphRun:
        driver, stream = self._driver, self._capture_stream
        started, ended = driver.event(), driver.event()
        with self._on_stream(stream):
            token = self._begin_capture()
            try:
                driver.record_inside(started, stream)
                nbytes = min(self.weights_bytes, self._place.nbytes)
                driver.copy(self.active, self._place.address, nbytes, stream)
                self._steps(buffers, rows, stream)
                driver.record_inside(ended, stream)
            except BaseException:
                self._abandon(token)
                raise
            captured = self._end_capture(token)
        self._kept += [captured, token]
        return GraphRun(driver, captured, self.active, self.weights_bytes, started, ended)

    def _plain(self, buffers: BufferSet, rows: Array) -> PlainRun:
        def run(stream: Stream) -> None:
            with self._on_stream(stream):
                self._steps(buffers, rows, stream)

        return PlainRun(self._driver, run)

    def drop_class(self, batch: int) -> None:
        """The class is not offered after all; nothing of it runs."""
        for buffers in self._sets.pop(batch):
            self._runs.pop(id(buffers)).close()
        del self._graphs[batch]
        self._free_class(batch)

    def release(self) -> None:
        """See Preparable."""
        for batch in self.classes:
            self.drop_class(batch)
        self._kept.clear()

    # ------------------------------------------------------------------------------- memory

    def _block(self, batch: int, nbytes: int) -> Block:
        block = self._driver.device_block(max(1, nbytes))
        self._class_blocks.setdefault(batch, []).append(block)
        return block

    def _pinned(self, batch: int, nbytes: int) -> Block:
        block = self._driver.pinned_block(max(1, nbytes))
        self._class_blocks.setdefault(batch, []).append(block)
        return block

    def _free_class(self, batch: int) -> None:
        blocks = self._class_blocks.pop(batch, [])
        try:
            for block in blocks:
                self._driver.free(block)
        except DeviceFault:
            pass  # the context is gone, and its memory with it


def made_up_rows(
    shape: tuple[int, ...], dtype: str, seed: int, *, high: int = 2
) -> npt.NDArray[Any]:
    """Random inputs of `shape` with the batch in front: floats in 0..1, integers in 0..high-1."""
    random = np.random.default_rng(seed)
    kind = np.dtype(dtype)
    if kind.kind == "f":
        return random.random(shape, dtype=np.float32).astype(kind)
    return random.integers(0, max(2, high), shape).astype(kind)
