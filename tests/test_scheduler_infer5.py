"""INFER5, our form: golden decisions, one rule of the policy's head at a time.

`net` takes 2 / 3 / 5 / 9 ms at batch 1 / 2 / 4 / 8; a decision reaches the worker in 0.5 ms and an
answer comes back in 0.25 ms.
"""

from __future__ import annotations

import pytest

from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.messages import Infer


def sent(rig: Rig) -> list[tuple[int, int, int]]:
    """(gpu, class, requests) of every Infer so far."""
    return [(i.gpu_id, i.batch_size, i.request_count) for i in rig.to_worker(Infer)]


def test_what_cannot_be_in_time_is_refused_at_once_with_the_prediction() -> None:
    rig, (model,) = Rig.ready()
    late = rig.infer(model, slo_ms=2.7)  # 0.5 + 2 + 0.25 = 2.75
    just = rig.infer(model, slo_ms=2.76)
    rig.step()
    reply = rig.reply(late)
    assert reply.code == Code.COULD_NOT_START_IN_TIME
    assert (reply.predicted_start_ns, reply.predicted_exec_ns, reply.latency_ns) == (
        MS // 2,
        2 * MS,
        0,
    )
    assert "500us" in reply.reason and "2ms" in reply.reason and "2.7ms" in reply.reason
    assert not rig.answered(just) and sent(rig) == [(0, 1, 1)]


def test_a_padded_batch_goes_only_if_it_costs_less_per_request_than_the_full_smaller_one() -> None:
    for eight_ms, expected in ((9, (0, 4, 4)), (7, (0, 8, 7))):  # 4 take 5 ms: 1.25 each
        rig, (model,) = Rig.ready()
        (gpu,) = rig.scheduler.cluster.gpus.values()
        table = gpu.exec_table(rig.scheduler.cluster.models[model.model_id].queue)
        for _ in range(100):
            table.add(8, eight_ms * MS)
        for _ in range(7):
            rig.infer(model, slo_ms=40)
        rig.step()
        assert sent(rig) == [expected]


def test_idle_gpus_share_what_arrives_apart() -> None:
    rig, (model,) = Rig.ready(gpus=2)
    rig.infer(model, slo_ms=40)
    rig.step()
    rig.infer(model, slo_ms=40)
    rig.step()
    assert sent(rig) == [(0, 1, 1), (1, 1, 1)]


def test_the_next_action_is_sent_just_before_the_running_one_ends_and_no_earlier() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=40)
    rig.step(0)
    rig.infer(model, slo_ms=40)
    rig.step(0.1)
    assert len(sent(rig)) == 1
    # Predicted end is 2.5 ms; the lead is the path there, 0.5 ms, and 50 us for timers.
    assert rig.scheduler.next_wakeup_ns() == T0 + round(1.95 * MS)
    rig.step(1.95)
    assert len(sent(rig)) == 2
    rig.infer(model, slo_ms=40)
    rig.step(2.4)
    assert len(sent(rig)) == 2, "two outstanding are the most"


def test_schedule_ahead_is_an_upper_limit_of_the_lead() -> None:
    rig, (model,) = Rig.ready(SchedulerConfig(schedule_ahead_ns=MS // 10))
    rig.infer(model, slo_ms=40)
    rig.step(0)
    rig.infer(model, slo_ms=40)
    rig.step(0.1)
    assert rig.scheduler.next_wakeup_ns() == T0 + round(2.4 * MS)


def test_a_report_corrects_the_plan_behind_it() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=40)
    rig.step(0)
    rig.infer(model, slo_ms=40)
    rig.step(1.95)
    first, second = rig.outstanding()
    rig.now_ns = T0 + 4 * MS
    rig.finish(first, begin_ms=1.5)  # a whole millisecond late
    rig.step()
    (gpu,) = rig.scheduler.cluster.gpus.values()
    assert gpu.exec.outstanding[0].action_id == second.action_id
    assert gpu.exec.outstanding[0].predicted_start_ns == T0 + round(3.5 * MS)
    assert gpu.exec.busy_until_ns == T0 + round(5.5 * MS)


def test_an_overdue_gpu_gets_nothing_more_until_it_reports() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=90)
    rig.step(0)
    rig.step(
        10.0
    )  # nothing was queued when it opened, and the action should have been back at 2.75
    rig.infer(model, slo_ms=90)
    rig.step(10.0)
    assert len(sent(rig)) == 1
    rig.finish(rig.outstanding()[0], begin_ms=0.5)
    rig.step(10.5)
    assert len(sent(rig)) == 2


def test_the_most_urgent_batch_goes_first_not_the_oldest_request() -> None:
    rig, (patient, urgent) = Rig.ready(copies=2)
    rig.infer(patient, slo_ms=90)
    rig.infer(urgent, slo_ms=10)
    rig.step()
    (infer,) = rig.outstanding()
    assert infer.model_id == urgent.model_id


def test_a_request_too_old_for_the_batch_is_stepped_over_and_then_given_up_with_code_7() -> None:
    rig, (model,) = Rig.ready()
    old = rig.infer(model, slo_ms=3)
    young = [rig.infer(model, slo_ms=10) for _ in range(8)]
    rig.step()
    # Batch 8 takes 9 ms: the old one cannot ride along, and no GPU is free for it in time afterwards.
    assert sent(rig) == [(0, 8, 8)]
    reply = rig.reply(old)
    assert reply.code == Code.SKIPPED
    assert "better batch" in reply.reason
    assert not any(rig.answered(i) for i in young)


