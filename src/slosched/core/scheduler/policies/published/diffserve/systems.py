"""DiffServe, and the systems that it is compared with, on one cascade (MLSys'25, sections 3 and 4).

DIFFSERVE plans threshold, roles and batches every five seconds (allocator.py). DIFFSERVE-STATIC keeps a fixed
plan. CLIPPER-LIGHT and CLIPPER-HEAVY have one program on all GPUs. PROTEUS mixes both programs without a judge.
"""

from __future__ import annotations

from collections.abc import Iterable

from slosched.core.scheduler.after import Judgement
from slosched.core.scheduler.cascades import blind, uniform
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.about import About
from slosched.core.scheduler.policies.base import Refusals
from slosched.core.scheduler.policies.one_cascade import CASCADE_DEFAULTS
from slosched.core.scheduler.policies.published.diffserve.allocator import (
    THRESHOLDS,
    Allocation,
    Problem,
    aimd_batch,
    allocate,
    clipper_batch,
    proteus,
    static_plan,
)
from slosched.core.scheduler.policies.published.diffserve.routed import Routed
from slosched.core.scheduler.state import Request

#: Before any demand is known (artifact): half of the GPUs light, batches of 8, everything deferred.
_FIRST_BATCH = 8


def _about(type_: str, rank: int, summary: str) -> About:
    return About(
        type=type_,
        rank=rank,
        summary=summary,
        defaults=CASCADE_DEFAULTS,
        takes_placement=False,
        published=True,
        length_classes=False,
        one_cascade=True,
        not_planned="serves one cascade, whose quality is not among what is planned for",
    )


def _first_batch(sizes: Iterable[int]) -> int:
    """The greatest of the `sizes`, which have 1, that is no more than the artifact's first one."""
    return max(each for each in sizes if each <= _FIRST_BATCH)


class DiffServe(Routed):
    """Every `plan_every_ns` the published problem is solved for the demand that was measured."""

    about = _about("DIFFSERVE", 51, "DiffServe's allocator: threshold, roles, batches every 5 s")

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        if self._now is None:
            light = -(-gpus // 2)
            threshold = self._cascade.threshold if self._options.fixed_threshold >= 0 else 1.0
            deferred = self._spec.scores.share_below(threshold)
            light_batch, heavy_batch = map(
                _first_batch, (self._spec.light_ns, self._spec.heavy.exec_ns)
            )
            return Allocation(
                threshold, light, gpus - light, light_batch, heavy_batch, deferred, True
            )
        demand = rate * self._options.over_provision
        fixed = self._options.fixed_threshold
        light_ns, heavy_ns = self._batches()
        return allocate(
            Problem(
                gpus=gpus,
                demand=demand,
                light_ns=light_ns,
                heavy_ns=heavy_ns,
                scores=self._spec.scores,
                slo_ns=self._spec.slo_ns,
                light_queue_ns=self._queue_ns(0, rate),
                heavy_queue_ns=self._queue_ns(1, self._heavy_rate.per_s(now_ns)),
                thresholds=(fixed,) if fixed >= 0 else THRESHOLDS,
                now=self._now,
                first=self._options.ties == "first",
            )
        )

    def _batches(self) -> tuple[dict[int, int], dict[int, int]]:
        """The batch sizes among which the plan chooses, with their exec times."""
        light_ns, heavy_ns = self._spec.light_ns, self._spec.heavy.exec_ns
        if self._options.batching == "plan" or self._now is None:
            return light_ns, heavy_ns
        # Batches that are together too long for the SLO fit into no plan: they would be late as well.
        together_ns = light_ns[self._now.light_batch] + heavy_ns[self._now.heavy_batch]
        late = [each or together_ns > self._spec.slo_ns for each in self._timed_out]
        light = aimd_batch(self._now.light_batch, late[0], light_ns)
        heavy = aimd_batch(self._now.heavy_batch, late[1], heavy_ns)
        return {light: light_ns[light]}, {heavy: heavy_ns[heavy]}


class DiffServeStatic(Routed):
    """The spec's fixed plan."""

    about = _about("DIFFSERVE-STATIC", 52, "DiffServe with a fixed threshold, roles and batches")

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        return static_plan(self._spec, gpus)


class ClipperLight(Routed):
    """Every request gets the light answer."""

    about = _about("CLIPPER-LIGHT", 53, "all light: every request gets the light program's answer")

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        batch = self._options.fixed_batch or clipper_batch(self._spec.light_ns, self._spec.slo_ns)
        return Allocation(0.0, gpus, 0, batch, 1, 0.0, True)

    def _decide(self, request: Request, score: float, now_ns: int) -> Judgement:
        return blind(request, score, now_ns)


class ClipperHeavy(Routed):
    """Every request goes to the heavy program at once."""

    about = _about(
        "CLIPPER-HEAVY", 54, "all heavy: every request goes to the heavy program at once"
    )

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        heavy_ns = self._spec.heavy.exec_ns
        batch = self._options.fixed_batch or clipper_batch(heavy_ns, self._spec.slo_ns)
        return Allocation(1.0, 0, gpus, 1, batch, 1.0, True)

    def _stage_of(self, request: Request) -> bool:
        return True


class Proteus(Routed):
    """Both programs, as many GPUs of the better one as the demand allows, and no judge."""

    about = _about("PROTEUS", 55, "both programs without a judge, as accurate as the demand allows")

    def __init__(self, cluster: Cluster, refusals: Refusals) -> None:
        super().__init__(cluster, refusals)
        self._light_share = 1.0
        self._arrivals = 0

    def _make_plan(self, gpus: int, rate: float, now_ns: int) -> Allocation:
        plan = proteus(
            gpus=gpus,
            demand=rate,
            light_ns=self._spec.light_ns,
            heavy_ns=self._spec.heavy.exec_ns,
            slo_ns=self._spec.slo_ns,
        )
        self._light_share = plan.light_share
        return Allocation(
            0.0,
            plan.light_gpus,
            plan.heavy_gpus,
            plan.light_batch,
            plan.heavy_batch,
            1 - plan.light_share,
            plan.feasible,
        )

    def _stage_of(self, request: Request) -> bool:
        self._arrivals += 1
        return uniform(self._options.seed + 1, self._arrivals) >= self._light_share

    def _decide(self, request: Request, score: float, now_ns: int) -> Judgement:
        return blind(request, score, now_ns)
