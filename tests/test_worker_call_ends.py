"""How calls of functions end before their time, and devices that say strange things or arm calls."""

from __future__ import annotations

from typing import Any

from calls_rig import (
    ALL,
    COLD_NS,
    MS,
    ArmingHost,
    CallingWorker,
    function,
    leaf,
    nothing_left,
    parent,
)
from slosched.codes import Code
from slosched.core.worker.calls import CallState
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    Run,
    Step,
)
from slosched.core.worker.interface import CallChained, EndCall
from slosched.core.worker.lanes import PREEMPTIVE_LANES, Role
from slosched.core.worker.state import GpuState, PendingAction
from slosched.core.worker.state import Step as LaneStep
from slosched.messages import (
    CallResult,
    CallResumed,
    CancelCall,
    ChildRequest,
    ControllerHello,
    ErrorResult,
    GpuInfo,
    Span,
    WorkerGoodbye,
    WorkerWelcome,
)
from slosched.units import NS_PER_S

# ----------------------------------------------------------------------------------- ends


def test_a_call_that_waits_is_cancelled_before_it_begins() -> None:
    worker = leaf(5 * MS)
    running, waiting = worker.call(), worker.call()
    worker.give(CancelCall(worker.session, waiting))
    worker.ended(Code.CANCELLED, waiting)
    worker.run(5 * MS)
    assert worker.take(CallResult).action_id == running
    nothing_left(worker)
    assert len(worker.begun) == 1


def test_a_call_that_runs_is_ended_at_once_when_it_is_cancelled() -> None:
    worker = leaf(NS_PER_S)
    number = worker.call()
    worker.run(MS)
    worker.give(CancelCall(worker.session, number))
    worker.ended(Code.CANCELLED, number)
    nothing_left(worker)


def test_a_suspended_call_is_cancelled_and_its_children_are_nobody_else_s() -> None:
    worker = parent(Chain("leaf"), ALL)
    number = worker.call()
    worker.sent.clear()
    worker.give(CancelCall(worker.session, number))
    worker.ended(Code.CANCELLED, number)
    assert any(isinstance(effect, EndCall) for effect in worker.effects)
    assert worker.reply(number, 0) is None
    nothing_left(worker)


def test_a_call_that_waits_to_go_on_is_cancelled() -> None:
    worker = parent(Chain("leaf"), ALL)
    number = worker.call()
    worker.sent.clear()
    worker.call(1)
    worker.reply(number, 0)
    worker.give(CancelCall(worker.session, number))
    worker.ended(Code.CANCELLED, number)
    worker.run(2 * MS)
    assert worker.take(CallResult)
    nothing_left(worker)


def test_to_cancel_what_has_ended_or_never_was_is_fine() -> None:
    worker = leaf(MS)
    number = worker.call()
    worker.run(MS)
    worker.sent.clear()
    worker.give(CancelCall(worker.session, number))
    worker.give(CancelCall(worker.session, 999))
    worker.give(CancelCall(worker.session + 1, number))
    assert worker.brain.dropped == 1
    nothing_left(worker)


def test_a_new_session_begins_without_calls_of_the_old_one() -> None:
    worker = parent(Chain("leaf"), ALL, slots=2)
    suspended, running = worker.call(), worker.call(1)
    worker.call(1), worker.call(1)
    worker.sent.clear()
    worker.give(ControllerHello(5, 7, times_lost=1))
    sent, worker.sent = worker.sent, []
    errors = {each.action_id: each.code for each in sent if isinstance(each, ErrorResult)}
    assert errors[suspended] == errors[running] == Code.PROCESS_ENDED
    assert sorted(errors.values()) == [Code.CANCELLED, 100, 100, 100]
    assert isinstance(sent[-1], WorkerWelcome)
    nothing_left(worker)


def test_a_worker_that_shuts_down_finishes_what_runs_and_ends_what_is_suspended() -> None:
    worker = parent(Chain("leaf"), ALL, slots=1)
    suspended, running, waiting = worker.call(), worker.call(1), worker.call(1)
    worker.sent.clear()
    worker.brain.shutdown(now_ns=worker.now)
    worker.stepper.step(worker.now)
    worker.ended(Code.PROCESS_ENDED, suspended)
    assert worker.take(WorkerGoodbye)
    worker.ended(Code.CANCELLED, waiting)
    late = worker.call(1)
    worker.ended(Code.SHUTTING_DOWN, late)
    worker.run(2 * MS)
    assert worker.take(CallResult).action_id == running
    nothing_left(worker)


def test_a_call_that_awaits_while_its_worker_shuts_down_is_ended() -> None:
    worker = parent(Run(MS), Chain("leaf"), ALL)
    number = worker.call()
    worker.brain.shutdown(now_ns=worker.now)
    worker.run(MS)
    assert worker.take(WorkerGoodbye) and worker.take(ChildRequest)
    worker.ended(Code.PROCESS_ENDED, number)
    nothing_left(worker)


def test_a_call_whose_answers_were_lost_is_ended_a_minute_after_its_deadline() -> None:
    worker = parent(Chain("leaf"), ALL)
    number = worker.call(deadline_ns=worker.now + NS_PER_S)
    worker.sent.clear()
    worker.run(60 * NS_PER_S)
    assert worker.sent == []
    worker.run(2 * NS_PER_S)
    assert "1 children" in worker.ended(Code.CALL_OVER_LIMIT, number)
    nothing_left(worker)


