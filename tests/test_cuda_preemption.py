"""Interruptions on the CUDA device, on a driver in virtual time: urgent runs at boundaries, and right bytes.

The driver's ordinary pool is written over by each ordinary run, and the urgent pool by each urgent one. So a
run that is interrupted answers wrongly if anything runs meanwhile that shares memory with it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from fake_cuda import (
    MS,
    ROW_IN,
    STEP_SHARE,
    FakeDriver,
    FakeProgram,
    FakeStream,
    SteppedProgram,
    VirtualClock,
    expected_row,
    stepped_row,
)
from slosched.codes import Code
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.cuda.device import CudaDevice
from slosched.daemon.backends.cuda.driver import Block
from slosched.daemon.backends.cuda.exec_lane import ExecLane
from slosched.daemon.backends.cuda.groups import Group, bounds_of
from slosched.daemon.backends.cuda.program import Class, Cut
from slosched.daemon.backends.cuda.segments import Gate, SegmentedRun
from slosched.daemon.backends.cuda.steps import Parts

PAGE = 4096
FOREVER_NS = 2**62
US = 1_000
#: A node of the long model that takes a fifth of its time, and small ones.
SHARES = (0.2, *[0.05] * 12, *[0.02] * 10)
LONG_NS, SHORT_NS = 8 * MS, MS // 2
#: What the host's part of noticing and launching may take in virtual time.
HOST_NS = 20 * US


def cut_program(program: FakeProgram, of: Class, tau_ns: int, in_flight: int) -> Cut:
    """Cut a class where its nodes' times say, without measuring."""
    wholes = program.whole_runs(of)
    times = [0, 0, *[round(share * program.exec_ns[of.batch]) for share in program.shares], 0, 0]
    groups = [Group(i, i + 1, ns) for i, ns in enumerate(times)]
    bounds = bounds_of(groups, tau_ns)
    ends = (*bounds, len(times))
    segments = tuple(sum(times[begin:end]) for begin, end in zip((0, *bounds), ends, strict=True))
    chain = range(len(wholes[0].captured))
    runs = [SegmentedRun(program.driver, whole, chain, bounds) for whole in wholes]
    cut = Cut(bounds, segments, in_flight)
    program.run_in_segments(of, cut, runs)
    return cut


