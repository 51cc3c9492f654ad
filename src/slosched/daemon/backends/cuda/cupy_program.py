"""A model given as CuPy functions, as a program. It runs on the driver's stream, like any other.

The operator's factory returns a `CupyModel`: its weights as named arrays, and a function of them and a
batch. CuPy captures what launches kernels only; it refuses cuBLAS inside a capture ("currently
unsupported", CuPy 14), so a model with matrix products of that library is run by plain execution, and
says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.daemon.backends.contract import ModelRefused
from slosched.daemon.backends.cuda.bindings import CudaDriver
from slosched.daemon.backends.cuda.driver import Block, Stream
from slosched.daemon.backends.cuda.recorded import WARM_UPS, Arrays, RecordedProgram
from slosched.daemon.backends.cuda.runs import PAD_BYTES
from slosched.daemon.backends.layout import made_up
from slosched.errors import MissingPackage
from slosched.signature import ONLY_INPUT, ONLY_OUTPUT, Tensor

try:
    import cupy as _imported
except ImportError as error:
    raise MissingPackage(
        f"models of CuPy functions need cupy ({error}): pip install 'slosched[gpu]'"
    ) from None

cupy: Any = _imported
_ALIGN = 256

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class CupyModel:
    """`run(weights, batch)` maps a cupy array (batch, *input_shape) to one (batch, *output_shape).

    `weights` are numpy arrays by name; `run` gets them as cupy arrays in device memory, and a batch of its
    own that it may work on in place. It must not keep references to what it is given, nor wait for the
    device.
    """

    weights: Mapping[str, Array]
    run: Callable[[Mapping[str, Any], Any], Any]
    input_shape: tuple[int, ...]
    input_dtype: str = "float32"
    random_weights: bool = True


class CupyProgram(RecordedProgram):
    """The program of `model`; `image()` is its weights as one flat block."""

    def __init__(
        self, name: str, model: CupyModel, driver: CudaDriver, capture: Stream, place: Block
    ) -> None:
        self._places: dict[str, tuple[int, Array]] = {}
        end = 0
        for key, array in model.weights.items():
            begin = -(-end // _ALIGN) * _ALIGN
            self._places[key] = (begin, array)
            end = begin + array.nbytes
        takes = (Tensor(ONLY_INPUT, model.input_dtype, tuple(model.input_shape)),)
        super().__init__(name, driver, capture, place, max(end, 1), takes=takes)
        self._model = model
        self._active_block = driver.device_block(self.weights_bytes + PAD_BYTES)
        self.active = self._active_block.address
        self._weights = {
            key: self._contiguous(self.active + begin, array.shape, array.dtype.name)
            for key, (begin, array) in self._places.items()
        }
        # Intermediates come from a pool of their own, and go back to it alone: an intermediate of a
        # graph must never be memory of another array.
        self._pool = cupy.cuda.MemoryPool()
        self._streams: dict[int, Any] = {}  # CuPy's wrappers of the driver's streams
        # Eager work shares no stream with captures: cuBLAS keeps a workspace for each.
        self._preparing = driver.stream(0)

    def image(self) -> Array:
        """The weights as they lie in the active block (weights_bytes,), uint8."""
        flat = np.zeros(self.weights_bytes, np.uint8)
        for begin, array in self._places.values():
            flat[begin : begin + array.nbytes] = np.frombuffer(array.tobytes(), np.uint8)
        return flat

    # ------------------------------------------------------------------- what a library does

    def sample_rows(self, batch: int, seed: int, length: int = 0) -> Arrays:
        return made_up(self._takes, batch, seed)

    def run_rows(self, rows: Arrays) -> Arrays:
        with self._on_stream(self._preparing):
            (found,) = self._forward([cupy.asarray(rows[ONLY_INPUT])])
            return {ONLY_OUTPUT: cupy.asnumpy(found)}

    def changed_weights(self, source: Block) -> tuple[str, ...]:
        changed = []
        with self._on_stream(self._preparing):
            for key, (begin, array) in self._places.items():
                kept = self._contiguous(source.address + begin, (array.nbytes,), "uint8")
                active = self._contiguous(self.active + begin, (array.nbytes,), "uint8")
                if not bool((kept == active).all()):
                    changed.append(key)
        return tuple(changed)

    def restore_weights(self, source: Block) -> None:
        self._driver.copy(self.active, source.address, self.weights_bytes, self._preparing)
        self._wrapped(self._preparing).synchronize()

    def release(self) -> None:
        super().release()
        self._driver.free(self._active_block)

    def _wrapped(self, stream: Stream) -> Any:
        pointer = int(stream)
        if pointer not in self._streams:
            self._streams[pointer] = _as_cupys(stream)
        return self._streams[pointer]

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        with self._wrapped(stream):
            yield

    def _forward(self, inputs: Sequence[Any]) -> list[Any]:
        (batch,) = inputs
        with cupy.cuda.using_allocator(self._pool.malloc):
            output = self._model.run(self._weights, batch.copy())
            if not isinstance(output, cupy.ndarray):
                raise ModelRefused(
                    f"model {self.name!r} returned a {type(output).__name__}; return one cupy array"
                )
            if output.ndim == 0 or len(output) != len(batch):
                raise ModelRefused(
                    f"model {self.name!r} answers a batch of {len(batch)} with the shape "
                    f"{list(output.shape)}: dimension 0 must be the batch"
                )
            return [cupy.ascontiguousarray(output.astype(cupy.float32, copy=False))]

    def _address(self, result: Any) -> int:
        return int(result.data.ptr)

    def _warm_up(self, inputs: Sequence[Any]) -> list[Array]:
        # On the stream of captures: CuPy's pool keeps memory by stream, and none can be had in a capture.
        # What is captured uses no cuBLAS, so there is no workspace to share.
        with self._on_stream(self._capture_stream):
            for _ in range(WARM_UPS):
                (output,) = self._forward(inputs)
            return [cupy.asnumpy(output)]

    def _view(
        self, address: int, shape: tuple[int, ...], dtype: str, strides: tuple[int, ...]
    ) -> Any:
        return self._contiguous(address, shape, dtype)  # as an only input of a fixed shape is

    def _contiguous(self, address: int, shape: tuple[int, ...], dtype: str) -> Any:
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
