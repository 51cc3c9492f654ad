"""CASCADE with `preempt`: light batches interrupt heavy ones at their boundaries, and make none late."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cascade_rig import SLO_MS, CascadeRig
from cascade_runs import CascadeRun, run, spec_of
from scheduler_rig import MS
from slosched.codes import Verdict
from slosched.messages import Infer
from slosched.telemetry.segment_log import FILE_NAME, read_segment_log
from slosched.units import NS_PER_S

PART_MS = SLO_MS / 8


def rig_with_a_heavy_batch(requests: int = 4, **config: Any) -> CascadeRig:
    """One GPU, on which a heavy batch of `requests` requests has just begun."""
    rig = CascadeRig("CASCADE", **{"preempt": True, **config})
    for _ in range(requests):
        rig.ask()
    while rig.waiting("small"):
        batch = rig.waiting("small")[0].batch_size
        rig.run("small", *[0.1] * batch)
    assert len(rig.waiting("large")) == 1
    return rig


def urgent(rig: CascadeRig) -> list[Infer]:
    return [infer for infer in rig.waiting("small") if infer.priority]


def test_a_light_request_that_has_waited_for_its_part_interrupts_the_heavy_batch() -> None:
    rig = rig_with_a_heavy_batch()
    asked_ns = rig.now_ns
    request = rig.ask()
    assert not rig.waiting("small"), "alone it may wait for others"
    wakes_ns = rig.scheduler.next_wakeup_ns()
    assert wakes_ns is not None and wakes_ns <= asked_ns + round(PART_MS * MS) + 1
    rig.now_ns = asked_ns + round(PART_MS * MS) + 1
    rig.beat()
    rig.step()
    (infer,) = urgent(rig)
    assert infer.earliest_ns < rig.now_ns + 6 * MS
    rig.run("small", 0.9)
    assert rig.verdicts(request) == [Verdict.ACCEPTED]
    assert rig.waiting("large"), "the heavy batch goes on"


def test_without_preempt_it_waits_for_the_end_of_the_heavy_batch() -> None:
    rig = rig_with_a_heavy_batch(preempt=False)
    rig.ask()
    rig.now_ns += round(PART_MS * MS) + 1
    rig.beat()
    rig.step()
    assert not rig.waiting("small")


def test_a_full_light_batch_interrupts_at_once() -> None:
    rig = rig_with_a_heavy_batch()
    for _ in range(8):
        rig.ask()
    assert [infer.batch_size for infer in urgent(rig)] == [8]


def test_no_heavy_request_is_made_late_but_for_more_light_ones() -> None:
    """The heavy batch has no time to spare: one light request waits, since it can be in time afterwards."""
    rig = CascadeRig("CASCADE", preempt=True)
    for _ in range(4):
        rig.ask(slo_ms=58.5)
    while rig.waiting("small"):
        rig.run("small", *[0.1] * rig.waiting("small")[0].batch_size)
    (heavy,) = rig.waiting("large")
    assert heavy.batch_size == 4
    rig.ask(slo_ms=150)
    rig.now_ns += round(PART_MS * MS) + 1
    rig.beat()
    rig.step()
    assert not rig.waiting("small")


def interrupted(made: CascadeRun) -> int:
    """The number of rows of interrupted actions."""
    assert made.result.run_dir is not None
    path = made.result.run_dir / FILE_NAME
    return len(read_segment_log(path)["t"]) if path.is_file() else 0


def preempting(policy: str, trace: str, *, gpus: int, preempt: bool = True) -> Any:
    spec = spec_of(policy, trace, gpus=gpus, seconds=40)
    return replace(spec, scheduler=replace(spec.scheduler, preempt=preempt))


def test_two_gpus_defer_more_if_none_has_to_stay_free_for_light_batches(tmp_path: Path) -> None:
    heavy = {}
    for preempt in (False, True):
        spec = preempting("CASCADE", "fixed_3", gpus=2, preempt=preempt)
        made = run(spec, tmp_path / str(preempt))
        assert made.requests["deadline_met"].all()
        assert bool(interrupted(made)) == preempt
        heavy[preempt] = made.verdicts["HEAVY"]
    assert heavy[True] > 1.15 * heavy[False]


@pytest.mark.parametrize("policy", ["DIFFSERVE", "CLIPPER-HEAVY"])
def test_published_policies_interrupt_nothing(policy: str, tmp_path: Path) -> None:
    assert not interrupted(run(preempting(policy, "fixed_3", gpus=2), tmp_path))


def test_light_stages_wait_for_their_part_and_a_boundary_at_most(tmp_path: Path) -> None:
    """Also at a load at which every GPU runs heavy batches all the time."""
    made = run(preempting("CASCADE", "fixed_5", gpus=2), tmp_path)
    stages = made.stages
    light = stages["stage"] == 0
    waits_ns = stages["start"][light]
    assert interrupted(made) > 10
    # A part of the SLO (5 s), a step of the largest batch, and another light batch before it.
    assert waits_ns.max() < 5 * NS_PER_S // 8 + NS_PER_S
