"""Sharing experiments in virtual time: the brain of live runs over lanes that take as long as a model says.

Nothing is computed and nothing waits: 120 s take a second or less. Formats, policies, barriers and failures
are those of a live run; times are as good as the solo profiles (solos.py), the contention model
(contention.py, with its errors) and, for power, the model here: the card's power without work plus, for each
job that runs, what it takes alone above that times its rate, at most what the card may draw. Results say in
`about` that they are a model's.

What each mode is here:
- exclusive: one job alone.
- tm, mps, streams: each job at the rate that contention.py gives it beside those that run; in tm graphs have
  the driver's time slices (time_slices.py).
- preempt: one brain over one lane, interrupted at boundaries of equal distance (but for a longer first one).
- gate: a brain for each job; one request runs at a time and lower ones stop at their boundaries, GATE_NS later.
  Jobs that all have one priority do not stop for each other: they run as in tm.

Not modelled: the interpreter that the jobs of one process share, memory that does not suffice, clocks that
fall.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from slosched.core.share.brain import Load, ShareBrain
from slosched.core.share.driving import turn
from slosched.core.share.interface import Ended, Lane
from slosched.core.share.tuner import boundary_cost_ns, tunable, tuning_of, urgent_of
from slosched.core.worker.emulated import SplitMix64
from slosched.errors import InvalidConfig
from slosched.share.solos import Profile, Solo, load_profile
from slosched.share.time_slices import SharedGpu, SliceGpu
from slosched.share.virtual_lanes import BoundaryLane, Port, RateGpu, RateLane, Spacing
from slosched.share.virtual_power import PowerModel
from slosched.share_spec import (
    Arriving,
    Boundary,
    BoundaryKind,
    Interruption,
    Job,
    JobResult,
    Mode,
    Pieces,
    Prepared,
    Request,
    Run,
    RunResult,
    ShareSpec,
    Status,
    Tuning,
    kept_segments,
)
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.job_arrivals import arrivals_of, seed_of

#: An arbitrary date: 0 would hide mistakes with relative times.
START_NS = 1_000_000 * NS_PER_S
#: From the stop of the low process at the gate to the first work of the high one: one poll of a shared word and
#: a launch (an estimate of 20 to 100 us; not measured).
GATE_NS = 60_000
#: From the end of a request in the serving lane to the start of its client's next one, in which the lane has
#: gone on: polls of Python and a launch (an H200 and bert in a closed loop: 37 us).
NOTICE_NS = 37_000
#: Steps of one run at most; a run of one request/us for 20 s has fewer.
_MOST_STEPS = 50_000_000
#: Some 20 ms of work.
_STEPS_A_CHECK = 1024
#: Requests of one run at most; each takes some 300 bytes, and as much in its files.
_MOST_REQUESTS = 5_000_000
_SHARED_PROCESS = (Mode.STREAMS, Mode.PREEMPT)


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """A failure that a test asks for: `job` fails `after_ns` after the begin.

    DIED ends its process, and so every job of it in streams and preempt; OUT_OF_MEMORY and FAILED end the job.
    """

    job: int
    after_ns: int
    status: Status = Status.DIED
    reason: str = "its process was killed, by a fault"


class _Pair(msgspec.Struct):
    brain: ShareBrain
    lane: Lane
    jobs: tuple[int, ...]


class _World:
    """The jobs of one run, their solos, and the brains and lanes over them."""

    def __init__(
        self, spec: ShareSpec, mode: Mode, repeat: int, profile: Profile, jobs: tuple[int, ...]
    ) -> None:
        self.spec, self.mode, self.profile = spec, mode, profile
        self.repeat = repeat
        self.seed = spec.seed + 1_000_003 * repeat
        self.jobs = {i: spec.jobs[i] for i in jobs}
        self.solos: dict[int, Solo] = {i: profile.of(job) for i, job in self.jobs.items()}
        self.tunings: dict[int, Tuning] = {}
        self.boundaries = {i: _boundary(job, self.solos[i], self) for i, job in self.jobs.items()}
        self.statuses: dict[int, tuple[Status, str]] = {}
        self.gpu: SharedGpu | None = None
        self.boundary_lane: BoundaryLane | None = None
        self.pairs = self._pairs()

    def work_ns(self, job: int, number: int) -> int:
        """How long a request takes alone: the median, and a spread with the solo's 99th percentile."""
        solo = self.solos[job]
        tail = solo.p99_ms / solo.latency_ms - 1 if solo.p99_ms > solo.latency_ms else 0.0
        alone_ns = _exec_ns(solo, self.mode)
        if not tail:
            return alone_ns
        drawn = SplitMix64((self.seed * 1_000_003 + job) * 1_000_003 + number).normal() / 2.326
        return max(1, round(alone_ns * (1 + tail * (drawn if drawn > 0 else 0.2 * drawn))))

    def load_of(self, i: int) -> Load:
        job, solo = self.jobs[i], self.solos[i]
        slo_ns = job.slo_ns or round(job.slo_times_solo * solo.latency_ns)
        return Load(
            job=i,
            clients=job.clients,
            arrivals=arrivals_of(job.clients, seed_of(self.spec.seed, self.repeat, i))
            if job.clients.arriving is not Arriving.CLOSED
            else (),
            priority=job.priority,
            slo_ns=slo_ns,
            count=job.count,
            start_after_ns=job.start_after_ns,
            expected_ns=solo.latency_ns,
            boundary_ns=self.boundaries[i].longest_ns,
        )

    def _brain(self, jobs: Iterable[int], lane: Lane) -> ShareBrain:
        return ShareBrain(
            [self.load_of(i) for i in jobs],
            policy=self.spec.policy,
            takes=lane.takes,
            preemptive=lane.preemptive,
            linger_ns=self.spec.linger_ns if self.mode is Mode.PREEMPT else 0,
            seed=self.seed,
            stop=self.spec.stop,
            least_jobs=self.spec.least_jobs,
        )

    def _pairs(self) -> list[_Pair]:
        jobs = tuple(self.jobs)
        levels = {job.priority for job in self.jobs.values()}
        if self.mode is Mode.PREEMPT:
            lane = self.boundary_lane = BoundaryLane(
                self.work_ns, self.boundaries, notice_ns=NOTICE_NS
            )
            return [_Pair(self._brain(jobs, lane), lane, jobs)]
        if self.mode is Mode.GATE and len(levels) > 1:
            gate = self.boundary_lane = BoundaryLane(
                self.work_ns, self.boundaries, latency_ns=GATE_NS
            )
            arrived: dict[int, list[Ended]] = {}
            ports = {i: Port(gate, i, self.jobs[i].priority, arrived) for i in jobs}
            return [_Pair(self._brain((i,), ports[i]), ports[i], (i,)) for i in jobs]
        rates_of = Mode.TM if self.mode in (Mode.EXCLUSIVE, Mode.GATE) else self.mode
        parties = {i: self.profile.party(job) for i, job in self.jobs.items()}
        graphs = all(solo.runs is Run.GRAPHS for solo in self.solos.values())
        gpu: SharedGpu = (
            SliceGpu(jobs, self.work_ns)
            if graphs and rates_of is Mode.TM
            else RateGpu(parties, rates_of, self.work_ns, cores=self.profile.cores)
        )
        self.gpu = gpu
        lanes = {i: RateLane(gpu, i) for i in jobs}
        return [_Pair(self._brain((i,), lanes[i]), lanes[i], (i,)) for i in jobs]

    def rates_now(self) -> dict[int, float]:
        """The rate of each job that runs."""
        if self.gpu is not None:
            return self.gpu.rates_now()
        assert self.boundary_lane is not None
        runs = self.boundary_lane.runs
        return {} if runs is None else {runs: 1.0}

    def strike(self, fault: Fault, now_ns: int) -> None:
        """Carry out `fault`."""
        together = fault.status is Status.DIED and self.mode in _SHARED_PROCESS
        for i in self.jobs if together else (fault.job,):
            pair = next(pair for pair in self.pairs if i in pair.jobs)
            if pair.brain.tally(i).over:
                continue
            self.statuses[i] = (fault.status, fault.reason)
            out_of_memory = fault.status is Status.OUT_OF_MEMORY
            if isinstance(pair.lane, RateLane):
                pair.lane.kill(fault.reason, now_ns, out_of_memory=out_of_memory)
            else:
                assert self.boundary_lane is not None
                self.boundary_lane.kill(i, fault.reason, now_ns, out_of_memory=out_of_memory)
            pair.brain.end_job(i, fault.reason)


