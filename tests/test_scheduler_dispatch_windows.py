"""What INFER5 keeps instead of looking at everything is brought up to date when the facts below it move.

Each test moves one fact (a way that becomes shorter or longer, an exec that was never so short) and asks
what must follow from it. `net` takes 2 / 3 / 5 / 9 ms at batch 1 / 2 / 4 / 8.
"""

from __future__ import annotations

import math

import pytest

from naive_infer5 import NaiveDispatchWindows
from scheduler_rig import EXEC_MS, MS, T0, Rig
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.dispatch_windows import DispatchWindows
from slosched.core.scheduler.paths import Paths
from slosched.core.scheduler.state import Client, Gpu, Instance, Queue, Request, Worker, WorkerState
from slosched.core.scheduler.urgency import CREDIT, CREDIT_SLOPE, WEIGHT, WEIGHT_SLOPE, Urgency
from slosched.messages import Infer


def windows_of(rig: Rig) -> DispatchWindows:
    """Dispatch windows of their own on the rig's cluster, which know every GPU."""
    cluster = rig.scheduler.cluster
    windows = DispatchWindows(cluster)
    for gpu in cluster.gpus.values():
        cluster.changes.execs(gpu)
    return windows


def run_something(rig: Rig, gpu: Gpu, *, at_ms: float, start_ms: float, exec_ms: float = 2) -> None:
    """Send an Infer without a request to `gpu` at T0 + `at_ms`, predicted to start at `start_ms`."""
    (model,) = rig.scheduler.cluster.models.values()
    rig.scheduler.cluster.send_infer(
        gpu,
        [],
        1,
        now_ns=T0 + round(at_ms * MS),
        start_ns=T0 + round(start_ms * MS),
        duration_ns=round(exec_ms * MS),
        latest_ns=T0 + 1000 * MS,
        queue=model.queue,
    )


def assert_as_by_looking(rig: Rig, windows: DispatchWindows, at_ms: float) -> list[int]:
    """All questions are answered as by looking at every GPU; returns the open ones, soonest first."""
    now_ns = T0 + round(at_ms * MS)
    naive = NaiveDispatchWindows(rig.scheduler.cluster)
    found = windows.open_gpus(now_ns)
    assert found == naive.open_gpus(now_ns)
    assert windows.next_opening_ns(now_ns) == naive.next_opening_ns(now_ns)
    return [index for _, index, _ in found]


