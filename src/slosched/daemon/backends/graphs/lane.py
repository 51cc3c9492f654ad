"""The lane of jobs whose models run as CUDA graphs, for members of sharing experiments. It decides nothing.

A request is one exec of the job's class. Its inputs lie on the device from preparation on and its outputs stay
there, so a request costs the host one launch, or one for each segment. Some requests have their answers
compared: the output is copied back, and must be, byte for byte, that of the first request, which ran alone.
Otherwise something disturbed it (`Ended.differs`). The input of such a request is copied anew ahead of time, so
that it starts as fast as any other.
"""

from __future__ import annotations

import hashlib
import os
import threading
from bisect import bisect_left, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise

import msgspec

from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.core.worker.interface import Op, OpDone, OpKind
from slosched.daemon.backends.base import first_line
from slosched.daemon.backends.cuda.driver import OutOfDeviceMemory
from slosched.daemon.backends.cuda.recorded import SETS
from slosched.daemon.backends.graphs.stage import Made, OpenStage, Stage, tune_cut
from slosched.errors import InvalidConfig
from slosched.share_spec import Interruption, Job, Prepared, Run, Tuning, Urgent, kept_segments
from slosched.signature import row_bytes
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

_FOREVER_NS = 2**62
#: The loop's thread waits for the device this long at a time; and beside other lanes, which it polls by turns.
_SPIN_NS, _SPIN_BESIDE_NS = 400 * NS_PER_US, 20 * NS_PER_US
#: Loads, warm-ups and looks at an answer that take longer have failed.
_PATIENCE_NS = 300 * NS_PER_S
#: Runs that are remembered, to say which of them interrupted a longer one.
_REMEMBERED = 65_536
#: Comparing an answer takes some 0.3 ms of copies. So each request of this length is compared, and one in 256
#: of the shorter ones, which no percentile shows. Larger answers than these would hold up the thread.
_LONG_NS, _EVERY_SHORT = 20 * NS_PER_MS, 256
_LARGE_BYTES, _TOO_LARGE_BYTES = 16 * 2**20, 64 * 2**20


@dataclass(frozen=True)
class Failure:
    """Why a job's model could not be prepared."""

    error: Exception
    out_of_memory: bool

    @property
    def reason(self) -> str:
        return f"{type(self.error).__name__}: {first_line(self.error)}"


@dataclass(slots=True, eq=False)
class _Held:
    """A request on the device. `action_id` is 0 unless its answer is compared."""

    start: Start
    wanted_ns: int
    op_id: int = 0
    kind: OpKind = OpKind.EXEC
    action_id: int = 0
    ended: Ended | None = None  # its exec ended, and its answer is on the way


@dataclass(slots=True)
class _Ready:
    """A job that can run. `frames` are the inputs of its requests."""

    job: Job
    made: Made
    frames: list[bytes]
    sizes: tuple[int, ...]
    since: int = 0  # requests since the last one that was compared
    staged: list[int] = field(default_factory=list)  # actions whose inputs are on the device
    compare_every: int = 1  # 0: no answer
    answer: list[bytes] = field(default_factory=list)  # the first one, by row
    exec_ns: int = 0
    tuning: Tuning | None = None


def _open_cuda(device: str, stream_priority: int | None, by_deadline: bool) -> OpenStage:
    def opened(jobs: Mapping[int, Job], preempt: bool) -> Stage:
        if not device.startswith("cuda"):
            raise InvalidConfig(
                f"graphs need a CUDA device (cuda:0), not {device!r}: run eager models"
            )
        from slosched.daemon.backends.graphs.cuda_stage import open_stage

        return open_stage(device, jobs, preempt, stream_priority, by_deadline=by_deadline)

    return opened