def _exec_ns(solo: Solo, mode: Mode) -> int:
    """How long a request runs that no other disturbs."""
    if mode is Mode.PREEMPT and solo.lane_ms:
        return max(1, round(solo.lane_ms * NS_PER_MS))
    return solo.latency_ns


def _tuned(job: Job, solo: Solo, exec_ns: int, world: _World) -> Boundary:
    """The tuned boundary of `job`; what the tuner says of it is kept in `world`."""
    place = next(i for i, each in world.jobs.items() if each is job)
    alone = {i: world.profile.of(each).latency_ns for i, each in world.jobs.items()}
    slos = {
        i: each.slo_ns or round(each.slo_times_solo * alone[i]) for i, each in world.jobs.items()
    }
    equals = world.mode is Mode.PREEMPT
    urgent = urgent_of(world.jobs, place, exec_ns=alone, slo_ns=slos, equals=equals)
    if urgent is None:
        return job.boundary
    pieces = Pieces(
        pieces=solo.boundaries, exec_ns=exec_ns, longest_ns=round(solo.longest_ms * NS_PER_MS)
    )
    # Segments of graphs have one in flight (_measured_segments).
    graphs = _is_cut(job, solo)
    boundary, tuning = tuning_of(
        job,
        pieces,
        urgent,
        depths=(1,) if graphs else (1, 2),
        unit="segments" if graphs else "pieces",
    )
    if tuning is not None:
        world.tunings[place] = tuning
    return boundary


