"""What the controller counts of cascades: verdicts, and the last plan. Nothing is called without cascades."""

from __future__ import annotations

from typing import Any

from slosched.codes import Verdict
from slosched.core.scheduler.interface import PlanRecord, StageRecord
from slosched.verdicts import verdict_name


class CascadeTally:
    """Fed with every stage and every plan; `forget` with the requests that are answered."""

    __slots__ = ("deferred", "plan", "verdicts")

    def __init__(self) -> None:
        #: By program of the request's first stage, and verdict. Stages of no cascade are not counted.
        self.verdicts: dict[tuple[str, int], int] = {}
        #: Requests that go on to the heavy program, by key: the light one, whose cascade the request is of.
        self.deferred: dict[int, str] = {}
        #: A policy that plans serves one cascade alone.
        self.plan: PlanRecord | None = None

    def add_stage(self, record: StageRecord) -> None:
        """Count one stage that ended."""
        verdict = int(record.verdict)
        if verdict == Verdict.NONE:
            return
        program = self.deferred.pop(record.key, record.program)
        if verdict == Verdict.DEFERRED:
            self.deferred[record.key] = program
        self.verdicts[program, verdict] = self.verdicts.get((program, verdict), 0) + 1

    def add_plan(self, record: PlanRecord) -> None:
        self.plan = record

    def forget(self, key: int) -> None:
        """The request is answered."""
        self.deferred.pop(key, None)

    def report(self) -> dict[str, Any]:
        """Plain values: counts by program and name of the verdict, and the GPUs of the plan. {} without any."""
        plan = self.plan
        if not self.verdicts and plan is None:
            return {}
        counts: dict[str, dict[str, int]] = {}
        for (program, verdict), n in sorted(self.verdicts.items()):
            counts.setdefault(program, {})[verdict_name(verdict)] = n
        gpus = None if plan is None else {"light": plan.light_gpus, "heavy": plan.heavy_gpus}
        return {"verdicts": counts, "planned_gpus": gpus}
