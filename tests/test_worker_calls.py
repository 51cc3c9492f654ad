"""What the worker's brain does with calls of functions: this arrives, that follows."""

from __future__ import annotations

import pytest

from calls_rig import (
    ALL,
    FOREVER_NS,
    MS,
    CallingWorker,
    function,
    leaf,
    nothing_left,
    parent,
)
from slosched.codes import Code
from slosched.core.worker.emulated import prepare_emulated
from slosched.core.worker.emulated_calls import (
    AwaitAll,
    Chain,
    EmulatedHost,
    Exit,
    Raise,
    Return,
    Run,
    Step,
    TakeBack,
)
from slosched.core.worker.interface import CallAwaits, CallLost, Op, OpDone, OpKind, PrepareModel
from slosched.messages import (
    NO_SPAN,
    CallResult,
    CallResumed,
    CallSuspended,
    ChildCancel,
    ChildRequest,
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    FunctionInfo,
    Infer,
    LoadModelResult,
    Span,
    UnloadModel,
)
from worker_rig import VirtualWorker

# ------------------------------------------------------------------------------- one call


def test_the_welcome_has_the_functions_and_the_slots() -> None:
    worker = CallingWorker([function("f"), function("g")], slots=3)
    welcome = worker.hello()
    assert welcome.functions == ("f", "g")
    assert welcome.loadable == ("f", "g", "net")
    assert [(gpu.host, gpu.slots, gpu.pages) for gpu in welcome.gpus] == [(True, 3, 100)]


def test_a_call_runs_in_a_slot_and_is_answered_with_its_result() -> None:
    worker = leaf(2 * MS, Return(500))
    begin = worker.now
    number = worker.call()
    worker.run(2 * MS)
    result = worker.take(CallResult)
    assert result.action_id == number and result.gpu_id == 0
    assert result.exec == Span(begin, begin + 2 * MS, 2 * MS)
    assert (result.output_sizes, result.children) == ((500,), 0)
    nothing_left(worker)


def test_a_result_of_no_bytes_has_no_frame() -> None:
    worker = leaf(1 * MS, Return(0))
    worker.call(input_size=0, frames=())
    worker.run(MS)
    assert worker.take(CallResult).output_sizes == (0,)
    nothing_left(worker)


@pytest.mark.parametrize("slots", [1, 2, 8])
def test_as_many_calls_run_at_a_time_as_there_are_slots(slots: int) -> None:
    worker = CallingWorker([function("f", Run(2 * MS))], slots).serving()
    begin = worker.now
    for _ in range(10):
        worker.call()
    worker.run(100 * MS)
    ends = [worker.take(CallResult).exec.end_ns - begin for _ in range(10)]
    assert ends == [(1 + i // slots) * 2 * MS for i in range(10)]
    nothing_left(worker)


def test_a_call_begins_within_its_window_or_not_at_all() -> None:
    worker = leaf(5 * MS)
    begin = worker.now
    worker.call(earliest_ns=begin + 3 * MS)
    late = worker.call(earliest_ns=begin + 4 * MS, latest_ns=begin + 7 * MS)
    worker.run(20 * MS)
    result = worker.take(CallResult)
    assert result.exec.begin_ns == begin + 3 * MS
    assert "1ms after latest" in worker.ended(Code.EXEC_TOO_LATE, late)
    assert len(worker.begun) == 1
    nothing_left(worker)


@pytest.mark.parametrize(
    ("last", "code", "said"),
    [
        (Raise("Traceback: ValueError: no"), Code.CALL_RAISED, "ValueError"),
        (Exit(), Code.MODEL_PROCESS_ENDED, "process"),
        (Run(60 * MS), Code.CALL_OVER_LIMIT, "50ms"),
    ],
)
def test_a_call_that_ends_badly_has_its_code_and_the_next_one_runs(
    last: Step, code: Code, said: str
) -> None:
    functions = [
        function("bad", Run(MS), last, info=FunctionInfo(limit_ns=50 * MS)),
        function("good", Run(MS)),
    ]
    worker = CallingWorker(functions).serving()
    bad = worker.call(0)
    good = worker.call(1)
    worker.run(100 * MS)
    assert said in worker.ended(code, bad)
    assert worker.take(CallResult).action_id == good
    nothing_left(worker)


def test_a_long_traceback_keeps_its_end() -> None:
    worker = leaf(MS, Raise("x" * 9000 + "ValueError: the end"))
    worker.call()
    worker.run(MS)
    reason = worker.ended(Code.CALL_RAISED)
    assert len(reason) == 4000 and reason.endswith("ValueError: the end")


# ------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"model_id": 7}, Code.COPY_INPUT_UNKNOWN_MODEL, "7"),
        ({"gpu_id": 3}, Code.INVALID_GPU, "no GPU 3"),
        ({"size_class": 2}, Code.COPY_INPUT_INVALID_INPUT, "0 to 1"),
        ({"size_class": -1}, Code.COPY_INPUT_INVALID_INPUT, "0 to 1"),
        ({"input_size": 17}, Code.COPY_INPUT_BAD_SIZES, "17"),
        ({"frames": (16, 16)}, Code.COPY_INPUT_BAD_SIZES, "16"),
        ({"frames": ()}, Code.COPY_INPUT_BAD_SIZES, "16"),
        ({"input_size": 99, "frames": (99,)}, Code.COPY_INPUT_INVALID_INPUT, "at most 64"),
        ({"earliest_ns": 5, "latest_ns": 4}, Code.INVALID_ACTION, "after latest"),
    ],
)
def test_a_call_that_cannot_be_is_refused(fields: dict[str, object], code: Code, said: str) -> None:
    worker = leaf(size_classes=2, max_payload_bytes=64)
    worker.call(**fields)  # type: ignore[arg-type]
    assert said in worker.ended(code)
    nothing_left(worker)
    assert worker.begun == []


