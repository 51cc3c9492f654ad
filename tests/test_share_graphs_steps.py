"""Jobs whose steps are long, in the lane of CUDA graphs: boundaries within a step."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")

from fake_cuda import MS
from slosched.daemon.backends.graphs.stage import PART_NS
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
