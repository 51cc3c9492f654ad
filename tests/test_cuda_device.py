"""The CUDA device on a driver in virtual time: exact starts, right bytes, exact pages, every op reported."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fake_cuda import (
    MS,
    ROW_IN,
    ROW_OUT,
    TICK_NS,
    FakeDriver,
    FakeProgram,
    VirtualClock,
    expected_row,
)
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.driver import Block
from slosched.daemon.backends.cuda.program import Class, Use

PAGE = 4096
EXEC_NS = {1: 2 * MS, 2: 3 * MS, 4: 5 * MS}
FOREVER_NS = 2**62


@dataclass
class Rig:
    """A device of `pages` pages with one architecture; image i % images is instance i's weights."""

    pages: int = 8
    weights_bytes: int = 2 * PAGE + 100  # three pages, the last one not full
    images: int = 4
    stay_bytes: int = 0
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        self.driver = FakeDriver(self.clock)
        self.program = FakeProgram("net", self.driver, self.weights_bytes, EXEC_NS)
        blocks: list[Block] = []
        for image in range(self.images):
            block = self.driver.pinned_block(self.weights_bytes)
            assert block.host is not None
            block.host[:] = np.random.default_rng(image).integers(0, 256, self.weights_bytes)
            blocks.append(block)
        self.blocks = blocks
        self.device = CudaDevice(
            self.driver,
            {"net": self.program},
            {"net": blocks},
            cache=self.driver.device_block(self.pages * PAGE),
            page_bytes=PAGE,
            stream=self.driver.stream(-2),
            clock=self.clock,
            stay_bytes=self.stay_bytes,
        )
        self.done: dict[int, OpDone] = {}
        self.next_op = 0

    def launch(self, kind: OpKind, action_id: int = 0, model_id: int = 0, **more: Any) -> int:
        self.next_op += 1
        fields: dict[str, Any] = {"latest_ns": FOREVER_NS, "model_name": "net"}
        fields.update(more)
        op = Op(self.next_op, kind, 0, model_id, action_id, **fields)
        done = self.device.launch(op, now_ns=self.clock.now_ns)
        if done is not None:
            self.take([done])
        return self.next_op

    def take(self, done: list[OpDone]) -> None:
        for each in done:
            assert each.op_id not in self.done, "reported twice"
            self.done[each.op_id] = each

    def until(self, op_id: int, *, within_ns: int = 100 * MS) -> OpDone:
        give_up_ns = self.clock.now_ns + within_ns
        while op_id not in self.done:
            self.take(self.device.poll(now_ns=self.clock.now_ns))
            self.device.spin(self.clock.now_ns + 50_000)
            self.clock.now_ns += 1_000
            assert self.clock.now_ns < give_up_ns, "not reported within the time"
        return self.done[op_id]

    def load(self, model_id: int = 0) -> OpDone:
        return self.until(self.launch(OpKind.LOAD_WEIGHTS, model_id=model_id))

    def infer(self, action_id: int, rows: list[bytes], model_id: int = 0) -> list[bytes]:
        """Copy in, run, copy out; returns the output rows."""
        sizes = tuple(len(row) for row in rows)
        self.device.keep_inputs(action_id, [row for row in rows if row])
        shape: dict[str, Any] = {
            "batch_size": len(rows),
            "request_count": len(rows),
            "input_sizes": sizes,
        }
        for kind in (OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT):
            done = self.until(self.launch(kind, action_id, model_id, **shape))
            assert done.code == 0, done.reason
        assert done.output_sizes == tuple(ROW_OUT if size else 0 for size in sizes)
        return [bytes(frame) for frame in self.device.take_outputs(action_id)]

    def weights(self, model_id: int) -> bytes:
        host = self.blocks[model_id % self.images].host
        assert host is not None
        return host.tobytes()


def rows_of(count: int, seed: int) -> list[bytes]:
    draw = random.Random(seed)
    return [draw.randbytes(ROW_IN) for _ in range(count)]


# ------------------------------------------------------------------------------------ bytes