def test_a_function_that_is_not_ready_is_not_called() -> None:
    worker = CallingWorker([function("f", Run(MS))])
    worker.hello()
    worker.load_model("f", 0)
    worker.sent.clear()
    worker.call()
    assert "not ready" in worker.ended(Code.EXEC_WEIGHTS_MISSING)
    nothing_left(worker)


def test_a_host_runs_no_model_and_a_function_no_infer() -> None:
    worker = leaf()
    infer = Infer(
        session=worker.session,
        action_id=50,
        model_id=0,
        gpu_id=0,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
        expected_duration_ns=0,
        batch_size=1,
        request_count=1,
    )
    worker.give(infer)
    assert "a Call runs" in worker.ended(Code.INVALID_ACTION)


def test_a_function_of_a_gpu_is_not_made_ready_on_a_host() -> None:
    worker = CallingWorker([function("f", info=FunctionInfo(gpu=True))])
    worker.hello()
    worker.load_model("f", 0)
    worker.sent.clear()
    worker.load_weights(0)
    assert "runs on a GPU" in worker.ended(Code.INVALID_GPU)


def test_a_function_stays_ready_while_a_call_is_unfinished() -> None:
    worker = parent(Chain("leaf"), ALL)
    number = worker.call()
    assert worker.take(ChildRequest) and worker.take(CallSuspended)
    evict = EvictWeights(
        session=worker.session,
        action_id=60,
        model_id=0,
        gpu_id=0,
        earliest_ns=0,
        latest_ns=FOREVER_NS,
    )
    worker.give(evict)
    worker.ended(Code.WEIGHTS_IN_USE)
    worker.give(UnloadModel(worker.session, 61, 0))
    worker.ended(Code.WEIGHTS_IN_USE)
    worker.next_action = 70
    worker.reply(number, 0)
    assert worker.take(CallResumed) and worker.take(CallResult)
    worker.give(
        EvictWeights(
            session=worker.session,
            action_id=71,
            model_id=0,
            gpu_id=0,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
        )
    )
    assert worker.take(EvictWeightsResult)


def test_a_suspended_call_whose_process_ends_is_answered() -> None:
    worker = parent(Chain("leaf"), ALL, slots=2)
    number = worker.call()
    worker.sent.clear()
    key = next(iter(worker.brain._ledger.calls.begun))
    worker.host._push(worker.now, None, CallLost(key, Code.MODEL_PROCESS_ENDED, "it died"))
    worker.run(MS)
    assert worker.ended(Code.MODEL_PROCESS_ENDED, number) == "it died"
    assert worker.reply(number, 0) is None
    nothing_left(worker)


def test_the_process_of_a_call_that_runs_again_is_reported_by_its_op_alone() -> None:
    worker = parent(Chain("leaf"), ALL, Run(2 * MS))
    number = worker.call()
    worker.sent.clear()
    key = next(iter(worker.brain._ledger.calls.begun))
    worker.reply(number, 0)
    assert worker.take(CallResumed)
    worker.stepper.handle(CallLost(key, Code.MODEL_PROCESS_ENDED, "late"), now_ns=worker.now)
    worker.run(2 * MS)
    assert worker.take(CallResult).action_id == number
    nothing_left(worker)


