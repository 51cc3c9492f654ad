"""Solo profiles: how long a model takes alone on a device, and what it asks of the GPU.

A profile is one of our own (share/profiles/*.toml, by name), a TOML file of the same form, or the directory
of a finished run whose exclusive results are taken as the solos.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import inf
from pathlib import Path

import msgspec

from slosched.errors import InvalidConfig
from slosched.share.contention import Party
from slosched.share.found_runs import runs_below
from slosched.share_spec import Job, Mode, Run, RunResult, ShareSpec, tiny_layers
from slosched.units import NS_PER_MS

_OWN = Path(__file__).parent / "profiles"
_DEFAULT = "h200"


class Solo(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model alone. `gpu_share`: the part of the latency in which the GPU works, 0..1; `host_share`: that in
    which the host does (-1: 1 of an eager model, 1 - gpu_share of graphs).

    `watts`: the mean power of the card in a closed loop. `burst`, `press`: see contention.py; their defaults
    are those of a model in the middle. `boundaries`: places in one request where it can be interrupted;
    `longest_ms`: the longest stretch without one (0: all are equal), which is the first, or with `longest_last`
    the last. `runs`: as "graphs" or "eager"; `lane_ms`: how long it takes in the lane of mode preempt (0: as
    long as alone).
    """

    model: str
    latency_ms: float
    batch: int = 1
    size: tuple[int, int] = (0, 0)
    p99_ms: float = 0.0  # 0: each request takes the same time
    gpu_share: float = 1.0
    host_share: float = -1.0
    watts: float = -1.0  # -1: unknown; in proportion to the GPU share
    memory_mib: int = 0
    burst: float = 4.0
    press: float = 1.0
    fills: float = 1.0
    boundaries: int = 32
    longest_ms: float = 0.0
    longest_last: bool = False
    lane_ms: float = 0.0
    runs: Run = Run.EAGER
    note: str = ""

    def __post_init__(self) -> None:
        wrong = [
            (self.latency_ms > 0, "latency_ms must be above 0"),
            (self.p99_ms >= 0, "p99_ms must be at least 0"),
            (0 < self.gpu_share <= 1, "gpu_share must be above 0 and at most 1"),
            (self.burst > 0 and self.press >= 0, "burst must be above 0 and press at least 0"),
            (0 < self.fills <= 1, "fills must be above 0 and at most 1"),
            (self.boundaries >= 0 and self.batch >= 1, "boundaries and batch cannot be negative"),
            (self.host_share <= 1, "host_share must be at most 1"),
            (0 <= self.longest_ms < inf, "longest_ms must be at least 0"),
            (0 <= self.lane_ms < inf, "lane_ms must be at least 0"),
            (self.runs is not Run.AUTO, 'runs must be "graphs" or "eager"'),
        ]
        for right, text in wrong:
            if not right:  # NaN is not
                raise ValueError(f"model {self.model!r}: {text}")

    @property
    def latency_ns(self) -> int:
        return max(1, round(self.latency_ms * NS_PER_MS))


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The solos of one device. `measured` says how; every report of a simulation repeats it.

    `awake_watts`: with models loaded, while none runs (0: as idle). `cores`: of its host, for eager models in
    processes of their own (0: enough).
    """

    device: str
    measured: str
    solos: tuple[Solo, ...]
    idle_watts: float = 0.0
    awake_watts: float = 0.0
    most_watts: float = 1e9
    cores: int = 0

    def of(self, job: Job) -> Solo:
        """The solo of `job`'s model, batch and size. Raises InvalidConfig where the model is unknown.

        A job that runs as graphs (or AUTO) has the solo of graphs, if there is one; an eager one that of eager.
        Where only another size or batch is known, the nearest one is scaled: the GPU's part in proportion to
        batch and pixels, the host's part not at all; `note` says so.
        """
        if job.model == "tiny" or job.model.startswith("tiny:"):
            return _tiny(job)
        same = [solo for solo in self.solos if solo.model == job.model]
        if not same:
            known = ", ".join(sorted({solo.model for solo in self.solos}))
            raise InvalidConfig(
                f"job {job.name!r}: the profile of {self.device} has no solo run of {job.model!r} "
                f"(it has {known}); run it alone first and name that directory as the profile"
            )
        wanted = Run.EAGER if job.run is Run.EAGER else Run.GRAPHS
        same = [solo for solo in same if solo.runs is wanted] or same
        size = job.size if any(job.size) else (0, 0)
        fitting = [solo for solo in same if solo.size == size] or same
        nearest = min(
            fitting,
            key=lambda solo: (abs(solo.batch - job.batch), abs(_pixels(solo) - _area(size))),
        )
        factor = job.batch / nearest.batch
        if any(size) and any(nearest.size):
            factor *= _area(size) / _pixels(nearest)
        return nearest if factor == 1 else _scaled(nearest, job, factor, self.idle_watts)

    def party(self, job: Job) -> Party:
        """What `job` asks of the GPU."""
        solo = self.of(job)
        return Party(
            gpu_share=solo.gpu_share,
            burst=solo.burst,
            press=solo.press,
            host_share=solo.host_share if solo.host_share >= 0 else _host_share(solo),
            interprets=job.run is Run.EAGER,  # what is not runs as graphs in mode streams
            fills=solo.fills,
            priority=job.priority,
            thread_percentage=job.thread_percentage,
        )


def _host_share(solo: Solo) -> float:
    return 1.0 - solo.gpu_share if solo.runs is Run.GRAPHS else 1.0


def _tiny(job: Job) -> Solo:
    """The eager backend's model for tests, which takes the time that its name says."""
    layers, layer_ms = tiny_layers(job.model)
    return Solo(
        model=job.model,
        batch=job.batch,
        latency_ms=max(0.001, layers * layer_ms),
        boundaries=layers,
        note="sleeps",
    )


