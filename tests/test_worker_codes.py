"""Every code that a worker can answer with, and that each comes once, with words."""

from __future__ import annotations

import pytest

from slosched.codes import ActionType, Code
from slosched.core.worker.interface import (
    EvictPages,
    ModelPrepared,
    Op,
    OpDone,
    OpKind,
    PrepareModel,
)
from slosched.core.worker.stepping import Stepper
from slosched.messages import (
    NO_SPAN,
    ErrorResult,
    EvictWeights,
    InferResult,
    LoadModelResult,
    Span,
    UnloadModel,
)
from worker_rig import EXEC_NS, FOREVER_NS, MS, WEIGHTS_NS, VirtualWorker, small_profile


def evict(worker: VirtualWorker, model_id: int = 0, **more: int) -> None:
    fields = {"gpu_id": 0, "earliest_ns": 0, "latest_ns": FOREVER_NS, **more}
    worker.give(EvictWeights(worker.session, worker.action_id(), model_id=model_id, **fields))


def test_10_a_model_that_the_worker_does_not_have() -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.load_model("../../etc/passwd")
    code, reason = worker.error()
    assert code == Code.UNKNOWN_MODEL and "net, other" in reason


def test_10_unloading_what_was_never_loaded() -> None:
    worker = VirtualWorker().serving()
    worker.give(UnloadModel(worker.session, worker.action_id(), 9))
    assert worker.error()[0] == Code.UNKNOWN_MODEL


def test_11_a_model_that_waited_too_long_for_its_preparation() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    worker.run(0)
    worker.load_model("net", 0)
    worker.brain._link.clock.add(  # the clocks must agree before a window means anything
        sent_ns=worker.now, received_ns=worker.now, answered_ns=worker.now, returned_ns=worker.now
    )
    worker.load_model("other", 1, latest_ns=worker.now + MS)
    worker.run(5 * MS)
    prepare = next(effect for effect in worker.effects if isinstance(effect, PrepareModel))
    worker.stepper.handle(
        ModelPrepared(prepare.action_id, worker.profile.models["net"], NO_SPAN), now_ns=worker.now
    )
    worker.stepper.step(worker.now)
    first, second = worker.answers()
    assert isinstance(first, LoadModelResult)
    assert isinstance(second, ErrorResult) and second.code == Code.LOAD_MODEL_TOO_LATE


@pytest.mark.parametrize(
    "copies, max_batch, model_id", [(0, 1, 0), (10**9, 1, 0), (1, 0, 0), (1, 1, -1)]
)
def test_12_nonsense(copies: int, max_batch: int, model_id: int) -> None:
    worker = VirtualWorker()
    worker.hello()
    worker.load_model("net", model_id, copies, max_batch=max_batch)
    assert worker.error()[0] == Code.INVALID_ACTION


def test_12_a_window_that_ends_before_it_begins() -> None:
    worker = VirtualWorker().serving()
    worker.infer(earliest=worker.now + 1, latest=worker.now)
    assert worker.error()[0] == Code.INVALID_ACTION
    worker.load_weights(earliest=2, latest=1)
    assert worker.error()[0] == Code.INVALID_ACTION


def test_13_a_gpu_that_is_not_there() -> None:
    worker = VirtualWorker(gpus=2).serving()
    worker.infer(gpu_id=2)
    code, reason = worker.error()
    assert code == Code.INVALID_GPU and "0, 1" in reason
    worker.load_weights(gpu_id=-1)
    assert worker.error()[0] == Code.INVALID_GPU


def test_22_weights_of_a_queued_and_of_a_running_inference_are_not_evicted() -> None:
    worker = VirtualWorker().serving()
    worker.infer(earliest=worker.now + 20 * MS)
    evict(worker)
    assert worker.error()[0] == Code.WEIGHTS_IN_USE
    worker.run(21 * MS)  # it runs
    evict(worker)
    assert worker.error()[0] == Code.WEIGHTS_IN_USE
    worker.give(UnloadModel(worker.session, worker.action_id(), 0))
    assert worker.error()[0] == Code.WEIGHTS_IN_USE
    worker.run(20 * MS)
    assert isinstance(worker.answer(), InferResult)
    evict(worker)
    worker.answer()
    assert worker.brain.free_pages(0) == 10


