"""Repeats of the same run as one: each figure's mean with its 95 % interval (Student's t)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import msgspec

from slosched.analysis.compare import Estimate
from slosched.share.figures import JobMetrics, RunMetrics
from slosched.share.outputs import Summary


class JobRepeats(msgspec.Struct, frozen=True, kw_only=True):
    """One job over all repeats. None: no repeat has the figure."""

    name: str
    model: str
    throughput_per_s: Estimate | None
    normalized: Estimate | None
    mean_ms: Estimate | None
    p50_ms: Estimate | None
    p99_ms: Estimate | None
    inflation: Estimate | None
    joules_per_request: Estimate | None
    missed_share: Estimate | None


class Repeats(msgspec.Struct, frozen=True, kw_only=True):
    """The repeats of one mix in one mode under one label. `left_out` repeats were not complete."""

    label: str
    mix: str
    mode: str
    repeats: int
    left_out: int
    jobs: tuple[JobRepeats, ...]
    stp: Estimate | None
    antt: Estimate | None
    jain: Estimate | None
    energy_ratio: Estimate | None
    energy_ratio_with_idle: Estimate | None
    joules_per_request: Estimate | None
    total_g: Estimate | None


def over_repeats(summaries: Iterable[Summary]) -> tuple[Repeats, ...]:
    """One for each label, mix and mode, in their order of appearance; one repeat alone has no interval."""
    groups: dict[tuple[str, str, str], list[Summary]] = {}
    for each in summaries:
        groups.setdefault((each.label, each.mix, each.mode), []).append(each)
    return tuple(_repeats(group) for group in groups.values())


def _repeats(group: Sequence[Summary]) -> Repeats:
    whole = [each for each in group if each.metrics.complete]
    first = group[0]

    def of_run(figure: Callable[[RunMetrics], float | None]) -> Estimate | None:
        return _estimate(figure(each.metrics) for each in whole)

    def of_job(place: int, figure: Callable[[JobMetrics], float | None]) -> Estimate | None:
        return _estimate(figure(each.metrics.jobs[place]) for each in whole)

    jobs = tuple(
        JobRepeats(
            name=job.name,
            model=job.model,
            throughput_per_s=of_job(place, lambda each: each.throughput_per_s),
            normalized=of_job(place, lambda each: each.normalized),
            mean_ms=of_job(place, lambda each: each.latency.mean_ms if each.latency else None),
            p50_ms=of_job(place, lambda each: each.latency.p50_ms if each.latency else None),
            p99_ms=of_job(place, lambda each: each.latency.p99_ms if each.latency else None),
            inflation=of_job(place, lambda each: each.inflation.all),
            joules_per_request=of_job(place, lambda each: each.joules_per_request),
            missed_share=of_job(place, lambda each: each.misses.share),
        )
        for place, job in enumerate(whole[0].metrics.jobs if whole else ())
    )
    return Repeats(
        label=first.label,
        mix=first.mix,
        mode=first.mode,
        repeats=len(whole),
        left_out=len(group) - len(whole),
        jobs=jobs,
        stp=of_run(lambda each: each.stp),
        antt=of_run(lambda each: each.antt),
        jain=of_run(lambda each: each.jain),
        energy_ratio=of_run(lambda each: each.energy_ratio),
        energy_ratio_with_idle=of_run(lambda each: each.energy_ratio_with_idle),
        joules_per_request=of_run(lambda each: each.joules_per_request),
        total_g=_estimate(each.carbon.total_g for each in whole),
    )


def _estimate(values: Iterable[float | None]) -> Estimate | None:
    return Estimate.of([value for value in values if value is not None])
