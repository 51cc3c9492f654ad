"""What the controller counts of cascades: verdicts, and the last plan. Nothing is called without cascades."""

from __future__ import annotations

from typing import Any

from slosched.codes import Verdict
from slosched.core.scheduler.interface import PlanRecord, StageRecord
from slosched.verdicts import verdict_name


class CascadeTally:
    """Fed with every stage and every plan."""

    __slots__ = ("plans", "verdicts")

    def __init__(self) -> None:
        #: By name of the cascade, and verdict. Stages of no cascade are not counted.
        self.verdicts: dict[tuple[str, int], int] = {}
        #: The last plan of each cascade, by name.
        self.plans: dict[str, PlanRecord] = {}

    def add_stage(self, record: StageRecord) -> None:
        """Count one stage that ended."""
        verdict = int(record.verdict)
        if verdict != Verdict.NONE:
            key = record.cascade, verdict
            self.verdicts[key] = self.verdicts.get(key, 0) + 1

    def add_plan(self, record: PlanRecord) -> None:
        self.plans[record.cascade] = record

    def report(self) -> dict[str, Any]:
        """Plain values by name of the cascade: counts by name of the verdict, and GPUs of the last plan.

        {} without any. A cascade that has no plan has no GPUs either.
        """
        if not self.verdicts and not self.plans:
            return {}
        counts: dict[str, dict[str, int]] = {}
        for (cascade, verdict), n in sorted(self.verdicts.items()):
            counts.setdefault(cascade, {})[verdict_name(verdict)] = n
        gpus = {
            cascade: {"light": plan.light_gpus, "heavy": plan.heavy_gpus}
            for cascade, plan in sorted(self.plans.items())
        }
        return {"verdicts": counts, "planned_gpus": gpus}