@pytest.mark.parametrize("batch, count", [(0, 0), (1, 2), (2, 0), (-1, -1)])
def test_31_a_batch_that_cannot_carry_its_requests(batch: int, count: int) -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=batch, count=count)
    assert worker.error()[0] == Code.INVALID_BATCH_SIZE


def test_73_a_batch_larger_than_every_class() -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=5)
    code, reason = worker.error()
    assert code == Code.COPY_INPUT_INVALID_BATCH_SIZE and "4" in reason


def test_40_an_id_that_is_another_model() -> None:
    worker = VirtualWorker().serving()
    worker.load_model("other", 1, copies=3)
    code, reason = worker.error()
    assert code == Code.INVALID_MODEL_ID and "'net'" in reason


def test_41_or_2_a_model_whose_preparation_fails() -> None:
    worker = VirtualWorker(prepares=False)
    worker.hello()
    for given, expected in ((Code.INVALID_MODEL_PATH, 41), (0, 2)):
        key = worker.load_model()
        assert key is not None
        failed = ModelPrepared(key, None, NO_SPAN, code=given, reason="broken")
        worker.stepper.handle(failed, now_ns=worker.now)
        worker.stepper.step(worker.now)
        assert worker.error() == (expected, "broken")


def test_51_61_and_71_after_latest() -> None:
    worker = VirtualWorker().serving()
    past = worker.now - 1
    worker.load_weights(latest=past)
    assert worker.error()[0] == Code.LOAD_WEIGHTS_TOO_LATE
    evict(worker, latest_ns=past)
    assert worker.error()[0] == Code.EVICT_WEIGHTS_TOO_LATE
    worker.infer(latest=past)
    code, reason = worker.error()
    assert code == Code.COPY_INPUT_TOO_LATE and "1ns after latest" in reason


def test_81_when_the_gpu_is_busy_until_after_latest() -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=4)
    worker.infer(latest=worker.now + EXEC_NS[4] - 1)
    worker.infer(latest=worker.now + EXEC_NS[4])  # exactly in time is in time
    worker.run(50 * MS)
    first, late, third = worker.answers()
    assert isinstance(first, InferResult) and isinstance(third, InferResult)
    assert isinstance(late, ErrorResult) and late.code == Code.EXEC_TOO_LATE
    assert late.action_type == ActionType.INFER
    assert third.exec.begin_ns == first.exec.end_ns


def test_52_62_and_72_ids_that_were_never_loaded() -> None:
    worker = VirtualWorker().serving()
    worker.load_weights(9)
    assert worker.error()[0] == Code.LOAD_WEIGHTS_UNKNOWN_MODEL
    evict(worker, 9)
    assert worker.error()[0] == Code.EVICT_WEIGHTS_UNKNOWN_MODEL
    worker.infer(9)
    assert worker.error()[0] == Code.COPY_INPUT_UNKNOWN_MODEL


def test_53_no_pages_left_and_nothing_is_taken() -> None:
    worker = VirtualWorker(profile=small_profile(pages=5)).serving()
    worker.load_weights(1)
    code, reason = worker.error()
    assert code == Code.LOAD_WEIGHTS_INSUFFICIENT_CACHE and "3 page(s), 2 of 5" in reason
    assert worker.brain.free_pages(0) == 2
    evict(worker)
    worker.answer()
    worker.load_weights(1)
    worker.run(WEIGHTS_NS)
    worker.answer()
    assert worker.brain.free_pages(0) == 2


def test_63_nothing_to_evict() -> None:
    worker = VirtualWorker().serving(loaded=False)
    evict(worker)
    assert worker.error()[0] == Code.EVICT_WEIGHTS_NOT_IN_CACHE