def _boundary(job: Job, solo: Solo, world: _World) -> Spacing:
    boundary = job.boundary
    if boundary.kind is BoundaryKind.NONE or not solo.boundaries:
        return Spacing(0)
    exec_ns = _exec_ns(solo, world.mode)
    if tunable(boundary):
        boundary = _tuned(job, solo, exec_ns, world)
    if _is_cut(job, solo) and (not job.boundary.tuned or boundary.every == 1):
        return _measured_segments(solo, exec_ns)
    every = 1 if boundary.kind is BoundaryKind.LAYER else max(1, boundary.every)
    depth = boundary.depth if boundary.kind in (BoundaryKind.SEGMENT, BoundaryKind.EVENT) else 1
    groups = max(1.0, solo.boundaries / every)
    # With several groups in flight, an urgent request waits for them all: as if they were one.
    every_ns = min(exec_ns, max(1, round(exec_ns / groups * max(1, depth))))
    cost_ns = boundary_cost_ns(boundary.kind, depth) * max(1, depth)
    return Spacing(every_ns, cost_ns)


def _is_cut(job: Job, solo: Solo) -> bool:
    """True if the job's boundaries are those of graphs that preparation cut."""
    return job.boundary.kind is BoundaryKind.SEGMENT and solo.runs is Run.GRAPHS


def _measured_segments(solo: Solo, exec_ns: int) -> Spacing:
    """The segments that preparation cut, one in flight; `lane_ms` has what they cost, where it was measured."""
    longest_ns = round(solo.longest_ms * NS_PER_MS)
    if not 0 < longest_ns < exec_ns:
        longest_ns = 0
    every_ns = max(
        1, (exec_ns - longest_ns) // (solo.boundaries if longest_ns else solo.boundaries + 1)
    )
    cost_ns = 0 if solo.lane_ms else boundary_cost_ns(BoundaryKind.SEGMENT, 1)
    if solo.longest_last:
        return Spacing(every_ns, cost_ns, last_ns=longest_ns)
    return Spacing(every_ns, cost_ns, first_ns=longest_ns)


# --------------------------------------------------------------------------------- a run


