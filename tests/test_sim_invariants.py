"""The checker itself: that it catches what it should, and forgets what is over."""

from __future__ import annotations

import pytest

from scheduler_rig import MS, Rig
from slosched.core.invariants import InvariantViolated
from slosched.messages import Infer


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
    for gpu_id in (0, 1):  # a report far ahead of the clock, as after a restart with another clock
        rig.checker._exec_end_ns[0, gpu_id] = rig.now_ns + 10_000 * MS
    rig.checker._exec_end_ns[1, 0] = kept = rig.now_ns
    rig.checker._incarnation_of[0] = 49  # the process before this one
    run_one_on_each_gpu(rig, model.model_id, at_ms=0, begin_ms=1)
    assert rig.checker._exec_end_ns[1, 0] == kept


def test_an_action_lost_with_its_worker_is_forgotten() -> None:
    rig, (model,) = Rig.ready()
    rig.infer(model, slo_ms=10)
    rig.step(0)
    assert len(rig.checker._sent) == 1
    worker = rig.scheduler.cluster.workers[0]
    rig.scheduler.sessions.lose(worker, "test", now_ns=rig.now_ns)
    rig.step(20)
    assert not rig.checker._sent
