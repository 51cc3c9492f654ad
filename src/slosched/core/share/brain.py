"""Which request of which job starts when, on one lane: the same class live and in virtual time.

The lane holds `takes` requests at most. One runs; those that were interrupted lie below it; and one may be
armed behind, so that nothing has to be decided between two requests. When a better one arrives for that
place, the armed one is taken back, unless it has begun. The queues of the jobs are in queues.py, the policies
in order.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.core.share.order import Order
from slosched.core.share.queues import JobQueue, Load, Waiting
from slosched.errors import InvalidConfig
from slosched.share_spec import Interruption, Policy, Request, Stop

__all__ = ["Load", "ShareBrain", "Tally"]


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job stands.

    `reason` is of its last failure, or why it is over. `left`: requests that arrived and never started, all
    of them once the job is `over`.
    """

    job: int
    over: bool
    ended: int
    failed: int
    left: int
    reason: str = ""
    fatal: bool = False
    out_of_memory: bool = False


@dataclass(slots=True, eq=False)
class _Held:
    """A request in the lane. `begun`: it runs, or was interrupted, or goes first at the next boundary."""

    waiting: Waiting
    level: int
    begun: bool
    since_ns: int = 0  # when it last came to the top
    ran_ns: int = 0
    linger_ns: int = 0


