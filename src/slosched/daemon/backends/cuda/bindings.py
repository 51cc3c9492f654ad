"""The Driver on NVIDIA's own bindings (cuda-bindings: the CUDA runtime, call by call).

Torch's and CuPy's wrappers cost too much in the loop (entering a torch stream takes 19 us, H200), and
they keep each their own idea of the current stream; addresses and streams are the same for both.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
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
        "--device cpu, or emulated GPUs: slosched worker --device emulated"
    ) from None

_cuda: Any = _imported
_OK = _cuda.cudaError_t.cudaSuccess
_NOT_READY = _cuda.cudaError_t.cudaErrorNotReady
_NO_MEMORY = _cuda.cudaError_t.cudaErrorMemoryAllocation
_KIND = _cuda.cudaMemcpyKind.cudaMemcpyDefault  # one for all: a graph's copy keeps the kind it has
_EXTERNAL = 1  # cudaEventRecordExternal: in a capture, a node that records the event at each launch
_THREAD_LOCAL = _cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
_NON_BLOCKING = 1  # cudaStreamNonBlocking: waits for nothing on the default stream
_PORTABLE = 1  # cudaHostAllocPortable


class CudaDriver:
    """GPU `index` as this process sees it. Raises DeviceFault if it cannot be opened."""

    def __init__(self, index: int) -> None:
        self.index = index
        _checked(_cuda.cudaSetDevice(index), "open")

    def use_in_this_thread(self) -> None:
        """CUDA keeps the current device per thread; every thread that calls must say so once."""
        _checked(_cuda.cudaSetDevice(self.index), "open")

    def stream(self, priority: int) -> Stream:
        least, greatest = self._range()
        chosen = max(min(priority, least), greatest)
        answer = _cuda.cudaStreamCreateWithPriority(_NON_BLOCKING, chosen)
        return _checked(answer, "make a stream")

    def _range(self) -> tuple[int, int]:
        error, least, greatest = _cuda.cudaDeviceGetStreamPriorityRange()
        if error != _OK:
            raise _fault(error, "ask for priorities")
        return int(least), int(greatest)

    def event(self) -> Event:
        return _checked(_cuda.cudaEventCreate(), "make an event")

    def record(self, event: Event, stream: Stream) -> None:
        error = _cuda.cudaEventRecord(event, stream)[0]
        if error != _OK:
            raise _fault(error, "record an event")

    def record_inside(self, event: Event, stream: Stream) -> None:
        """In a capture: each launch of the graph records the event there."""
        _checked(_cuda.cudaEventRecordWithFlags(event, stream, _EXTERNAL), "record an event")

    def begin_capture(self, stream: Stream) -> None:
        """What this thread gives to `stream` from now on becomes a graph."""
        _checked(_cuda.cudaStreamBeginCapture(stream, _THREAD_LOCAL), "begin a capture")

    def end_capture(self, stream: Stream) -> Any:
        """The graph. Raises DeviceFault if something in between cannot be captured."""
        return _checked(_cuda.cudaStreamEndCapture(stream), "capture")

    def graph(self, captured: Any, active: int) -> CudaGraph:
        node = _copy_node(captured, active)
        if node is None:
            raise DeviceFault("a captured graph has lost the copy of its weights")
        return CudaGraph(captured, node)

    def part(self, captured: Any) -> CudaGraph:
        return CudaGraph(captured, None)

    def chain(self, captured: Any) -> Sequence[Any] | None:
        """The nodes of what was captured, in the order in which they run; None where that is not a chain."""
        nodes = {int(node): node for node in _nodes(captured)}
        # Newer bindings also give the kinds of edges, in between.
        count = int(_whole(_cuda.cudaGraphGetEdges(captured), "list a graph's edges")[-1])
        _, begins, ends, *_ = _whole(
            _cuda.cudaGraphGetEdges(captured, count), "list a graph's edges"
        )
        follows = {int(a): int(b) for a, b in zip(begins[:count], ends[:count], strict=True)}
        if count != len(nodes) - 1 or len(follows) != count:
            return None
        roots = nodes.keys() - follows.values()
        ordered: list[Any] = []
        place = roots.pop() if len(roots) == 1 else None
        while place is not None:
            ordered.append(nodes[place])
            place = follows.get(place)
        return ordered if len(ordered) == len(nodes) else None

    def segment(
        self, captured: Any, chain: Sequence[Any], begin: int, end: int, active: int | None
    ) -> CudaGraph:
        clone = _checked(_cuda.cudaGraphClone(captured), "clone a graph")
        for place, node in enumerate(chain):
            if not begin <= place < end:
                twin = _checked(_cuda.cudaGraphNodeFindInClone(node, clone), "find a node")
                _checked(_cuda.cudaGraphDestroyNode(twin), "take a node out of a graph")
        if active is None or begin:
            return CudaGraph(clone, None, own=True)
        copy = _copy_node(clone, active)
        if copy is None:
            _checked(_cuda.cudaGraphDestroy(clone), "give up a graph")
            raise ValueError("its first segment has no copy of the weights")
        return CudaGraph(clone, copy, own=True)

    def done(self, event: Event) -> bool:
        error = _cuda.cudaEventQuery(event)[0]
        if error == _OK:
            return True
        if error == _NOT_READY:
            return False
        raise _fault(error, "run")

    def elapsed_ns(self, start: Event, end: Event) -> int:
        return int(_checked(_cuda.cudaEventElapsedTime(start, end), "take the time") * NS_PER_MS)

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        error = _cuda.cudaMemcpyAsync(to, source, nbytes, _KIND, stream)[0]
        if error != _OK:
            raise _fault(error, "copy")

    def device_block(self, nbytes: int) -> Block:
        address = _checked(_cuda.cudaMalloc(nbytes), f"allocate {nbytes} bytes")
        return Block(int(address), nbytes)

    def pinned_block(self, nbytes: int) -> Block:
        answer = _cuda.cudaHostAlloc(nbytes, _PORTABLE)
        address = int(_checked(answer, f"pin {nbytes} bytes of host memory"))
        view = memoryview((ctypes.c_uint8 * nbytes).from_address(address)).cast("B")
        return Block(address, nbytes, np.frombuffer(view, np.uint8))

    def free(self, block: Block) -> None:
        release = _cuda.cudaFree if block.host is None else _cuda.cudaFreeHost
        _checked(release(block.address), "free memory")

    def free_bytes(self) -> int:
        error, free, _ = _cuda.cudaMemGetInfo()
        if error != _OK:
            raise _fault(error, "ask for free memory")
        return int(free)


class CudaGraph:
    """A captured graph that can be launched, and whose copy `node` (if it has one) can be aimed elsewhere.

    `own`: `graph` is used for nothing else. Raises DeviceFault if it cannot be instantiated.
    """

    def __init__(self, graph: Any, node: Any, *, own: bool = False) -> None:
        # Priorities are kept per node (from the capture stream) only if asked for.
        flags = _cuda.cudaGraphInstantiateFlags.cudaGraphInstantiateFlagUseNodePriority
        self._graph, self._node = graph, node  # the node names what is changed
        self._own = own
        self._executable = _checked(_cuda.cudaGraphInstantiate(graph, flags), "make a graph")

    def aim(self, to: int, source: int, nbytes: int) -> None:
        """The next launch copies these. One that runs is not changed."""
        error = _cuda.cudaGraphExecMemcpyNodeSetParams1D(
            self._executable, self._node, to, source, nbytes, _KIND
        )[0]
        if error != _OK:
            raise _fault(error, "change a graph")

    def close(self) -> None:
        """It is launched no more: give back what it holds on the device (some 6 MB)."""
        _checked(_cuda.cudaGraphExecDestroy(self._executable), "give up a graph")
        if self._own:
            _checked(_cuda.cudaGraphDestroy(self._graph), "give up a graph")

    def launch(self, stream: Stream) -> None:
        error = _cuda.cudaGraphLaunch(self._executable, stream)[0]
        if error != _OK:
            raise _fault(error, "launch a graph")


def _nodes(graph: Any) -> list[Any]:
    count = int(_whole(_cuda.cudaGraphGetNodes(graph), "list a graph's nodes")[-1])
    nodes = _whole(_cuda.cudaGraphGetNodes(graph, count), "list a graph's nodes")[1]
    return list(nodes[:count])


def _copy_node(graph: Any, to: int) -> Any:
    """The node that copies to `to`; None if there is none."""
    for node in _nodes(graph):
        kind = _checked(_cuda.cudaGraphNodeGetType(node), "look at a node")
        if kind == _cuda.cudaGraphNodeType.cudaGraphNodeTypeMemcpy:
            params = _checked(_cuda.cudaGraphMemcpyNodeGetParams(node), "look at a copy")
            if int(params.dstPtr.ptr) == to:
                return node
    return None


def _whole(answer: tuple[Any, ...], what: str) -> tuple[Any, ...]:
    """An answer of several parts."""
    if answer[0] != _OK:
        raise _fault(answer[0], what)
    return answer


def _checked(answer: tuple[Any, ...], what: str) -> Any:
    if answer[0] != _OK:
        raise _fault(answer[0], what)
    return answer[1] if len(answer) > 1 else None


def _fault(error: Any, what: str) -> DeviceFault | OutOfDeviceMemory:
    code, text = _cuda.cudaGetErrorString(error)
    problem = text.decode() if code == _OK and isinstance(text, bytes) else str(text)
    if error == _NO_MEMORY:
        _cuda.cudaGetLastError()  # this one leaves the context as it was
        return OutOfDeviceMemory(f"the GPU could not {what}: {problem}")
    return DeviceFault(f"the GPU could not {what}: {problem} ({error.name})")
