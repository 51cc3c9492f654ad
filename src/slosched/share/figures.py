"""The figures of one run, per job and in all: plain data that share/metrics.py makes, for summary.json."""

from __future__ import annotations

import msgspec

from slosched.share.energy import Energy
from slosched.share.latency import Latency
from slosched.share_spec import Mode, Status, Tuning


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    pass


class Inflation(Figures, frozen=True):
    """Mean latency / mean latency alone - 1, of all requests and of two parts of them.

    A request overlaps if another job's request ran between its arrival and its end (Deft's filter of logs). The
    parts of two jobs are the four groups of Deft's dynamic workload. `own` leaves pauses out.
    """

    all: float | None = None
    overlapping: float | None = None
    apart: float | None = None
    own: float | None = None
    overlapping_n: int = 0
    apart_n: int = 0
    overlapping_mean_ms: float | None = None
    apart_mean_ms: float | None = None
    apart_sem_ms: float | None = None


class Misses(Figures, frozen=True):
    """`missed` of `n` requests with a deadline ended behind it; by Deft's rule: 1.6 times the time alone."""

    n: int = 0
    missed: int = 0
    share: float | None = None
    slo_ms: float | None = None
    deft_missed: int | None = None
    deft_share: float | None = None


class Pauses(Figures, frozen=True):
    """Interruptions: from the arrival of the job that went first to its start, and how long the pauses took."""

    n: int = 0
    preempted: Latency | None = None
    paused: Latency | None = None


class JobMetrics(Figures, frozen=True):
    """One job of a run. `normalized` is throughput / throughput alone, `slowdown` mean latency / alone.

    `device_share` is its part of the device's time: of what was measured (`device_measured`), else of the time
    from start to end without pauses. Energy is attributed by that share. `wrong_answers` are the requests
    whose answer was not that of the job's first one: something disturbed them. `left`: requests of an open
    loop that had arrived by the end and never started, so that no latency and no miss tells of them.
    """

    job: int
    name: str
    model: str
    batch: int
    priority: int
    status: Status
    reason: str
    pid: int
    n: int
    work: float  # requests in the window, with parts of them
    throughput_per_s: float
    latency: Latency | None
    wait_mean_ms: float | None
    inflation: Inflation
    misses: Misses
    pauses: Pauses
    left: int = 0
    solo_throughput_per_s: float | None = None
    solo_mean_ms: float | None = None
    normalized: float | None = None
    slowdown: float | None = None
    device_s: float = 0.0
    device_measured: bool = False
    device_share: float | None = None
    joules: float | None = None
    joules_per_request: float | None = None
    active_joules_per_request: float | None = None
    solo_joules_per_request: float | None = None
    memory_allocated: int = 0
    memory_reserved: int = 0
    wrong_answers: int = 0
    runs: str = ""
    note: str = ""
    boundaries: int = 0  # in one request, of which each `every`-th binds
    tuning: Tuning | None = None  # where the tuner chose its boundaries


#: A common window that is shorter than this part of the planned one is told.
_SHORT = 0.9


class RunMetrics(Figures, frozen=True):
    """One run. None: not known, for want of a run alone or of power.

    `energy_ratio` is energy here / energy of the same requests alone, each on a GPU that counts only while
    it works; `energy_ratio_with_idle` adds those GPUs' idle time in this window. `gpu_s_alone` is the time
    that the same requests take alone. `low_overhead` is what sharing costs the jobs of the lowest priority
    at most, where no other job runs (or, if one always does, without their pauses).
    """

    mode: Mode
    repeat: int
    window_s: float
    jobs: tuple[JobMetrics, ...]
    complete: bool
    energy: Energy
    pauses: Pauses
    unavailable: str = ""
    planned_s: float = 0.0  # the window's length, if each job lasts for as long; 0: not known
    stopped: bool = False  # before its duration was over; what it has is of the time until then
    throughput_per_s: float = 0.0
    stp: float | None = None
    antt: float | None = None
    jain: float | None = None
    gpu_s_alone: float | None = None
    gpu_seconds_ratio: float | None = None
    joules_per_request: float | None = None
    active_joules_per_request: float | None = None
    energy_alone_j: float | None = None
    energy_ratio: float | None = None
    energy_ratio_with_idle: float | None = None
    low_overhead: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def short(self) -> bool:
        """True if jobs shared the GPU for much less than planned: one began late, or ended early."""
        shared = self.mode is not Mode.EXCLUSIVE and not self.stopped and not self.unavailable
        return shared and self.window_s < _SHORT * self.planned_s


class Alone(Figures, frozen=True):
    """A job by itself: what the shared run is compared with. `busy_s` is the time that a request takes."""

    throughput_per_s: float
    mean_ms: float
    busy_s: float
    joules: float | None  # of one request, while the GPU works
    idle_watts: float | None