def test_a_request_whose_turn_cannot_come_any_more_is_answered_then_with_code_4() -> None:
    rig, (first, second) = Rig.ready(copies=2)
    for _ in range(8):
        rig.infer(first, slo_ms=12)  # 0.5 + 9 + 0.25: just fits
    rig.step(0)
    waits = rig.infer(second, slo_ms=12)  # the GPU comes free at 9.5 ms, which leaves 2.5 ms
    rig.step(0)
    hopeless = rig.infer(second, slo_ms=5)
    rig.step(0)
    assert rig.reply(hopeless).code == Code.COULD_NOT_START_IN_TIME
    assert not rig.answered(waits)
    # Nothing is reported; the GPU is overdue by the time it should be given more.
    rig.scheduler.cluster.workers[0].returns.add(0)
    rig.step(12.0)
    reply = rig.reply(waits)
    assert reply.code == Code.TIMED_OUT and "no GPU came free in time" in reply.reason


def test_a_failed_action_is_planned_anew_while_slack_is_left() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=30)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 2 * MS
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.EXEC_TOO_LATE, "late", action_type=2)
    )
    rig.step()
    assert not rig.answered(request)
    (again,) = rig.outstanding()
    rig.step(5.0)
    rig.finish(again, begin_ms=2.6)
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.attempts) == (Code.OK, 2)


def test_a_failed_action_without_slack_is_answered() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=4)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.now_ns = T0 + 3 * MS
    rig.from_worker(
        an_error(infer.session, infer.action_id, Code.EXEC_TOO_LATE, "late", action_type=2)
    )
    rig.step()
    assert rig.reply(request).code == Code.TIMED_OUT
    assert rig.scheduler.idle


def test_a_bad_input_is_not_tried_again() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=50)
    rig.step(0)
    (infer,) = rig.outstanding()
    rig.from_worker(
        an_error(
            infer.session, infer.action_id, Code.COPY_INPUT_BAD_SIZES, "3 bytes", action_type=2
        )
    )
    rig.step()
    assert (
        rig.reply(request).code == Code.COPY_INPUT_BAD_SIZES
        and "3 bytes" in rig.reply(request).reason
    )


def test_an_action_that_keeps_failing_ends_after_three_attempts() -> None:
    rig, (model,) = Rig.ready()
    request = rig.infer(model, slo_ms=90)
    for _ in range(3):
        rig.step()
        (infer,) = rig.outstanding()
        rig.from_worker(
            an_error(infer.session, infer.action_id, Code.CANCELLED, "boom", action_type=2)
        )
    rig.step()
    reply = rig.reply(request)
    assert (reply.code, reply.attempts) == (Code.CANCELLED, 3) and "boom" in reply.reason


def test_the_window_lets_half_the_batch_be_in_time() -> None:
    rig, (model,) = Rig.ready()
    for slo_ms in (20, 22, 30, 40):
        rig.infer(model, slo_ms=slo_ms)
    rig.step()
    (infer,) = rig.outstanding()
    assert infer.batch_size == 4
    # The second of four is due at 22 ms: 22 - 5 - 0.25.
    assert infer.latest_ns == T0 + round(16.75 * MS)


def test_an_idle_gpu_tries_what_is_likely_but_promises_only_what_is_safe() -> None:
    rig, (model,) = Rig.ready()
    (worker,) = rig.scheduler.cluster.workers.values()
    for _ in range(30):  # now three in ten answers come back 2 ms later than the median
        worker.returns.add(2 * MS)
    request = rig.infer(model, slo_ms=3)
    rig.step()
    assert not rig.answered(request) and sent(rig) == [(0, 1, 1)]
    # Behind a running action it would be a promise, and that the margin forbids.
    second = rig.infer(model, slo_ms=4.9)
    rig.step(2.0)
    assert sent(rig) == [(0, 1, 1)] and not rig.answered(second)


def test_losses_raise_the_credit_for_larger_batches_and_service_lowers_it() -> None:
    rig, (model,) = Rig.ready()
    policy = rig.scheduler.policy
    for _ in range(50):
        rig.infer(model, slo_ms=1)
    rig.step()
    raised = policy._losses.share  # type: ignore[attr-defined]
    assert 0.4 < raised < 0.5  # 1 - 0.988 ** 50
    rig.infer(model, slo_ms=50)
    rig.step()
    assert policy._losses.share == pytest.approx(raised * 0.988)  # type: ignore[attr-defined]


def test_without_any_gpu_requests_are_refused_in_words() -> None:
    rig, (model,) = Rig.ready()
    rig.now_ns += MS
    rig.scheduler.sessions.lose(rig.scheduler.cluster.workers[0], "test", now_ns=rig.now_ns)
    request = rig.infer(model, slo_ms=50)
    rig.step()
    reply = rig.reply(request)
    assert reply.code == Code.COULD_NOT_START_IN_TIME and "no GPU" in reply.reason


def test_requests_with_long_deadlines_are_not_kept_after_their_answer() -> None:
    """An hour's SLO must not keep an hour's requests: the expiry heap forgets the answered ones."""
    rig, (model,) = Rig.ready()
    policy = rig.scheduler.policy
    at_ms = 0.0
    for _ in range(9000):
        rig.infer(model, slo_ms=3_600_000)
        rig.step(at_ms)
        rig.finish(rig.outstanding()[0], begin_ms=at_ms + 0.5)
        rig.effects.clear()
        at_ms += 3.0
        rig.step(at_ms)
    assert len(policy._expiry) < 4200  # type: ignore[attr-defined]
    assert rig.scheduler.idle
