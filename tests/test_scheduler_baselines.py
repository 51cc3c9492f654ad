"""The baseline policies FIFO, EDF, REJECT and AIMD: golden decisions, one rule of each head at a time.

`net` takes 2 / 3 / 5 / 9 ms at batch 1 / 2 / 4 / 8; a decision reaches the worker in 0.5 ms and an
answer comes back in 0.25 ms. An Infer may be sent 0.55 ms before the running one ends.
"""

from __future__ import annotations

import pytest

from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import FromClient
from slosched.messages import (
    CancelRequest,
    EvictWeights,
    EvictWeightsResult,
    Infer,
    LoadWeights,
    ModelInfo,
    Span,
)

BASELINES = ("FIFO", "EDF", "REJECT", "AIMD")


def ready(policy: str, **more: int) -> tuple[Rig, tuple[ModelInfo, ...]]:
    return Rig.ready(SchedulerConfig(policy=policy), **more)


def sent(rig: Rig, worker_id: int | None = None) -> list[tuple[int, int, int, int]]:
    """(gpu, model, class, requests) of every Infer so far."""
    infers = rig.to_worker(Infer, worker_id)
    return [(i.gpu_id, i.model_id, i.batch_size, i.request_count) for i in infers]


def run_out(rig: Rig, *, until_ms: float, step_ms: float = 0.25) -> None:
    """Let the worker run what it gets, one after another on each GPU, reported at the next step."""
    free_ms: dict[int, float] = {}
    now_ms = (rig.now_ns - T0) / MS
    while now_ms < until_ms:
        for infer in rig.outstanding():
            begin_ms = max(free_ms.get(infer.gpu_id, 0.0), (infer.earliest_ns - T0) / MS + 0.5)
            end_ms = begin_ms + {1: 2, 2: 3, 4: 5, 8: 9}[infer.batch_size]
            if end_ms <= now_ms:
                free_ms[infer.gpu_id] = end_ms
                rig.finish(infer, begin_ms=begin_ms)
        report_weights(rig)
        now_ms += step_ms
        rig.step(now_ms)


def report_weights(rig: Rig) -> None:
    for evict in rig.to_worker(EvictWeights):
        if evict.action_id in rig.scheduler.cluster.actions:
            span = Span(rig.now_ns, rig.now_ns, 0)
            rig.from_worker(
                EvictWeightsResult(
                    evict.session, evict.action_id, span=span, received_ns=0, sent_ns=0
                )
            )
    loads = [a for a in rig.to_worker(LoadWeights) if a.action_id in rig.scheduler.cluster.actions]
    if any(rig.now_ns - load.earliest_ns >= 9 * MS for load in loads):
        rig.weights_loaded()


# ------------------------------------------------------------------------------------- in common


@pytest.mark.parametrize("policy", BASELINES)
def test_idle_gpus_share_what_arrives_apart_and_a_third_waits_for_the_lead(policy: str) -> None:
    rig, (model,) = ready(policy, gpus=2)
    for _ in range(2):
        rig.infer(model, slo_ms=40)
        rig.step()
    assert sent(rig) == [(0, 0, 1, 1), (1, 0, 1, 1)]
    rig.infer(model, slo_ms=40)
    rig.step(0.1)
    assert len(sent(rig)) == 2
    assert rig.scheduler.next_wakeup_ns() == T0 + round(1.95 * MS)
    rig.step(1.95)
    assert len(sent(rig)) == 3


@pytest.mark.parametrize("policy", BASELINES)
def test_a_cancelled_request_is_never_sent(policy: str) -> None:
    rig, (model,) = ready(policy)
    first, second, third = (rig.infer(model, slo_ms=40) for _ in range(3))
    rig.handle(FromClient(b"c", CancelRequest(second)))
    rig.step(0)
    run_out(rig, until_ms=12)
    assert rig.reply(second).code == Code.CANCELLED
    assert rig.reply(first).code == rig.reply(third).code == Code.OK
    assert sum(count for *_, count in sent(rig)) == 2 and rig.scheduler.idle


