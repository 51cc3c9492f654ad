"""A model given as CuPy functions, as a program. It runs on the driver's stream, like any other.

The operator's factory returns a `CupyModel`: its weights as named arrays, and a function of them and a
batch. CuPy captures what launches kernels only; it refuses cuBLAS inside a capture ("currently
unsupported", CuPy 14), so a model with matrix products of that library is run by plain execution, and
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.driver import Block, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Copies
from slosched.daemon.backends.cuda.runs import PAD_BYTES, GraphRun, PlainRun, Run
from slosched.errors import MissingPackage

try:
    import cupy as _imported
except ImportError as error:
    raise MissingPackage(
        f"models of CuPy functions need cupy ({error}): pip install 'slosched[gpu]'"
    ) from None

cupy: Any = _imported
SETS = 2
_WARM_UPS = 3
_ALIGN = 256

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CupyModel:
    """`run(weights, batch)` maps a cupy array (batch, *input_shape) to one (batch, *output_shape).

    `weights` are numpy arrays by name; `run` gets them as cupy arrays in device memory. It must not keep
    references to what it is given, nor wait for the device.
    """

    weights: Mapping[str, Array]
    run: Callable[[Mapping[str, Any], Any], Any]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    random_weights: bool = True


class CupyProgram:
    """The program of `model`; `image()` is its weights as one flat block."""

    def __init__(
        self, name: str, model: CupyModel, driver: CudaDriver, capture: Stream, place: Block
    ) -> None:
        self.name, self._model, self._driver, self._place = name, model, driver, place
        self._raw_capture, self._capture_stream = capture, _as_cupys(capture)
        self._places: dict[str, tuple[int, Array]] = {}
        end = 0
        for key, array in model.weights.items():
            begin = -(-end // _ALIGN) * _ALIGN
            self._places[key] = (begin, array)
            end = begin + array.nbytes
        self.weights_bytes = max(end, 1)
        active = driver.device_block(self.weights_bytes + PAD_BYTES)
        self._blocks = [active]  # of the driver's memory
        self.active = active.address
        self._weights = {
            key: self._view(self.active + begin, array.shape, array.dtype)
            for key, (begin, array) in self._places.items()
        }
        self._sets: dict[int, tuple[BufferSet, ...]] = {}
        self._runs: dict[int, Run] = {}
        self._graphs: dict[int, bool] = {}
        self._kept: list[Any] = []
        # Intermediates come from a pool of their own, and go back to it alone: what a graph writes on
        # its way must never be somebody else's array.
        self._pool = cupy.cuda.MemoryPool()
        self._streams: dict[int, Any] = {}  # CuPy's wrappers of the driver's streams
        self.output_shape: tuple[int, ...] = ()
        self.output_dtype = "float32"
        self.not_captured = ""

    def image(self) -> Array:
        """The weights as they lie in the active block (weights_bytes,), uint8."""
        flat = np.zeros(self.weights_bytes, np.uint8)
        for begin, array in self._places.values():
            flat[begin : begin + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return flat

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

    def _wrapped(self, stream: Stream) -> Any:
        pointer = int(stream)
        if pointer not in self._streams:
            self._streams[pointer] = _as_cupys(stream)
        return self._streams[pointer]

    # ------------------------------------------------------------------------ preparation

    def add_class(self, batch: int, *, capture: bool = True) -> None:
        """Make `batch` runnable, captured if CuPy can. Raises what `run` raises."""
        sample = self.sample_input(batch)
        inputs = []
        for _ in range(SETS):
            block = self._driver.device_block(max(1, sample.nbytes))
            inputs.append(self._view(block.address, sample.shape, sample.dtype))
            self._blocks.append(block)
        stream = self._capture_stream
        with stream:
            for each in inputs:
                each.set(sample)
            for _ in range(_WARM_UPS):
                output = self._forward(inputs[0])
            stream.synchronize()
        self.output_shape, self.output_dtype = tuple(output.shape[1:]), str(output.dtype)
        sets: list[BufferSet] = []
        if capture and not self.not_captured:
            try:
                sets = [self._capture(batch, sample, each, output) for each in inputs]
            except Exception as error:  # CuPy's own kinds, and NotImplementedError for cuBLAS
                self.not_captured = f"batch {batch}: {error}"
        self._graphs[batch] = bool(sets)
        self._sets[batch] = tuple(
            sets or [self._plain(batch, sample, each, output) for each in inputs]
        )

    def drop_class(self, batch: int) -> None:
        for buffers in self._sets.pop(batch):
            self._runs.pop(id(buffers)).close()
        del self._graphs[batch]

    def release(self) -> None:
        """See Preparable."""
        for batch in self.classes:
            self.drop_class(batch)
        for block in self._blocks:
            self._driver.free(block)
        self._blocks.clear()
        self._kept.clear()

    def sample_input(self, batch: int) -> Array:
        """A made-up input of (batch, *input_shape), the same each time."""
        random = np.random.default_rng(0)
        shape, dtype = (batch, *self._model.input_shape), np.dtype(self._model.input_dtype)
        if dtype.kind == "f":
            return random.random(shape, dtype=np.float32).astype(dtype)
        return random.integers(0, 2, shape).astype(dtype)

    def _forward(self, batch: Any) -> Any:
        with cupy.cuda.using_allocator(self._pool.malloc):
            output = self._model.run(self._weights, batch)
            return cupy.ascontiguousarray(output.astype(cupy.float32, copy=False))

    def _output_like(self, output: Any) -> Any:
        block = self._driver.device_block(max(1, output.nbytes))
        self._blocks.append(block)
        return self._view(block.address, output.shape, output.dtype)

    def _capture(self, batch: int, sample: Array, inputs: Any, like: Any) -> BufferSet:
        driver, stream = self._driver, self._raw_capture
        started, ended = driver.event(), driver.event()
        out = self._output_like(like)
        result = None
        with self._capture_stream:
            driver.begin_capture(stream)
            try:
                driver.record_inside(started, stream)
                nbytes = min(self.weights_bytes, self._place.nbytes)
                driver.copy(self.active, self._place.address, nbytes, stream)
                result = self._forward(inputs)
                cupy.copyto(out, result)
                driver.record_inside(ended, stream)
            finally:
                graph = driver.end_capture(stream)
        self._kept += [graph, result]
        run = GraphRun(driver, graph, self.active, self.weights_bytes, started, ended)
        return self._buffers(batch, sample, inputs, out, run)

    def _plain(self, batch: int, sample: Array, inputs: Any, like: Any) -> BufferSet:
        out = self._output_like(like)

        def run(stream: Stream) -> None:
            with self._wrapped(stream):
                cupy.copyto(out, self._forward(inputs))

        return self._buffers(batch, sample, inputs, out, PlainRun(self._driver, run))

    def _buffers(self, batch: int, sample: Array, inputs: Any, output: Any, run: Run) -> BufferSet:
        row_in, row_out = sample.nbytes // batch, output.nbytes // batch
        buffers = BufferSet(
            batch, inputs.data.ptr, output.data.ptr, row_in, row_out,
            self._pinned(row_in * batch), self._pinned(row_out * batch),
            run.started, run.ended,
        )  # fmt: skip
        self._runs[id(buffers)] = run
        self._kept += [buffers, inputs, output]
        return buffers

    def _pinned(self, nbytes: int) -> Block:
        block = self._driver.pinned_block(max(1, nbytes))
        self._blocks.append(block)
        return block

    def _view(self, address: int, shape: tuple[int, ...], dtype: Any) -> Any:
        nbytes = max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        memory = cupy.cuda.UnownedMemory(address, nbytes, self)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))


class _Foreign:
    """A stream as CUDA's stream protocol shows it."""

    def __init__(self, stream: Stream) -> None:
        self._pointer = int(stream)

    def __cuda_stream__(self) -> tuple[int, int]:
        return 0, self._pointer


def _as_cupys(stream: Stream) -> Any:
    """CuPy's object for a stream of the driver's. Before CuPy 14 it did not know the protocol."""
    made = getattr(cupy.cuda.Stream, "from_external", None)
    return made(_Foreign(stream)) if made else cupy.cuda.ExternalStream(int(stream))