class GraphLane:
    """A lane of `jobs`, by their places in the experiment, on `device` ("cuda:0").

    With `preempt`, requests of a higher priority interrupt those of other jobs, at any depth (levels.py). With
    a `stream_priority` (CUDA's numbers) other lanes run beside it in this thread. Inputs follow from `seed`.
    The answer of each `check_every`-th request of a job is compared; 0: of none; None: as often as it costs
    next to nothing. `urgent` is what interrupts the jobs whose boundaries are tuned here, where they are cut.
    `by_deadline`: the policy lets any job interrupt any other, whatever their priorities.
    """

    def __init__(
        self,
        jobs: Mapping[int, Job],
        *,
        device: str,
        seed: int,
        preempt: bool,
        stream_priority: int | None = None,
        check_every: int | None = None,
        urgent: Mapping[int, Urgent] | None = None,
        by_deadline: bool = False,
        open_stage: OpenStage | None = None,
    ) -> None:
        if not jobs:
            raise InvalidConfig("a lane of graphs needs a job")
        self._jobs, self._seed, self._check_every = dict(jobs), seed, check_every
        self._preempt = preempt
        self._urgent = dict(urgent or {})
        self._thread = threading.get_ident()
        self._open_stage = open_stage or _open_cuda(device, stream_priority, by_deadline)
        self._spin_ns = _SPIN_NS if stream_priority is None else _SPIN_BESIDE_NS
        self._stage: Stage | None = None
        self._ready: dict[int, _Ready] = {}
        self._held: dict[int, _Held] = {}  # by op id
        self._ops = self._actions = 0
        self._ended: list[Ended] = []
        self._runs: list[tuple[int, int, int]] = []  # begin, job, wanted: in the order of begins
        #: Jobs whose models could not be prepared, while others could.
        self.failures: dict[int, Failure] = {}
        self.warmups: tuple[Ended, ...] = ()
        #: Answers that were compared, and those of them that differed, by job.
        self.compared = dict.fromkeys(jobs, 0)
        self.differed = dict.fromkeys(jobs, 0)

    # ----------------------------------------------------------------------------- preparation

    def prepare(self) -> tuple[Prepared, ...]:
        """Make, capture, load and warm up every model. What fails alone is in `failures`.

        Raises the error of the first job if none can run; MissingPackage, InvalidConfig or DeviceFault if the
        GPU cannot be opened.
        """
        stage = self._stage = self._open_stage(self._jobs, self._preempt)
        clock, spent = stage.clock, dict.fromkeys(self._jobs, 0)
        for number, job in self._jobs.items():
            began_ns = clock()
            self._try(number, partial(stage.build, number, job))
            spent[number] = clock() - began_ns
        if len(self.failures) < len(self._jobs):
            stage.allocate()
        found = []
        for number in self._jobs:
            began_ns = clock()
            if number not in self.failures and self._try(number, partial(self._prepare, number)):
                found.append(self._prepared(number, spent[number] + clock() - began_ns))
        if not found:
            raise next(iter(self.failures.values())).error
        return tuple(found)

    def _try(self, number: int, what: partial[None]) -> bool:
        try:
            what()
            return True
        except Exception as error:  # models of others raise anything
            memory = isinstance(error, OutOfDeviceMemory | MemoryError)
            memory = memory or "out of memory" in str(error).lower()
            # The frames that it came through hold the model, and with it memory of the device.
            error.__traceback__ = error.__context__ = error.__cause__ = None
            self.failures[number] = Failure(error, memory)
            self._ready.pop(number, None)
            return False

    def _prepare(self, number: int) -> None:
        assert self._stage is not None
        job, made = self._jobs[number], self._stage.prepare(number)
        tuning = tune_cut(made, job, self._urgent.get(number))
        takes = made.program.sets(made.of)[0].takes
        packed = takes.pack(made.program.sample_rows(job.batch, self._seed))
        nbytes = row_bytes(takes.tensors, 0)  # a row may be longer than its frame
        frames = [packed[row, :nbytes].tobytes() for row in range(job.batch)]
        self._ready[number] = _Ready(job, made, frames, (nbytes,) * job.batch)
        self._ready[number].tuning = tuning
        load = _Held(Start(number, -1), self._stage.clock(), kind=OpKind.LOAD_WEIGHTS)
        self._launch(load)
        self._finish()
        self._stage.loaded(number)
        for _ in range(SETS):  # so that all buffers have the input of all requests
            self._stage_input(number)
            self._finish()
        if len(self._ready[number].staged) < SETS:
            raise RuntimeError("its input could not be copied to the device")
        ended: list[Ended] = []
        for count in range(1 + max(SETS, job.warmups)):
            self._begin(Start(number, -1 - count), self._stage.clock(), compare=count < SETS)
            ended += self._finish()
        ready = self._ready[number]
        ready.exec_ns = ended[-1].ended_ns - ended[-1].started_ns
        ready.compare_every = self._compare_every(ready)
        self.warmups += tuple(ended)

    def _compare_every(self, ready: _Ready) -> int:
        if self._check_every is not None:
            return self._check_every
        size = sum(map(len, ready.answer))
        if size > _TOO_LARGE_BYTES:
            ready.made.notes.append(f"answers of {size / 1e6:.0f} MB are not compared")
            return 0
        return 1 if ready.exec_ns >= _LONG_NS and size <= _LARGE_BYTES else _EVERY_SHORT

    def _prepared(self, number: int, load_ns: int) -> Prepared:
        ready = self._ready[number]
        made, cut, exec_ns = ready.made, ready.made.cut, ready.exec_ns
        return Prepared(
            job=number,
            pid=os.getpid(),
            runs=Run.GRAPHS,
            load_ns=load_ns,
            exec_ns=exec_ns,
            boundaries=0 if cut is None else len(cut.bounds),
            boundary_ns=exec_ns if cut is None else cut.boundary_ns,
            segments_ns=() if cut is None else kept_segments(cut.segment_ns),
            note="; ".join(made.notes),
            answer=_digest(ready.answer),
            tuning=ready.tuning,
        )

    def _finish(self) -> list[Ended]:
        """Wait for all that is on the device. Raises RuntimeError if it fails or takes too long."""
        assert self._stage is not None
        clock = self._stage.clock
        give_up_ns = clock() + _PATIENCE_NS
        ended: list[Ended] = []
        while self._held:
            self._stage.device.spin(clock() + _SPIN_NS)
            ended += self.poll(now_ns=clock())
            if clock() > give_up_ns:
                raise RuntimeError("the GPU did not end a run")
        failed = [each.reason for each in ended if each.reason]
        if failed:
            raise RuntimeError(failed[0])
        return ended

    # ------------------------------------------------------------------------------ the protocol

    @property
    def takes(self) -> int:
        """One that runs and one behind it; and beside them one of each job, if they interrupt each other."""
        return 2 + len(self._jobs) if self.preemptive else 2

    @property
    def preemptive(self) -> bool:
        return self._preempt and len(self._jobs) > 1

    def start(self, start: Start, *, now_ns: int) -> None:
        """Arm a request, which starts when the lane is free or at a boundary of one of lower priority."""
        self._enter()
        ready = self._ready.get(start.job)
        if ready is None:
            failure = self.failures.get(start.job)
            reason = failure.reason if failure is not None else "its model was not prepared"
            self._fail(start, now_ns, reason, fatal=True)
            return
        ready.since += 1
        every = ready.compare_every
        self._begin(start, now_ns, compare=bool(every) and ready.since >= every)

    def _enter(self) -> None:
        """CUDA keeps the current device by thread, and one may prepare while another serves."""
        thread = threading.get_ident()
        if thread != self._thread:
            self._thread = thread
            if self._stage is not None:
                self._stage.enter()

    def _begin(self, start: Start, now_ns: int, *, compare: bool) -> None:
        held, ready = _Held(start, now_ns), self._ready[start.job]
        if compare and ready.staged:
            held.action_id, ready.since = ready.staged.pop(), 0
        self._launch(held)

    def _stage_input(self, job: int) -> None:
        """Copy the input of a request to the device that will be compared."""
        self._actions += 1
        held = _Held(Start(job, -1), 0, kind=OpKind.COPY_INPUT, action_id=self._actions)
        self._device.keep_inputs(held.action_id, self._ready[job].frames)
        self._launch(held)

    def withdraw(self, withdraw: Withdraw) -> bool:
        """True if the request had not begun."""
        wanted = (withdraw.job, withdraw.number)
        for held in self._held.values():
            if held.kind is OpKind.EXEC and (held.start.job, held.start.number) == wanted:
                if self._device.withdraw(held.op_id) is None:
                    return False
                del self._held[held.op_id]
                if held.action_id:
                    self._ready[withdraw.job].staged.append(held.action_id)
                return True
        return False

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        """The requests that ended since the last call, in order."""
        if self._stage is not None and self._held:
            self._enter()
            for done in self._device.poll(now_ns=now_ns):
                self._done(done)
        ended, self._ended = self._ended, []
        return ended

    def next_event_ns(self) -> int | None:
        """0 while something is on the device."""
        return 0 if self._held or self._ended else None

    def pass_time(self, until_ns: int | None) -> bool:
        """Wait for the device, or for a start that is near. False: nothing is to come for a while."""
        if self._stage is None:
            return False
        now_ns = self._stage.clock()
        end_ns = now_ns + self._spin_ns
        if self._held:
            self._device.spin(end_ns if until_ns is None else min(end_ns, until_ns))
            return True
        if until_ns is None or until_ns > end_ns:
            return False
        while self._stage.clock() < until_ns:
            pass
        return True

    # ---------------------------------------------------------------------------------- the device

    @property
    def _device(self):  # type: ignore[no-untyped-def]
        assert self._stage is not None, "prepare() comes first"
        return self._stage.device

    def _launch(self, held: _Held) -> None:
        """Give the next op of a request to the device."""
        ready = self._ready[held.start.job]
        self._ops += 1
        held.op_id = self._ops
        self._held[held.op_id] = held
        op = Op(
            held.op_id,
            held.kind,
            0,
            held.start.job,
            held.action_id,
            batch_size=ready.job.batch,
            request_count=ready.job.batch,
            input_sizes=ready.sizes if held.action_id else (),
            model_name=ready.made.name,
            latest_ns=_FOREVER_NS,
            priority=held.start.priority,
            linger_ns=held.start.linger_ns,
            patient=held.start.patient,
        )
        done = self._device.launch(op, now_ns=self._stage.clock())  # type: ignore[union-attr]
        if done is not None:
            self._done(done)

    def _done(self, done: OpDone) -> None:
        held = self._held.pop(done.op_id)
        ready = self._ready[held.start.job]
        if done.code:
            self._device.drop_inputs(held.action_id)
            if held.kind in (OpKind.EXEC, OpKind.LOAD_WEIGHTS):
                lost = bool(self._device.lost)
                self._fail(held.start, done.span.end_ns, done.reason, fatal=lost)
            elif held.ended is not None:  # it ran, and its answer cannot be had
                self._ended.append(held.ended)
        elif held.kind is OpKind.COPY_INPUT:
            ready.staged.append(held.action_id)
        elif held.kind is OpKind.EXEC:
            held.ended = self._outcome(held, done)
            if held.action_id:
                held.kind = OpKind.COPY_OUTPUT
                self._launch(held)
            else:
                self._ended.append(held.ended)
        elif held.kind is OpKind.COPY_OUTPUT:
            assert held.ended is not None
            frames = self._device.take_outputs(held.action_id)
            self._ended.append(self._compared(held.ended, [bytes(each) for each in frames]))
            if not ready.staged:
                self._stage_input(held.start.job)

    def _fail(self, start: Start, at_ns: int, reason: str, *, fatal: bool) -> None:
        failure = self.failures.get(start.job)
        self._ended.append(
            Ended(
                job=start.job,
                number=start.number,
                started_ns=at_ns,
                ended_ns=at_ns,
                reason=reason or "the device gave no reason",
                fatal=fatal,
                out_of_memory=failure is not None and failure.out_of_memory,
            )
        )

    def _outcome(self, held: _Held, done: OpDone) -> Ended:
        start, span = held.start, done.span
        # The thread launches segments meanwhile: nothing here may take longer the more runs there were.
        insort(self._runs, (span.begin_ns, start.job, held.wanted_ns))
        if len(self._runs) > _REMEMBERED:
            del self._runs[: _REMEMBERED // 2]
        return Ended(
            job=start.job,
            number=start.number,
            started_ns=span.begin_ns,
            ended_ns=span.end_ns,
            device_ns=span.duration_ns,
            paused_ns=done.pause_ns,
            pauses=self._pauses(start.job, done) if done.segments else (),
        )

    def _pauses(self, job: int, done: OpDone) -> tuple[Interruption, ...]:
        """What interrupted a run: in each pause the first run that began, which has ended before it."""
        runs, found = self._runs, []
        for before, after in pairwise(done.segments):
            place = bisect_left(runs, (before.end_ns, -1, 0))
            begun_ns, by, wanted_ns = runs[place] if place < len(runs) else (before.end_ns, -1, 0)
            if begun_ns > after.begin_ns:  # it is not remembered any more
                begun_ns, by, wanted_ns = before.end_ns, -1, before.end_ns
            found.append(
                Interruption(
                    job=job,
                    by=by,
                    wanted_ns=wanted_ns,
                    started_ns=begun_ns,
                    resumed_ns=after.begin_ns,
                )
            )
        return tuple(found)

    # ---------------------------------------------------------------------------------- answers

    def _compared(self, ended: Ended, answer: list[bytes]) -> Ended:
        """`ended`, and whether its answer is the first one of its job."""
        ready = self._ready[ended.job]
        if not ready.answer:
            ready.answer = answer
        self.compared[ended.job] += 1
        if answer == ready.answer:
            return ended
        self.differed[ended.job] += 1
        return msgspec.structs.replace(ended, differs=True)

    def memory(self) -> dict[int, tuple[int, int]]:
        """Bytes on the device by job, allocated and reserved at most."""
        stage = self._stage
        return {number: (0, 0) if stage is None else stage.memory(number) for number in self._jobs}

    def close(self) -> None:
        """Give everything back; idempotent."""
        stage, self._stage = self._stage, None
        self._ready.clear()
        self._held.clear()
        if stage is not None:
            stage.close()


def _digest(rows: Sequence[bytes]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        digest.update(row)
    return digest.hexdigest()[:16]