@pytest.mark.parametrize("policy", BASELINES)
def test_a_failed_action_is_planned_anew(policy: str) -> None:
    rig, (model,) = ready(policy)
    request = rig.infer(model, slo_ms=30)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 2 * MS
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.EXEC_TOO_LATE, "late", action_type=2)
    )
    rig.step()
    (again,) = rig.outstanding()
    rig.step(5.0)
    rig.finish(again, begin_ms=2.6)
    rig.step()
    assert (rig.reply(request).code, rig.reply(request).attempts) == (Code.OK, 2)


@pytest.mark.parametrize("policy", BASELINES)
def test_a_lost_workers_requests_go_to_the_other_one(policy: str) -> None:
    rig, (model,) = ready(policy, workers=2)
    requests = [rig.infer(model, slo_ms=60) for _ in range(4)]
    rig.step(0)
    before = len(sent(rig, 1))
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "gone", now_ns=rig.now_ns)
    rig.step()
    assert len(sent(rig, 0)) >= 1 and not any(rig.answered(r) for r in requests)
    assert rig.scheduler.cluster.gpus and before <= len(sent(rig, 1))
    for _ in range(10):
        rig.step((rig.now_ns - T0) / MS + 6)
        for infer in rig.outstanding(1):
            rig.finish(infer, begin_ms=(rig.now_ns - T0) / MS - 5.5, worker_id=1)
        rig.step()
    assert rig.scheduler.idle
    assert {rig.reply(r).code for r in requests} <= {Code.OK, Code.TIMED_OUT}
    assert any(rig.reply(r).code == Code.OK for r in requests)


@pytest.mark.parametrize("policy", BASELINES)
def test_with_the_last_gpu_gone_everything_is_answered_and_new_ones_are_refused(
    policy: str,
) -> None:
    rig, (model,) = ready(policy)
    requests = [rig.infer(model, slo_ms=60) for _ in range(4)]
    rig.step(0)
    requests.append(rig.infer(model, slo_ms=60))
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[0], "gone", now_ns=rig.now_ns)
    rig.step()
    assert rig.scheduler.idle
    assert {rig.reply(r).code for r in requests} == {Code.CANCELLED}
    assert any("the last GPU that had it was lost" in rig.reply(r).reason for r in requests)
    late = rig.infer(model, slo_ms=60)
    rig.step()
    reply = rig.reply(late)
    assert reply.code == Code.COULD_NOT_START_IN_TIME and "no connected GPU" in reply.reason


@pytest.mark.parametrize("policy", BASELINES)
def test_a_cold_model_is_loaded_and_its_request_runs(policy: str) -> None:
    rig, models = ready(policy, copies=3, pages=2)
    request = rig.infer(models[2], slo_ms=100)
    rig.step(0)
    assert [e.model_id for e in rig.to_worker(EvictWeights)] == [0]
    run_out(rig, until_ms=30)
    reply = rig.reply(request)
    assert (reply.code, reply.cold, reply.deadline_met) == (Code.OK, True, True)


# ------------------------------------------------------------------------------------------ FIFO


def test_fifo_sends_the_oldest_of_all_with_what_waits_of_its_model() -> None:
    rig, (first, second) = ready("FIFO", copies=2)
    rig.infer(first, slo_ms=1)
    rig.step(0)
    for model in (second, first, second, second):
        rig.infer(model, slo_ms=1)
    run_out(rig, until_ms=12)
    assert sent(rig) == [(0, 0, 1, 1), (0, 1, 4, 3), (0, 0, 1, 1)]
    assert {r.code for r in rig.records()} == {Code.OK}  # however late


# ------------------------------------------------------------------------------------------- EDF


