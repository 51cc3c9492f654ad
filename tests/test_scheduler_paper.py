"""INFER5 as published: its constants, and the behaviour that ours leaves behind."""

from __future__ import annotations

from made_messages import an_error, an_infer_result
from scheduler_rig import EXEC_MS, MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.core.scheduler.policies import resolved
from slosched.core.scheduler.policies.published.infer5_paper import Infer5Paper
from slosched.core.scheduler.policies.published.tracker import ExecutorTracker, PaperEstimator
from slosched.messages import (
    Infer,
    LoadModel,
    LoadModelReply,
    LoadModelRequest,
    LoadModelResult,
    LoadWeights,
    Span,
)

PAPER = SchedulerConfig(fidelity="paper", schedule_ahead_ns=5 * MS)


def warm(copies: int = 1, gpus: int = 1) -> tuple[Rig, tuple[int, ...]]:
    return Rig.warm(PAPER, copies=copies, gpus=gpus)


def test_code_defaults_not_help_text() -> None:
    config = resolved(SchedulerConfig(fidelity="paper"))
    assert (config.schedule_ahead_ns, config.max_exec_ns, config.max_batch) == (
        10 * MS,
        250 * MS,
        8,
    )
    generated = resolved(SchedulerConfig(fidelity="paper", generate_inputs=True))
    assert generated.schedule_ahead_ns == 15 * MS


def test_the_estimate_is_p99_of_ten_and_the_first_sample_replaces_the_profile() -> None:
    estimator = PaperEstimator(5 * MS)
    assert estimator.estimate_ns() == 5 * MS
    estimator.add(3 * MS)
    assert estimator.estimate_ns() == 3 * MS
    for _ in range(8):
        estimator.add(3 * MS)
    estimator.add(13 * MS)
    assert estimator.estimate_ns() == round(0.91 * 13 * MS + 0.09 * 3 * MS)
    assert estimator.estimate_ns(clock_mhz=690) == 2 * estimator.estimate_ns()


def test_the_tracker_follows_reports_and_gives_up_on_a_stuck_head() -> None:
    tracker = ExecutorTracker()
    assert tracker.available_ns(0) == MS  # never less than 1 ms ahead
    tracker.add(1, 3 * MS, 10 * MS)
    tracker.add(2, 4 * MS, 11 * MS)
    assert tracker.available_ns(11 * MS) == 17 * MS
    tracker.done(1, 14 * MS, ok=True)
    assert tracker.available_ns(14 * MS) == 18 * MS
    # The head should have ended at 18 ms; from 10 ms after that it counts as ending now - 10 ms.
    assert tracker.available_ns(40 * MS) == 41 * MS


def test_the_tracker_rescales_what_waits_when_the_clock_changes() -> None:
    tracker = ExecutorTracker()
    tracker.add(1, 3 * MS, 10 * MS)
    tracker.set_clock(690)  # half of the default
    tracker.add(2, 4 * MS, 11 * MS)  # estimated at the new clock: as it is
    assert tracker.available_ns(11 * MS) == 20 * MS
    assert tracker.opens_ns(5 * MS) == 15 * MS + 1
    tracker.set_clock(0)
    assert tracker.available_ns(11 * MS) == 15 * MS


def policy_of(rig: Rig) -> Infer5Paper:
    policy = rig.scheduler.policy
    assert isinstance(policy, Infer5Paper)
    return policy


def report(rig: Rig, infer: Infer, *, begin_ms: float, before_mhz: int, after_mhz: int) -> None:
    """`infer` ran its profiled time, on a GPU whose clock was read before and after."""
    begin_ns = T0 + round(begin_ms * MS)
    duration_ns = round(EXEC_MS[infer.batch_size] * MS)
    span = Span(begin_ns, begin_ns + duration_ns, duration_ns)
    rig.from_worker(
        an_infer_result(
            infer.session,
            infer.action_id,
            span,
            gpu_id=infer.gpu_id,
            gpu_clock_before_mhz=before_mhz,
            gpu_clock_mhz=after_mhz,
            received_ns=infer.earliest_ns,
            sent_ns=span.end_ns,
        )
    )


def test_work_is_duration_times_the_mean_clock_and_plans_use_the_clock_after() -> None:
    rig, (model,) = warm()
    for at_ms in range(200, 300, 10):  # all ten samples of the window
        rig.infer(model, slo_ms=100)
        rig.step(at_ms)
        (infer,) = rig.outstanding()
        rig.step(at_ms + 3)
        report(rig, infer, begin_ms=at_ms + 0.6, before_mhz=1000, after_mhz=2000)
        rig.step()
    rig.infer(model, slo_ms=100)
    rig.step(300)
    (infer,) = rig.outstanding()
    assert infer.expected_duration_ns == 2 * MS * 1500 // 2000


