"""`slosched status --watch`: what happened between two reports, and how it is shown."""

from __future__ import annotations

from typing import Any

import pytest

from big_controller import MS, T0, big_controller
from made_call_run import a_call
from scheduler_rig import Rig
from slosched.cli.rates import rates_between
from slosched.cli.watch import Look
from slosched.cli.watch_text import watch_text
from slosched.core.scheduler.interface import FromClient, RequestRecord
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu
from slosched.daemon.status import status_report
from slosched.messages import StatusReply, StatusRequest
from slosched.telemetry.tally import Tally

S = 1_000 * MS


def look(scheduler: Scheduler, tally: Tally, at_s: float) -> dict[str, Any]:
    now_ns = T0 + round(at_s * S)
    return status_report(scheduler, now_ns=now_ns, brief=True, counted=tally.report)


def answer(scheduler: Scheduler, tally: Tally, code: int, latency_ms: float, met: bool) -> None:
    """Count one answered request, as the controller does."""
    scheduler.arrivals.count += 1
    scheduler.answers.count += 1
    scheduler.by_code[code] = scheduler.by_code.get(code, 0) + 1
    end_ns = T0 + round(latency_ms * MS)
    record = RequestRecord(1, 1, 0, 0, code, "", 1.0, 9 * MS, T0, end_ns, met, 1, 1, False)
    tally.add_request(record)


@pytest.fixture
def two_gpus() -> tuple[Scheduler, Tally]:
    return big_controller(gpus=2, instances=3)


def test_rates_are_of_the_time_between_two_reports(two_gpus: tuple[Scheduler, Tally]) -> None:
    scheduler, tally = two_gpus
    answer(scheduler, tally, 0, 4, True)
    before = look(scheduler, tally, 10)
    for _ in range(6):
        answer(scheduler, tally, 0, 9, True)
    answer(scheduler, tally, 0, 90, False)
    answer(scheduler, tally, 8, 0, False)
    answer(scheduler, tally, 8, 0, False)
    answer(scheduler, tally, 4, 5, False)
    scheduler.cluster.gpus[1].busy_ns += S
    rates = rates_between(before, look(scheduler, tally, 12))
    assert rates is not None
    assert rates["seconds"] == 2 and rates["offered_per_s"] == rates["answered_per_s"] == 5
    assert rates["admitted_per_s"] == 4 and rates["in_time_per_s"] == 3
    assert rates["satisfaction"] == 0.6
    assert rates["rejected_per_s"] == {"could not start in time": 1.0, "timed out": 0.5}
    # Seven were served, six of them in the bucket from 7.5 to 10 ms.
    assert 7.5 * MS < rates["latency_p50_ns"] < 10 * MS < 75 * MS < rates["latency_p99_ns"]
    assert [g["utilisation"] for g in rates["gpus"]] == [0, 0.5]
    assert rates["mean_batch"] is None and rates["exec_error_p50_ns"] is None  # no batch ended
    assert rates["loads_per_s"] == rates["failed_actions_per_s"] == 0


def test_an_interval_in_which_nothing_happened_has_no_shares(
    two_gpus: tuple[Scheduler, Tally],
) -> None:
    scheduler, tally = two_gpus
    rates = rates_between(look(scheduler, tally, 1), look(scheduler, tally, 2))
    assert rates is not None
    assert rates["offered_per_s"] == 0 and rates["rejected_per_s"] == {}
    assert rates["satisfaction"] is rates["latency_p50_ns"] is None


def test_a_gpu_that_joined_anew_counts_from_nothing(two_gpus: tuple[Scheduler, Tally]) -> None:
    scheduler, tally = two_gpus
    gpu = scheduler.cluster.gpus[0]
    gpu.busy_ns = 50 * S
    before = look(scheduler, tally, 1)
    gpu.busy_ns = S // 4
    rates = rates_between(before, look(scheduler, tally, 2))
    assert rates is not None and rates["gpus"][0]["utilisation"] == 0.25


def test_reports_of_two_lives_or_of_one_instant_have_no_rates(
    two_gpus: tuple[Scheduler, Tally],
) -> None:
    scheduler, tally = two_gpus
    first = look(scheduler, tally, 1)
    assert rates_between(first, look(scheduler, tally, 1)) is None
    assert rates_between(first, look(scheduler, tally, 2) | {"incarnation": 9}) is None
    assert rates_between({}, first) is None


def test_an_older_controller_that_counts_less_is_shown_all_the_same() -> None:
    before = {"now_ns": 0, "requests": {"arrived": 1, "answered": 1}}
    after = {"now_ns": S, "requests": {"arrived": 5, "answered": 3, "by_code": {"0 ok": 3}}}
    rates = rates_between(before, after)
    assert rates is not None and rates["offered_per_s"] == 4 and rates["in_time_per_s"] is None
    text = watch_text("a:1", after, rates)
    assert "offered 4.0/s   in time -   satisfaction -" in text and "no GPU" in text


