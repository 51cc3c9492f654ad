"""What shares one GPU: jobs, modes and what a run records. Plain data; no files are read here.

A *job* is one model with its clients. A *mode* is how the jobs share the GPU. `slosched share` (the laboratory)
reads an experiment into a `ShareSpec`, starts *members* (daemon/member: the processes that hold the models)
with an `Order` each, and gets `Request` rows back. core/share decides what starts when, live and in virtual
time.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum

import msgspec

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S

#: The SLO of Deft's figures, as a multiple of the latency of the model alone.
DEFT_SLO = 1.6
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")


class Mode(StrEnum):
    """How jobs share the GPU."""

    EXCLUSIVE = "exclusive"  # one at a time, each alone: the baseline
    TM = "tm"  # a process for each job, under the driver's time slicing
    MPS = "mps"  # a process for each job, under CUDA's Multi-Process Service
    STREAMS = "streams"  # one process, a stream for each job with its priority
    PREEMPT = "preempt"  # one process, one serving lane that is preempted at segment boundaries
    GATE = "gate"  # a process for each job; low ones pass a gate in shared memory at boundaries


class Run(StrEnum):
    """How a model runs."""

    AUTO = "auto"  # as graphs where it can be captured
    GRAPHS = "graphs"
    EAGER = "eager"


class Arriving(StrEnum):
    CLOSED = "closed"
    POISSON = "poisson"
    GAMMA = "gamma"
    CONSTANT = "constant"
    TRACE = "trace"


class BoundaryKind(StrEnum):
    """Where a low job looks whether it must wait, and how the work that it has launched is bounded."""

    NONE = "none"  # no bound
    SEGMENT = "segment"  # graphs: the segments that preparation cut
    SYNC = "sync"  # eager: wait for the device after each `every` boundaries (Deft's controlsync)
    EVENT = "event"  # eager: at most `depth` groups of `every` boundaries in flight (Deft's controlEvent)
    LAYER = "layer"  # eager: wait for the device after each layer (Deft's sync_level)


class Policy(StrEnum):
    """Which job's request starts next where one lane serves several."""

    FCFS = "fcfs"
    RR = "rr"
    PRIORITY = "priority"
    EDF = "edf"
    LEAST_SLACK = "least-slack"


class Stop(StrEnum):
    FINISH = "finish"  # what runs at the end of the duration ends, and counts
    CUT = "cut"  # what runs then does not count


class Status(StrEnum):
    """How a job ended."""

    OK = "ok"
    FAILED = "failed"  # its model raised, or could not be prepared
    OUT_OF_MEMORY = "out of memory"
    DIED = "died"  # its process ended
    TIMED_OUT = "timed out"
    UNAVAILABLE = "unavailable"  # this machine lacks what the job needs


