"""Kinds of actions and lanes on the worker's side: one entry each, and what a new one costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

from slosched.codes import ActionType, Code
from slosched.core.worker.emulated import EmulatedGpu
from slosched.core.worker.interface import DeviceEvent, FromController, Op, OpDone, OpKind, joined
from slosched.core.worker.kinds import KINDS, takes_inputs
from slosched.core.worker.kinds.base import Acceptance, ActionKind, Fault
from slosched.core.worker.kinds.infer import InferKind, batch_op
from slosched.core.worker.lanes import GPU_LANES, LaneSpec, Role
from slosched.core.worker.offers import Offers
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import PendingAction, Step
from slosched.messages import (
    Action,
    Call,
    ChildReply,
    ClearCache,
    ClearCacheResult,
    ErrorResult,
    Infer,
    InferResult,
    SessionMessage,
    Span,
)
from worker_rig import EXEC_NS, MS, VirtualWorker


def test_every_action_has_its_kind() -> None:
    assert set(KINDS) == set(get_args(Action))
    assert len({kind.action_type for kind in KINDS.values()}) == len(KINDS) == len(ActionType)


def test_only_an_infer_a_call_and_the_answer_of_a_child_bring_frames() -> None:
    takers = [message for message, kind in KINDS.items() if kind.takes_inputs]
    assert set(takers) == {Infer, Call}
    assert takes_inputs(ChildReply(session=1, action_id=1, child=0, code=0))
    assert not takes_inputs(ClearCache(1, 1)) and not takes_inputs("no action")


def test_an_op_of_a_batch_has_every_field_of_its_action() -> None:
    worker = VirtualWorker(gpus=2).serving(loaded=False)
    ledger = worker.brain._ledger
    message = Infer(
        session=worker.session,
        action_id=5,
        model_id=1,
        gpu_id=1,
        earliest_ns=10,
        latest_ns=20,
        expected_duration_ns=30,
        batch_size=4,
        request_count=3,
        input_sizes=(12, 0, 12),
    )
    kind = worker.brain._kinds[Infer]
    assert isinstance(kind, InferKind)
    action = PendingAction(77, kind, message, b"", 0)
    action.gpu, action.instance = ledger.gpus[1], ledger.instances[1]
    action.earliest_ns, action.latest_ns = 11, 21  # on the worker's clock
    assert batch_op(9, OpKind.EXEC, action) == Op(
        op_id=9,
        kind=OpKind.EXEC,
        gpu_id=1,
        model_id=1,
        action_id=77,
        batch_size=4,
        request_count=3,
        input_sizes=(12, 0, 12),
        model_name="net",
        earliest_ns=11,
        latest_ns=21,
    )


class Probe(SessionMessage, frozen=True):
    """An action of a new kind: it waits its turn in the load lane, and runs as a load does."""


class ProbeKind(ActionKind[ClearCache]):
    action_type = ActionType.CLEAR_CACHE

    def __init__(self, pipeline: Pipeline, acceptance: Acceptance) -> None:
        super().__init__(pipeline, acceptance)
        self._step = Step(Role.LOAD, self._start, self._ended)

    def check(self, action: PendingAction[ClearCache], frames: tuple[int, ...]) -> Fault | None:
        return None

    def begin(self, action: PendingAction[ClearCache], now_ns: int) -> None:
        lane = self._ledger.gpus[0].lanes[Role.LOAD]
        self._pipeline.enqueue(lane, now_ns + MS, action, self._step)

    def _start(self, action: PendingAction[ClearCache], now_ns: int) -> None:
        op = Op(self._ledger.next_seq(), OpKind.LOAD_WEIGHTS, 0, 0, action.key, model_name="net")
        self._pipeline.launch(self._ledger.gpus[0].lanes[Role.LOAD], action, op)

    def _ended(self, action: PendingAction[ClearCache], done: OpDone, now_ns: int) -> None:
        message = action.message
        result = ClearCacheResult(
            message.session, message.action_id, received_ns=done.span.begin_ns, sent_ns=now_ns
        )
        self._ledger.answer(action, result)


def test_a_new_kind_is_one_object_in_the_table() -> None:
    worker = VirtualWorker().serving()
    brain = worker.brain
    brain._kinds[Probe] = ProbeKind(brain._pipeline, Acceptance(Offers(())))
    begin_ns = worker.now + MS
    event = FromController(b"controller", Probe(worker.session, 99))  # type: ignore[arg-type]
    assert worker.stepper.handle(event, now_ns=worker.now) is not None
    worker.stepper.step(worker.now)
    assert worker.answers() == []
    worker.run(20 * MS)
    answer = worker.answer()
    assert answer == ClearCacheResult(
        worker.session, 99, received_ns=begin_ns, sent_ns=begin_ns + 8 * MS
    )
    assert brain.idle


# ------------------------------------------------------------------------------------ lanes


@dataclass
class WideWorker(VirtualWorker):
    """Its exec lane takes two ops at a time, and its GPU runs one after the other."""

    lanes: Sequence[LaneSpec] = tuple(
        replace(spec, width=2) if spec.role is Role.EXEC else spec for spec in GPU_LANES
    )


def test_a_lane_starts_as_many_ops_as_it_is_wide() -> None:
    worker = WideWorker().serving()
    lane = worker.brain._ledger.gpus[0].lanes[Role.EXEC]
    for _ in range(3):
        worker.infer()
    assert len(lane.started) == 2 and len(lane.queue) == 1
    worker.run(EXEC_NS[1])
    assert len(lane.started) == 2 and not lane.queue
    worker.run(2 * EXEC_NS[1])
    assert len(worker.answers()) == 3 and not lane.started


def test_an_exec_that_is_armed_behind_another_starts_at_its_end_on_an_emulated_gpu() -> None:
    worker = WideWorker().serving()
    begin_ns = worker.now
    worker.infer(batch=2)
    worker.infer(batch=1)
    worker.infer(batch=1, latest=begin_ns + MS)  # behind both: too late
    worker.run(10 * MS)
    first, second, third = sorted(worker.answers(), key=lambda answer: answer.action_id)  # type: ignore[union-attr]
    assert isinstance(first, InferResult) and isinstance(second, InferResult)
    assert first.exec == Span(begin_ns, begin_ns + EXEC_NS[2], EXEC_NS[2])
    end_ns = first.exec.end_ns + EXEC_NS[1]
    assert second.exec == Span(first.exec.end_ns, end_ns, EXEC_NS[1])
    assert isinstance(third, ErrorResult) and third.code == Code.EXEC_TOO_LATE


def test_the_emulated_gpu_gives_up_armed_execs_alone_and_reports_those_that_are_too_late() -> None:
    gpu = EmulatedGpu(VirtualWorker().profile)

    def launch(op_id: int, latest_ns: int = 10**12) -> None:
        op = Op(
            op_id=op_id,
            kind=OpKind.EXEC,
            gpu_id=0,
            model_id=0,
            action_id=op_id,
            batch_size=1,
            request_count=1,
            model_name="net",
            latest_ns=latest_ns,
        )
        assert gpu.launch(op, now_ns=0) is None

    for op_id, latest_ns in ((1, 10**12), (2, 10**12), (3, 1), (4, 10**12)):
        launch(op_id, latest_ns)
    assert gpu.withdraw(1) is None and gpu.withdraw(9) is None
    withdrawn = gpu.withdraw(2)
    assert withdrawn is not None and withdrawn.code == Code.CANCELLED
    done = gpu.poll(now_ns=EXEC_NS[1])
    assert [(e.op_id, e.code) for e in done if isinstance(e, OpDone)] == [
        (1, 0),
        (3, Code.EXEC_TOO_LATE),
    ]
    assert gpu.next_event_ns() == 2 * EXEC_NS[1]
    assert len(gpu.poll(now_ns=2 * EXEC_NS[1])) == 1 and gpu.next_event_ns() is None


class InterruptedGpu(EmulatedGpu):
    """Reports each exec as if its GPU had done something else for the middle millisecond."""

    def poll(self, *, now_ns: int) -> list[DeviceEvent]:
        return [self._interrupted(event) for event in super().poll(now_ns=now_ns)]

    def _interrupted(self, event: DeviceEvent) -> DeviceEvent:
        if not isinstance(event, OpDone) or event.span.duration_ns != EXEC_NS[2]:
            return event
        begin_ns, end_ns = event.span.begin_ns, event.span.end_ns
        segments = Span(begin_ns, begin_ns + MS, MS), Span(end_ns - MS, end_ns, MS)
        span, pause_ns = joined(segments)
        return OpDone(event.op_id, span, segments=segments, pause_ns=pause_ns)


def test_a_segmented_infer_is_one_action_whose_measured_time_has_no_pause() -> None:
    worker = VirtualWorker()
    worker.devices[0] = InterruptedGpu(worker.profile)
    worker.stepper = type(worker.stepper)(worker.brain, worker.devices, worker._perform)
    worker.serving()
    begin_ns = worker.now
    worker.infer(batch=2)
    worker.run(10 * MS)
    answer = worker.answer()
    assert isinstance(answer, InferResult)
    assert answer.exec == Span(begin_ns, begin_ns + 3 * MS, 2 * MS)
