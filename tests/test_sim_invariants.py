"""The checker itself: that it catches what it should, and forgets what is over."""

from __future__ import annotations

import pytest

from made_messages import an_infer_result
from scheduler_rig import MS, T0, Rig
from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import RequestDone, ToWorker
from slosched.core.timeline import Timeline
from slosched.messages import Infer, InferResult, ModelInfo, Span


def run_one_on_each_gpu(rig: Rig, model_id: int, *, at_ms: float, begin_ms: float) -> None:
    """Enough requests that both GPUs get work, each reported to begin at `begin_ms`."""
    already = len(rig.to_worker(Infer))
    for _ in range(16):
        rig.infer(model_id, slo_ms=100)
    rig.step(at_ms)
    sent = rig.to_worker(Infer)[already:]
    assert {i.gpu_id for i in sent} == {0, 1}
    first = [next(i for i in sent if i.gpu_id == g) for g in (0, 1)]
    rig.now_ns += 2 * MS
    for infer in first:
        rig.finish(infer, begin_ms=begin_ms)
    rig.step()


def test_an_exec_that_begins_before_the_one_ahead_ended_is_a_violation() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=100)
    rig.step(0)
    (first,) = rig.outstanding()
    rig.finish(first, begin_ms=1)
    rig.step(1)
    rig.infer(model, slo_ms=100)
    rig.step(1.5)
    (second,) = rig.outstanding()
    with pytest.raises(InvariantViolated, match="before the one ahead of it ended"):
        rig.finish(second, begin_ms=1.6)


def test_a_restarted_worker_has_no_past_on_any_of_its_gpus() -> None:
    rig, (model,) = Rig.ready(gpus=2)
    ahead_ns = rig.now_ns + 10_000 * MS
    for gpu_id in (0, 1):  # a report far ahead of the clock, as after a restart with another clock
        rig.checker._execs[0, gpu_id] = Timeline([(ahead_ns - MS, ahead_ns)])
    rig.checker._execs[1, 0] = kept = Timeline([(rig.now_ns - MS, rig.now_ns)])
    rig.checker._session_of[0] = 49  # the process before this one
    run_one_on_each_gpu(rig, model.model_id, at_ms=0, begin_ms=1)
    assert rig.checker._execs[1, 0] == kept


def test_an_action_lost_with_its_worker_is_forgotten() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=10)
    rig.step(0)
    assert len(rig.checker._sent) == 1
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "test", now_ns=rig.now_ns)
    rig.step(20)
    assert not rig.checker._sent
    rig.checker.recount()


def result(infer: Infer, *, begin_ms: float, session: int | None = None) -> InferResult:
    begin_ns = T0 + round(begin_ms * MS)
    span = Span(begin_ns, begin_ns + 2 * MS, 2 * MS)
    return an_infer_result(
        infer.session if session is None else session,
        infer.action_id,
        span,
        gpu_id=infer.gpu_id,
        received_ns=infer.earliest_ns,
        sent_ns=span.end_ns,
    )


def two_sent(rig: Rig, model: ModelInfo) -> tuple[Infer, Infer]:
    """Two actions one behind the other on the only GPU."""
    rig.infer(model, slo_ms=100)
    rig.step(0)
    rig.infer(model, slo_ms=100)
    rig.step(2)
    first, second = rig.outstanding()
    return first, second


def test_lost_late_doubled_and_strange_reports_are_no_violation() -> None:
    rig, (model,) = Rig.ready()
    first, second = two_sent(rig, model)
    rig.now_ns = T0 + 5 * MS
    rig.from_worker(result(second, begin_ms=2.6))  # overtook the one before it
    rig.from_worker(result(second, begin_ms=2.6))  # twice in one step
    rig.from_worker(result(first, begin_ms=90, session=7))  # of another life of the worker
    rig.step()
    rig.from_worker(result(first, begin_ms=0.5))
    rig.step()
    rig.from_worker(result(first, begin_ms=0.5))
    rig.from_worker(result(second, begin_ms=50))  # long answered: what it says is not judged
    rig.step()
    rig.checker.recount()
    assert rig.scheduler.idle


def test_reports_that_overtake_each_other_may_not_overlap_either() -> None:
    rig, (model,) = Rig.ready()
    first, second = two_sent(rig, model)
    rig.now_ns = T0 + 5 * MS
    rig.from_worker(result(second, begin_ms=2.3))
    with pytest.raises(InvariantViolated, match="after the one behind it began"):
        rig.from_worker(result(first, begin_ms=0.5))


def test_a_second_answer_is_told_with_its_story() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=100)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.finish(infer, begin_ms=0.5)
    effects = rig.step(3)
    done = [effect for effect in effects if isinstance(effect, RequestDone)]
    with pytest.raises(
        InvariantViolated, match=r"(?s)although it was answered.*sent in action.*ran"
    ):
        rig.checker.check(done, now_ns=rig.now_ns)


def test_a_request_in_two_actions_is_a_violation() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=100)
    sends = [effect for effect in rig.step(0) if isinstance(effect, ToWorker)]
    with pytest.raises(InvariantViolated, match="is in actions"):
        rig.checker.check(sends, now_ns=rig.now_ns)


def test_pages_are_counted_where_a_load_touched_them_and_everywhere_in_the_recount() -> None:
    rig, _ = Rig.ready(gpus=2)
    gpu = rig.scheduler.cluster.gpus[1]
    gpu.free_pages -= 1
    rig.step(0)  # nothing touched it
    with pytest.raises(InvariantViolated, match="is not 100 pages"):
        rig.checker.recount()
    model = rig.scheduler.cluster.models[0]
    rig.scheduler.cluster.send_evict(gpu, model, now_ns=rig.now_ns)
    with pytest.raises(InvariantViolated, match="is not 100 pages"):
        rig.step(1)


def test_a_request_that_leaves_its_queue_unanswered_is_found() -> None:
    rig, (model,) = Rig.ready()
    for _ in range(20):
        rig.infer(model, slo_ms=100)
    rig.step(0)
    rig.checker.recount()
    rig.scheduler.cluster.models[model.model_id].queue.requests.pop()
    with pytest.raises(InvariantViolated, match="is not arrived"):
        rig.checker.recount()


def test_stories_are_dropped_some_time_after_the_answer() -> None:
    rig, (model,) = Rig.ready()
    for _ in range(3000):
        rig.infer(model, slo_ms=0.1)  # refused at once
    rig.step(0)
    assert rig.scheduler.idle and len(rig.checker._stories) == 2048