def test_outputs_are_the_instances_own_for_every_batch_and_after_a_reload() -> None:
    rig = Rig()
    for life in range(3):
        for model_id in (0, 1):
            assert rig.load(model_id).code == 0
        for batch in (1, 2, 3, 4):
            for model_id in (0, 1):
                rows = rows_of(batch, seed=100 * life + 10 * batch + model_id)
                outputs = rig.infer(1000 * life + 100 * batch + model_id, rows, model_id)
                assert outputs == [expected_row(rig.weights(model_id), row) for row in rows]
        for model_id in (1, 0):
            rig.device.evict(model_id)
        assert rig.device.free_pages == rig.pages
        cache = rig.device._copies._cache  # nothing of the last life may help the next one
        rig.driver.at(cache.address, cache.nbytes)[:] = 0xEE
        rig.driver.at(rig.program.active, rig.weights_bytes)[:] = 0xEE


def test_weights_in_pages_that_do_not_lie_together_are_put_together() -> None:
    rig = Rig(pages=9)
    for model_id in (0, 1, 2):
        rig.load(model_id)
    rig.device.evict(1)  # pages 3 to 5
    small = FakeProgram("small", rig.driver, PAGE, {1: MS})
    rig.device._programs["small"] = small  # type: ignore[index]
    rig.device._copies._images["small"] = [rig.driver.pinned_block(PAGE)]  # type: ignore[index]
    rig.until(rig.launch(OpKind.LOAD_WEIGHTS, model_id=7, model_name="small"))  # takes page 3
    rig.device.evict(0)
    rig.load(3)  # has 0 to 2, or 4, 5 and one more: all are free
    rig.device.evict(3)
    rig.until(rig.launch(OpKind.LOAD_WEIGHTS, model_id=8, model_name="small"))
    rig.load(3)
    rows = rows_of(2, seed=5)
    assert rig.infer(1, rows, 3) == [expected_row(rig.weights(3), row) for row in rows]


def test_an_only_instance_is_activated_once_and_again_when_it_was_reloaded() -> None:
    rig = Rig(images=1)
    rig.device.instances["net"] = 1
    rig.load()
    takes = [
        rig.until(rig.launch(OpKind.EXEC, action_id, batch_size=1)).span.duration_ns
        for action_id in range(3)
    ]
    assert takes[0] > EXEC_NS[1] + rig.weights_bytes // 2 and takes[1] == takes[2]
    assert takes[1] - EXEC_NS[1] < 10 * TICK_NS
    rig.device.evict(0)
    rig.blocks[0].host[:] = 7  # type: ignore[index]
    rig.load()
    rows = rows_of(1, seed=1)
    assert rig.infer(9, rows) == [expected_row(rig.weights(0), rows[0])]
    rig.device.instances["net"] = 2  # another one may have been active since
    again = rig.until(rig.launch(OpKind.EXEC, 10, batch_size=1)).span.duration_ns
    assert again > EXEC_NS[1] + rig.weights_bytes // 2


def test_a_batch_without_inputs_leaves_inputs_and_outputs_of_others_alone() -> None:
    rig = Rig()
    rig.load()
    rows = rows_of(1, seed=3)
    shape: dict[str, Any] = {"batch_size": 1, "request_count": 1, "input_sizes": (ROW_IN,)}
    rig.device.keep_inputs(1, rows)
    rig.until(rig.launch(OpKind.COPY_INPUT, 1, **shape))
    # Three without inputs go before it, and two follow it before its output is fetched.
    for action_id in (2, 3, 4):
        rig.until(rig.launch(OpKind.EXEC, action_id, batch_size=1))
    rig.until(rig.launch(OpKind.EXEC, 1, **shape))
    for action_id in (5, 6):
        rig.until(rig.launch(OpKind.EXEC, action_id, batch_size=1))
    rig.until(rig.launch(OpKind.COPY_OUTPUT, 1, **shape))
    assert rig.device.take_outputs(1) == [expected_row(rig.weights(0), rows[0])]
    assert all(buffers.use is Use.FREE for buffers in rig.program.sets(Class(1)))


def test_each_armed_exec_runs_with_its_own_weights_though_they_share_a_buffer_set() -> None:
    rig = Rig()
    for model_id in (0, 1):
        rig.load(model_id)
    shape: dict[str, Any] = {"batch_size": 1, "request_count": 1, "input_sizes": (ROW_IN,)}
    first, second = rows_of(2, seed=9)
    rig.device.keep_inputs(1, [first])
    rig.until(rig.launch(OpKind.COPY_INPUT, 1, **shape))
    rig.until(rig.launch(OpKind.EXEC, 1, **shape))  # its outputs stay in one set
    rig.device.keep_inputs(2, [second])
    rig.until(rig.launch(OpKind.COPY_INPUT, 2, 1, **shape))  # and these inputs wait in the other
    due_ns = rig.clock.now_ns + 500_000
    without = rig.launch(OpKind.EXEC, 3, 0, batch_size=1, earliest_ns=due_ns)
    behind = rig.launch(OpKind.EXEC, 2, 1, earliest_ns=due_ns, **shape)
    rig.until(without)
    rig.until(behind)
    assert rig.program.ran_with[-2:] == [rig.weights(0), rig.weights(1)]
    rig.until(rig.launch(OpKind.COPY_OUTPUT, 2, 1, **shape))
    assert rig.device.take_outputs(2) == [expected_row(rig.weights(1), second)]


