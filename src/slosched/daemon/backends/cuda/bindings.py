"""The Driver on NVIDIA's own bindings (cuda-bindings: the CUDA runtime, call by call).

Torch's and CuPy's wrappers cost too much in the loop (entering a torch stream takes 19 us, H200), and
they keep each their own idea of the current stream; addresses and streams are the same for both.
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

from slosched.daemon.backends.cuda.driver import (
    Block,
    DeviceFault,
    Event,
    OutOfDeviceMemory,
    Stream,
)
from slosched.errors import MissingPackage
from slosched.units import NS_PER_MS

try:
    from cuda.bindings import runtime as _imported
except ImportError as error:
    raise MissingPackage(
        f"a CUDA device needs NVIDIA's bindings ({error}): pip install 'slosched[gpu]', or take "
        "--device cpu or emulated"
    ) from None

_cuda: Any = _imported
_OK = _cuda.cudaError_t.cudaSuccess
_NOT_READY = _cuda.cudaError_t.cudaErrorNotReady
_NO_MEMORY = _cuda.cudaError_t.cudaErrorMemoryAllocation
_KIND = _cuda.cudaMemcpyKind.cudaMemcpyDefault
_NON_BLOCKING = 1  # cudaStreamNonBlocking: waits for nothing on the default stream
_PORTABLE = 1  # cudaHostAllocPortable


class CudaDriver:
    """GPU `index` as this process sees it. Raises DeviceFault if it cannot be opened."""

    def __init__(self, index: int) -> None:
        self.index = index
        self._call(_cuda.cudaSetDevice(index), "open")

    def use_in_this_thread(self) -> None:
        """CUDA keeps the current device per thread; every thread that calls must say so once."""
        self._call(_cuda.cudaSetDevice(self.index), "open")

    def _call(self, answer: tuple[Any, ...], what: str) -> Any:
        if answer[0] != _OK:
            raise _fault(answer[0], what)
        return answer[1] if len(answer) > 1 else None

    def stream(self, priority: int) -> Stream:
        least, greatest = self._range()
        chosen = max(min(priority, least), greatest)
        answer = _cuda.cudaStreamCreateWithPriority(_NON_BLOCKING, chosen)
        return self._call(answer, "make a stream")

    def _range(self) -> tuple[int, int]:
        error, least, greatest = _cuda.cudaDeviceGetStreamPriorityRange()
        if error != _OK:
            raise _fault(error, "ask for priorities")
        return int(least), int(greatest)

    def event(self) -> Event:
        return self._call(_cuda.cudaEventCreate(), "make an event")

    def record(self, event: Event, stream: Stream) -> None:
        error = _cuda.cudaEventRecord(event, stream)[0]
        if error != _OK:
            raise _fault(error, "record an event")

    def done(self, event: Event) -> bool:
        error = _cuda.cudaEventQuery(event)[0]
        if error == _OK:
            return True
        if error == _NOT_READY:
            return False
        raise _fault(error, "run")

    def elapsed_ns(self, start: Event, end: Event) -> int:
        return int(self._call(_cuda.cudaEventElapsedTime(start, end), "take the time") * NS_PER_MS)

    def wait(self, stream: Stream, event: Event) -> None:
        self._call(_cuda.cudaStreamWaitEvent(stream, event, 0), "wait for an event")

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        error = _cuda.cudaMemcpyAsync(to, source, nbytes, _KIND, stream)[0]
        if error != _OK:
            raise _fault(error, "copy")

    def device_block(self, nbytes: int) -> Block:
        address = self._call(_cuda.cudaMalloc(nbytes), f"allocate {nbytes} bytes")
        return Block(int(address), nbytes)

    def pinned_block(self, nbytes: int) -> Block:
        answer = _cuda.cudaHostAlloc(nbytes, _PORTABLE)
        address = int(self._call(answer, f"pin {nbytes} bytes of host memory"))
        view = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
        return Block(address, nbytes, np.frombuffer(view, np.uint8))

    def free(self, block: Block) -> None:
        release = _cuda.cudaFree if block.host is None else _cuda.cudaFreeHost
        self._call(release(block.address), "free memory")

    def free_bytes(self) -> int:
        error, free, _ = _cuda.cudaMemGetInfo()
        if error != _OK:
            raise _fault(error, "ask for free memory")
        return int(free)


def _fault(error: Any, what: str) -> DeviceFault | OutOfDeviceMemory:
    code, text = _cuda.cudaGetErrorString(error)
    words = text.decode() if code == _OK and isinstance(text, bytes) else str(text)
    if error == _NO_MEMORY:
        _cuda.cudaGetLastError()  # this one leaves the context as it was
        return OutOfDeviceMemory(f"the GPU could not {what}: {words}")
    return DeviceFault(f"the GPU could not {what}: {words} ({error.name})")
