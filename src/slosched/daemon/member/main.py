"""The process of a member: it prepares its models, says that it is ready, and serves window after window.

    python -m slosched.daemon.member DESCRIPTOR

Its Order is the first line of the input, Begin and End follow; at the input's end it ends. What it says goes as
JSON lines to the descriptor, which its models do not know.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import msgspec

from slosched.child_processes import end_with_parent
from slosched.clock import now_ns, take_anchor
from slosched.core.share.brain import Load, ShareBrain
from slosched.daemon.member import opening, program
from slosched.daemon.member.loop import Control, Pair, Serving, outcome, undisturbed
from slosched.daemon.member.rows import RowFile
from slosched.errors import SloschedError
from slosched.share_spec import (
    Begin,
    End,
    FromMember,
    JobEnded,
    Order,
    Prepared,
    Ready,
    Request,
    Status,
    ToMember,
)
from slosched.workloads.job_arrivals import arrivals_of, seed_of

#: A member that serves nothing for this time has lost its experiment.
_BEGIN_WITHIN_S = 3600.0
#: What runs when the experiment is gone has this time to end.
_ORPHAN_S = 3.0
#: Threads that launch from one process share the interpreter: none may keep the others waiting for 5 ms.
_SWITCH_S = 0.0005

_decoder = msgspec.json.Decoder(ToMember)
_T = TypeVar("_T")


@dataclass
class _Ready:
    """A lane whose jobs are warmed up, and the thread that alone uses it (None: the main one)."""

    held: opening.Held
    prepared: dict[int, Prepared]
    thread: ThreadPoolExecutor | None = None
    broken: str = ""  # what it raised while it served: nothing of it can be trusted any more
    warmups: list[Request] = field(default_factory=list)


class Input:
    """The standard input: the Order, then messages, which a thread reads. Its end ends the member."""

    def __init__(self, control: Control) -> None:
        self._control = control
        self.messages: queue.Queue[Begin | None] = queue.Queue()
        self._file = sys.stdin.buffer

    def order(self) -> Order:
        """Raises msgspec.ValidationError, msgspec.DecodeError for what is none."""
        return msgspec.json.decode(self._file.readline(), type=Order)

    def listen(self) -> None:
        """Read the rest in a thread, which sleeps in the kernel until something comes."""
        threading.Thread(target=self._listen, daemon=True, name="input").start()

    def _listen(self) -> None:
        try:
            for line in self._file:
                message = _decoder.decode(line)
                if isinstance(message, End):
                    self._control.ending = True
                else:
                    self._control.ending = False
                    self.messages.put(message)
        except (OSError, ValueError, msgspec.MsgspecError) as error:
            _log(f"{error}")
        self._control.gone = True
        self.messages.put(None)
        # A request that hangs on the device must not keep this process, and its memory, for ever.
        threading.Event().wait(_ORPHAN_S)
        os._exit(1)


class Member:
    """Prepares the lanes of `order` and serves windows on them."""

    def __init__(self, order: Order, control: Control, tell: Callable[[FromMember], None]) -> None:
        self._order, self._control, self._tell = order, control, tell
        self._rows = RowFile(Path(order.rows), now_ns)
        self._lanes: list[_Ready] = []
        self._windows = 0

    def prepare(self) -> bool:
        """Open and warm up each lane; a job that fails is reported, the others go on. False: none is left."""
        plans, refused = opening.plans(self._order)
        for each in refused:
            self._tell(each)
        threads = len(plans) > 1
        for plan in plans:
            self._prepare(plan, threads)
        if not self._lanes:
            return False
        if sum(lane.thread is not None for lane in self._lanes) > 1:
            sys.setswitchinterval(_SWITCH_S)
        for lane in self._lanes:
            self._rows.take(lane.warmups)
        self._rows.flush()
        found = [each for lane in self._lanes for each in lane.prepared.values()]
        self._tell(Ready(prepared=tuple(found)))
        return True

    def _prepare(self, plan: opening.Plan, threads: bool) -> None:
        # What libraries keep per thread is made in the thread that will serve.
        own = threads and plan.own_thread
        thread = ThreadPoolExecutor(1, thread_name_prefix="lane") if own else None
        held: opening.Held | None = None
        try:
            held = _call(thread, plan.open)
            prepared = _call(thread, held.prepare)
        except BaseException as error:  # a model's code may raise anything
            if isinstance(error, KeyboardInterrupt):
                raise
            if held is not None:
                with suppress(Exception):
                    held.lane.close()
            status, reason = opening.why_not(error)
            for job in plan.jobs:
                self._tell(JobEnded(job=job, status=status, reason=reason))
            if thread is not None:
                thread.shutdown()
            return
        for job, (status, reason) in held.failures().items():
            self._tell(JobEnded(job=job, status=status, reason=reason))
        ready = _Ready(held, {each.job: each for each in prepared}, thread)
        ready.warmups = _warmups(held)
        self._lanes.append(ready)

    # -------------------------------------------------------------------------------- windows

    def window(self, begin: Begin) -> None:
        """Serve the requests of one Begin, and tell how its jobs ended."""
        asked = set(begin.jobs or self._order.jobs)
        pairs: list[tuple[_Ready, Pair]] = []
        for lane in self._lanes:
            jobs = tuple(job for job in lane.held.jobs if job in asked and job in lane.prepared)
            if lane.broken:
                for job in jobs:
                    self._tell(JobEnded(job=job, status=Status.FAILED, reason=lane.broken))
            elif jobs:
                pairs.append((lane, self._pair(lane, jobs)))
        serving = Serving(
            begin,
            rows=self._rows,
            control=self._control,
            now=now_ns,
            tell=self._tell,
            finish_within_ns=self._order.finish_within_ns,
            threads=max(1, sum(lane.thread is not None for lane, _ in pairs)),
        )
        with undisturbed():
            self._serve(serving, pairs)
        self._rows.flush()
        self._windows += 1
        hangs = False
        for lane, pair in pairs:
            memory = {}
            with suppress(Exception):
                memory = lane.held.memory()
            hangs = hangs or pair.unfinished
            lane.broken = pair.problem
            for job in pair.jobs:
                within_ns = self._order.finish_within_ns
                self._tell(outcome(pair, job, memory.get(job, (0, 0)), within_ns))
        if hangs:
            # Work that does not end cannot be taken off the device but with the process.
            _log("a request does not end")
            os._exit(1)

    def _serve(self, serving: Serving, pairs: Sequence[tuple[_Ready, Pair]]) -> None:
        """Those with a thread of their own serve in it; the others, which are only looked at, here."""
        unthreaded = [pair for lane, pair in pairs if lane.thread is None]
        threaded = [(lane.thread, pair) for lane, pair in pairs if lane.thread is not None]
        waiting = [  # one thread collects the garbage of all
            thread.submit(serving.serve, [pair], collects=not (place or unthreaded))
            for place, (thread, pair) in enumerate(threaded)
        ]
        if unthreaded:
            serving.serve(unthreaded)
        for each in waiting:
            each.result()

    def _pair(self, lane: _Ready, jobs: Sequence[int]) -> Pair:
        order = self._order
        brain = ShareBrain(
            [self._load(job, lane.prepared[job]) for job in jobs],
            policy=order.policy,
            takes=lane.held.lane.takes,
            preemptive=lane.held.lane.preemptive,
            linger_ns=order.linger_ns,
            seed=order.seed + order.repeat,
            stop=order.stop,
            least_jobs=order.least_jobs,
        )
        return Pair(tuple(jobs), brain, lane.held.lane)

    def _load(self, place: int, prepared: Prepared) -> Load:
        order, job = self._order, self._order.jobs[place]
        return Load(
            job=place,
            clients=job.clients,
            arrivals=arrivals_of(job.clients, seed_of(order.seed, order.repeat, place)),
            priority=job.priority,
            slo_ns=order.deadline_times_ns.get(place, job.slo_ns),
            count=job.count,
            start_after_ns=job.start_after_ns,
            expected_ns=order.expected_ns.get(place, 0) or prepared.exec_ns,
            boundary_ns=prepared.boundary_ns,
        )

    def close(self) -> None:
        """Give back what the lanes hold, and write the last rows."""
        for lane in self._lanes:
            with suppress(Exception):
                _call(lane.thread, lane.held.lane.close)
            if lane.thread is not None:
                lane.thread.shutdown()
        self._rows.close()


def _call(thread: ThreadPoolExecutor | None, function: Callable[[], _T]) -> _T:
    return function() if thread is None else thread.submit(function).result()


def _warmups(held: opening.Held) -> list[Request]:
    """The warm-ups of a lane that keeps them, as rows."""
    return [
        Request(
            job=each.job,
            number=each.number,
            arrived_ns=each.started_ns,
            started_ns=each.started_ns,
            ended_ns=each.ended_ns,
            device_ns=each.device_ns,
            warmup=True,
        )
        for each in getattr(held.lane, "warmups", ())
    ]


def _log(text: str) -> None:
    sys.stderr.write(f"slosched member: {text}\n")
    sys.stderr.flush()


def _teller(descriptor: int) -> Callable[[FromMember], None]:
    """Sends a message as one line. A parent that is gone is noticed at the input."""
    os.set_inheritable(descriptor, False)  # programs that a model starts do not hold it open
    lock = threading.Lock()

    def tell(message: FromMember) -> None:
        text = msgspec.json.encode(message) + b"\n"
        with lock, suppress(OSError):
            while text:
                text = text[os.write(descriptor, text) :]

    return tell


def main(arguments: Sequence[str]) -> int:
    """Run a member that speaks on the descriptor `arguments[0]`; returns its exit code."""
    end_with_parent(signal.SIGKILL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the experiment
    take_anchor(0)  # from here on now_ns is CLOCK_MONOTONIC, which all processes of the host share
    control = Control()
    source, tell = Input(control), _teller(int(arguments[0]))
    try:
        order = source.order()
    except msgspec.MsgspecError as error:
        _log(f"the order cannot be read: {error}")
        return 2
    source.listen()
    if any(job.command for job in order.jobs.values()):
        return program.serve(order, source.messages, control, tell)
    try:
        member = Member(order, control, tell)
        try:
            if not member.prepare():
                return 1
            while True:
                try:
                    begin = source.messages.get(timeout=_BEGIN_WITHIN_S)
                except queue.Empty:
                    _log("nothing to serve for an hour")
                    return 1
                if begin is None:
                    return 0
                member.window(begin)
        finally:
            member.close()
    except SloschedError as error:
        _log(f"{error}")
        return error.exit_code
