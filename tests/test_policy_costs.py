"""INFER5 held to what things cost, and not to a twin that has its constants."""

from __future__ import annotations

import pytest

from made_messages import a_heartbeat
from scheduler_rig import EXEC_MS, MS, Rig
from slosched.codes import Code
from slosched.messages import Infer, LoadWeights

#: The rig's latencies to the worker and back, and its time for a load.
THERE_MS, BACK_MS, LOAD_MS = 0.5, 0.25, 8.0


@pytest.mark.parametrize("waiting", range(1, 9))
def test_padding_never_makes_a_request_dearer(waiting: int) -> None:
    """A padded batch costs each request no more GPU time than the next smaller class does when full."""
    rig, (model,) = Rig.ready()
    for _ in range(waiting):
        rig.infer(model, slo_ms=500.0)
    rig.step()
    sent = rig.to_worker(Infer)[0]
    taken, batch = sent.request_count, sent.batch_size
    smaller = max((each for each in EXEC_MS if each < batch), default=None)
    if taken < batch and smaller is not None:
        assert EXEC_MS[batch] / taken <= EXEC_MS[smaller] / smaller
    fills = max(each for each in EXEC_MS if each <= waiting)
    assert EXEC_MS[batch] / taken <= EXEC_MS[fills] / fills, "nor than what would be full now"


@pytest.mark.parametrize(
    ("spare_ms", "promised"), [(-6.0, False), (-0.8, False), (-0.1, False), (4.0, True)]
)
def test_a_load_is_promised_only_if_weights_report_and_answer_can_make_their_ways(
    spare_ms: float, promised: bool
) -> None:
    """There, load, the report back, there again, exec, and the answer back: nothing is quicker."""
    rig, (here, other) = Rig.ready(copies=2, pages=1)
    gpu = next(iter(rig.scheduler.cluster.gpus.values()))
    away = other if here.model_id in gpu.resident else here
    needs_ms = 2 * (THERE_MS + BACK_MS) + LOAD_MS + EXEC_MS[1]
    loads = len(rig.to_worker(LoadWeights))
    request = rig.infer(away, slo_ms=needs_ms + spare_ms)
    rig.step()
    if promised:
        assert not rig.answered(request) and len(rig.to_worker(LoadWeights)) > loads
    else:
        assert rig.reply(request).code == Code.COULD_NOT_START_IN_TIME
    assert away.b1_ns == EXEC_MS[1] * MS


def test_a_worker_once_found_slow_is_given_work_again_by_its_heartbeats_alone() -> None:
    """Nothing is sent to it meanwhile, so nothing else tells that the way is short again."""
    rig, (model,) = Rig.ready()
    (worker,) = rig.scheduler.cluster.workers.values()
    for _ in range(200):
        rig.scheduler.cluster.paths.learn(worker, there_ns=40 * MS, back_ns=40 * MS)
    refused = rig.infer(model, slo_ms=10.0)
    rig.step()
    assert rig.reply(refused).code == Code.COULD_NOT_START_IN_TIME
    for beat in range(1, 151):
        rig.step(at_ms=200.0 * beat)
        rig.from_worker(a_heartbeat(50, rig.now_ns - MS // 2))
    rig.hello()  # it was silent for long
    taken = rig.infer(model, slo_ms=10.0)
    rig.step()
    assert not rig.answered(taken) and len(rig.outstanding()) == 1


def test_a_rare_stall_of_what_runs_does_not_close_its_gpu_to_others() -> None:
    """One batch of eight in twenty once took 60 ms. What runs behind the next one is promised its end with an
    eighth of its time to spare, and not with the stall's: that is for refusals and second tries.
    """
    rig, (long, short) = Rig.ready(copies=2)
    (gpu,) = rig.scheduler.cluster.gpus.values()
    for sample in range(100):
        gpu.tables["net"].add(8, 60 * MS if sample % 20 == 0 else 9 * MS)
    for _ in range(8):
        rig.infer(long, slo_ms=500)
    rig.step(0)
    behind = rig.infer(short, slo_ms=20)  # 0.5 + 9 + 2 + 0.25 ms, and 1.1 ms to spare
    for tenth in range(95):
        rig.step(tenth / 10)
    first, second = rig.outstanding()
    assert (first.batch_size, second.batch_size) == (8, 1)
    assert not rig.answered(behind)


def test_a_heartbeat_of_a_clock_that_is_not_known_yet_teaches_no_latency() -> None:
    """A new session begins with such: its first heartbeats may be off by any round trip."""
    rig, (model,) = Rig.ready()
    for _ in range(200):
        rig.from_worker(a_heartbeat(50, rig.now_ns - 40 * MS, clock_error_ns=20 * MS))
    taken = rig.infer(model, slo_ms=10.0)
    rig.step()
    assert not rig.answered(taken) and len(rig.outstanding()) == 1
    for _ in range(200):
        rig.from_worker(a_heartbeat(50, rig.now_ns - 40 * MS, clock_error_ns=MS))
    late = rig.infer(model, slo_ms=10.0)
    rig.step()
    assert rig.reply(late).code == Code.COULD_NOT_START_IN_TIME, "one that is known does"
