"""Capacity planning: how many GPUs a mix of models needs, found by simulating numbers of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import msgspec

from slosched.config import EmulationNoise, GpuProfile
from slosched.core.scheduler.policies import resolved
from slosched.errors import InvalidConfig
from slosched.field_types import check_types
from slosched.loadgen.results import RunResult, StepResult
from slosched.output_files import utf8_document, write_file
from slosched.sim.jobs import Job, JobsProgress, Stop, run_many
from slosched.sim.plan_search import (
    INTERVAL,
    Block,
    Judged,
    Share,
    Verdict,
    conclude,
    least_requests,
    next_number,
    share_of,
)
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.base import Step
from slosched.workloads.composed import Composed
from slosched.workloads.mix import MixEntry, mix

FILE_NAME = "plan.json"
#: Blocks of each run, over which the spread of the share is taken.
BLOCKS = 10
#: In a flat curve the largest number of GPUs is less than this above the one before.
_FLAT = 0.002


@dataclass(frozen=True)
class PlanSpec:
    """The question. `base` is the simulation without its workload, number of GPUs and seed.

    Requests of the first `warmup_ns` do not count, those of the `duration_ns` after it do. With
    `each_model` every entry must reach `target`, else all together. Raises InvalidConfig for what cannot
    be answered: a target of 1, too few requests to show it, a model without a profile, faults.
    """

    entries: tuple[MixEntry, ...]
    base: SimSpec = field(repr=False)
    target: float
    low: int = 1
    high: int = 64
    seeds: int = 3
    duration_ns: int = 20 * NS_PER_S
    warmup_ns: int = NS_PER_S
    each_model: bool = False

    def __post_init__(self) -> None:
        check_types(self)
        if not 0 < self.target < 1:
            raise InvalidConfig(f"the target must be above 0 and below 1, not {self.target:g}")
        if not 1 <= self.low <= self.high:
            raise InvalidConfig(
                f"the numbers of GPUs must ascend from 1, not {self.low}..{self.high}"
            )
        if self.seeds < 1 or self.duration_ns < BLOCKS or self.warmup_ns < 0:
            raise InvalidConfig("seeds and duration must be above 0, the warm-up at least 0")
        if len(self.base.profiles) != 1:
            raise InvalidConfig("planning takes one profile, which all GPUs have")
        if self.base.faults is not None:
            raise InvalidConfig(
                "planning takes no --faults: failures are not modelled, so add GPUs for those that may be "
                "lost (docs/planning.md)"
            )
        for entry in self.entries:
            self.profile.model(entry.model)
        need = least_requests(self.target, self.seeds * BLOCKS)
        rates = [entry.rate_per_s for entry in self.entries]
        rate = min(rates) if self.each_model else sum(rates)
        expected = rate * self.seeds * self.duration_ns / NS_PER_S
        if expected < need:
            seconds = math.ceil(need / rate / self.seeds)
            raise InvalidConfig(
                f"{expected:.0f} requests cannot show a target of {self.target:g}: that takes {need} "
                f"without a single miss; with {self.seeds} seed(s) a duration of {seconds}s or more"
            )

    @property
    def profile(self) -> GpuProfile:
        return self.base.profiles[0]

    def workload(self) -> Composed:
        """The mix, with a step for the warm-up and one for each block."""
        ends = [self.warmup_ns + self.duration_ns * i // BLOCKS for i in range(BLOCKS + 1)]
        starts = ([0] if self.warmup_ns else []) + ends[:-1]
        steps = tuple(
            Step(i, start, label="warm-up" if start < self.warmup_ns else f"from {start / 1e9:g}s")
            for i, start in enumerate(starts)
        )
        return mix(self.entries, ends[-1], steps)

    def sim(self, gpus: int, seed: int) -> SimSpec:
        """The simulation of `gpus` GPUs with the seed of number `seed`, from 0."""
        return replace(self.base, workload=self.workload(), gpus=gpus, seed=self.base.seed + seed)

    def slo_ns(self, entry: MixEntry) -> int:
        """The SLO of an entry's requests."""
        factor, slo_ns = entry.slo
        if slo_ns:
            return slo_ns
        b1_ns = self.profile.model(entry.model).exec_ns[1]
        return round(b1_ns * factor) if factor else self.base.scheduler.default_slo_ns

    def guess(self) -> int:
        """GPUs that could do the work if every batch were as large as its SLO allows: a start."""
        config = resolved(self.base.scheduler)
        assert config.max_batch is not None and config.max_exec_ns is not None
        busy = 0.0
        for entry in self.entries:
            limit_ns = min(config.max_exec_ns, self.slo_ns(entry))
            costs = [
                ns / batch
                for batch, ns in self.profile.model(entry.model).exec_ns.items()
                if batch == 1 or (batch <= config.max_batch and ns <= limit_ns)
            ]
            busy += entry.rate_per_s * min(costs) / NS_PER_S
        return max(1, math.ceil(busy))