def test_fifo_keeps_the_place_of_a_request_whose_action_failed() -> None:
    rig, (first, second) = ready("FIFO", copies=2)
    oldest = rig.infer(first, slo_ms=90)
    rig.step(0)
    (infer,) = rig.outstanding()
    # Younger ones of its own model, which it must be ahead of, and of another one.
    for model in (second, first, first):
        rig.infer(model, slo_ms=90)
    rig.now_ns = T0 + 2 * MS
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.EXEC_TOO_LATE, "late", action_type=2)
    )
    queue = rig.scheduler.cluster.models[first.model_id].queue.requests
    assert [r.key for r in queue] == sorted(r.key for r in queue)
    rig.step()
    run_out(rig, until_ms=30)
    # Had it lost its place, the second model's request would be the oldest and go before it.
    assert [(model, count) for _, model, _, count in sent(rig)] == [(0, 1), (0, 3), (1, 1)]
    assert (rig.reply(oldest).code, rig.reply(oldest).attempts) == (Code.OK, 2)
    assert rig.scheduler.idle


def test_edf_sends_the_earliest_deadline_alone_whatever_waits_of_its_model() -> None:
    rig, (patient, urgent) = ready("EDF", copies=2)
    slow = [rig.infer(patient, slo_ms=slo_ms) for slo_ms in (40, 30)]
    fast = rig.infer(urgent, slo_ms=20)
    rig.step(0)
    run_out(rig, until_ms=12)
    assert sent(rig) == [(0, 1, 1, 1), (0, 0, 1, 1), (0, 0, 1, 1)]
    done = [r.request_id for r in rig.records()]
    assert done == [fast, slow[1], slow[0]]


def test_edf_starts_what_ends_too_late_but_answers_what_would_start_too_late() -> None:
    rig, (model,) = ready("EDF")
    first = rig.infer(model, slo_ms=2)  # would end at 2.5: EDF knows no exec times
    ends_late = rig.infer(model, slo_ms=4)  # starts at 2.5, ends at 4.5
    starts_late = rig.infer(model, slo_ms=4.4)  # the GPU is free again at 4.5
    rig.step(0)
    run_out(rig, until_ms=10)
    assert len(sent(rig)) == 2
    assert [rig.reply(r).code for r in (first, ends_late)] == [Code.OK, Code.OK]
    assert not rig.reply(first).deadline_met and not rig.reply(ends_late).deadline_met
    reply = rig.reply(starts_late)
    assert reply.code == Code.TIMED_OUT and "before its deadline" in reply.reason
    assert reply.latency_ns <= 4.4 * MS


def test_edf_answers_at_the_deadline_when_no_gpu_opens() -> None:
    rig, (model,) = ready("EDF")
    rig.infer(model, slo_ms=50)
    rig.step(0)
    waits = rig.infer(model, slo_ms=90)
    rig.step(50.0)  # the running one is long overdue: nothing more is sent
    assert rig.scheduler.next_wakeup_ns() is not None
    rig.step(89.9)
    assert not rig.answered(waits) and len(sent(rig)) == 1
    rig.step(90.0)
    assert rig.reply(waits).code == Code.TIMED_OUT


# ---------------------------------------------------------------------------------------- REJECT


def test_reject_admits_what_will_be_done_in_time_and_answers_the_rest_at_once() -> None:
    rig, (model,) = ready("REJECT")
    # Alone: 0.5 + 2 + 0.25. Behind others: one more exec of 2 ms each.
    too_late = rig.infer(model, slo_ms=2.74)
    alone = rig.infer(model, slo_ms=2.75)
    second_late = rig.infer(model, slo_ms=4.74)
    second = rig.infer(model, slo_ms=4.75)
    third = rig.infer(model, slo_ms=6.75)
    rig.step(0)
    for refused, start_ms in ((too_late, 0.5), (second_late, 2.5)):
        reply = rig.reply(refused)
        assert reply.code == Code.COULD_NOT_START_IN_TIME and reply.latency_ns == 0
        assert reply.predicted_start_ns == start_ms * MS and reply.predicted_exec_ns == 2 * MS
        assert "could start in" in reply.reason
    run_out(rig, until_ms=10)
    assert sent(rig) == [(0, 0, 1, 1)] * 3
    assert [r.request_id for r in rig.records()][2:] == [alone, second, third]