class _Plain(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Clients(_Plain, frozen=True):
    """When a job's requests arrive. `rate_per_s`, `cv` and `trace` are of open loops.

    `trace` has rising times in s after the start.
    """

    arriving: Arriving = Arriving.CLOSED
    think_ns: int = 0  # from an end to the next request of a closed loop
    concurrency: int = 1  # requests of a closed loop that are out at a time
    rate_per_s: float = 0.0
    cv: float = 1.0
    trace: tuple[float, ...] = ()


class Boundary(_Plain, frozen=True):
    """Where a job can be interrupted. `tuned`: the tuner chooses `every`."""

    kind: BoundaryKind = BoundaryKind.SEGMENT
    every: int = 1
    depth: int = 2
    tuned: bool = False


class Job(_Plain, frozen=True):
    """A model and its clients. `size` is the height and width of an image; (0, 0): the model's own."""

    name: str
    model: str
    batch: int = 1
    size: tuple[int, int] = (0, 0)
    dtype: str = ""  # empty: that of the published experiment
    run: Run = Run.AUTO
    priority: int = 0  # a higher one goes first
    clients: Clients = Clients()
    count: int = 0  # requests; 0: until the duration is over
    start_after_ns: int = 0
    warmups: int = 2
    slo_ns: int = 0
    slo_times_solo: float = 0.0
    boundary: Boundary = Boundary()
    thread_percentage: int = 0  # under MPS; 0: no limit
    command: tuple[str, ...] = ()  # a program of the user's, which runs instead of a model

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise InvalidConfig(
                f"job {self.name!r}: a name has letters, digits and . _ + - (at most 100)"
            )


def tiny_layers(model: str) -> tuple[int, float]:
    """The layers of the model for tests, and the ms of each: "tiny:LAYERS:MS"; 8 and 0.5 unless it says others.

    Raises InvalidConfig.
    """
    parts = model.split(":")[1:]
    try:
        layers = int(parts[0]) if parts else 8
        ms = float(parts[1]) if len(parts) > 1 else 0.5
    except ValueError:
        layers, ms = 0, 0.0
    if len(parts) > 2 or not 1 <= layers <= 10_000 or not 0 <= ms <= 10_000:
        raise InvalidConfig(
            f"model {model!r}: write tiny, tiny:LAYERS or tiny:LAYERS:MS, with 1 to 10000 layers of 0 to "
            "10000 ms"
        )
    return layers, ms


class ShareSpec(_Plain, frozen=True):
    """An experiment: every job in every mode, `repeats` times. Paths are chosen by who runs it."""

    jobs: tuple[Job, ...]
    modes: tuple[Mode, ...] = (Mode.MPS, Mode.TM)
    policy: Policy = Policy.PRIORITY
    duration_ns: int = 120 * NS_PER_S
    device: str = "cuda:0"  # cuda:N, cpu or emulated
    label: str = "gpu"  # what the results call the device
    repeats: int = 1
    seed: int = 0
    linger_ns: int = 0  # in mode preempt the lane waits this long for a higher job's next request
    stop: Stop = Stop.FINISH
    least_jobs: int = (
        0  # the duration is over for a job after this number at the soonest (Deft: 10)
    )
    idle_ns: int = 3 * NS_PER_S  # measured before each run, for the power of an idle GPU
    cool_down_ns: int = 2 * NS_PER_S
    power_every_ns: int = 50_000_000  # between two samples of the power
    prepare_within_ns: int = 600 * NS_PER_S
    finish_within_ns: int = 120 * NS_PER_S
    profile: str = ""  # of emulated GPUs: a file of solo profiles, or the name of an own one


# --------------------------------------------------------------------------------- what a run records


class Request(_Plain, frozen=True):
    """One request of one job. Times are of CLOCK_MONOTONIC, which all processes of a host share.

    Latency (JCT) counts from `arrived_ns`. Where a request was paused `interruptions` times, `paused_ns` is the
    time in which others ran in its place.
    """

    job: int  # its place among the spec's jobs
    number: int
    arrived_ns: int
    started_ns: int
    ended_ns: int
    deadline_ns: int = 0  # 0: it has none
    interruptions: int = 0
    paused_ns: int = 0
    device_ns: int = 0  # the device's time, where it was measured
    warmup: bool = False
    cut: bool = False  # ended behind the duration, in a run that cuts
    differs: bool = (
        False  # its answer is not that of the job's first request: something disturbed it
    )
    beside_lower: bool = False  # a lower job did not stop at the gate in time

    @property
    def latency_ns(self) -> int:
        return self.ended_ns - self.arrived_ns

    @property
    def counts(self) -> bool:
        """False for a warm-up and for what a run cut."""
        return not (self.warmup or self.cut)


class Interruption(_Plain, frozen=True):
    """A job of higher priority went first: from its arrival over its start to the end of the pause."""

    job: int  # the interrupted one
    by: int  # -1: unknown
    wanted_ns: int
    started_ns: int
    resumed_ns: int
    boundary: int = 0


class Pieces(_Plain, frozen=True):
    """What the tuner of boundaries needs of a job alone, measured with its kind of boundary.

    A piece is what lies between two boundaries of `every` = 1. `costs_ns` has what one boundary costs by depth;
    `fixed_ns` is what looking at boundaries costs a request however far apart they are. Deft counts kernels:
    their number and times are 0 where they were not measured.
    """

    pieces: int
    exec_ns: int
    longest_ns: int = 0  # between two boundaries
    costs_ns: dict[int, int] = {}
    fixed_ns: int = 0
    kernels: int = 0
    kernel_ns: int = 0
    longest_kernel_ns: int = 0


class Urgent(_Plain, frozen=True):
    """What interrupts a job, for its tuner; rates are in requests/s.

    `low_rate_per_s` is that of the job itself; 0: it runs without a break. SLO and time are of the urgent job
    with the least room between them.
    """

    rate_per_s: float
    exec_ns: int = 0
    slo_ns: int = 0
    low_rate_per_s: float = 0.0


class Tuning(_Plain, frozen=True):
    """What the tuner chose for a job, and what it expects of it. `why` is one line.

    `overhead` is a part of the request's time. `deft_every` is N* = sqrt(a n / k) in pieces, and
    `deft_launches` the same in launches; `deft_best` is the best of Deft's 13 values. 0: not known.
    """

    every: int
    depth: int
    pieces: int
    cost_ns: int
    overhead: float
    mean_wait_ns: int
    longest_wait_ns: int
    fits: bool
    deft_launches: float = 0.0
    deft_every: float = 0.0
    deft_best: int = 0
    unit: str = "pieces"  # what `every`, `pieces` and `deft_every` count
    why: str = ""


#: Times of segments that are kept of a request; SDXL has 75,000 module boundaries.
MOST_SEGMENTS = 500


def kept_segments(times_ns: Sequence[int]) -> tuple[int, ...]:
    """`times_ns` in rising order; of more than MOST_SEGMENTS as many, evenly spaced, with both ends."""
    order = sorted(times_ns)
    if len(order) <= MOST_SEGMENTS:
        return tuple(order)
    return tuple(
        order[place * (len(order) - 1) // (MOST_SEGMENTS - 1)] for place in range(MOST_SEGMENTS)
    )


class Prepared(_Plain, frozen=True):
    """What a member says of a job that is ready.

    `segments_ns`: the times between boundaries in one request, as `kept_segments` keeps them.
    """

    job: int
    pid: int
    runs: Run = Run.EAGER
    load_ns: int = 0
    exec_ns: int = 0  # predicted, or measured in warm-ups
    boundaries: int = 0  # in one request
    boundary_ns: int = 0  # the longest time between two
    segments_ns: tuple[int, ...] = ()
    note: str = ""  # "random weights; ..."
    answer: str = ""  # a digest of the answer, to be compared with that of another run
    pieces: Pieces | None = None  # of a member that was asked to measure
    tuning: Tuning | None = None  # of a job whose boundary was tuned


class JobResult(_Plain, frozen=True):
    """A job of a run: its rows and how it ended. `memory` is bytes on the device at most.

    `left`: requests that had arrived by the end and never started; they have no rows.
    """

    job: int
    status: Status = Status.OK
    reason: str = ""
    pid: int = 0
    requests: tuple[Request, ...] = ()
    interruptions: tuple[Interruption, ...] = ()
    prepared: Prepared | None = None
    memory_allocated: int = 0
    memory_reserved: int = 0
    left: int = 0


class PowerSample(_Plain, frozen=True):
    """What NVML said at `at_ns`. -1: it does not say."""

    at_ns: int
    watts: float
    watts_average: float = -1.0
    energy_mj: int = -1  # the counter, since the driver was loaded
    utilization: int = -1  # %
    memory_utilization: int = -1  # %
    memory_used: int = -1  # bytes
    memory_total: int = -1
    temperature: int = -1
    sm_mhz: int = -1
    pstate: int = -1
    throttle: int = -1  # NVML's bit mask of reasons


class RunResult(_Plain, frozen=True):
    """One mode, once. The window in which all jobs were there is `begin_ns` to `end_ns`."""

    mode: Mode
    repeat: int
    jobs: tuple[JobResult, ...]
    begin_ns: int
    end_ns: int
    power: tuple[PowerSample, ...] = ()  # from the idle time before the run to its end
    power_problem: str = ""
    idle_watts: float = -1.0
    unavailable: str = ""  # why this machine cannot run the mode
    about: dict[str, str] = {}  # versions, device, what was random


# --------------------------------------------------------------------------------- orders to members


class Order(_Plain, frozen=True):
    """What one member holds and how it shares: its jobs, by their places in the spec."""

    mode: Mode
    device: str
    jobs: dict[int, Job]
    policy: Policy
    seed: int  # of weights and inputs, and of arrivals together with `repeat`
    rows: str  # the file to which it appends a JSON object a line: Request, Interruption
    gate: str = ""  # the name of the shared memory of a gate
    deadline_times_ns: dict[int, int] = {}  # SLOs by job, where they are known
    expected_ns: dict[
        int, int
    ] = {}  # how long a request runs alone, by job, where that was measured
    prepare_within_ns: int = 600 * NS_PER_S
    finish_within_ns: int = 120 * NS_PER_S
    least_jobs: int = 0
    stop: Stop = Stop.FINISH
    repeat: int = 0
    linger_ns: int = 0
    measure: bool = False  # what the tuner of boundaries needs; nothing is served
    urgent: dict[
        int, Urgent
    ] = {}  # of jobs that the member tunes itself, since it cuts their graphs


class Row(_Plain, frozen=True, omit_defaults=True):
    """A line of the file `Order.rows`: one of both."""

    request: Request | None = None
    interruption: Interruption | None = None


class Begin(_Plain, frozen=True, tag="begin"):
    """To a member: all are ready. Requests of `jobs` (empty: all) arrive from `at_ns` until `until_ns`.

    A member keeps its models loaded and may be begun again, with other jobs, when those have ended.
    """

    at_ns: int
    until_ns: int
    jobs: tuple[int, ...] = ()


class End(_Plain, frozen=True, tag="end"):
    """To a member: no more requests; finish what runs."""


class Ready(_Plain, frozen=True, tag="ready"):
    """From a member: all its jobs are warmed up."""

    prepared: tuple[Prepared, ...]


class JobEnded(_Plain, frozen=True, tag="job_ended"):
    """From a member: a job is over, or failed; the others go on."""

    job: int
    status: Status
    reason: str = ""
    memory_allocated: int = 0
    memory_reserved: int = 0
    left: int = 0


class Progress(_Plain, frozen=True, tag="progress"):
    """From a member once a second: it lives; the number of requests that ended by job."""

    ended: dict[int, int]


ToMember = Begin | End
FromMember = Ready | JobEnded | Progress
