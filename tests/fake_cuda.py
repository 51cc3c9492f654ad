"""CUDA in virtual time, for the tests of daemon/backends/cuda: copies really move bytes, when they end.

A copy or a run takes effect as a whole at the moment at which it ends on its stream: a copy reads its source
then. So overwriting what is still to be read, or reading what has not arrived, gives wrong bytes.

What a run allocates comes from one pool that all graphs share, as torch's do. Each run begins by writing over
all of the pool, since another program's run may: nothing that lies there outlives the next run.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from slosched.daemon.backends.cuda.driver import Block, DeviceFault, Event, Stream
from slosched.daemon.backends.cuda.program import BufferSet
from slosched.daemon.backends.cuda.recorded import Array, RecordedProgram

MS = 1_000_000
#: A reading of the clock takes this long, so that a loop that waits for a time reaches it.
TICK_NS = 100


class VirtualClock:
    def __init__(self, now_ns: int = 1_000 * MS) -> None:
        self.now_ns = now_ns

    def __call__(self) -> int:
        self.now_ns += TICK_NS
        return self.now_ns


@dataclass(eq=False)
class FakeStream:
    priority: int
    free_ns: int = 0  # when everything given so far has ended


@dataclass(eq=False)
class FakeEvent:
    at_ns: int = 0


#: What a graph is made of: how long a step takes, and what it does in the end.
Step = tuple[int, Callable[[], None]]
POOL_BYTES = 4096


@dataclass(eq=False)
class FakeGraph:
    """Recorded steps; the first copy to `active` can be aimed."""

    driver: FakeDriver
    steps: list[object]
    active: int

    def __post_init__(self) -> None:
        copies = [
            i for i, s in enumerate(self.steps) if isinstance(s, list) and s[0] == self.active
        ]
        assert copies, "no copy of the weights"
        self._aimed = copies[0]

    def aim(self, to: int, source: int, nbytes: int) -> None:
        self.steps[self._aimed] = [to, source, nbytes]

    def launch(self, stream: FakeStream) -> None:
        self.driver.check()
        self.driver.pollute(stream)
        for step in self.steps:
            if isinstance(step, FakeEvent):
                self.driver.record(step, stream)
            elif isinstance(step, list):
                to, source, nbytes = step
                self.driver.copy(to, source, nbytes, stream)
            else:
                assert isinstance(step, tuple)
                self.driver.enqueue(stream, *step)

    def close(self) -> None:
        self.steps.clear()


@dataclass(eq=False)
class FakeDriver:
    """`ns_per_kb` is what a copy takes; after `fault` is set every call fails with it."""

    clock: VirtualClock
    ns_per_kb: int = 1_000
    fault: str = ""
    pending: list[tuple[int, int, Callable[[], None]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._bases: list[int] = []
        self._memory: dict[int, np.ndarray] = {}
        self._next = 1 << 20
        self._seq = 0
        self._captures: dict[FakeStream, list[object]] = {}
        self._pool = self._block(POOL_BYTES)
        self._pool_used = 0
        self._runs = 0

    def check(self) -> None:
        """Fail as every call does after `fault`; do what has come to its end."""
        self._check()

    def pool(self, nbytes: int) -> int:
        """Memory for a result or whatever else a run needs: the same for the next program's runs."""
        assert nbytes <= POOL_BYTES
        if self._pool_used + nbytes > POOL_BYTES:
            self._pool_used = 0
        address = self._pool + self._pool_used
        self._pool_used += nbytes
        return address

    def pollute(self, stream: FakeStream) -> None:
        """A run begins: what lies in the pool is another's no more."""
        self._runs += 1
        junk = self._runs % 251

        def action() -> None:
            self.at(self._pool, POOL_BYTES)[:] = junk

        self.enqueue(stream, 0, action)

    def _check(self) -> None:
        if self.fault:
            raise DeviceFault(self.fault)
        due = sorted(entry[:2] for entry in self.pending if entry[0] <= self.clock.now_ns)
        if due:
            actions = {entry[:2]: entry[2] for entry in self.pending}
            self.pending = [entry for entry in self.pending if entry[0] > self.clock.now_ns]
            for key in due:
                actions[key]()

    def enqueue(self, stream: FakeStream, takes_ns: int, action: Callable[[], None]) -> None:
        if stream in self._captures:
            self._captures[stream].append((takes_ns, action))
            return
        begin_ns = max(stream.free_ns, self.clock())
        stream.free_ns = begin_ns + takes_ns
        self._seq += 1
        self.pending.append((stream.free_ns, self._seq, action))

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """The memory there; fails if none of our allocations has it."""
        base = self._bases[bisect_right(self._bases, address) - 1]
        memory = self._memory[base]
        assert address - base + nbytes <= len(memory), "outside its block"
        return memory[address - base : address - base + nbytes]

    # ------------------------------------------------------------------------ the protocol

    def stream(self, priority: int) -> Stream:
        return FakeStream(priority)

    def event(self) -> Event:
        return FakeEvent()

    def record(self, event: Event, stream: Stream) -> None:
        self._check()
        event.at_ns = max(stream.free_ns, self.clock())

    def record_inside(self, event: Event, stream: Stream) -> None:
        self._captures[stream].append(event)

    def begin_capture(self, stream: Stream) -> None:
        self._captures[stream] = []
        self._pool_used = 0

    def end_capture(self, stream: Stream) -> Any:
        return self._captures.pop(stream)

    def graph(self, captured: Any, active: int) -> FakeGraph:
        return FakeGraph(self, captured, active)

    def done(self, event: Event) -> bool:
        now_ns = self.clock()
        self._check()
        return bool(event.at_ns <= now_ns)

    def elapsed_ns(self, start: Event, end: Event) -> int:
        self._check()
        return int(end.at_ns - start.at_ns)

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        self._check()
        if stream in self._captures:
            self._captures[stream].append([to, source, nbytes])
            return

        def action() -> None:
            self.at(to, nbytes)[:] = self.at(source, nbytes)

        self.enqueue(stream, 1 + nbytes * self.ns_per_kb // 1024, action)

    def _block(self, nbytes: int) -> int:
        address = self._next
        self._next += nbytes + 4096
        self._bases.append(address)
        self._memory[address] = np.full(nbytes, 0xEE, np.uint8)  # poison, until it is written
        return address

    def device_block(self, nbytes: int) -> Block:
        self._check()
        return Block(self._block(nbytes), nbytes)

    def pinned_block(self, nbytes: int) -> Block:
        self._check()
        address = self._block(nbytes)
        return Block(address, nbytes, self._memory[address])

    def free(self, block: Block) -> None:
        self._bases.remove(block.address)
        del self._memory[block.address]

    def free_bytes(self) -> int:
        return 1 << 30


ROW_IN, ROW_OUT = 16, 4


def expected_row(weights: bytes, row: bytes) -> bytes:
    """What a FakeProgram answers to one input with these weights."""
    return zlib.crc32(row, zlib.crc32(weights)).to_bytes(4, "little")


class FakeProgram(RecordedProgram):
    """Answers with a checksum of the active weights and each input row, after `exec_ns[batch]`.

    Its result lies in the pool that all runs share. `capture`: as a graph; else each run is put together
    anew. `spoils`: it changes the first byte of its weights in each run; `remembers`: what its graphs
    answer depends on something that was put into the pool when they were captured.
    """

    def __init__(
        self,
        name: str,
        driver: FakeDriver,
        weights_bytes: int,
        exec_ns: Mapping[int, int],
        *,
        capture: bool = True,
        spoils: bool = False,
        remembers: bool = False,
    ) -> None:
        place = driver.device_block(weights_bytes)
        super().__init__(name, driver, driver.stream(-2), place, weights_bytes)
        self.driver = driver
        self.exec_ns = dict(exec_ns)
        self.active = driver.device_block(weights_bytes + 1024).address
        self.keeps_weights = not spoils
        self.spoils, self.remembers = spoils, remembers
        self.launches: list[tuple[int, int]] = []  # (begin, end) of each run
        self.ran_with: list[bytes] = []  # the active weights at each run
        self.raises: Exception | None = None
        self._preparing = driver.stream(0)
        self._stream = self._preparing
        for batch in sorted(exec_ns):
            self.add_class(batch, capture=capture)
        self.ran_with.clear()

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        if self.raises is not None:
            raise self.raises
        super().launch(buffers, stream)
        self.launches.append((stream.free_ns - self.exec_ns[buffers.batch], stream.free_ns))

    # ------------------------------------------------------------------- what a library does

    def sample_rows(self, batch: int, seed: int) -> Array:
        return np.random.default_rng(seed).integers(0, 256, (batch, ROW_IN), dtype=np.uint8)

    def run_rows(self, rows: Array) -> Array:
        block = self.driver.device_block(rows.nbytes)
        self.driver.at(block.address, rows.nbytes)[:] = rows.ravel()
        answer = self._answer(self._forward((block.address, rows.shape)), len(rows))
        self.driver.free(block)
        return answer

    def _answer(self, result: int, batch: int) -> Array:
        self.driver.clock.now_ns = max(self.driver.clock.now_ns, self._stream.free_ns)
        self.driver.check()
        return self.driver.at(result, batch * ROW_OUT).copy().reshape(batch, ROW_OUT)

    def changed_weights(self, source: Block) -> tuple[str, ...]:
        here = self.driver.at(self.active, self.weights_bytes)
        there = self.driver.at(source.address, self.weights_bytes)
        return () if (here == there).all() else ("counter",)

    def restore_weights(self, source: Block) -> None:
        self.driver.check()
        there = self.driver.at(source.address, self.weights_bytes)
        self.driver.at(self.active, self.weights_bytes)[:] = there

    def disturb(self, stream: Stream) -> None:
        self.driver.pollute(stream)

    def _view(
        self, address: int, shape: tuple[int, ...], dtype: str
    ) -> tuple[int, tuple[int, ...]]:
        return address, shape

    def _forward(self, inputs: Any) -> int:
        address, (batch, row_in) = inputs
        result = self.driver.pool(batch * ROW_OUT)
        note = self.driver.pool(1)
        captured = self._stream is self._capture_stream
        if captured:
            self.driver.at(note, 1)[:] = 1

        def action() -> None:
            weights = self.driver.at(self.active, self.weights_bytes).tobytes()
            self.ran_with.append(weights)
            rows = self.driver.at(address, batch * row_in)
            outputs = self.driver.at(result, batch * ROW_OUT)
            for row in range(batch):
                answer = expected_row(weights, rows[row * row_in : (row + 1) * row_in].tobytes())
                outputs[row * ROW_OUT : (row + 1) * ROW_OUT] = np.frombuffer(answer, np.uint8)
            if self.remembers and captured:
                outputs[:] ^= self.driver.at(note, 1) ^ 1
            if self.spoils:
                self.driver.at(self.active, 1)[:] += 1

        self.driver.enqueue(self._stream, self.exec_ns.get(batch, MS), action)
        return result

    def _address(self, result: Any) -> int:
        return int(result)

    def _warm_up(self, inputs: Any) -> Array:
        return self._answer(self._forward(inputs), inputs[1][0])

    @contextmanager
    def _on_stream(self, stream: Stream) -> Iterator[None]:
        before, self._stream = self._stream, stream
        try:
            yield
        finally:
            self._stream = before