def test_an_instance_that_was_loaded_runs_by_a_program_that_was_prepared_after_it() -> None:
    rig = Rig(images=1)
    rig.device.instances["net"] = 1
    rig.load()
    rows = rows_of(1, seed=2)
    assert rig.infer(1, rows) == [expected_row(rig.weights(0), rows[0])]
    newer = FakeProgram("net", rig.driver, rig.weights_bytes, {1: MS, 8: 9 * MS})
    rig.device._programs["net"] = newer  # type: ignore[index]
    rig.device.overwritten("net")
    rows = rows_of(7, seed=3)
    assert rig.infer(2, rows) == [expected_row(rig.weights(0), row) for row in rows]
    assert len(newer.launches) == 1


def test_inputs_in_the_buffers_of_a_program_that_was_replaced_fail_their_action_alone() -> None:
    rig = Rig()
    rig.load()
    shape: dict[str, Any] = {"batch_size": 1, "request_count": 1, "input_sizes": (ROW_IN,)}
    rig.device.keep_inputs(1, rows_of(1, seed=1))
    rig.until(rig.launch(OpKind.COPY_INPUT, 1, **shape))
    rig.device._programs["net"] = FakeProgram(  # type: ignore[index]
        "net", rig.driver, rig.weights_bytes, EXEC_NS
    )
    rig.device.overwritten("net")
    failed = rig.until(rig.launch(OpKind.EXEC, 1, **shape))
    assert failed.code == Code.CANCELLED and "prepared anew" in failed.reason
    rig.device.drop_inputs(1)
    rows = rows_of(1, seed=2)
    assert rig.infer(2, rows) == [expected_row(rig.weights(0), rows[0])]


# ------------------------------------------------------------------------------------- time


def test_an_armed_exec_starts_on_the_dot_and_the_next_one_when_its_end_is_noticed() -> None:
    rig = Rig()
    rig.load()
    due_ns = rig.clock.now_ns + 900_000
    first = rig.launch(OpKind.EXEC, 1, batch_size=1, earliest_ns=due_ns)
    second = rig.launch(OpKind.EXEC, 2, batch_size=2, earliest_ns=due_ns + 1)
    begin, end = rig.until(first).span, rig.until(second).span
    assert 0 <= begin.begin_ns - due_ns <= 3 * TICK_NS
    assert 0 <= end.begin_ns - begin.end_ns <= 5 * TICK_NS
    assert begin.duration_ns >= EXEC_NS[1] and end.duration_ns >= EXEC_NS[2]
    (_, first_end), (second_begin, _) = rig.program.launches
    assert second_begin >= first_end


def test_one_that_could_only_start_after_latest_is_not_run_and_the_one_behind_it_is() -> None:
    rig = Rig()
    rig.load()
    now_ns = rig.clock.now_ns
    running = rig.launch(OpKind.EXEC, 1, batch_size=1)
    late = rig.launch(OpKind.EXEC, 2, batch_size=1, latest_ns=now_ns + MS)
    rig.until(running)
    behind = rig.launch(OpKind.EXEC, 3, batch_size=1)
    assert rig.until(late).code == Code.EXEC_TOO_LATE and "after latest" in rig.done[late].reason
    assert rig.until(behind).code == 0 and len(rig.program.launches) == 2


def test_an_exec_that_is_armed_later_and_due_sooner_starts_first_with_its_own_weights() -> None:
    rig = Rig()
    rig.load(0)
    rig.load(1)
    now_ns = rig.clock.now_ns
    later = rig.launch(OpKind.EXEC, 1, 0, batch_size=1, earliest_ns=now_ns + 900_000)
    sooner = rig.launch(OpKind.EXEC, 2, 1, batch_size=1, earliest_ns=now_ns + 500_000)
    first, second = rig.until(sooner).span, rig.until(later).span
    assert 0 <= first.begin_ns - (now_ns + 500_000) <= 3 * TICK_NS
    assert 0 <= second.begin_ns - first.end_ns <= 5 * TICK_NS
    assert rig.program.ran_with[-2:] == [rig.weights(1), rig.weights(0)]