def test_reject_binds_to_the_least_loaded_gpu_and_does_not_reorder() -> None:
    rig, (first, second) = ready("REJECT", gpus=2, copies=2)
    for model in (first, first, second, first):
        rig.infer(model, slo_ms=50)
    urgent = rig.infer(second, slo_ms=6)  # would fit if it overtook; it may not: 0.5 + 4 + 2
    rig.step(0)
    assert rig.reply(urgent).code == Code.COULD_NOT_START_IN_TIME
    run_out(rig, until_ms=10)
    assert sent(rig) == [(0, 0, 1, 1), (1, 0, 1, 1), (0, 1, 1, 1), (1, 0, 1, 1)]


def test_reject_answers_an_admitted_request_at_its_deadline_when_the_prediction_failed() -> None:
    rig, (model,) = ready("REJECT")
    rig.infer(model, slo_ms=40)
    rig.step(0)
    waits = rig.infer(model, slo_ms=10)
    rig.step(0.1)
    rig.step(9.9)  # nothing was reported, and by now it is overdue
    assert not rig.answered(waits)
    rig.step(10.1)
    reply = rig.reply(waits)
    assert reply.code == Code.TIMED_OUT and "its turn did not come" in reply.reason


def test_reject_judges_an_idle_gpu_by_what_is_likely_and_a_busy_one_with_margins() -> None:
    def code_at(slo_ms: float, *, busy: bool) -> int | None:
        rig, (model,) = ready("REJECT")
        (gpu,) = rig.scheduler.cluster.gpus.values()
        single = gpu.exec_table(rig.scheduler.cluster.models[model.model_id].queue).single
        # Rarely it takes 3 ms and not 2: what is expected stays, what is allowed for does not.
        for duration_ms in (3, *[2] * 20):
            single.add(duration_ms * MS)
        assert (single.expected_ns, single.margin_ns) == (2 * MS, 3 * MS)
        if busy:
            rig.infer(model, slo_ms=40)
        request = rig.infer(model, slo_ms=slo_ms)
        rig.step(0)
        return rig.reply(request).code if rig.answered(request) else None

    # There 0.5 ms, exec 2 ms, back 0.25 ms; behind another one 2 ms more, and 3 ms are allowed for.
    refused = Code.COULD_NOT_START_IN_TIME
    assert [code_at(slo_ms, busy=False) for slo_ms in (2.7, 2.8)] == [refused, None]
    assert [code_at(slo_ms, busy=True) for slo_ms in (4.8, 5.7, 5.8)] == [refused, refused, None]


def test_reject_counts_the_load_of_a_cold_model_into_its_prediction() -> None:
    rig, models = ready("REJECT", copies=3, pages=2)
    refused = rig.infer(models[2], slo_ms=11)  # 0.5 there + 8 load + 0.25 back + 0.5 + 2 + 0.25
    rig.step(0)
    assert "after loading its weights" in rig.reply(refused).reason
    rig, models = ready("REJECT", copies=3, pages=2)
    admitted = rig.infer(models[2], slo_ms=15)
    rig.step(0)
    run_out(rig, until_ms=20)
    assert rig.reply(admitted).code == Code.OK and rig.reply(admitted).deadline_met


def test_reject_tries_a_cold_model_on_an_idle_gpu_that_was_slow_once() -> None:
    """Slow execs raise a margin for a hundred more; one that waits for it would never have them."""
    rig, models = ready("REJECT", copies=3, pages=2)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    single = gpu.exec_table(rig.scheduler.cluster.models[models[2].model_id].queue).single
    for duration_ms in (20, *[2] * 20):
        single.add(duration_ms * MS)
    admitted = rig.infer(models[2], slo_ms=15)
    rig.step(0)
    assert not rig.answered(admitted)
    # Behind another it is a promise, and the words say that its margin is what is too long.
    rig, models = ready("REJECT")
    (gpu,) = rig.scheduler.cluster.gpus.values()
    for duration_ms in (20, *[2] * 20):
        gpu.exec_table(rig.scheduler.cluster.models[0].queue).single.add(duration_ms * MS)
    rig.infer(slo_ms=40)
    behind = rig.infer(slo_ms=15)
    rig.step(0)
    assert "takes 2ms, or up to 20.2ms until the report is here" in rig.reply(behind).reason