def test_the_text_says_what_the_rates_say(two_gpus: tuple[Scheduler, Tally]) -> None:
    scheduler, tally = two_gpus
    before = look(scheduler, tally, 0)
    for place in range(400):
        answer(scheduler, tally, 8 * (place % 4 == 0), 9 * (place % 4 > 0), place % 4 > 0)
    scheduler.cluster.gpus[1].busy_ns += S * 3 // 4
    after = look(scheduler, tally, 1)
    text = watch_text("a:1", after, rates_between(before, after))
    assert "a:1: INFER5 (best)" in text and "2 of 2 workers joined" in text
    assert "offered 400.0/s   in time 300.0/s   satisfaction 75.0 %" in text
    assert "rejected   100.0/s could not start in time" in text
    assert "mean 38 %, least 0 %, most 75 % of 2" in text
    assert "1/0 ████████░░  75 %" in text
    plain = watch_text("a:1", after, rates_between(before, after), blocks=False)
    assert "1/0 ########..  75 %" in plain and plain.isascii()


def test_nearly_all_is_not_called_all() -> None:
    before = {"now_ns": 0, "requests": {"answered": 0}, "counted": {"in_time": 0}}
    after = {"now_ns": S, "requests": {"answered": 10_000}, "counted": {"in_time": 9_999}}
    assert "satisfaction 99.9 %" in watch_text("a:1", after, rates_between(before, after))


def test_a_large_cluster_fits_a_terminal() -> None:
    scheduler, tally = big_controller(gpus=300, instances=1000)
    for worker_id in range(40):
        scheduler.cluster.workers[worker_id].times_lost = 1
    rates = rates_between(look(scheduler, tally, 1), look(scheduler, tally, 2))
    text = watch_text("a:1", look(scheduler, tally, 2), rates, width=80, height=24)
    lines = text.split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "and 35 more workers lost or busy" in text and "more GPUs" in lines[-1]
    piped = watch_text("a:1", look(scheduler, tally, 2), rates)
    assert "and 284 more GPUs" in piped


def test_silence_is_said_with_what_was_last_known(two_gpus: tuple[Scheduler, Tally]) -> None:
    scheduler, tally = two_gpus
    silent = Look(look(scheduler, tally, 1), None, T0, "nobody there")
    said = silent.silence(T0 + 7 * S)
    assert said.startswith("no answer since ") and said.endswith("(7 s)")
    assert said in watch_text("a:1", silent.report, None, silent=said)
    document = silent.document(T0)
    assert document["no_answer_since_ns"] == T0 and document["report"] is None
    answered = Look(look(scheduler, tally, 1), {"seconds": 1.0})
    assert answered.silence(T0) == "" and answered.document(T0)["rates"] == {"seconds": 1.0}


def test_a_brief_report_has_no_list_of_models_and_the_full_one_keeps_every_field() -> None:
    rig, _ = Rig.ready(copies=3)
    for brief in (True, False):
        rig.handle(FromClient(b"c", StatusRequest(90 + brief, brief)))
    rig.steps()
    full, brief_report = (
        next(r for r in rig.to_client(StatusReply) if r.request_id == n).report for n in (90, 91)
    )
    assert len(full["models"]) == 3 and brief_report["models"] == []  # type: ignore[arg-type]
    assert full["model_instances"] == brief_report["model_instances"] == 3
    assert set(brief_report) == set(full)
    old = {
        "now_ns",
        "policy",
        "fidelity",
        "options",
        "draining",
        "ready",
        "requests",
        "clients",
        "workers",
    }
    assert old <= set(full)


def test_the_queue_is_what_waits_and_the_oldest_is_the_first_to_have_come() -> None:
    rig, (model,) = Rig.ready()
    for at_ms in (1, 2, 3):
        rig.now_ns = T0 + at_ms * MS
        rig.infer(model, slo_ms=900)
    requests = status_report(rig.scheduler, now_ns=T0 + 5 * MS)["requests"]
    assert (requests["queued"], requests["in_flight"]) == (3, 0)
    assert requests["oldest_unanswered_ns"] == 4 * MS


def test_slots_have_a_line_of_their_own_and_are_not_gpus(two_gpus: tuple[Scheduler, Tally]) -> None:
    scheduler, tally = two_gpus
    host = Gpu(2, 1, scheduler.cluster.workers[0], 0, 0, 1, host=True)
    host.exec.width = 4
    scheduler.cluster.workers[0].gpus.append(host)
    first = look(scheduler, tally, 0)
    host.busy_ns += 2_000 * MS
    tally.calls.add(a_call(1, 0, 1))
    tally.calls.add(a_call(2, 0, 1, code=104))
    second = look(scheduler, tally, 1)
    rates = rates_between(first, second)
    text = watch_text("here", second, rates)
    assert "0 of 4 have a call, 0 calls suspended, busy 50 %; in all 2 calls, 1 failed" in text
    for _ in range(3):
        answer(scheduler, tally, 0, 4, True)
    tally.batch_sizes.add(2)
    rates = rates_between(first, look(scheduler, tally, 2))
    assert rates is not None and rates["mean_batch"] == 2  # three answers, one of them a call's
    assert "of 2\n" in text and "0/1" not in text
    assert "slots      0 of 4" in watch_text("here", first, None)
