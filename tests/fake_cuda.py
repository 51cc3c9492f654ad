"""CUDA in virtual time, for the tests of daemon/backends/cuda: copies really move bytes, when they end.

A copy or a run takes effect as a whole at the moment at which it ends on its stream. So whoever overwrites
what is still to be read, or reads what has not arrived, gets other bytes than he should.
"""

from __future__ import annotations

import zlib
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from slosched.daemon.backends.cuda.driver import Block, DeviceFault, Event, Stream
from slosched.daemon.backends.cuda.program import BufferSet, Copies

MS = 1_000_000
#: A reading of the clock takes this long, so that whoever spins gets on.
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
        begin_ns = max(stream.free_ns, self.clock())
        stream.free_ns = begin_ns + takes_ns
        self._seq += 1
        self.pending.append((stream.free_ns, self._seq, action))

    def at(self, address: int, nbytes: int) -> np.ndarray:
        """The memory there; fails if it is none of ours."""
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

    def done(self, event: Event) -> bool:
        now_ns = self.clock()
        self._check()
        return bool(event.at_ns <= now_ns)

    def elapsed_ns(self, start: Event, end: Event) -> int:
        self._check()
        return int(end.at_ns - start.at_ns)

    def copy(self, to: int, source: int, nbytes: int, stream: Stream) -> None:
        self._check()

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


class FakeProgram:
    """Answers with a checksum of the active weights and each input row, after `exec_ns[batch]`."""

    def __init__(
        self, name: str, driver: FakeDriver, weights_bytes: int, exec_ns: Mapping[int, int]
    ) -> None:
        self.name, self.weights_bytes, self._driver = name, weights_bytes, driver
        self.exec_ns = dict(exec_ns)
        self.classes = tuple(sorted(exec_ns))
        self.active = driver.device_block(weights_bytes).address
        self._sets = {batch: tuple(self._set(batch) for _ in range(2)) for batch in self.classes}
        self.launches: list[tuple[int, int]] = []  # (begin, end) of each run
        self.aimed: dict[int, Copies] = {}
        self.ran_with: list[bytes] = []  # the active weights at each run
        self.raises: Exception | None = None

    def _set(self, batch: int) -> BufferSet:
        block = self._driver.device_block
        pinned = self._driver.pinned_block
        return BufferSet(
            batch, block(batch * ROW_IN).address, block(batch * ROW_OUT).address, ROW_IN, ROW_OUT,
            pinned(batch * ROW_IN), pinned(batch * ROW_OUT), FakeEvent(), FakeEvent(),
        )  # fmt: skip

    def sets(self, batch: int) -> tuple[BufferSet, ...]:
        return self._sets[batch]

    def captured(self, batch: int) -> bool:
        return True

    def aim(self, buffers: BufferSet, copies: Copies) -> None:
        self.aimed[id(buffers)] = copies

    def launch(self, buffers: BufferSet, stream: Stream) -> None:
        if self.raises is not None:
            raise self.raises
        driver, batch = self._driver, buffers.batch
        driver.record(buffers.started, stream)
        for to, source, nbytes in self.aimed[id(buffers)]:
            driver.copy(to, source, nbytes, stream)

        def action() -> None:
            weights = driver.at(self.active, self.weights_bytes).tobytes()
            self.ran_with.append(weights)
            inputs = driver.at(buffers.input, batch * ROW_IN)
            outputs = driver.at(buffers.output, batch * ROW_OUT)
            for row in range(batch):
                answer = expected_row(weights, inputs[row * ROW_IN : (row + 1) * ROW_IN].tobytes())
                outputs[row * ROW_OUT : (row + 1) * ROW_OUT] = np.frombuffer(answer, np.uint8)

        driver.enqueue(stream, self.exec_ns[batch], action)
        driver.record(buffers.ended, stream)
        self.launches.append((stream.free_ns - self.exec_ns[batch], stream.free_ns))