# ------------------------------------------------------------------------------------------ AIMD


def batches(rig: Rig) -> list[tuple[int, int]]:
    return [(i.batch_size, i.request_count) for i in rig.to_worker(Infer)]


def test_aimd_raises_the_limit_by_one_for_each_batch_of_that_size_within_the_slo() -> None:
    rig, (model,) = ready("AIMD")
    for _ in range(15):
        rig.infer(model, slo_ms=20)
    rig.step(0)
    run_out(rig, until_ms=40, step_ms=0.05)
    # Each size twice: the next batch leaves before the answer to the one before it is back.
    assert batches(rig) == [(1, 1), (1, 1), (2, 2), (2, 2), (4, 3), (4, 3), (4, 3)]
    assert {r.code for r in rig.records()} == {Code.OK}


def test_aimd_cuts_the_limit_by_a_tenth_when_a_batch_takes_longer_than_the_slo() -> None:
    rig, (model,) = ready("AIMD")
    # Sent 0.55 ms before it may begin, back 0.25 ms after its end: 4 takes 5.8 ms, 2 takes 3.8 ms.
    for _ in range(200):
        rig.infer(model, slo_ms=5)
    rig.step(0)
    run_out(rig, until_ms=150, step_ms=0.05)
    sizes = [count for _, count in batches(rig)]
    assert sizes[:6] == [1, 1, 2, 2, 3, 3]
    # 3 runs as 4 and breaks the SLO; 2 does not: it goes to and fro between them, late as all are.
    assert set(sizes[6:-1]) == {2, 3}
    assert {r.code for r in rig.records()} == {Code.OK}


def test_aimd_does_not_raise_the_limit_for_batches_that_are_not_full() -> None:
    rig, (model,) = ready("AIMD")
    for at_ms in range(0, 60, 6):
        rig.infer(model, slo_ms=20)
        run_out(rig, until_ms=at_ms + 6)
    before = len(batches(rig))
    for _ in range(10):
        rig.infer(model, slo_ms=20)
    rig.step()
    # A single request fills a limit of 1 only: by now it is 2, and no more.
    assert batches(rig)[before:] == [(2, 2)]


def test_aimd_raises_no_limit_beyond_the_largest_batch() -> None:
    rig, (model,) = ready("AIMD")
    for _ in range(300):
        rig.infer(model, slo_ms=50)
    rig.step(0)
    run_out(rig, until_ms=250)
    counts = [count for _, count in batches(rig)]
    assert max(counts) == 8 and counts[20:26] == [8] * 6  # `net` runs 8 at most
    limits = rig.scheduler.policy._queues[0].limits  # type: ignore[attr-defined]
    assert limits == {model.model_id: 8.0}  # so that one slow batch is felt at once


def test_aimd_serves_the_replicas_of_a_gpu_in_turn() -> None:
    rig, (first, second) = ready("AIMD", copies=2)
    for model in (first, first, first, second):
        rig.infer(model, slo_ms=1)
    rig.step(0)
    run_out(rig, until_ms=12)
    assert [model for _, model, _, _ in sent(rig)] == [0, 1, 0, 0]


def test_aimd_joins_the_replica_on_the_gpu_with_the_fewest_requests() -> None:
    rig, (first, second) = ready("AIMD", copies=2, gpus=2)
    for model in (first, second, first):
        rig.infer(model, slo_ms=50)
    rig.step(0)
    rig.infer(second, slo_ms=50)
    rig.infer(second, slo_ms=50)
    rig.step(0.1)
    run_out(rig, until_ms=12)
    per_gpu = [sum(n for gpu, _, _, n in sent(rig) if gpu == index) for index in (0, 1)]
    assert per_gpu == [3, 2]