def run_mode_virtual(
    spec: ShareSpec,
    mode: Mode,
    repeat: int,
    *,
    solos: Profile | None = None,
    jobs: Sequence[int] | None = None,
    faults: Sequence[Fault] = (),
    check: Callable[[], None] = lambda: None,
) -> RunResult:
    """One mode of `spec`, once, in virtual time. The same arguments give the same result to the byte.

    `solos`: the profile, else the one that `spec.profile` names. `jobs`: only these, by place; `exclusive`
    takes one of them (`run_exclusive_virtual` runs each). `check` is called now and then; what it raises ends
    the run. Raises InvalidConfig for models that the profile does not have, and for open loops without a rate.
    """
    profile = solos if solos is not None else load_profile(spec.profile)
    chosen = tuple(range(len(spec.jobs))) if jobs is None else tuple(jobs)
    if mode is Mode.EXCLUSIVE and len(chosen) != 1:
        raise InvalidConfig("exclusive runs one job at a time: say which one")
    modelled = tuple(i for i in chosen if not spec.jobs[i].command)
    begin_ns = START_NS + spec.idle_ns
    until_ns = begin_ns + spec.duration_ns
    if not modelled:
        return _result(spec, mode, repeat, profile, chosen, None, begin_ns, until_ns, None)
    world = _World(spec, mode, repeat, profile, modelled)
    expected = sum(_expected(job, world.solos[i], spec) for i, job in world.jobs.items())
    if expected > _MOST_REQUESTS:
        raise InvalidConfig(
            f"{mode}: some {expected:,} requests in virtual time; at most {_MOST_REQUESTS:,} are possible: "
            "choose a shorter duration"
        )
    power = PowerModel(profile, world.solos, START_NS)
    power.spend({}, begin_ns)
    for pair in world.pairs:
        pair.brain.begin(begin_ns, until_ns)
    power.awake = True
    over_ns = _play(world, begin_ns, until_ns + spec.finish_within_ns, faults, power.spend, check)
    power.awake = False
    end_ns = min(max(over_ns, begin_ns + 1), until_ns)
    power.spend({}, over_ns + spec.cool_down_ns)
    return _result(spec, mode, repeat, profile, chosen, world, begin_ns, end_ns, power)


def _expected(job: Job, solo: Solo, spec: ShareSpec) -> int:
    """About how many requests of `job` end, if no other job slows it down."""
    clients, seconds = job.clients, max(0, spec.duration_ns - job.start_after_ns) / NS_PER_S
    most = seconds * NS_PER_S / solo.latency_ns
    if clients.arriving is Arriving.TRACE:
        most = min(most, len(clients.trace))
    elif clients.arriving is not Arriving.CLOSED:
        most = min(most, clients.rate_per_s * seconds)
    else:
        turn_ns = solo.latency_ns + clients.think_ns
        most = min(most, clients.concurrency * seconds * NS_PER_S / turn_ns)
    return max(min(round(most), job.count or round(most)), spec.least_jobs)


def run_exclusive_virtual(
    spec: ShareSpec, repeat: int, *, solos: Profile | None = None
) -> tuple[RunResult, ...]:
    """The solo run of each distinct model, batch and size of `spec`: the baselines of its mixes."""
    seen: set[tuple[object, ...]] = set()
    results = []
    for i, job in enumerate(spec.jobs):
        key = (job.model, job.batch, job.size, job.dtype, job.run)
        if key not in seen:
            seen.add(key)
            results.append(run_mode_virtual(spec, Mode.EXCLUSIVE, repeat, solos=solos, jobs=(i,)))
    return tuple(results)


def _play(
    world: _World,
    begin_ns: int,
    latest_ns: int,
    faults: Sequence[Fault],
    spend: Callable[[Mapping[int, float], int], None],
    check: Callable[[], None],
) -> int:
    """Let time pass until every brain is done, or `latest_ns`. Returns the time of the end."""
    due = sorted(faults, key=lambda fault: (fault.after_ns, fault.job))
    unknown = [fault.job for fault in due if fault.job not in world.jobs]
    if unknown:
        raise InvalidConfig(f"a fault is of job {unknown[0]}, which this run does not have")
    now_ns = begin_ns
    for step in range(_MOST_STEPS):
        if step % _STEPS_A_CHECK == 0:
            check()
        while due and begin_ns + due[0].after_ns <= now_ns:
            world.strike(due.pop(0), now_ns)
        at_ns = now_ns
        for pair in world.pairs:
            turn(pair.brain, pair.lane, lambda: at_ns)  # noqa: B023 - it is called before the next step
        if all(pair.brain.done for pair in world.pairs):
            return now_ns
        times = [t for pair in world.pairs if (t := pair.brain.next_wakeup_ns()) is not None]
        times += [t for pair in world.pairs if (t := pair.lane.next_event_ns()) is not None]
        times += [begin_ns + due[0].after_ns] if due else []
        then_ns = max(now_ns, min(times, default=latest_ns))
        if then_ns >= latest_ns:
            break
        spend(world.rates_now(), then_ns)
        now_ns = then_ns
    for pair in world.pairs:
        for i in pair.jobs:
            if not pair.brain.tally(i).over:
                reason = "it had not ended its requests in the time after the duration"
                world.statuses.setdefault(i, (Status.TIMED_OUT, reason))
    spend(world.rates_now(), latest_ns)
    return latest_ns