def test_a_slot_without_a_process_for_its_call_is_no_begin() -> None:
    """Its template ended while the call, which had a slot, waited for a process."""
    worker = CallingWorker([function("leaf", Run(MS))], host_type=NoProcess).serving()
    number = worker.call()
    worker.run(2 * MS)
    error = worker.take(ErrorResult)
    assert (error.action_id, error.code, error.part) == (
        number,
        Code.EXEC_WEIGHTS_MISSING,
        NO_SPAN,
    )
    nothing_left(worker)


class NoProcess(EmulatedHost):
    """A host whose calls get no process for a while, and then their function is gone."""

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        if op.kind is not OpKind.CALL:
            return super().launch(op, now_ns=now_ns)
        self.drop_inputs(op.action_id)
        span = Span(now_ns - MS, now_ns, MS)
        return OpDone(op.op_id, span, Code.EXEC_WEIGHTS_MISSING, "its template ended")


def test_a_process_that_held_a_function_ready_may_end_while_its_calls_run() -> None:
    worker = leaf()
    worker.call()
    worker.host.lose("leaf", now_ns=worker.now)
    worker.run(MS)
    worker.call()
    worker.run(2 * MS)
    assert worker.take(CallResult)
    worker.ended(Code.EXEC_WEIGHTS_MISSING)
    nothing_left(worker)


# ----------------------------------------------------------------------------- suspension


def test_a_call_that_awaits_gives_its_slot_to_its_child() -> None:
    worker = parent(Run(MS), Chain("leaf", slo_ns=9 * MS, size_class=0, near="k"), ALL, Run(4 * MS))
    begin = worker.now
    number = worker.call()
    worker.run(MS)
    child = worker.take(ChildRequest)
    assert (child.action_id, child.child, child.function) == (number, 0, "leaf")
    assert (child.slo_ns, child.near, child.near_child, child.ran_ns) == (9 * MS, "k", -1, MS)
    suspended = worker.take(CallSuspended)
    assert (suspended.ran_ns, suspended.children) == (MS, (0,))
    assert suspended.part == Span(begin, begin + MS, MS)
    worker.call(1)  # the child, in the only slot
    worker.run(2 * MS)
    assert worker.take(CallResult).exec.begin_ns == begin + MS
    worker.run(10 * MS)
    resumed_ns = worker.now
    worker.reply(number, 0)
    assert worker.take(CallResumed).action_id == number
    worker.run(4 * MS)
    result = worker.take(CallResult)
    assert result.exec == Span(begin, resumed_ns + 4 * MS, 5 * MS)
    assert result.children == 1
    nothing_left(worker)


def test_a_call_goes_on_when_all_that_it_awaits_are_answered_in_any_order() -> None:
    worker = parent(Chain("leaf", 3), ALL)
    number = worker.call()
    for child in range(3):
        assert worker.take(ChildRequest).child == child
    assert worker.take(CallSuspended).children == (0, 1, 2)
    for child in (2, 0):
        assert worker.reply(number, child) is not None
        assert worker.sent == []
    assert worker.reply(number, 0) is None  # a second time
    assert worker.sent == []
    worker.reply(number, 1)
    assert worker.take(CallResumed) and worker.take(CallResult)
    assert worker.reply(number, 1) is None
    nothing_left(worker)


def test_an_answer_that_comes_before_it_is_awaited_is_kept() -> None:
    worker = parent(Chain("leaf"), Run(5 * MS), ALL, Run(MS))
    number = worker.call()
    assert worker.take(ChildRequest)
    worker.run(2 * MS)
    worker.reply(number, 0)
    worker.run(4 * MS)
    assert worker.take(CallResult).exec.duration_ns == 6 * MS
    nothing_left(worker)