@dataclass
class Rig:
    """A device with a long model in segments, and a short one with a twin; model ids 0 and 1."""

    tau_ns: int = 400 * US
    in_flight: int = 1
    twins_pool: int = 1
    steps: int = 0  # of the long model; 0: it is cut where its nodes are
    state_in_pool: bool = False
    nodes: int = 1  # of each part of a long model in steps: with several, its parts are in pieces
    clock: VirtualClock = field(default_factory=VirtualClock)

    def __post_init__(self) -> None:
        self.driver = FakeDriver(self.clock)
        self.gate = Gate(self.clock)
        self.long, self.cut = self._long_program()
        self.short = FakeProgram("short", self.driver, 200, {1: SHORT_NS})
        urgent = FakeStream(-5, pool=self.twins_pool)
        self.twin = FakeProgram("short", self.driver, 200, {1: SHORT_NS}, stream=urgent)
        self.short.urgent = self.twin
        self.images: list[Block] = []
        for number, program in enumerate((self.long, self.short)):
            image = self.driver.pinned_block(program.weights_bytes)
            assert image.host is not None
            image.host[:] = np.random.default_rng(number).integers(0, 256, program.weights_bytes)
            self.images.append(image)
        self.device = CudaDevice(
            self.driver,
            {"long": self.long, "short": self.short},
            {"long": self.images[:1], "short": self.images[1:]},
            cache=self.driver.device_block(4 * PAGE),
            page_bytes=PAGE,
            stream=self.driver.stream(-2),
            clock=self.clock,
            urgent_stream=FakeStream(-5, pool=1),
            gate=self.gate,
        )
        self.done: dict[int, OpDone] = {}
        self.next_op = 0
        for model_id in (0, 1):
            self.until(self.launch(OpKind.LOAD_WEIGHTS, 0, model_id))

    def _long_program(self) -> tuple[FakeProgram, Cut]:
        times = {1: LONG_NS, 2: LONG_NS}
        if not self.steps:
            long = FakeProgram("long", self.driver, PAGE + 40, times, shares=SHARES)
            return long, cut_program(long, Class(1), self.tau_ns, self.in_flight)
        stepped = SteppedProgram(
            "long",
            self.driver,
            PAGE + 40,
            times,
            steps=self.steps,
            in_pool=self.state_in_pool,
            nodes=self.nodes,
        )
        step_ns = round(LONG_NS * STEP_SHARE / self.steps)
        rest_ns = (LONG_NS - self.steps * step_ns) // 2
        segments = (rest_ns, *[step_ns] * self.steps, rest_ns)
        if self.nodes == 1:
            cut = Cut(tuple(range(1, len(segments))), segments, self.in_flight)
            stepped.run_in_steps(Class(1), cut)
            return stepped, cut
        return stepped, self._in_pieces(stepped, rest_ns, step_ns)

    def _in_pieces(self, stepped: SteppedProgram, rest_ns: int, step_ns: int) -> Cut:
        """Cut in the middle of each part and between them."""
        middle: tuple[int, ...] = (self.nodes // 2,)
        middles = Parts(middle, middle, middle)
        halves = [rest_ns // 2] * 2 + [step_ns // 2] * 2 * self.steps + [rest_ns // 2] * 2
        cut = Cut(tuple(range(1, len(halves))), tuple(halves), self.in_flight)
        runs = []
        for run in stepped.stepped_runs(Class(1)):
            chains = Parts(*(self.driver.chain(each) for each in run.captured))
            runs.append(run.in_pieces(self.driver, chains, middles))
        stepped.run_in_steps(Class(1), cut, runs)
        return cut

    def launch(self, kind: OpKind, action_id: int, model_id: int, **more: Any) -> int:
        self.next_op += 1
        fields: dict[str, Any] = {"latest_ns": FOREVER_NS, "batch_size": 1, "request_count": 1}
        fields |= {"model_name": ("long", "short")[model_id], "input_sizes": (ROW_IN,)} | more
        op = Op(self.next_op, kind, 0, model_id, action_id, **fields)
        done = self.device.launch(op, now_ns=self.clock.now_ns)
        self.take([] if done is None else [done])
        return self.next_op

    def take(self, done: list[OpDone]) -> None:
        for each in done:
            assert each.op_id not in self.done, "reported twice"
            self.done[each.op_id] = each

    def run(self, for_ns: int) -> None:
        end_ns = self.clock.now_ns + for_ns
        while self.clock.now_ns < end_ns:
            self.take(self.device.poll(now_ns=self.clock.now_ns))
            self.device.spin(min(end_ns, self.clock.now_ns + 50 * US))
            self.clock.now_ns += US

    def until(self, op_id: int) -> OpDone:
        give_up_ns = self.clock.now_ns + 100 * MS
        while op_id not in self.done:
            self.run(10 * US)
            assert self.clock.now_ns < give_up_ns, "not reported within the time"
        return self.done[op_id]

    def bring(self, action_id: int, model_id: int, priority: int = 0) -> None:
        """Have an input of the action on the device."""
        self.device.keep_inputs(action_id, [self.row(action_id)])
        op = self.launch(OpKind.COPY_INPUT, action_id, model_id, priority=priority)
        assert self.until(op).code == 0

    def answer(self, action_id: int, model_id: int) -> None:
        """Fetch the action's output, and compare it."""
        assert self.until(self.launch(OpKind.COPY_OUTPUT, action_id, model_id)).code == 0
        host = self.images[model_id].host
        assert host is not None
        wanted = expected_row(host.tobytes(), self.row(action_id))
        if self.steps and not model_id:
            wanted = stepped_row(host.tobytes(), self.row(action_id), self.steps)
        assert self.device.take_outputs(action_id) == [wanted], f"action {action_id}"

    @staticmethod
    def row(action_id: int) -> bytes:
        return action_id.to_bytes(ROW_IN, "little")

    def exec(self, action_id: int, model_id: int, **more: Any) -> int:
        return self.launch(OpKind.EXEC, action_id, model_id, **more)


# ---------------------------------------------------------------------------------- the lane


@pytest.mark.parametrize("in_flight", [1, 2])
def test_an_urgent_run_starts_at_the_next_boundary_and_the_long_one_goes_on(in_flight: int) -> None:
    rig = Rig(in_flight=in_flight)
    rig.bring(1, 0)
    rig.bring(2, 1, priority=1)
    long = rig.exec(1, 0)
    rig.run(2 * MS + 70 * US)
    asked_ns = rig.clock.now_ns
    urgent = rig.until(rig.exec(2, 1, priority=1))
    assert urgent.code == 0 and not urgent.segments and long not in rig.done
    assert urgent.span.begin_ns - asked_ns <= rig.cut.boundary_ns + HOST_NS
    assert SHORT_NS <= urgent.span.duration_ns <= SHORT_NS + HOST_NS
    rig.answer(2, 1)  # while the long one runs on
    done = rig.until(long)
    rig.answer(1, 0)
    assert len(done.segments) == 2
    first, second = done.segments
    assert first.end_ns <= urgent.span.begin_ns and urgent.span.end_ns <= second.begin_ns
    assert done.pause_ns == second.begin_ns - first.end_ns >= SHORT_NS
    assert done.span.duration_ns == first.duration_ns + second.duration_ns
    assert LONG_NS <= done.span.duration_ns <= LONG_NS + HOST_NS + 5 * US * PAGE // 1024
    assert (done.span.begin_ns, done.span.end_ns) == (first.begin_ns, second.end_ns)


def test_a_run_that_nothing_interrupts_is_reported_as_one() -> None:
    rig = Rig()
    rig.bring(1, 0)
    done = rig.until(rig.exec(1, 0))
    rig.answer(1, 0)
    assert done.segments == () and done.pause_ns == 0
    assert len(rig.long.launches) == len(rig.cut.segment_ns) > 10
    assert not rig.gate.open_run and rig.device.idle


@pytest.mark.parametrize("in_flight", [1, 2])
def test_any_number_of_interruptions_at_any_time_leave_every_answer_right(in_flight: int) -> None:
    rig = Rig(in_flight=in_flight)
    for turn in range(12):
        first = 100 * turn
        rig.bring(first, 0)
        long = rig.exec(first, 0)
        urgents = []
        for number in range(1, 4):
            rig.run((turn * 137 + number * 911) % 2000 * US)
            rig.bring(first + number, 1, priority=1)
            urgents.append(rig.exec(first + number, 1, priority=1))
            rig.until(urgents[-1])
            rig.answer(first + number, 1)
        done = rig.until(long)
        rig.answer(first, 0)
        spans = [rig.done[op].span for op in urgents]
        for segment in done.segments or (done.span,):
            for span in spans:
                assert span.end_ns <= segment.begin_ns or segment.end_ns <= span.begin_ns
        assert len(done.segments) in (0, 2, 3, 4)


def test_the_fake_notices_a_twin_that_shares_the_ordinary_pool() -> None:
    rig = Rig(twins_pool=0)
    long, _ = interrupted(rig)
    rig.until(long)
    with pytest.raises(AssertionError, match="action 1"):
        rig.answer(1, 0)


def test_ordinary_work_waits_behind_the_interrupted_run() -> None:
    rig = Rig()
    rig.bring(1, 0)
    rig.bring(2, 1)
    long = rig.exec(1, 0)
    rig.run(MS)
    ordinary = rig.exec(2, 1)
    urgent = rig.exec(3, 1, priority=1, input_sizes=())
    end_ns = rig.until(long).span.end_ns
    assert rig.until(urgent).span.end_ns < end_ns <= rig.until(ordinary).span.begin_ns
    rig.answer(1, 0)
    rig.answer(2, 1)


def test_an_urgent_exec_of_a_model_without_a_twin_waits_like_any_other() -> None:
    rig = Rig()
    rig.short.urgent = None
    long = rig.exec(1, 0, input_sizes=())
    rig.run(MS)
    other = rig.until(rig.exec(2, 1, priority=1, input_sizes=()))
    assert rig.done[long].segments == () and other.span.begin_ns >= rig.done[long].span.end_ns


def test_a_class_that_is_not_cut_is_not_interrupted() -> None:
    rig = Rig()
    long = rig.exec(1, 0, batch_size=2, input_sizes=())
    rig.run(MS)
    urgent = rig.until(rig.exec(2, 1, priority=1, input_sizes=()))
    assert rig.done[long].segments == () and urgent.span.begin_ns >= rig.done[long].span.end_ns


def test_an_urgent_exec_that_is_due_later_starts_at_its_time_or_the_boundary_behind_it() -> None:
    rig = Rig()
    rig.exec(1, 0, input_sizes=())
    rig.run(MS)
    due_ns = rig.clock.now_ns + 900 * US
    urgent = rig.until(rig.exec(2, 1, priority=1, input_sizes=(), earliest_ns=due_ns))
    assert 0 <= urgent.span.begin_ns - due_ns <= rig.cut.boundary_ns + HOST_NS


def test_the_lane_says_when_the_segments_in_flight_run_out() -> None:
    rig = Rig(in_flight=2)
    rig.exec(1, 0, input_sizes=())
    rig.run(3 * MS)
    assert 0 < rig.device.spare_ns() <= rig.cut.boundary_ns


# ------------------------------------------------------------------- while it is interrupted


def interrupted(rig: Rig) -> tuple[int, int]:
    """(op of the long run, op of the urgent one that runs in its place)."""
    rig.bring(1, 0)
    long = rig.exec(1, 0)
    rig.run(MS)
    urgent = rig.exec(2, 1, priority=1, input_sizes=())
    while not rig.twin.launches:
        rig.run(5 * US)
    assert long not in rig.done and urgent not in rig.done
    return long, urgent


def test_neither_the_interrupted_run_nor_the_urgent_one_can_be_withdrawn_and_others_can() -> None:
    rig = Rig()
    long, urgent = interrupted(rig)
    behind = rig.exec(3, 0, input_sizes=())
    assert rig.device.withdraw(long) is None and rig.device.withdraw(urgent) is None
    withdrawn = rig.device.withdraw(behind)
    assert withdrawn is not None and withdrawn.code == Code.CANCELLED
    assert rig.until(urgent).code == rig.until(long).code == 0
    rig.answer(1, 0)
    assert rig.device.idle


@pytest.mark.parametrize("in_flight", [1, 2])
def test_an_urgent_exec_that_is_withdrawn_before_the_boundary_interrupts_nothing(
    in_flight: int,
) -> None:
    rig = Rig(in_flight=in_flight)
    rig.bring(1, 0)
    long = rig.exec(1, 0)
    rig.run(3 * MS)
    urgent = rig.exec(2, 1, priority=1, input_sizes=())
    rig.run(US)
    given_back = rig.device.withdraw(urgent)
    if given_back is None:  # the boundary was just here
        rig.until(urgent)
    assert rig.until(long).code == 0
    rig.answer(1, 0)
    assert len(rig.done[long].segments) == (0 if given_back else 2)


def test_an_urgent_exec_that_is_too_late_at_the_boundary_fails_and_the_run_goes_on() -> None:
    rig = Rig()
    rig.bring(1, 0)
    long = rig.exec(1, 0)
    rig.run(MS)
    late = rig.exec(2, 1, priority=1, input_sizes=(), latest_ns=rig.clock.now_ns)
    assert rig.until(late).code == Code.EXEC_TOO_LATE
    done = rig.until(long)
    rig.answer(1, 0)
    assert done.code == 0 and done.pause_ns < 100 * US and len(rig.twin.launches) == 0


def test_an_urgent_model_that_raises_fails_alone() -> None:
    rig = Rig()
    rig.bring(1, 0)
    long = rig.exec(1, 0)
    rig.run(MS)
    rig.twin.raises = ValueError("shapes do not fit")
    failed = rig.until(rig.exec(2, 1, priority=1, input_sizes=()))
    assert failed.code == Code.RUNTIME_ERROR and rig.until(long).code == 0
    rig.answer(1, 0)


@pytest.mark.parametrize("after_us", [0, 300, 600, 1_500, 9_500])
def test_a_gpu_that_is_lost_meanwhile_reports_each_op_once(after_us: int) -> None:
    rig = Rig()
    long, urgent = interrupted(rig)
    behind = rig.exec(3, 0, input_sizes=())
    rig.run(after_us * US)
    rig.driver.fault = "an illegal address"
    codes = {rig.until(op).code for op in (long, urgent, behind)}
    assert codes <= {0, Code.PROCESS_ENDED} and rig.done[behind].code == Code.PROCESS_ENDED
    assert rig.device.lost and rig.device.idle and not rig.gate.open_run


def test_weights_that_are_evicted_and_overwritten_meanwhile_do_not_change_the_interrupted_run() -> (
    None
):
    rig = Rig()
    long, urgent = interrupted(rig)
    rig.device.evict(0)  # the brain does not: it protects what an exec uses
    cache = rig.device._copies._cache
    rig.driver.at(cache.address, 2 * PAGE)[:] = 0xEE
    assert rig.until(urgent).code == rig.until(long).code == 0
    rig.answer(1, 0)


def test_inputs_and_outputs_are_copied_while_a_run_is_interrupted() -> None:
    rig = Rig()
    long, urgent = interrupted(rig)
    rig.bring(5, 0)
    rig.bring(6, 1, priority=1)
    rig.until(urgent)
    rig.until(rig.exec(6, 1, priority=1))
    rig.answer(6, 1)
    rig.until(long)
    rig.answer(1, 0)
    rig.until(rig.exec(5, 0))
    rig.answer(5, 0)


def test_a_program_is_in_use_while_its_twin_is() -> None:
    rig = Rig()
    _, urgent = interrupted(rig)
    assert rig.device.uses(rig.short) and rig.device.uses(rig.long)
    rig.until(urgent)
    rig.run(20 * MS)
    assert not rig.device.uses(rig.short)


# ---------------------------------------------------------------------------------- the gate


def test_a_preparation_launches_nothing_while_a_run_in_segments_is_open() -> None:
    rig = Rig()
    rig.bring(1, 0)
    rig.exec(1, 0)
    rig.run(MS)
    waits = 0

    def pause() -> None:
        nonlocal waits
        waits += 1
        rig.run(100 * US)

    with rig.gate.alone(pause, segments=False):
        assert waits > 10 and not rig.gate.open_run
        rig.driver.pollute(rig.device._exec._stream)  # in stream order, behind the last segment
    rig.run(MS)
    rig.answer(1, 0)


@pytest.mark.parametrize("segments", [False, True])
def test_the_lane_begins_no_run_in_segments_while_a_preparation_launches(segments: bool) -> None:
    rig = Rig()
    rig.bring(1, 0)
    with rig.gate.alone(lambda: None, segments=segments):
        long = rig.exec(1, 0)
        rig.run(MS)
        assert not rig.long.launches and not rig.device.running
        assert rig.device.spare_ns() > MS  # so the preparation gets its slices
        urgent = rig.until(rig.exec(2, 1, priority=1, input_sizes=()))
        assert urgent.code == 0
    assert rig.until(long).code == 0
    rig.answer(1, 0)
    with rig.gate.alone(lambda: None, segments=segments):
        whole = rig.exec(3, 1, input_sizes=())
        rig.run(2 * MS)
        assert (whole in rig.done) is not segments
    assert rig.until(whole).code == 0


def test_a_start_is_exact_again_once_the_preparation_is_over() -> None:
    rig = Rig()
    with rig.gate.alone(lambda: None, segments=False):
        waiting = rig.exec(1, 0, input_sizes=())
        rig.run(US)
        assert rig.device.withdraw(waiting) is not None
    due_ns = rig.clock.now_ns + MS
    rig.exec(2, 0, input_sizes=(), earliest_ns=due_ns)
    assert rig.device.spare_ns() <= MS


def test_a_preparation_that_waited_for_long_is_next() -> None:
    rig = Rig()
    ops = [rig.exec(number, 0, input_sizes=()) for number in range(1, 40)]
    began_ns = rig.clock.now_ns
    with rig.gate.alone(lambda: rig.run(100 * US), segments=False):
        assert rig.clock.now_ns - began_ns < 50 * MS + 2 * LONG_NS
        assert any(op not in rig.done for op in ops)
    rig.run(2 * LONG_NS)


def test_without_an_urgent_stream_a_priority_changes_nothing() -> None:
    rig = Rig()
    device = CudaDevice(
        rig.driver,
        {"short": rig.short},
        {"short": rig.images[1:]},
        cache=rig.driver.device_block(PAGE),
        page_bytes=PAGE,
        stream=rig.driver.stream(-2),
        clock=rig.clock,
    )
    assert type(device._exec) is ExecLane