@dataclass(frozen=True)
class Point:
    """What was found for one number of GPUs. `models` are the shares of the entries, in order."""

    gpus: int
    share: Share
    models: tuple[Share, ...]
    by_seed: tuple[float, ...]
    codes: Mapping[str, int]
    run_dirs: tuple[Path | None, ...]

    def judged(self, each_model: bool) -> Judged:
        """The share that is held against the target: of all requests, or of the worst model."""
        shares = self.models if each_model else (self.share,)
        return Judged(
            min(share.low for share in shares),
            min(share.point for share in shares),
            min(share.high for share in shares),
        )


@dataclass(frozen=True)
class Plan:
    """The answer so far. `why_none` explains a verdict without a number; `complete`: nothing is left to try."""

    spec: PlanSpec
    points: tuple[Point, ...]
    verdict: Verdict
    why_none: tuple[str, ...]
    complete: bool

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON. Times in ns."""
        spec, verdict = self.spec, self.verdict
        workload = spec.workload()
        return {
            "complete": self.complete,
            "workload": workload.describe(),
            "models": list(workload.groups),
            "profile": spec.profile.name,
            "policy": spec.base.scheduler.policy,
            "fidelity": spec.base.scheduler.fidelity,
            "target": spec.target,
            "judged": "each model" if spec.each_model else "all requests",
            "satisfaction": "client, from the scheduled send",
            "interval": INTERVAL,
            "range": [spec.low, spec.high],
            "seeds": [spec.base.seed + i for i in range(spec.seeds)],
            "duration_ns": spec.duration_ns,
            "warmup_ns": spec.warmup_ns,
            "gpus": verdict.gpus,
            "gpus_by_point_estimate": verdict.gpus_by_point,
            "doubts": list(verdict.doubts),
            "why_none": list(self.why_none),
            "points": [
                {
                    "gpus": point.gpus,
                    **_share_document(point.share),
                    "judged": point.judged(spec.each_model)._asdict(),
                    "by_seed": list(point.by_seed),
                    "models": [_share_document(share) for share in point.models],
                    "codes": dict(point.codes),
                    "runs": [None if path is None else str(path) for path in point.run_dirs],
                }
                for point in self.points
            ],
        }


def _share_document(share: Share) -> dict[str, Any]:
    return {"satisfaction": share.point, **asdict(share)}


#: Called with the number of GPUs that is simulated and how far its runs are.
OnProgress = Callable[[int, JobsProgress], None]


def plan(
    spec: PlanSpec,
    *,
    out: Path | None = None,
    processes: int = 1,
    progress: OnProgress | None = None,
    on_point: Callable[[Point], None] | None = None,
    stop: Stop | None = None,
) -> Plan:
    """Find the smallest number of GPUs that reaches the target.

    With `out` each run has a directory in it (gpus=N/seed=S), complete ones are not run again, and
    plan.json is written after each number. `on_point` gets each number's result. Nothing is simulated
    if no number can suffice. `stop` is as of `run_many`. Raises what `run_many` raises, InvalidConfig if
    plan.json cannot be written.
    """
    why_none = hopeless(spec)
    points: dict[int, Point] = {}
    guess = spec.guess()
    limits = {"low": spec.low, "high": spec.high, "target": spec.target}
    while True:
        known = {n: point.judged(spec.each_model) for n, point in points.items()}
        gpus = None if why_none else next_number(known, guess=guess, **limits)  # type: ignore[arg-type]
        verdict = conclude(known, **limits)  # type: ignore[arg-type]
        ordered = tuple(points[n] for n in sorted(points))
        if gpus is None and verdict.gpus is None and not why_none:
            why_none = _why_none(spec, ordered)
        answer = Plan(spec, ordered, verdict, tuple(why_none), gpus is None)
        if out is not None:
            _write(answer, out)
        if gpus is None:
            return answer
        points[gpus] = _try(spec, gpus, out, processes, progress, stop)
        if on_point is not None:
            on_point(points[gpus])


def _try(
    spec: PlanSpec,
    gpus: int,
    out: Path | None,
    processes: int,
    progress: OnProgress | None,
    stop: Stop | None,
) -> Point:
    jobs = [
        Job(
            spec.sim(gpus, seed),
            None if out is None else out / f"gpus={gpus}" / f"seed={spec.base.seed + seed}",
        )
        for seed in range(spec.seeds)
    ]

    def show(where: JobsProgress) -> None:
        if progress is not None:
            progress(gpus, where)

    results = run_many(jobs, processes=processes, progress=show, stop=stop)
    return point_of(spec, gpus, results)


def point_of(spec: PlanSpec, gpus: int, results: Sequence[RunResult]) -> Point:
    """What the runs of one number of GPUs come to, a result for each seed."""
    names = spec.workload().groups
    first = 1 if spec.warmup_ns else 0
    counted = [[step for step in result.steps if step.index >= first] for result in results]
    codes: dict[str, int] = {}
    for steps in counted:
        for step in steps:
            for code, number in step.codes.items():
                codes[code] = codes.get(code, 0) + number
    seeds = [share_of(_blocks([steps], first)) for steps in counted]
    return Point(
        gpus=gpus,
        share=share_of(_blocks(counted, first)),
        models=tuple(share_of(_blocks(counted, first, name)) for name in names),
        by_seed=tuple(share.point for share in seeds),
        codes=dict(sorted(codes.items(), key=lambda item: (-item[1], item[0]))),
        run_dirs=tuple(result.run_dir for result in results),
    )


def _blocks(
    runs: Sequence[Sequence[StepResult]], first: int, group: str | None = None
) -> list[Block]:
    """The counts of each block of each run: of one group, or of all."""
    blocks = []
    for steps in runs:
        for index in range(first, first + BLOCKS):
            own = [s for s in steps if s.index == index and group in (None, s.group)]
            blocks.append(Block(sum(s.sent for s in own), sum(s.in_time for s in own)))
    return blocks


# ----------------------------------------------------------------------------------- why not


def hopeless(spec: PlanSpec) -> list[str]:
    """Why no number of GPUs can suffice, whatever the scheduler does; [] if some number may."""
    rate = sum(entry.rate_per_s for entry in spec.entries)
    lost, reasons = 0.0, []
    for name, entry in zip(spec.workload().groups, spec.entries, strict=True):
        least_ns, slo_ns = _least_ns(spec, entry), spec.slo_ns(entry)
        if slo_ns < least_ns:
            lost += entry.rate_per_s / rate
            reasons.append(
                f"{name}: its SLO of {format_duration(slo_ns)} is below {format_duration(least_ns)}, "
                f"which one request alone takes on an idle {spec.profile.name} and the "
                "network's latency; a larger SLO, a faster GPU or a shorter latency is needed"
            )
    return reasons if lost > 1 - spec.target or (spec.each_model and reasons) else []


def _least_ns(spec: PlanSpec, entry: MixEntry) -> int:
    """The shortest time from send to answer: one request alone, and the network in both directions."""
    network = spec.base.network
    ways_ns = (
        network.from_client_ns
        + network.to_worker_ns
        + network.from_worker_ns
        + network.to_client_ns
    )
    model = spec.profile.model(entry.model)
    exec_ns = min(model.times(length)[1] for length in model.lengths or (0,))
    return ways_ns + math.floor(exec_ns * _fastest(spec.base.noise))


def _fastest(noise: EmulationNoise) -> float:
    """The smallest factor on exec times that the noise may draw."""
    return noise.exec_quantiles[0] if noise.exec_quantiles else 1 - 3 * noise.exec_sigma


def _why_none(spec: PlanSpec, points: Sequence[Point]) -> list[str]:
    """Why the largest number of GPUs fell short, from what was counted."""
    last = points[-1]
    judged = last.judged(spec.each_model)
    reasons = [
        f"even {last.gpus} GPUs reach only {100 * judged.point:.4g} % (lower bound "
        f"{100 * judged.low:.4g} %)"
    ]
    before = points[-2].judged(spec.each_model) if len(points) > 1 else None
    if judged.point >= spec.target:
        reasons.append(
            "the point estimate reaches the target and its lower bound does not: take more seeds or a "
            "longer duration to be sure"
        )
    elif before is not None and judged.point - before.point < _FLAT:
        reasons.append(
            f"{points[-2].gpus} GPUs reach {100 * before.point:.4g} % too, so that more of them do not "
            "help: what misses does so for another reason than a lack of GPUs, such as an SLO too "
            "short for bursts of one model or for loading it"
        )
    elif before is not None:
        reasons.append(f"more GPUs still help: look beyond {spec.high} with --gpus")
    names = spec.workload().groups
    worst = min(range(len(names)), key=lambda i: last.models[i].point)
    if len(names) > 1:
        reasons.append(
            f"the worst model is {names[worst]} with {100 * last.models[worst].point:.4g} % in time"
        )
    codes = [f"{number} {code}" for code, number in last.codes.items() if code != "ok"][:3]
    if codes:
        reasons.append(f"of {last.share.sent} requests: {', '.join(codes)}")
    return reasons


def _write(answer: Plan, out: Path) -> None:
    path = out / FILE_NAME
    data = (
        msgspec.json.format(msgspec.json.encode(utf8_document(answer.as_dict())), indent=2) + b"\n"
    )
    write_file(path, data)
