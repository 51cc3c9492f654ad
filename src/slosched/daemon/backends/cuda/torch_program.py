"""A torch model as a program: CUDA graphs that torch captures, or plain execution (recorded.py)."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch

from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.driver import Block, OutOfDeviceMemory, Stream
from slosched.daemon.backends.cuda.program import Class
from slosched.daemon.backends.cuda.recorded import WARM_UPS, Array, Arrays, RecordedProgram
from slosched.daemon.backends.cuda.runs import PAD_BYTES
from slosched.daemon.backends.templates import DeviceWeights, Template

#: What a disturbance writes over: one large and some small pieces of the pool that graphs share.
_LARGE_FLOATS, _SMALL_FLOATS, _SMALL = 16 * 2**20, 64 * 2**10, 8
#: Freed memory of torch's allocator that a disturbance writes over: (log2 of the size, number of blocks).
_FILLED = [(power, 8 if power <= 20 else 2) for power in range(9, 26)]
#: Weights are compared in pieces of this size, each a slice's work.
_COMPARE_BYTES = 64 * 2**20

_cuda: Any = torch.cuda  # its streams and graphs carry no types


class TorchStreams:
    """Torch's side of the driver's streams: the exec lane's, one to capture on, and one to prepare on.

    Nothing but captures is given to the second. Torch keeps cuBLAS's workspace by stream, and graphs write
    to that of the stream they were captured on: eager work there would share it with graphs that run.
    """

    def __init__(
        self, driver: CudaDriver, device: torch.device, exec_stream: Stream, capture: Stream
    ):
        self.driver, self.device, self.capture_stream = driver, device, capture
        self.prepare_stream = driver.stream(0)
        self._exec = _cuda.ExternalStream(int(exec_stream), device=device)
        self.capture = _cuda.ExternalStream(int(capture), device=device)
        self.prepare = _cuda.ExternalStream(int(self.prepare_stream), device=device)
        self.pool = _cuda.graph_pool_handle()
        self._entered: set[int] = set()
        self._disturbance: Any = None

    def enter(self) -> None:
        """Make the exec stream torch's current one in this thread, for good (a switch costs 19 us)."""
        thread = threading.get_ident()
        if thread not in self._entered:
            _cuda.set_device(self.device)
            _cuda.set_stream(self._exec)
            self._entered.add(thread)

    def give_up_pool(self) -> None:
        """After a capture that failed: later ones go to a new pool; graphs that are there keep theirs.

        Up to torch 2.11 capture_end raises before it says that nothing is captured into the pool any more
        (pytorch/pytorch#180395). The device's half of that can be said here, or torch would defer what it
        frees for ever; the half of pinned memory cannot, and would refuse every later capture.
        """
        end = getattr(torch._C, "_cuda_endAllocateToPool", None)
        if end is not None:
            with suppress(RuntimeError):
                end(self.device.index or 0, self.pool)
        self.pool = _cuda.graph_pool_handle()
        self.make_disturbance()

    def make_disturbance(self) -> None:
        """Capture a graph that fills the pool's first memory with NaN: before any program's, so that they
        take their memory from there. A program that keeps something in the pool is found out by it.
        """
        graph = _cuda.CUDAGraph()
        sizes = (_LARGE_FLOATS, *[_SMALL_FLOATS] * _SMALL)
        with _cuda.stream(self.capture):
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            tensors = [torch.full((n,), float("nan"), device=self.device) for n in sizes]
            graph.capture_end()
        del tensors
        self._disturbance = graph

    def disturb(self) -> None:
        """Run the disturbance on the exec stream, in the background thread."""
        if self._disturbance is not None:
            with _cuda.stream(self._exec):
                self._disturbance.replay()


class _Memory:
    """Memory that is not torch's, as torch can see it."""

    def __init__(
        self, address: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...] | None
    ) -> None:
        self.__cuda_array_interface__ = {
            "shape": shape,
            "typestr": np.dtype(dtype).str,
            "data": (address, False),
            "strides": strides,
            "version": 3,
        }


def device_view(
    address: int,
    shape: tuple[int, ...],
    dtype: str,
    device: torch.device,
    strides: tuple[int, ...] | None = None,
) -> torch.Tensor:
    """A tensor of memory that the driver gave; it must outlive the tensor. `strides` are in bytes."""
    if 0 in shape:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=device)
    return torch.as_tensor(_Memory(address, shape, dtype, strides), device=device)