def _area(size: tuple[int, int]) -> int:
    return size[0] * size[1]


def _pixels(solo: Solo) -> int:
    return _area(solo.size)


def _scaled(solo: Solo, job: Job, factor: float, idle_watts: float) -> Solo:
    gpu_ms = solo.latency_ms * solo.gpu_share * factor
    latency_ms = max(gpu_ms, solo.latency_ms * min(1.0, factor) if factor < 1 else solo.latency_ms)
    gpu_share = min(1.0, gpu_ms / latency_ms)
    watts = idle_watts + (solo.watts - idle_watts) * gpu_share / solo.gpu_share
    return msgspec.structs.replace(
        solo,
        batch=job.batch,
        size=job.size,
        latency_ms=latency_ms,
        p99_ms=solo.p99_ms / solo.latency_ms * latency_ms,
        longest_ms=solo.longest_ms / solo.latency_ms * latency_ms,
        lane_ms=solo.lane_ms / solo.latency_ms * latency_ms,
        gpu_share=gpu_share,
        watts=watts if solo.watts >= 0 else solo.watts,
        note=f"scaled by {factor:.3g} from batch {solo.batch}; {solo.note}".rstrip("; "),
    )


# --------------------------------------------------------------------------------- reading


def own_profiles() -> tuple[str, ...]:
    """The names of the profiles that come with the package."""
    return tuple(sorted(path.stem for path in _OWN.glob("*.toml")))


def load_profile(name: str) -> Profile:
    """The profile that `name` names: one of our own ("" is the H200's), a TOML file, or a run's directory.

    Raises InvalidConfig where there is none, or it is wrong.
    """
    name = name or _DEFAULT
    path = _OWN / f"{name}.toml" if name in own_profiles() else Path(name)
    if path.is_dir():
        return profile_of_runs(path)
    if not path.is_file():
        raise InvalidConfig(
            f"there is no solo profile {name!r}: give one of {', '.join(own_profiles())}, a TOML file, or the "
            "directory of a finished run with exclusive results"
        )
    try:
        return msgspec.toml.decode(path.read_bytes(), type=Profile)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError, OSError) as error:
        raise InvalidConfig(f"{path} is not a solo profile: {error}") from None


def profile_of_runs(directory: Path) -> Profile:
    """A profile of the exclusive results under `directory`: measured median and p99, the mean power.

    Models that ours know keep their GPU share, burst and press; those of others have the defaults.
    """
    solos: dict[tuple[str, int, tuple[int, int], Run], Solo] = {}
    device = "unknown"
    idle: list[float] = []
    for _, spec, result in runs_below(directory):
        if result.mode is not Mode.EXCLUSIVE:
            continue
        device = result.about.get("device", spec.label)
        if result.idle_watts >= 0:
            idle.append(result.idle_watts)
        for solo in _solos_of(result, spec):
            solos[solo.model, solo.batch, solo.size, solo.runs] = solo
    if not solos:
        raise InvalidConfig(
            f"{directory} has no finished exclusive run: run the models alone there first (mode exclusive)"
        )
    return Profile(
        device=device,
        measured=f"the exclusive runs under {directory}",
        solos=tuple(solos[key] for key in sorted(solos)),
        idle_watts=sum(idle) / len(idle) if idle else 0.0,
    )


def _solos_of(result: RunResult, spec: ShareSpec) -> Iterable[Solo]:
    ours = {
        (solo.model, solo.runs): solo for solo in load_profile(_DEFAULT).solos if solo.batch == 1
    }
    watts = [each.watts for each in result.power if result.begin_ns <= each.at_ns <= result.end_ns]
    for each in result.jobs:
        job = spec.jobs[each.job]
        times = sorted(r.ended_ns - r.started_ns for r in each.requests if r.counts)
        if not times:
            continue
        ran = each.prepared.runs if each.prepared else job.run
        runs = Run.GRAPHS if ran is Run.GRAPHS else Run.EAGER
        known = ours.get((job.model, runs))
        yield Solo(
            model=job.model,
            batch=job.batch,
            size=job.size,
            latency_ms=times[len(times) // 2] / NS_PER_MS,
            p99_ms=times[min(len(times) - 1, len(times) * 99 // 100)] / NS_PER_MS,
            gpu_share=_busy(result) or (known.gpu_share if known else 1.0),
            watts=sum(watts) / len(watts) if watts else -1.0,
            memory_mib=each.memory_reserved >> 20,
            burst=known.burst if known else 4.0,
            press=known.press if known else 1.0,
            boundaries=each.prepared.boundaries if each.prepared else 32,
            runs=runs,
            note="measured",
        )


def _busy(result: RunResult) -> float:
    """NVML's mean utilization in the window, 0 where it is unknown. Think time makes it too small."""
    utilization = [
        each.utilization / 100
        for each in result.power
        if result.begin_ns <= each.at_ns <= result.end_ns and each.utilization > 0
    ]
    return min(1.0, sum(utilization) / len(utilization)) if utilization else 0.0
