"""Run directories of a cascade made of whole cloth: requests, their stages and plans, each number known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from slosched.cascade_spec import CascadeSpec, QualityCurve, ScoreCurve, StageSpec
from slosched.codes import Code, Verdict
from slosched.core.scheduler.interface import PlanRecord
from slosched.telemetry import plan_log, request_log, stage_log

START_NS = 1_600_000_000_000_000_000
MS = 1_000_000
S = 1_000 * MS
SLO_NS = 5 * S

QUALITY = QualityCurve((0.0, 0.5, 0.75, 1.0), (18.0, 16.0, 17.0, 22.0))


def small_cascade(**changes: object) -> CascadeSpec:
    """Light 100 ms and heavy 1 s a request at any batch size; SLO 5 s."""
    values: dict[str, object] = {
        "name": "sdturbo",
        "light": StageSpec("small", {1: 100 * MS, 2: 200 * MS}),
        "heavy": StageSpec("large", {1: 1000 * MS, 2: 2000 * MS}),
        "slo_ns": SLO_NS,
        "scores": ScoreCurve((0.0, 1.0), (0.0, 1.0)),
        "quality": QUALITY,
    }
    return CascadeSpec(**{**values, **changes})  # type: ignore[arg-type]


def a_plan(name: str = "pair") -> PlanRecord:
    """One light GPU and three heavy ones."""
    return PlanRecord(
        at_ns=S,
        threshold=0.5,
        light_gpus=1,
        heavy_gpus=3,
        light_batch=4,
        heavy_batch=2,
        demand=3.5,
        heavy_demand=1.5,
        light_queued=0,
        heavy_queued=0,
        role_changes=0,
        feasible=True,
        cascade=name,
    )


@dataclass(frozen=True)
class Made:
    """One request: its arrival and end after the run's start (ms), and (stage, end ms, verdict, score) rows."""

    arrival_ms: int
    end_ms: int
    stages: Sequence[tuple[int, int, Verdict, float]] = ()
    code: Code = Code.OK


#: (ms, threshold, role changes, feasible)
MadePlan = tuple[int, float, int, int]


def write_run(
    folder: Path,
    requests: Sequence[Made],
    plans: Sequence[MadePlan] = (),
    threshold: float = 0.5,
    cascades: Sequence[str] = ("sdturbo",),
) -> Path:
    """Write the three logs; requests have their places as ids, and are of the cascades by turns.

    Returns `folder`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows, stages = [request_log.HEADER], [stage_log.HEADER]
    for number, each in enumerate(requests):
        latency_ns = (each.end_ms - each.arrival_ms) * MS
        met = int(each.code == Code.OK and latency_ns <= SLO_NS)
        rows.append(
            f"{START_NS + each.end_ms * MS}\t{number}\t{int(each.code)}\t7\t0\t0\t{latency_ns}\t{SLO_NS}\t{met}"
            "\t1\t1\t0"
        )
        for place, (stage, end_ms, verdict, score) in enumerate(each.stages):
            answers = int(place == len(each.stages) - 1 and each.code == Code.OK)
            held = threshold if score >= 0 else -1
            stages.append(
                f"{START_NS + end_ms * MS}\t{number}\t7\t{stage}\t0\t1\t1\t0\t1\t1\t0\t0\t{answers}"
                f"\t{int(verdict)}\t{score}\t{held}\t{cascades[number % len(cascades)]}"
            )
    _write(folder / request_log.FILE_NAME, rows)
    if len(stages) > 1:
        _write(folder / stage_log.FILE_NAME, stages)
    if plans:
        made = [plan_log.HEADER]
        for at_ms, planned, changes, feasible in plans:
            made.append(
                f"{START_NS + at_ms * MS}\t{planned}\t2\t2\t4\t2\t3.5\t1.5\t0\t0\t{changes}\t{feasible}"
                f"\t{cascades[0]}"
            )
        _write(folder / plan_log.FILE_NAME, made)
    return folder


def _write(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines))


def mixed_run(folder: Path) -> Path:
    """Eight requests, one for each way that a request of a cascade can end. The first arrives at 1000 ms."""
    light, heavy = 0, 1
    requests = [
        Made(1000, 1100, [(light, 1100, Verdict.ACCEPTED, 0.75)]),
        Made(1500, 3600, [(light, 1600, Verdict.DEFERRED, 0.25), (heavy, 3600, Verdict.HEAVY, -1)]),
        Made(2000, 2100, [(light, 2100, Verdict.FORCED, 0.125)]),
        Made(
            2500, 7000, [(light, 2600, Verdict.DEFERRED, 0.25), (heavy, 7000, Verdict.INSTEAD, -1)]
        ),
        # Late by a second.
        Made(3000, 9000, [(light, 3100, Verdict.DEFERRED, 0.25), (heavy, 9000, Verdict.HEAVY, -1)]),
        # Deferred, and lost.
        Made(
            3500,
            8500,
            [(light, 3600, Verdict.DEFERRED, 0.0), (heavy, 8500, Verdict.UNANSWERED, -1)],
            Code.TIMED_OUT,
        ),
        # Refused at arrival.
        Made(4000, 4000, (), Code.COULD_NOT_START_IN_TIME),
        Made(
            4500,
            6000,
            [(light, 4600, Verdict.DEFERRED, 0.25), (heavy, 6000, Verdict.OUTRANKED, -1)],
        ),
    ]
    plans = [(500, 0.5, 4, 1), (4000, 0.25, 1, 0)]
    return write_run(folder, requests, plans)