def test_the_brain_lets_a_call_go_on_that_awaits_what_was_answered() -> None:
    """A device may say so, because the answer and the suspension cross."""
    worker = parent(Chain("leaf"), Run(5 * MS))
    number = worker.call()
    assert worker.take(ChildRequest)
    worker.reply(number, 0)
    key = next(iter(worker.brain._ledger.calls.begun))
    life = worker.host._lives[key]
    op_id, span = life.op_id, worker.host._part(life, worker.now)
    worker.stepper.handle(CallAwaits(op_id, span, (0,)), now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert worker.take(CallSuspended) and worker.take(CallResumed)
    assert worker.take(CallResult).action_id == number


def test_a_call_that_goes_on_has_precedence_over_new_ones_but_not_over_running_ones() -> None:
    worker = parent(Chain("leaf"), ALL, Run(MS))
    first = worker.call()
    assert worker.take(ChildRequest) and worker.take(CallSuspended)
    running, waiting = worker.call(1), worker.call(1)
    worker.reply(first, 0)
    assert worker.sent == []
    worker.run(20 * MS)
    assert worker.take(CallResult).action_id == running
    assert worker.take(CallResumed).action_id == first
    assert worker.take(CallResult).action_id == first
    assert worker.take(CallResult).action_id == waiting
    nothing_left(worker)


def test_a_failed_child_raises_in_its_parent() -> None:
    worker = parent(Chain("leaf"), ALL, Run(MS))
    number = worker.call()
    assert worker.take(ChildRequest) and worker.take(CallSuspended)
    worker.reply(number, 0, Code.CALL_RAISED, "Traceback: KeyError: 'x'")
    assert worker.take(CallResumed)
    reason = worker.ended(Code.CALL_RAISED)
    assert "child 0" in reason and "KeyError: 'x'" in reason
    nothing_left(worker)


def test_a_child_that_is_taken_back_is_answered_all_the_same() -> None:
    worker = parent(Chain("leaf", 2), TakeBack(1), AwaitAll(catch=True), Run(MS))
    number = worker.call()
    assert worker.take(ChildRequest) and worker.take(ChildRequest)
    cancel = worker.take(ChildCancel)
    assert (cancel.action_id, cancel.child) == (number, 1)
    assert worker.take(CallSuspended)
    worker.reply(number, 0)
    assert worker.sent == []
    worker.reply(number, 1, Code.CANCELLED)
    worker.run(MS)
    assert worker.take(CallResumed) and worker.take(CallResult)
    nothing_left(worker)


def test_sixty_four_calls_nest_in_one_slot() -> None:
    functions = [
        *(function(f"f{i}", Run(MS), Chain(f"f{i + 1}"), ALL, Run(MS)) for i in range(63)),
        function("f63", Run(MS)),
    ]
    worker = CallingWorker(functions).serving()
    parents: list[int] = []
    calls = [worker.call(0)]
    for level in range(1, 64):
        worker.run(MS)
        assert worker.take(ChildRequest).function == f"f{level}"
        assert worker.take(CallSuspended)
        parents.append(calls[-1])
        calls.append(worker.call(level))
    assert worker.brain._ledger.calls.suspended == 63
    worker.run(MS)
    assert worker.take(CallResult).action_id == calls[-1]
    while parents:
        worker.reply(parents[-1], 0)
        worker.run(MS)
        assert worker.take(CallResumed)
        assert worker.take(CallResult).action_id == parents.pop()
    nothing_left(worker)


def test_unfinished_calls_are_bounded_and_the_bound_gets_free_again() -> None:
    worker = parent(Chain("leaf"), ALL, most_calls=2)
    first, _ = worker.call(), worker.call()
    worker.sent.clear()
    third = worker.call(1)
    reason = worker.ended(Code.TOO_MANY_CALLS, third)
    assert "2 unfinished calls" in reason and "2 of them await" in reason
    worker.reply(first, 0)
    assert worker.take(CallResumed) and worker.take(CallResult)
    worker.call(1)
    worker.run(2 * MS)
    assert worker.take(CallResult)


# -------------------------------------------------------------------------------- preparation


def test_a_function_whose_preparation_hangs_holds_up_no_other() -> None:
    worker = VirtualWorker(prepares=False)
    worker.brain.prepare_at_once(2)
    worker.hello()
    worker.load_model("net", 0)
    worker.load_model("other", 1)
    first, second = [each for each in worker.effects if isinstance(each, PrepareModel)]
    prepared = prepare_emulated(worker.profile, second, now_ns=worker.now)
    worker.stepper.handle(prepared, now_ns=worker.now)
    worker.stepper.step(worker.now)
    assert isinstance(worker.answer(), LoadModelResult)
    assert first.name == "net", "the one that is not prepared yet was asked for first"


def test_two_preparations_of_one_instance_leave_one() -> None:
    worker = VirtualWorker(prepares=False)
    worker.brain.prepare_at_once(3)
    worker.hello()
    for name in ("net", "net", "other"):
        worker.load_model(name, 0)
    asked = [each for each in worker.effects if isinstance(each, PrepareModel)]
    assert len(asked) == 3
    for each in asked:
        prepared = prepare_emulated(worker.profile, each, now_ns=worker.now)
        worker.stepper.handle(prepared, now_ns=worker.now)
    worker.stepper.step(worker.now)
    first, second, third = worker.answers()
    assert isinstance(first, LoadModelResult) and isinstance(second, LoadModelResult)
    assert isinstance(third, ErrorResult)
    assert (third.code, "is 'net' already" in third.reason) == (Code.INVALID_MODEL_ID, True)