def test_lost_devices_fail_every_call() -> None:
    worker = parent(Chain("leaf"), ALL)
    numbers = [worker.call(), worker.call(1), worker.call(1)]
    worker.sent.clear()
    assert worker.brain.devices_lost("it is gone", now_ns=worker.now) == 3
    worker.stepper.step(worker.now)
    for number in numbers:
        worker.ended(Code.PROCESS_ENDED, number)
    assert worker.brain._ledger.calls.begun == {}


# ------------------------------------------------------------------------- strange devices


def test_a_call_that_awaits_a_child_that_it_did_not_ask_for_is_ended() -> None:
    worker = parent(Chain("leaf"), AwaitAll((0, 4)))
    worker.call()
    assert worker.take(ChildRequest)
    assert "child 4" in worker.ended(Code.RUNTIME_ERROR)
    nothing_left(worker)


def test_a_call_whose_children_are_miscounted_is_ended() -> None:
    worker = parent(Run(MS))
    number = worker.call()
    key = next(iter(worker.brain._ledger.calls.begun))
    worker.stepper.handle(CallChained(key, 3, "leaf", 5), now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert "child 3 after 0" in worker.ended(Code.RUNTIME_ERROR, number)
    nothing_left(worker)


def test_a_call_that_asks_faster_than_it_is_answered_is_ended() -> None:
    worker = parent(Chain("leaf", 20_001), ALL)
    number = worker.call()
    requests = [each for each in worker.sent if isinstance(each, ChildRequest)]
    assert len(requests) == 20_000
    worker.sent = worker.sent[20_000:]
    assert "20000" in worker.ended(Code.CALL_OVER_LIMIT, number)
    nothing_left(worker)


def test_cold_starts_take_their_time() -> None:
    worker = CallingWorker([function("f", Run(MS))])
    worker.hello()
    worker.load_model("f", 0)
    worker.sent.clear()
    begin = worker.now
    worker.load_weights(0)
    worker.run(COLD_NS - 1)
    assert worker.sent == []
    worker.run(1)
    assert worker.sent[0].span == Span(begin, begin + COLD_NS, COLD_NS)


def test_nothing_goes_beside_a_call_on_a_preemptive_gpu() -> None:
    """An urgent Infer interrupts another Infer at a boundary; a call has none."""
    worker = CallingWorker([function("f", Run(MS))])
    gpu = GpuState(GpuInfo(0, "gpu", 9, 1000), PREEMPTIVE_LANES)
    pipeline, started = worker.brain._pipeline, []
    lane = gpu.lanes[Role.EXEC]

    def waiting(key: int, priority: int) -> PendingAction[Any]:
        action: PendingAction[Any] = PendingAction(key, worker.brain._calls, None, b"", 0)
        action.gpu, action.priority = gpu, priority
        step = LaneStep(Role.EXEC, lambda action, now_ns: started.append(action), lambda *_: None)
        pipeline.enqueue(lane, 0, action, step)
        return action

    running, urgent = waiting(1, 0), waiting(2, 5)
    pipeline.run_due(0)
    assert started[0] is urgent  # the lane was empty
    started.clear()
    lane.started.append(running)
    urgent = waiting(3, 5)
    pipeline.run_due(0)
    assert started == [urgent]  # beside an Infer
    started.clear()
    running.call = CallState(1, 1)
    waiting(4, 5)
    pipeline.run_due(0)
    assert started == []


# ------------------------------------------------------------------------ devices that arm


def arming(*steps: Step) -> CallingWorker:
    functions = [function("parent", *steps), function("leaf", Run(5 * MS))]
    return CallingWorker(functions, host_type=ArmingHost).serving()


def test_a_call_that_is_armed_is_cancelled_before_it_begins() -> None:
    worker = arming(Run(MS))
    running, armed = worker.call(1), worker.call(1)
    worker.give(CancelCall(worker.session, armed))
    worker.ended(Code.CANCELLED, armed)
    worker.run(5 * MS)
    assert worker.take(CallResult).action_id == running
    assert len(worker.begun) == 1
    nothing_left(worker)


def test_a_call_that_is_armed_to_go_on_is_cancelled_with_its_process() -> None:
    worker = arming(Chain("leaf"), ALL, Run(MS))
    number = worker.call()
    worker.sent.clear()
    running = worker.call(1)
    worker.reply(number, 0)
    assert worker.take(CallResumed)  # its device has it, and waits for the slot
    worker.give(CancelCall(worker.session, number))
    worker.ended(Code.CANCELLED, number)
    worker.run(5 * MS)
    assert worker.take(CallResult).action_id == running
    nothing_left(worker)


def test_a_call_that_was_to_go_on_when_its_worker_ends_is_not_taken_for_one_that_never_began() -> (
    None
):
    worker = arming(Chain("leaf"), ALL, Run(MS))
    number = worker.call()
    worker.sent.clear()
    running = worker.call(1)
    worker.reply(number, 0)
    assert worker.take(CallResumed)
    worker.brain.shutdown(now_ns=worker.now)
    worker.run(5 * MS)
    assert worker.take(WorkerGoodbye)
    worker.ended(Code.PROCESS_ENDED, number)
    assert worker.take(CallResult).action_id == running
    nothing_left(worker)


def test_armed_calls_begin_one_after_the_other_at_their_times() -> None:
    worker = arming(Run(MS))
    begin = worker.now
    for at_ns in (0, 0, 20 * MS):
        worker.call(1, earliest_ns=begin + at_ns)
    worker.run(40 * MS)
    starts = [worker.take(CallResult).exec.begin_ns - begin for _ in range(3)]
    assert starts == [0, 5 * MS, 20 * MS]
