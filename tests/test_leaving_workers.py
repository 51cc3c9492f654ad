"""Workers that say goodbye: they get nothing new, and what they hand back does not count as failed."""

from __future__ import annotations

import pytest

from made_messages import an_error
from scheduler_rig import MS, T0, Rig
from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.interface import Note
from slosched.messages import Infer, WorkerGoodbye


def notes(rig: Rig) -> list[str]:
    return [e.text for e in rig.effects if isinstance(e, Note)]


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD"])
def test_a_worker_that_says_goodbye_gets_nothing_new_and_what_it_hands_back_costs_no_attempt(
    policy: str,
) -> None:
    rig, (model,) = Rig.ready(SchedulerConfig(policy=policy), workers=2)
    requests = [rig.infer(model, slo_ms=2_000) for _ in range(4)]
    rig.step()
    rig.from_worker(WorkerGoodbye(50), 0)
    sent = len(rig.to_worker(Infer, 0))
    for ms in range(1, 900):
        rig.now_ns = T0 + ms * MS
        if ms % 100 == 0:
            requests.append(rig.infer(model, slo_ms=1_000))
        rig.step()
        for infer in rig.outstanding(0):
            back = an_error(
                infer.session, infer.action_id, Code.CANCELLED, "shutting down", action_type=2
            )
            rig.from_worker(back, 0)
        for infer in rig.outstanding(1):
            if rig.now_ns >= infer.earliest_ns + 6 * MS:
                rig.finish(infer, begin_ms=ms - 5.5, worker_id=1)
        rig.scheduler.sessions.heard(rig.scheduler.cluster.workers[1])
    rig.step()
    assert [rig.reply(request).code for request in requests] == [0] * len(requests)
    assert len(rig.to_worker(Infer, 0)) == sent
    assert any("has left" in text for text in notes(rig))
    assert not any("lost" in text for text in notes(rig))
    rig.from_worker(WorkerGoodbye(49), 1)  # of an older session
    assert not rig.scheduler.cluster.workers[1].leaving


@pytest.mark.parametrize("policy", ["INFER5", "FIFO", "EDF", "REJECT", "AIMD"])
def test_a_worker_that_says_goodbye_gets_nothing_while_it_ends_what_runs(policy: str) -> None:
    """It is there until then, and its GPU would often be free sooner than the other's."""
    rig, (model,) = Rig.ready(SchedulerConfig(policy=policy), workers=2)
    for _ in range(4):
        rig.infer(model, slo_ms=5_000)
    rig.step(0)
    running = rig.outstanding(0)
    assert running
    rig.from_worker(WorkerGoodbye(50), 0)
    later = []
    for ms in range(1, 200):
        if ms % 4 == 0:
            later.append(rig.infer(model, slo_ms=5_000))
        rig.step(ms)
        for infer in rig.outstanding(1):
            if rig.now_ns >= infer.earliest_ns + 6 * MS:
                rig.finish(infer, begin_ms=ms - 5.5, worker_id=1)
        if ms == 100:
            for infer in running:
                rig.finish(infer, begin_ms=0.5)
        for worker in rig.scheduler.cluster.workers.values():
            rig.scheduler.sessions.heard(worker)
    assert [infer.action_id for infer in rig.to_worker(Infer, 0)] == [a.action_id for a in running]
    assert sum(rig.answered(request) for request in later) > 40
    assert any("has left" in text for text in notes(rig))


def test_a_request_that_is_handed_back_again_and_again_keeps_its_tries() -> None:
    """Three failures end a request; that its workers leave is none."""
    rig, (model,) = Rig.ready(workers=5)
    request = rig.infer(model, slo_ms=5_000)
    for ms in range(4):
        rig.step(ms)
        ((leaves, infer),) = [(w, a) for w in range(5) for a in rig.outstanding(w)]
        session = 50 + leaves
        rig.from_worker(WorkerGoodbye(session), leaves)
        back = an_error(session, infer.action_id, Code.CANCELLED, "shutting down", action_type=2)
        rig.from_worker(back, leaves)
    rig.step(5)
    ((last, infer),) = [(w, a) for w in range(5) for a in rig.outstanding(w)]
    rig.step(9)
    rig.finish(infer, begin_ms=5.5, worker_id=last)
    rig.step()
    assert (rig.reply(request).code, rig.reply(request).attempts) == (Code.OK, 5)
