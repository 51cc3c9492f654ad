"""A torch model as a program: a CUDA graph per batch class and buffer set, or plain execution.

Captured on a stream of the exec lane's priority, since a graph's nodes keep the priority of the stream
they were captured on, whatever it is replayed on. All graphs of a process share one memory pool: only
one runs at a time, and what must outlive a run, inputs and outputs, lies outside it or is kept alive.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.driver import Block, OutOfDeviceMemory, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Copies
from slosched.daemon.backends.cuda.runs import PAD_BYTES, GraphRun, PlainRun, Run
from slosched.daemon.backends.templates import DeviceWeights, Template

SETS = 2
_WARM_UPS = 3

_cuda: Any = torch.cuda  # its streams and graphs carry no types


class TorchStreams:
    """Torch's side of the driver's streams: the exec lane's, and one to capture on."""

    def __init__(
        self, driver: CudaDriver, device: torch.device, exec_stream: Stream, capture: Stream
    ):
        self.driver, self.device, self.capture_stream = driver, device, capture
        self._exec = _cuda.ExternalStream(int(exec_stream), device=device)
        self.capture = _cuda.ExternalStream(int(capture), device=device)
        self.pool = _cuda.graph_pool_handle()
        self._entered: set[int] = set()

    def enter(self) -> None:
        """Make the exec stream torch's current one in this thread, for good (a switch costs 19 us)."""
        thread = threading.get_ident()
        if thread not in self._entered:
            _cuda.set_device(self.device)
            _cuda.set_stream(self._exec)
            self._entered.add(thread)


class TorchProgram:
    """`template` with its active weights on the device, and no class yet: `add_class` makes one.

    `place` is device memory that graphs are captured to copy weights from; a launch says from where.
    """

    def __init__(self, template: Template, streams: TorchStreams, place: Block) -> None:
        self._template, self._streams, self._place = template, streams, place
        self.name = template.spec.name
        self.weights_bytes = template.weights_bytes
        block = torch.empty(
            self.weights_bytes + PAD_BYTES, dtype=torch.uint8, device=streams.device
        )
        self._weights = DeviceWeights(block)
        while not template.add_views(self._weights):
            pass
        self.active = block.data_ptr()
        self._sets: dict[int, tuple[BufferSet, ...]] = {}
        self._runs: dict[int, Run] = {}  # by id of the buffer set
        self._graphs: dict[int, bool] = {}
        self._blocks: list[Block] = []  # of the driver's memory
        self._kept: list[Any] = []  # what a graph reads and writes must live as long as it does
        self.output_shape: tuple[int, ...] = ()
        self.output_dtype = "float32"
        #: Why a class is run by plain execution, in words; empty if every class was captured.
        self.not_captured = ""

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

    # ------------------------------------------------------------------------ preparation

    def add_class(self, batch: int, *, capture: bool = True) -> None:
        """Make `batch` runnable. Raises what the model raises, or OutOfDeviceMemory.

        What cannot be captured is run by plain execution, and `not_captured` says why.
        """
        try:
            self._add_class(batch, capture=capture)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfDeviceMemory(first_line(error)) from None

    def _add_class(self, batch: int, *, capture: bool) -> None:
        sample = self._template.sample_input(batch)
        inputs = [torch.from_numpy(sample).to(self._streams.device) for _ in range(SETS)]
        with _cuda.stream(self._streams.capture):
            self._streams.capture.wait_stream(_cuda.default_stream(self._streams.device))
            for _ in range(_WARM_UPS):
                output = self._forward(inputs[0])
            self._streams.capture.synchronize()
        self.output_shape = tuple(output.shape[1:])
        self.output_dtype = str(output.dtype).removeprefix("torch.")
        sets: Sequence[BufferSet] = ()
        if capture and not self.not_captured:
            try:
                sets = [self._capture(batch, sample, each) for each in inputs]
            except RuntimeError as error:
                self.not_captured = f"batch {batch}: {first_line(error)}"
        self._graphs[batch] = bool(sets)
        self._sets[batch] = tuple(
            sets or [self._plain(batch, sample, each, output) for each in inputs]
        )

    def drop_class(self, batch: int) -> None:
        """The class is not offered after all."""
        for buffers in self._sets.pop(batch):
            self._runs.pop(id(buffers)).close()
        del self._graphs[batch]

    def release(self) -> None:
        """See Preparable."""
        for batch in self.classes:
            self.drop_class(batch)
        for block in self._blocks:
            self._streams.driver.free(block)
        self._blocks.clear()
        self._kept.clear()

    def _buffers(self, batch: int, sample: Any, inputs: Any, output: Any, run: Run) -> BufferSet:
        row_in = sample.nbytes // batch
        row_out = output.numel() * output.element_size() // batch
        buffers = BufferSet(
            batch, inputs.data_ptr(), output.data_ptr(), row_in, row_out,
            self._pinned(row_in * batch), self._pinned(row_out * batch),
            run.started, run.ended,
        )  # fmt: skip
        assert buffers.staged_in.host is not None
        buffers.staged_in.host[: sample.nbytes] = np.frombuffer(sample.tobytes(), np.uint8)
        self._runs[id(buffers)] = run
        self._kept += [buffers, inputs, output]
        return buffers

    def _pinned(self, nbytes: int) -> Block:
        block = self._streams.driver.pinned_block(max(1, nbytes))
        self._blocks.append(block)
        return block

    def _forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self._template.forward(self._weights, batch).contiguous()

    def _capture(self, batch: int, sample: Any, inputs: torch.Tensor) -> BufferSet:
        streams, driver = self._streams, self._streams.driver
        started, ended = driver.event(), driver.event()
        graph = _cuda.CUDAGraph(keep_graph=True)
        # Not torch.cuda.graph: on entry it waits for the device and empties torch's caches, which
        # would hold up what is being served. Thread-local: the loop goes on calling CUDA meanwhile.
        with _cuda.stream(streams.capture):
            graph.capture_begin(pool=streams.pool, capture_error_mode="thread_local")
            self._kept.append(graph)  # torch's allocator asks it even after it has failed
            try:
                driver.record_inside(started, streams.capture_stream)
                nbytes = min(self.weights_bytes, self._place.nbytes)
                driver.copy(self.active, self._place.address, nbytes, streams.capture_stream)
                output = self._forward(inputs)
                driver.record_inside(ended, streams.capture_stream)
            except BaseException:
                self._abandon(graph)
                raise
            graph.capture_end()
        run = GraphRun(
            driver, graph.raw_cuda_graph(), self.active, self.weights_bytes, started, ended
        )
        return self._buffers(batch, sample, inputs, output, run)

    def _abandon(self, graph: Any) -> None:
        """End a capture that failed, so that stream and memory pool can be used again."""
        try:
            graph.capture_end()
        except RuntimeError:
            # Torch leaves the pool marked as being captured into (CUDAGraph::capture_end raises before
            # it says otherwise), and would then defer what it frees for ever.
            end = getattr(torch._C, "_cuda_endAllocateToPool", None)
            if end is not None:
                end(self._streams.device.index or 0, self._streams.pool)

    def _plain(
        self, batch: int, sample: Any, inputs: torch.Tensor, like: torch.Tensor
    ) -> BufferSet:
        output = torch.empty_like(like)

        def run(stream: Stream) -> None:
            self._streams.enter()
            output.copy_(self._forward(inputs), non_blocking=True)

        plain = PlainRun(self._streams.driver, run)
        return self._buffers(batch, sample, inputs, output, plain)
