"""Where jobs can be interrupted in the lane of CUDA graphs: which of them, and within their steps too."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from fake_cuda import MS
from slosched.daemon.backends.graphs.stage import PART_NS
from slosched.share_spec import Boundary, BoundaryKind, Job
from test_share_graphs import TIMES_NS, US, Rig, job

pytestmark = pytest.mark.torch


def test_a_job_in_long_steps_has_a_boundary_every_millisecond_and_right_answers() -> None:
    """80 ms in four steps of 18 ms; what interrupts it writes over its own pool and no other."""
    rig = Rig(job("steps4"), job("short", 1), check_every=1)
    (note,) = [part for part in rig.prepared[0].note.split("; ") if "segments" in part]
    assert rig.prepared[0].boundaries > 70 and rig.prepared[0].boundary_ns <= PART_NS * 9 // 8
    assert f"at most {rig.prepared[0].boundary_ns / 1e6:.3f} ms to a boundary" in note
    waits_ns = []
    for number in range(3):
        rig.start(0, number)
        for each in range(7):
            rig.run((3 + (each * 911 + number * 577) % 5000 // 1000) * MS + each * 131 * US)
            rig.start(1, 10 * number + each, priority=1)
        ended = rig.finish()
        long = ended[-1]
        assert long.job == 0 and len(long.pauses) == 7
        assert not any(each.differs or each.reason for each in ended)
        assert abs(long.device_ns - TIMES_NS["steps4"]) < 500 * US
        waits_ns += [pause.started_ns - pause.wanted_ns for pause in long.pauses]
    assert max(waits_ns) <= PART_NS * 9 // 8 + 20 * US
    assert rig.lane.compared[0] == 3 + 2 and rig.lane.differed == {0: 0, 1: 0}


def test_a_job_that_is_interrupted_within_a_step_needs_its_pool_for_itself() -> None:
    rig = Rig(job("steps4"), job("short", 1), one_pool=True, check_every=1)
    differ = 0
    for number in range(4):
        rig.start(0, number)
        rig.run((5 + 7 * number) * MS)
        rig.start(1, number, priority=1)
        differ += rig.finish()[-1].differs
    assert differ


def test_a_job_is_interrupted_at_each_second_boundary_if_it_says_so() -> None:
    fine = Rig(job("steps10"), job("short", 1)).prepared[0]
    coarse = Rig(job("steps10", boundary=Boundary(every=4)), job("short", 1), check_every=1)
    assert fine.boundaries >= 9 and coarse.prepared[0].boundaries == (fine.boundaries + 4) // 4 - 1
    assert coarse.prepared[0].boundary_ns > 3 * fine.boundary_ns // 2
    coarse.start(0, 0)
    coarse.run(5 * MS)
    coarse.start(1, 0, priority=1)
    ended = coarse.finish()
    assert [each.job for each in ended] == [1, 0] and not ended[1].differs and ended[1].pauses


def test_who_is_cut() -> None:
    def cut(*jobs: Job) -> list[bool]:
        rig = Rig(*jobs)
        return [rig.prepared[place].boundaries > 0 for place in range(len(jobs))]

    assert cut(job("long"), job("middle", 1)) == [True, False]
    assert cut(job("long"), job("middle", 1), job("middle", 2)) == [True, True, False]
    # With one priority for all it is the policy that says who goes first.
    assert cut(job("long"), job("middle")) == [True, True]
    none = Boundary(kind=BoundaryKind.NONE)
    assert cut(job("long", boundary=none), job("middle", 1)) == [False, False]
    rig = Rig(job("short"), job("long", 1))
    assert "not interrupted" in rig.prepared[0].note