def test_what_has_not_begun_can_be_withdrawn() -> None:
    rig = Rig()
    rig.load()
    running = rig.launch(OpKind.EXEC, 1, batch_size=1)
    armed = rig.launch(OpKind.EXEC, 2, batch_size=1)
    assert rig.device.withdraw(running) is None
    withdrawn = rig.device.withdraw(armed)
    assert withdrawn is not None and withdrawn.code == Code.CANCELLED
    assert rig.device.withdraw(armed) is None
    rig.until(running)
    assert len(rig.program.launches) == 1 and rig.device.idle


def test_no_piece_of_an_input_is_copied_when_a_start_is_near() -> None:
    rig = Rig()
    rig.load()
    due_ns = rig.clock.now_ns + 30_000  # less than a piece may take
    armed = rig.launch(OpKind.EXEC, 1, batch_size=1, earliest_ns=due_ns)
    rows = rows_of(1, seed=1)
    rig.device.keep_inputs(2, rows)
    copying = rig.launch(OpKind.COPY_INPUT, 2, batch_size=1, request_count=1, input_sizes=(ROW_IN,))
    staged = rig.program.sets(Class(1))[0].staged_in.host
    assert staged is not None
    before = staged.tobytes()
    assert before != rows[0]
    rig.take(rig.device.poll(now_ns=rig.clock.now_ns))
    assert staged.tobytes() == before and copying not in rig.done
    rig.until(copying)
    assert staged.tobytes() == rows[0] and rig.until(armed).code == 0


# ------------------------------------------------------------------------------------ faults


def test_a_model_that_raises_fails_its_own_action_alone() -> None:
    rig = Rig()
    rig.load()
    rig.program.raises = ValueError("shapes do not fit")
    failed = rig.until(rig.launch(OpKind.EXEC, 1, batch_size=1))
    assert failed.code == Code.RUNTIME_ERROR and "shapes do not fit" in failed.reason
    rig.program.raises = None
    assert rig.until(rig.launch(OpKind.EXEC, 2, batch_size=1)).code == 0 and not rig.device.lost


def test_a_device_that_a_model_breaks_is_lost_whatever_the_model_raises() -> None:
    rig = Rig()
    rig.load()

    def breaking(*_: Any) -> None:
        rig.driver.fault = "an illegal address"  # a library says so first, in its own way
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    rig.program.launch = breaking  # type: ignore
    ops = [
        rig.launch(OpKind.EXEC, each, batch_size=1, earliest_ns=rig.clock.now_ns + each * MS)
        for each in (1, 20)
    ]
    assert [rig.until(op).code for op in ops] == [Code.PROCESS_ENDED] * 2 and rig.device.lost


@pytest.mark.parametrize("after_ns", range(0, 6 * MS, MS // 2))
def test_when_the_device_is_lost_every_op_is_reported_once(after_ns: int) -> None:
    rig = Rig()
    rig.load()
    ops = [rig.launch(OpKind.LOAD_WEIGHTS, model_id=1)]
    ops.append(rig.launch(OpKind.EXEC, 1, batch_size=1))
    ops.append(rig.launch(OpKind.EXEC, 2, batch_size=2))
    rig.device.keep_inputs(3, rows_of(1, seed=1))
    shape: dict[str, Any] = {"batch_size": 1, "request_count": 1, "input_sizes": (ROW_IN,)}
    ops.append(rig.launch(OpKind.COPY_INPUT, 3, **shape))
    end_ns = rig.clock.now_ns + after_ns
    while rig.clock.now_ns < end_ns:
        rig.take(rig.device.poll(now_ns=rig.clock.now_ns))
        rig.clock.now_ns += 10_000
    rig.driver.fault = "an illegal address"
    for op_id in ops:
        rig.until(op_id)
    last = rig.launch(OpKind.EXEC, 4, batch_size=1)
    # What was served when the device was lost is tried again elsewhere: its model is not to blame.
    assert {rig.done[op_id].code for op_id in ops} <= {0, Code.PROCESS_ENDED}
    assert rig.until(last).code == Code.PROCESS_ENDED
    assert rig.device.lost == rig.done[last].reason == "an illegal address"
    assert rig.device.withdraw(last) is None and rig.device.idle