@pytest.mark.parametrize(
    "sizes, frames, code",
    [
        ((12,), (12,), 77),  # one size for two requests
        ((12, 12), (12,), 77),  # a frame is missing
        ((12, 0), (12, 12), 77),  # a frame too many
        ((12, 12), (12, 13), 77),  # another length than was said
        ((), (12,), 77),
        ((13, 12), (13, 12), 75),  # not the model's input
    ],
)
def test_75_and_77_inputs_of_a_wrong_size(
    sizes: tuple[int, ...], frames: tuple[int, ...], code: int
) -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=2, sizes=sizes, frames=frames)
    assert worker.error()[0] == code


@pytest.mark.parametrize("sizes", [(), (12, 0)])
def test_75_no_input_where_none_is_made_up(sizes: tuple[int, ...]) -> None:
    worker = VirtualWorker(deny_input=True).serving()
    worker.infer(batch=2, sizes=sizes)
    code, reason = worker.error()
    assert code == Code.COPY_INPUT_INVALID_INPUT and "allow_zero_size_inputs" in reason


def test_82_weights_that_are_absent_or_still_on_their_way() -> None:
    worker = VirtualWorker().serving(loaded=False)
    worker.infer()
    assert worker.error()[0] == Code.EXEC_WEIGHTS_MISSING
    worker.load_weights()
    worker.infer()
    assert worker.error()[0] == Code.EXEC_WEIGHTS_MISSING


def test_84_weights_reloaded_under_a_running_inference() -> None:
    worker = VirtualWorker().serving()
    worker.infer(batch=4)
    worker.run(1 * MS)
    worker.load_weights()
    worker.run(50 * MS)
    codes = [answer.code for answer in worker.answers() if isinstance(answer, ErrorResult)]
    assert codes == [Code.EXEC_CONCURRENT_WEIGHTS_MODIFICATION]


class BrokenGpu:
    """A device on which the ops of one kind fail."""

    steady = False
    free_copies = False
    arm_ahead_ns = 0

    def withdraw(self, op_id: int) -> None:
        return None

    def __init__(self, kind: OpKind) -> None:
        self.kind = kind
        self.done: list[OpDone] = []

    def launch(self, op: Op, *, now_ns: int) -> None:
        code = Code.RUNTIME_ERROR if op.kind is self.kind else Code.OK
        self.done.append(OpDone(op.op_id, Span(now_ns, now_ns, 0), code=code, reason="it broke"))

    def poll(self, *, now_ns: int) -> list[OpDone]:
        done, self.done = self.done, []
        return done

    def next_event_ns(self) -> int | None:
        return 0 if self.done else None


@pytest.mark.parametrize(
    "kind", [OpKind.LOAD_WEIGHTS, OpKind.COPY_INPUT, OpKind.EXEC, OpKind.COPY_OUTPUT]
)
def test_2_a_device_that_fails_and_no_page_is_lost(kind: OpKind) -> None:
    worker = VirtualWorker()
    worker.stepper = Stepper(worker.brain, {0: BrokenGpu(kind)}, worker._perform)
    worker.serving(loaded=False)
    worker.load_weights()
    if kind is OpKind.LOAD_WEIGHTS:
        assert worker.error() == (Code.RUNTIME_ERROR, "it broke")
        assert worker.brain.free_pages(0) == 10
        assert EvictPages(0, 0) in worker.effects
        return
    worker.answer()
    worker.infer()
    assert worker.error() == (Code.RUNTIME_ERROR, "it broke")
    evict(worker)  # nothing keeps the weights in use
    worker.answer()
    assert worker.brain.free_pages(0) == 10 and worker.brain.idle


def test_1_and_3_at_shutdown_what_runs_ends_and_the_rest_is_refused() -> None:
    worker = VirtualWorker(prepares=False)
    worker.prepares = True
    worker.serving()
    worker.infer(batch=4)
    worker.infer()
    worker.infer(earliest=worker.now + 100 * MS)
    worker.prepares = False
    worker.load_model("other", 7)
    worker.run(1 * MS)
    worker.brain.shutdown(now_ns=worker.now)
    worker.infer()
    codes = [answer.code for answer in worker.answers() if isinstance(answer, ErrorResult)]
    assert sorted(codes) == [1, 1, 1, 3]
    assert not worker.brain.idle
    worker.run(10 * MS)
    assert isinstance(worker.answer(), InferResult)
    assert worker.brain.idle