# --------------------------------------------------------------------------------- its result


def _result(
    spec: ShareSpec,
    mode: Mode,
    repeat: int,
    profile: Profile,
    chosen: tuple[int, ...],
    world: _World | None,
    begin_ns: int,
    end_ns: int,
    power: PowerModel | None,
) -> RunResult:
    rows: dict[int, list[Request | Interruption]] = {i: [] for i in chosen}
    for pair in world.pairs if world is not None else ():
        for row in pair.brain.rows():
            rows[row.job].append(row)
    return RunResult(
        mode=mode,
        repeat=repeat,
        jobs=tuple(_job_result(spec, world, i, rows[i], begin_ns) for i in chosen),
        begin_ns=begin_ns,
        end_ns=end_ns,
        power=power.samples() if power is not None else (),
        idle_watts=profile.idle_watts,
        about={
            "virtual": "nothing ran: times are of a model in virtual time",
            "device": profile.device,
            "solos": profile.measured,
            "power": "of a model: idle power, and each job's own above it by its rate",
        },
    )


def _job_result(
    spec: ShareSpec,
    world: _World | None,
    i: int,
    rows: Sequence[Request | Interruption],
    begin_ns: int,
) -> JobResult:
    job = spec.jobs[i]
    if world is None or i not in world.jobs:
        reason = "a program of the user's own has no solo profile"
        return JobResult(job=i, status=Status.UNAVAILABLE, reason=reason)
    solo = world.solos[i]
    pair = next(pair for pair in world.pairs if i in pair.jobs)
    tally = pair.brain.tally(i)
    status, reason = world.statuses.get(i, (Status.OK, ""))
    if status is Status.OK and tally.fatal:
        status = Status.OUT_OF_MEMORY if tally.out_of_memory else Status.FAILED
        reason = tally.reason
    pid = 1 + (0 if world.mode in _SHARED_PROCESS else i)
    return JobResult(
        job=i,
        status=status,
        reason=reason,
        pid=pid,
        requests=(*_warmups(i, job, solo, begin_ns), *(r for r in rows if isinstance(r, Request))),
        interruptions=tuple(row for row in rows if isinstance(row, Interruption)),
        prepared=Prepared(
            job=i,
            pid=pid,
            runs=solo.runs,
            exec_ns=_exec_ns(solo, world.mode),
            boundaries=solo.boundaries,
            boundary_ns=world.boundaries[i].longest_ns,
            segments_ns=_segments_ns(world, i),
            note="; ".join(filter(None, ("virtual time", solo.note))),
            tuning=world.tunings.get(i),
        ),
        memory_allocated=solo.memory_mib << 20,
        memory_reserved=solo.memory_mib << 20,
        left=tally.left,
    )


def _segments_ns(world: _World, i: int) -> tuple[int, ...]:
    """Where a lane stops at boundaries, the times between those of the job `i`."""
    if world.boundary_lane is None:
        return ()
    exec_ns = _exec_ns(world.solos[i], world.mode)
    return kept_segments(world.boundaries[i].segments_ns(exec_ns))


def _warmups(i: int, job: Job, solo: Solo, begin_ns: int) -> Iterable[Request]:
    """The requests before the begin, one behind the other."""
    for number in range(job.warmups):
        started_ns = begin_ns - (job.warmups - number) * solo.latency_ns
        yield Request(
            job=i,
            number=number - job.warmups,
            arrived_ns=started_ns,
            started_ns=started_ns,
            ended_ns=started_ns + solo.latency_ns,
            warmup=True,
        )
