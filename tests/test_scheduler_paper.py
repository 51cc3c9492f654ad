"""INFER5 as published: its constants, and the behaviour that ours leaves behind."""

from __future__ import annotations

from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.paper.tracker import ExecutorTracker, PaperEstimator
from slosched.messages import ErrorResult, Infer, LoadWeights

PAPER = SchedulerConfig(fidelity="paper", schedule_ahead_ns=5 * MS)


def warm(copies: int = 1, gpus: int = 1) -> tuple[Rig, tuple[int, ...]]:
    """A rig whose models are resident everywhere, by the demand of one lenient request each."""
    rig, models = Rig.ready(PAPER, copies=copies, gpus=gpus)
    ids = tuple(m.model_id for m in models)
    for model in ids:
        rig.infer(model, slo_ms=10_000)
    rig.step(0)
    rig.now_ns = T0 + 100 * MS
    rig.weights_loaded()
    begin_ms = 100.5
    while rig.outstanding():
        rig.now_ns = T0 + round((begin_ms + 2.25) * MS)
        rig.finish(rig.outstanding()[0], begin_ms=begin_ms)
        rig.step()
        begin_ms += 3
    rig.step(200)
    assert rig.scheduler.idle
    rig.effects.clear()
    return rig, ids


def test_code_defaults_not_help_text() -> None:
    config = SchedulerConfig(fidelity="paper").resolved()
    assert (config.schedule_ahead_ns, config.max_exec_ns, config.max_batch) == (
        10 * MS,
        250 * MS,
        8,
    )
    generated = SchedulerConfig(fidelity="paper", generate_inputs=True).resolved()
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
    rig.from_worker(ErrorResult(infer.session, infer.action_id, 2, Code.EXEC_TOO_LATE, "late"))
    rig.step(201)
    assert rig.reply(request).code == Code.EXEC_TOO_LATE