class ShareBrain:
    """Gives one lane requests of one job or of several. Pure: it reads no clock.

    The shell: `begin`, then in a loop `ended` for all that `lane.poll` returns, and `schedule` until it
    returns nothing; a Start goes to `lane.start`, a Withdraw to `lane.withdraw`, whose answer goes to
    `withdrawn`. core/share/driving.py has this loop.

    `linger_ns`: a preemptive lane under policy priority waits that long behind a request whose client has its
    next one within that time (a closed loop that thinks no longer), before it goes on with lower jobs.

    `seed` turns the order in which jobs go whose requests arrive at one instant. Raises InvalidConfig for no
    load, two loads of one job, or a lane that takes none.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        *,
        policy: Policy = Policy.FCFS,
        takes: int = 1,
        preemptive: bool = False,
        linger_ns: int = 0,
        seed: int = 0,
        stop: Stop = Stop.FINISH,
        least_jobs: int = 0,
    ) -> None:
        if not loads or len({load.job for load in loads}) < len(loads):
            raise InvalidConfig("a lane needs at least one job, and each job once")
        if takes < 1:
            raise InvalidConfig(f"a lane holds at least one request, not {takes}")
        self._queues = [JobQueue(load, place, least_jobs) for place, load in enumerate(loads)]
        self._by_job = {queue.load.job: queue for queue in self._queues}
        self._order = Order(policy, self._queues, seed)
        self._takes, self._preemptive = takes, preemptive
        self._linger_ns = linger_ns if preemptive and policy is Policy.PRIORITY else 0
        self._lingers: tuple[Waiting, int] | None = (
            None  # for whose client the lane waits, until when
        )
        self._stop, self._least = stop, least_jobs
        self._held: list[_Held] = []  # as the lane runs them: the first one runs
        self._asked: Withdraw | None = None
        self._rows: list[Request | Interruption] = []
        self._begun = False
        self._now_ns = 0

    # ----------------------------------------------------------------------- from the shell

    def begin(self, at_ns: int, until_ns: int) -> None:
        """Requests arrive from `at_ns` until `until_ns`. Called once."""
        self._begun = True
        for queue in self._queues:
            queue.begin(at_ns, until_ns)

    def end(self, now_ns: int) -> None:
        """No more requests start, also where `least_jobs` is not reached; what the lane runs ends."""
        self._begun = True
        self._now_ns = max(self._now_ns, now_ns)
        for queue in self._queues:
            queue.end(now_ns)

    def end_job(self, job: int, reason: str) -> None:
        """No more requests of `job` start: its model cannot run. The other jobs go on."""
        queue = self._by_job[job]
        queue.end(self._now_ns)
        queue.reason, queue.fatal = reason, True

    def ended(self, ended: Ended, *, now_ns: int) -> None:
        """A request that the lane held ended. One that it does not hold is ignored: it has its row."""
        self._now_ns = max(self._now_ns, now_ns)
        held = self._find(ended.job, ended.number)
        if held is None:
            return
        on_top = self._held[0] is held
        self._held.remove(held)
        if on_top:
            self._come_up(ended.ended_ns)
        if held.linger_ns:
            self._lingers = held.waiting, ended.ended_ns + held.linger_ns
        queue = self._by_job[ended.job]
        if ended.reason:
            queue.has_failed(
                ended.ended_ns, ended.reason, fatal=ended.fatal, out_of_memory=ended.out_of_memory
            )
            return
        waiting = held.waiting
        counted = self._stop is Stop.FINISH or queue.ended < self._least
        queue.finished(ended.ended_ns, ended.ended_ns - ended.started_ns - ended.paused_ns)
        self._rows.extend(ended.pauses)
        self._rows.append(
            Request(
                job=ended.job,
                number=ended.number,
                arrived_ns=waiting.arrived_ns,
                started_ns=ended.started_ns,
                ended_ns=ended.ended_ns,
                deadline_ns=waiting.deadline_ns,
                interruptions=len(ended.pauses),
                paused_ns=ended.paused_ns,
                device_ns=ended.device_ns,
                differs=ended.differs,
                beside_lower=ended.beside_lower,
                cut=not counted and ended.ended_ns > queue.until_ns,
            )
        )

    def withdrawn(self, withdraw: Withdraw, taken_back: bool, *, now_ns: int) -> None:
        """The lane's answer to a Withdraw: True if the request had not begun. It is then queued again."""
        self._now_ns = max(self._now_ns, now_ns)
        self._asked = None
        held = self._find(withdraw.job, withdraw.number)
        if held is None:
            return
        if not taken_back:
            held.begun = True
            return
        self._held.remove(held)
        self._by_job[withdraw.job].give_back(held.waiting)

    def _find(self, job: int, number: int) -> _Held | None:
        for held in self._held:
            if held.waiting.job == job and held.waiting.number == number:
                return held
        return None

    def _come_up(self, now_ns: int) -> None:
        """The request that is first in the lane runs from now on."""
        if self._held:
            top = self._held[0]
            top.begun, top.since_ns = True, now_ns

    # ----------------------------------------------------------------------- decisions

    def schedule(self, *, now_ns: int) -> list[Start | Withdraw]:
        """What the lane is to do now, in order; call again after carrying it out, until nothing is left."""
        self._now_ns = max(self._now_ns, now_ns)
        effects: list[Start | Withdraw] = []
        while self._asked is None and (effect := self._decide(now_ns)) is not None:
            effects.append(effect)
        return effects

    def _decide(self, now_ns: int) -> Start | Withdraw | None:
        heads = [head for queue in self._queues if (head := queue.head(now_ns)) is not None]
        behind = next((held for held in reversed(self._held) if not held.begun), None)
        if behind is not None and self._by_job[behind.waiting.job].late(now_ns):
            return self._take_back(behind)  # the duration is over
        if behind is not None and self._urgent([behind.waiting], now_ns) is not None:
            return self._take_back(behind)  # it has become so while it waited, and starts anew
        if not heads:
            return None
        if not self._held:
            return self._start(min(heads, key=self._order.key), 0, now_ns)
        urgent = self._urgent(heads, now_ns)
        if urgent is not None:
            if len(self._held) < self._takes:
                return self._start(urgent, 0, now_ns)
            return self._take_back(behind)
        best = min(heads, key=self._order.key)
        if behind is None:
            if len(self._held) >= self._takes:
                return None
            return self._start(best, self._place_of(best, now_ns), now_ns)
        if self._order.swaps and self._order.key(best) < self._order.key(behind.waiting):
            return self._take_back(behind)
        return None

    def _urgent(self, heads: list[Waiting], now_ns: int) -> Waiting | None:
        """The best request that interrupts what runs. None does so with a request of its own job in the lane:
        both use the same memory of the model."""
        if not self._preemptive:
            return None
        inside = {held.waiting.job for held in self._held if held.begun}
        top = self._held[0]
        ran_ns = self._ran_ns(top, now_ns)
        urgent = [
            head
            for head in heads
            if head.job not in inside and self._order.interrupts(head, top.waiting, ran_ns)
        ]
        return min(urgent, key=self._order.key, default=None)

    def _ran_ns(self, held: _Held, now_ns: int) -> int:
        running = held is self._held[0]
        return held.ran_ns + (max(0, now_ns - held.since_ns) if running else 0)

    def _place_of(self, waiting: Waiting, now_ns: int) -> int:
        """Where a request goes that does not interrupt: behind the last one that it may not overtake."""
        place = len(self._held)
        if not self._preemptive:
            return place
        while place > 1:
            above = self._held[place - 1]
            if above.waiting.job == waiting.job or not self._order.interrupts(
                waiting, above.waiting, self._ran_ns(above, now_ns)
            ):
                break
            place -= 1
        return place

    def _start(self, waiting: Waiting, place: int, now_ns: int) -> Start:
        """`waiting` goes into the lane at `place` of its order."""
        held = self._held
        queue = self._by_job[waiting.job]
        taken = queue.take()
        assert taken is waiting
        self._order.started(waiting)
        if place:
            level = held[place - 1].level
        elif held:
            top = held[0]
            top.ran_ns = self._ran_ns(top, now_ns)
            level = top.level + 1
        else:
            level = 0
        patient = self._patient(waiting, now_ns)
        linger_ns = self._linger_ns if queue.follows_within(self._linger_ns) else 0
        held.insert(
            place,
            _Held(waiting, level, begun=not place, since_ns=now_ns, linger_ns=linger_ns),
        )
        if not patient:
            self._lingers = None  # the lane starts it at once, or waits for nothing
        return Start(waiting.job, waiting.number, level, now_ns, linger_ns, patient)

    def _patient(self, waiting: Waiting, now_ns: int) -> bool:
        """True if `waiting` is to wait while the lane lingers: a request in the lane, or the one that has just
        ended, is of a higher priority and has a client that goes on."""
        if not self._linger_ns:
            return False
        ahead = [held.waiting for held in self._held if held.linger_ns]
        if self._lingers is not None and now_ns < self._lingers[1]:
            ahead.append(self._lingers[0])
        return any(self._order.interrupts(each, waiting, 0) for each in ahead)

    def _take_back(self, held: _Held | None) -> Withdraw | None:
        if held is None:
            return None
        self._asked = Withdraw(held.waiting.job, held.waiting.number)
        return self._asked

    # ----------------------------------------------------------------------- for the shell

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` may have something without any end before. None: never."""
        if not self._begun:
            return None
        now_ns = self._now_ns
        times = [at_ns for queue in self._queues if (at_ns := queue.next_ns(now_ns)) is not None]
        overtaking_ns = self._overtaking_ns(now_ns)
        if overtaking_ns is not None:
            times.append(overtaking_ns)
        return min(times, default=None)

    def _overtaking_ns(self, now_ns: int) -> int | None:
        """When a request that waits becomes more urgent than what runs, though nothing arrives or ends.

        Slack of what waits falls; that of what runs stays. Only least slack knows this; the brain then looks
        once for each boundary of what runs.
        """
        if self._order.policy is not Policy.LEAST_SLACK or not self._preemptive or not self._held:
            return None
        top = self._held[0].waiting
        waiting = [head for queue in self._queues if (head := queue.head(now_ns)) is not None]
        waiting += [held.waiting for held in self._held if not held.begun]
        if not any(each.job != top.job and each.deadline_ns for each in waiting):
            return None
        return now_ns + max(1_000_000, self._queues[top.place].load.boundary_ns)

    def rows(self) -> list[Request | Interruption]:
        """What ended since the last call, in the order of the ends; pauses stand before their request."""
        rows, self._rows = self._rows, []
        return rows

    def tally(self, job: int) -> Tally:
        """Where `job` stands."""
        queue = self._by_job[job]
        return Tally(
            job=job,
            over=self._over(queue),
            ended=queue.ended,
            failed=queue.failed,
            left=queue.left(self._now_ns),
            reason=queue.reason,
            fatal=queue.fatal,
            out_of_memory=queue.out_of_memory,
        )

    def _over(self, queue: JobQueue) -> bool:
        return self._begun and queue.over(self._now_ns)

    @property
    def done(self) -> bool:
        """True if every job is over and the lane holds nothing of them."""
        return all(self._over(queue) for queue in self._queues)