class TorchProgram(RecordedProgram):
    """`template` with its active weights on the device, and no class yet: `add_class` makes one.

    `place` is device memory that graphs are captured to copy weights from; a launch says from where.
    """

    def __init__(self, template: Template, streams: TorchStreams, place: Block) -> None:
        super().__init__(
            template.spec.name,
            streams.driver,
            streams.capture_stream,
            place,
            template.weights_bytes,
            takes=template.spec.takes,
            pads=template.spec.pads,
        )
        self._template, self._streams = template, streams
        self.precision, self.steps = template.precision, template.steps
        block = torch.empty(
            self.weights_bytes + PAD_BYTES, dtype=torch.uint8, device=streams.device
        )
        self._weights = DeviceWeights(block)
        while not template.add_views(self._weights):
            pass
        self.active = block.data_ptr()

    # ------------------------------------------------------------------- what a library does

    def sample_rows(self, batch: int, seed: int, length: int = 0) -> Arrays:
        return self._template.sample_rows(batch, seed, length)

    def run_rows(self, rows: Arrays) -> Arrays:
        with self._prepared():
            names = [tensor.name for tensor in self._template.spec.takes]
            inputs = [torch.from_numpy(rows[name]).to(self._streams.device) for name in names]
            outputs = self._template.forward(self._weights, inputs, steps=self.few_steps)
            found = {name: output.cpu().contiguous().numpy() for name, output in outputs.items()}
        self._template.check_bound()
        return found

    def changed_weights(self, source: Block) -> tuple[str, ...]:
        size, device = self.weights_bytes, self._streams.device
        kept = device_view(source.address, (size,), "uint8", device)
        changed = []
        with self._prepared():
            for name, begin, nbytes in self._template.spans():
                for at in range(begin, begin + nbytes, _COMPARE_BYTES):
                    end = min(at + _COMPARE_BYTES, begin + nbytes)
                    if not torch.equal(self._weights.block[at:end], kept[at:end]):
                        changed.append(name)
                        break
        return tuple(changed)

    def restore_weights(self, source: Block) -> None:
        stream = self._streams.prepare_stream
        self._driver.copy(self.active, source.address, self.weights_bytes, stream)
        self._streams.prepare.synchronize()

    def disturb(self, stream: Stream) -> None:
        self.disturb_beside(stream)
        self._streams.disturb()

    def disturb_beside(self, stream: Stream) -> None:
        # What the model made for one batch class and dropped for the next lies in memory that torch gives
        # out again: a graph that still reads it must be found out now.
        with self._prepared():
            spoilt = [
                torch.full((2**power // 4,), float("nan"), device=self._streams.device)
                for power, count in _FILLED
                for _ in range(count)
            ]
        del spoilt

    def add_class(self, of: Class, *, capture: bool = True) -> None:
        try:
            super().add_class(of, capture=capture)
        except torch.cuda.OutOfMemoryError as error:
            raise OutOfDeviceMemory(first_line(error)) from None

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """On the stream of preparation, whose work has ended when it is left."""
        with _cuda.stream(self._streams.prepare):
            yield
            self._streams.prepare.synchronize()

    def _view(
        self, address: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]
    ) -> torch.Tensor:
        return device_view(address, shape, dtype, self._streams.device, strides)

    def _forward(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        outputs = self._template.forward(self._weights, inputs, steps=self.few_steps)
        return self._ordered(outputs)

    def _begin(self, inputs: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._template.begin(self._weights, inputs)

    def _step(self, state: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        return self._template.step(self._weights, state)

    def _finish(self, state: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return self._ordered(self._template.finish(self._weights, state))

    def _new_state(self, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        with self._prepared():
            return [torch.empty_like(value) for value in self._begin(inputs)]

    def _ordered(self, outputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        lacking = [tensor.name for tensor in self.gives if tensor.name not in outputs]
        if lacking:
            raise ModelRefused(f"model {self.name!r} answers this class without {lacking[0]!r}")
        return [outputs[tensor.name].contiguous() for tensor in self.gives]

    def _address(self, result: torch.Tensor) -> int:
        return result.data_ptr()

    def _store(self, result: torch.Tensor, view: torch.Tensor) -> None:
        with torch.inference_mode():
            view.copy_(result)

    def _warm_up(self, inputs: Sequence[torch.Tensor]) -> list[Array]:
        with self._prepared():
            for _ in range(WARM_UPS):
                outputs = self._forward(inputs)
            return [output.cpu().numpy() for output in outputs]

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        if stream is self._streams.capture_stream:
            with _cuda.stream(self._streams.capture):
                yield
        else:
            self._streams.enter()
            yield

    def _begin_capture(self) -> Any:
        graph = _cuda.CUDAGraph(keep_graph=True)
        # Not torch.cuda.graph: on entry it waits for the device and empties torch's caches, which
        # would hold up what is being served. Thread-local: the loop goes on calling CUDA meanwhile.
        graph.capture_begin(pool=self._streams.pool, capture_error_mode="thread_local")
        self._kept.append(graph)  # torch's allocator asks it even after it has failed
        return graph

    def _end_capture(self, token: Any) -> Any:
        token.capture_end()
        return token.raw_cuda_graph()

    def _abandon(self, token: Any) -> None:
        try:
            token.capture_end()
        except RuntimeError:
            self._streams.give_up_pool()