def long_tail(worker: Worker) -> None:
    """One way in ten takes 2 ms instead of 0.5, and has been longest in the window: the margin is 2 ms
    until the next short one."""
    for way_ns in [2 * MS] * 10 + [MS // 2] * 90:
        worker.transit.add(way_ns)
    assert (worker.transit.expected_ns, worker.transit.margin_ns) == (MS // 2, 2 * MS)


def learn_short_way(rig: Rig) -> None:
    (worker,) = rig.scheduler.cluster.workers.values()
    rig.scheduler.cluster.paths.learn(worker, there_ns=MS // 2, back_ns=MS // 4)
    assert worker.transit.margin_ns == MS // 2


# ------------------------------------------------------------------------- a way becomes shorter


@pytest.mark.parametrize(
    ("at_ms", "what"),
    [(1.9, "closed"), (1.97, "open until the running one ends"), (2.2, "open, the way decides")],
)
def test_with_a_shorter_way_a_gpu_opens_later(at_ms: float, what: str) -> None:
    rig, _ = Rig.ready()
    (worker,) = rig.scheduler.cluster.workers.values()
    (gpu,) = worker.gpus
    windows = windows_of(rig)
    long_tail(worker)
    run_something(rig, gpu, at_ms=0, start_ms=2)
    # It ends at 4 ms; the lead is 2.05 ms.
    assert assert_as_by_looking(rig, windows, 0) == []
    assert assert_as_by_looking(rig, windows, at_ms) == ([] if what == "closed" else [0])
    learn_short_way(rig)
    # The lead is 0.55 ms.
    assert assert_as_by_looking(rig, windows, at_ms) == []
    assert windows.next_opening_ns(T0 + round(at_ms * MS)) == T0 + round(3.45 * MS)
    assert assert_as_by_looking(rig, windows, 3.44) == []
    assert assert_as_by_looking(rig, windows, 3.46) == [0]


def test_the_nearest_idle_gpu_comes_first_when_ways_change() -> None:
    rig, _ = Rig.ready(workers=2)
    first, second = rig.scheduler.cluster.workers.values()
    windows = windows_of(rig)
    assert assert_as_by_looking(rig, windows, 0) == [0, 1]
    for _ in range(20):
        rig.scheduler.cluster.paths.learn(first, there_ns=MS, back_ns=MS // 4)
    assert first.transit.margin_ns == MS > second.transit.margin_ns
    assert assert_as_by_looking(rig, windows, 1) == [1, 0]


def test_a_gpu_that_was_too_far_away_is_asked_again_when_its_ways_become_shorter() -> None:
    """The request waits for the near GPU, which is busy; then the far worker turns out to be near."""
    rig, (model,) = Rig.ready(workers=2, gpus=2)
    cluster = rig.scheduler.cluster
    near, far = cluster.workers.values()
    for gpu in near.gpus:
        run_something(rig, gpu, at_ms=0, start_ms=0.5, exec_ms=4)
        run_something(rig, gpu, at_ms=0, start_ms=4.5, exec_ms=2)
    for way_ns in [5 * MS] * 50 + [MS // 2] * 50:
        far.transit.add(way_ns)  # half of the latencies: the next short one moves the median
    assert far.transit.expected_ns == 5 * MS
    # From 0 ms: near, behind the two, 6.5 + 2 + 0.25 = 8.75; far 5 + 2 + 0.25 = 7.25. From 3 ms: 10.25.
    request = rig.infer(model, slo_ms=7)
    rig.step(0)
    assert rig.answered(request), "neither would do"
    rig.now_ns = T0 + 3 * MS
    request = rig.infer(model, slo_ms=6)
    rig.step()
    assert not rig.answered(request) and len(rig.to_worker(Infer, 1)) == 0
    cluster.paths.learn(far, there_ns=MS // 2, back_ns=MS // 4)
    assert far.transit.expected_ns == MS // 2
    rig.step(3.1)  # 3.1 + 0.5 + 2 + 0.25 = 5.85, in time
    assert [i.request_count for i in rig.to_worker(Infer, 1)] == [1]


# --------------------------------------------------------------------------- a way becomes longer


def test_an_overdue_gpu_is_asked_again_when_reports_turn_out_to_take_longer() -> None:
    rig, _ = Rig.ready()
    (worker,) = rig.scheduler.cluster.workers.values()
    (gpu,) = worker.gpus
    windows = windows_of(rig)
    run_something(rig, gpu, at_ms=0, start_ms=0.5)
    # It ends at 2.5; the report is overdue from 2.5 + 0.25 + 2 / 8 = 3 ms.
    assert assert_as_by_looking(rig, windows, 2.9) == [0]
    windows.asked(gpu, retry_when_faster=False)
    assert assert_as_by_looking(rig, windows, 3.1) == []
    assert windows.to_ask_in_order(T0 + round(3.1 * MS)) == []
    for _ in range(20):
        rig.scheduler.cluster.paths.learn(worker, there_ns=MS // 2, back_ns=MS)
    assert worker.returns.margin_ns == MS
    assert assert_as_by_looking(rig, windows, 3.1) == [0]
    assert [g for _, _, g in windows.to_ask_in_order(T0 + round(3.1 * MS))] == [gpu]


def test_the_shortest_ways_are_those_of_the_workers_there_are() -> None:
    workers = {i: Worker(i, state=WorkerState.JOINED) for i in range(3)}
    paths = Paths(workers, Changes())
    for worker in list(workers.values())[:2]:
        worker.gpus.append(Gpu(worker.worker_id, 0, worker, 1, 1, 1))
    paths.workers_changed()
    for there_ms, back_ms in ((0.3, 0.2), (0.9, 0.8), (0.4, 0.3), (1.5, 0.1), (0.2, 2.0)):
        for number in (0, 2, 1):  # the last has no GPU: its latencies do not count
            scale = 1 + number / 8 if number < 2 else 0.1
            for _ in range(60):
                paths.learn(
                    workers[number],
                    there_ns=round(there_ms * scale * MS),
                    back_ns=round(back_ms * scale * MS),
                )
                used = [workers[0], workers[1]]
                assert paths.least_transit_ns == min(w.transit.expected_ns for w in used)
                assert paths.least_returns_ns == min(w.returns.expected_ns for w in used)


# ------------------------------------------------------------------------- an exec becomes shorter


def waiting_queue(model_id: int, name: str, count: int) -> Queue:
    model = Instance(model_id, name, 0)
    slo_ns = (10 + model_id) * MS
    for number in range(count):
        key = model_id * 100 + number
        model.queue.requests.append(
            Request(key, Client(b"c", 1, "c"), key, 0, model.queue, 0.0, slo_ns, T0)
        )
    return model.queue


def least_key(queue: Queue, exec_ns: dict[int, int], loss: float) -> float:
    """The smallest key of a batch of the first requests of `queue`, with these exec times."""
    head_ns, waiting = queue.requests[0].due_ns, len(queue.requests)
    best, smaller = math.inf, 0
    for batch, batch_ns in exec_ns.items():
        if waiting <= smaller:
            break
        best = min(
            best,
            1.25 * head_ns
            + (WEIGHT + WEIGHT_SLOPE * loss) * batch_ns
            - (CREDIT + CREDIT_SLOPE * loss) * min(batch, waiting) * exec_ns[1],
        )
        smaller = batch
    return best


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("models", [4, 12])
def test_the_bounds_of_what_waits_hold_for_each_new_exec_time(batch: int, models: int) -> None:
    """Not only of what is queued after it: a faster GPU may serve those that wait already."""
    urgency = Urgency()
    exec_ns = {b: round(ms * MS) for b, ms in EXEC_MS.items()}
    for name in ("net", "other"):
        for b, batch_ns in exec_ns.items():
            urgency.measured(name, b, batch_ns)
    for model_id in range(models):
        urgency.grew(waiting_queue(model_id, ("net", "other")[model_id % 2], 5))
    before = {q.queue_id: bound for bound, _, q in urgency.in_order(0.0)}
    factor = {1: 2.0, 4: 0.25}[
        batch
    ]  # the credit counts in times of batch 1: dearer is lower there
    exec_ns[batch] = round(exec_ns[batch] * factor)
    urgency.measured("net", batch, exec_ns[batch])
    entries = urgency.in_order(0.0)
    assert [(bound, since) for bound, since, _ in entries] == sorted(
        (bound, since) for bound, since, _ in entries
    )
    for bound, _, queue in entries:
        if queue.program == "net":
            assert bound <= least_key(queue, exec_ns, 0.0) < before[queue.queue_id]
        else:
            assert bound == before[queue.queue_id]