def test_a_gpu_is_given_only_batches_that_its_worker_offers() -> None:
    rig = Rig(PAPER, workers=2)
    rig.hello()
    for worker_id in range(2):
        rig.join(worker_id, session=50 + worker_id)
    rig.handle(FromClient(b"c", LoadModelRequest(1, "net", 1)))
    rig.step()
    rig.prepared(0)
    for action in rig.to_worker(LoadModel, 1):
        rig.from_worker(
            LoadModelResult(
                session=51,
                action_id=action.action_id,
                span=Span(0, 0, 0),
                copies=action.copies,
                batch_sizes=(1, 2),
                exec_ns=(2 * MS, 3 * MS),
                weights_ns=8 * MS,
                weights_bytes=2**24,
                pages=1,
                input_shape=(4,),
                input_dtype="float32",
                output_shape=(2,),
                output_dtype="float32",
                random_weights=True,
                received_ns=rig.now_ns,
                sent_ns=rig.now_ns,
            ),
            1,
        )
    rig.step()
    (loaded,) = rig.to_client(LoadModelReply)
    (model,) = loaded.models
    rig.infer(model, slo_ms=1000)
    rig.step(0)
    for worker_id in range(2):
        rig.weights_loaded(worker_id)
    for _ in range(40):
        rig.infer(model, slo_ms=1000)
    rig.step(20)
    sizes = {w: {i.batch_size for i in rig.to_worker(Infer, w)} for w in range(2)}
    assert max(sizes[0]) == 8 and max(sizes[1]) == 2


def test_a_lost_gpu_leaves_nothing_behind() -> None:
    rig, (model,) = warm(gpus=2)
    policy = policy_of(rig)
    first = list(rig.scheduler.cluster.gpus)
    rig.infer(model, slo_ms=100)
    rig.step(200)
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "test", now_ns=rig.now_ns)
    rig.step()
    rig.join(0, gpus=2, session=90)
    now = list(rig.scheduler.cluster.gpus)
    assert now != first
    for by_gpu in (policy._trackers, policy._strategies, policy._versions, policy._active):
        assert list(by_gpu) == now


def test_weights_are_loaded_only_when_asked_for() -> None:
    rig, (model,) = Rig.ready(PAPER)
    assert not rig.scheduler.cluster.gpus[0].resident
    rig.infer(model, slo_ms=100)
    rig.step(0)
    assert len(rig.to_worker(LoadWeights)) == 1


def test_a_tight_request_runs_against_a_floor_of_ahead_plus_five_and_is_late() -> None:
    rig, (model,) = warm()
    request = rig.infer(model, slo_ms=1)
    rig.step(200)
    (infer,) = rig.outstanding()
    rig.step(203)
    rig.finish(infer, begin_ms=200.6)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.deadline_met) == (Code.OK, False)


def test_nothing_is_refused_at_arrival_it_times_out_five_ms_before_its_deadline() -> None:
    rig, (model,) = warm()
    rig.infer(model, slo_ms=100)
    rig.step(200)
    requests = [rig.infer(model, slo_ms=20) for _ in range(40)]
    rig.step(200)
    rig.step(214.9)
    assert not any(rig.answered(i) for i in requests[8:])
    rig.step(215.1)
    codes = [rig.reply(i).code for i in requests if rig.answered(i)]
    assert codes and set(codes) == {Code.TIMED_OUT}


def test_work_is_sent_up_to_schedule_ahead_early_on_every_gpu() -> None:
    rig, models = warm(copies=4)
    for model in models:
        rig.infer(model, slo_ms=100)
    rig.step(200)
    # 2 ms each: the fourth would start 6 ms ahead.
    assert len(rig.outstanding()) == 3


def test_the_largest_full_batch_abandons_older_requests() -> None:
    rig, (model,) = warm()
    old = rig.infer(
        model, slo_ms=13
    )  # internal deadline 10 ms: too old for batch 8 (1 + 9 ms is not)
    rig.step(200)
    rig.effects.clear()
    blocked = [rig.infer(model, slo_ms=100) for _ in range(8)]
    rig.step(201)
    sent = rig.to_worker(Infer)
    assert sent and sent[0].batch_size == 8
    assert not any(rig.answered(i) for i in [old, *blocked])


def test_a_failed_action_fails_its_requests() -> None:
    rig, (model,) = warm()
    request = rig.infer(model, slo_ms=100)
    rig.step(200)
    (infer,) = rig.outstanding()
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.EXEC_TOO_LATE, "late", action_type=2)
    )
    rig.step(201)
    assert rig.reply(request).code == Code.EXEC_TOO_LATE


def test_demand_that_was_served_leaves_nothing_that_asks_for_a_load() -> None:
    rig, (model,) = warm()
    for slo_ms in (67, 71, 73, 79, 83):  # demands with thirds and sevenths of a nanosecond
        rig.infer(model, slo_ms=slo_ms)
    rig.step(200)
    begin_ms = 201.0
    while rig.outstanding():
        infer = rig.outstanding()[0]
        end_ms = begin_ms + EXEC_MS[infer.batch_size]
        rig.step(end_ms + 0.25)
        rig.finish(infer, begin_ms=begin_ms)
        rig.step()
        begin_ms = end_ms + 1
    assert rig.scheduler.idle
    (demand,) = policy_of(rig)._loads._demands.values()
    assert (demand.exec_ns, demand.loadweights_ns) == (0, 0)
