"""Sends requests: an open loop at intended times, or a closed one with think times. No correction adds samples.

One thread sends, another one's callbacks end; a latency counts from the time at which its request was meant
to be sent, so that a sender that comes too late does not hide it (MLPerf's rule). Each request has a
time-out from then on, after which it is given up and counted.
"""

from __future__ import annotations

import heapq
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.faasm.inference.choices import WARM
from slosched.faasm.inference.cold import ColdRule, container_pause_ns
from slosched.faasm.inference.plan import Image
from slosched.faasm.inference.requests import Outcome, Reply, Request, System, ended
from slosched.units import NS_PER_S

#: Requests on their way at a time; one more is not sent, and counts as timed out.
MOST_UNANSWERED = 2_000
#: A system that does not end what was given up within that time hangs.
_DRAIN_NS = 90 * NS_PER_S
#: When this little is left, the sender waits without sleeping: a wake-up comes later than asked for.
_SPIN_NS = 200_000


class Hangs(SloschedError):
    """A system did not end requests that were given up."""


class Arrivals(Protocol):
    """When requests are meant to be sent, from the begin of a run on, in ns."""

    def first(self) -> Sequence[tuple[int, int]]:
        """(time, user) of the first requests, in any order."""

    def after(self, user: int, done_ns: int) -> int | None:
        """When `user` sends again after a request that ended at `done_ns`; None: not for that reason."""


@dataclass(frozen=True, kw_only=True)
class Open:
    """Poisson arrivals of `rate_per_s` requests, by `users` in turn of a draw."""

    rate_per_s: float
    duration_ns: int
    seed: int
    users: int = 100

    def first(self) -> Sequence[tuple[int, int]]:
        source = np.random.default_rng([self.seed, 4])
        found: list[tuple[int, int]] = []
        at_ns = 0
        while True:
            at_ns += round(source.exponential(1 / self.rate_per_s) * NS_PER_S)
            if at_ns >= self.duration_ns:
                return found
            found.append((at_ns, int(source.integers(self.users))))

    def after(self, user: int, done_ns: int) -> int | None:
        return None


class Closed:
    """`connections` users, each of which thinks for U[0, think_ns] before each request, as the original's
    wrk."""

    def __init__(self, *, connections: int, think_ns: int, seed: int) -> None:
        self._connections, self._think_ns = connections, think_ns
        self._source = np.random.default_rng([seed, 5])

    def _think(self) -> int:
        return int(self._source.integers(self._think_ns + 1))

    def first(self) -> Sequence[tuple[int, int]]:
        return [(self._think(), user) for user in range(self._connections)]

    def after(self, user: int, done_ns: int) -> int | None:
        return done_ns + self._think()


@dataclass(frozen=True, kw_only=True)
class Run:
    """What is sent. `rung` is that of cold requests; with `container_ns` their start is emulated, with that
    mean. Requests are meant for `duration_ns`, and are given up `timeout_ns` after their time."""

    arrivals: Arrivals
    rule: ColdRule
    rung: str
    duration_ns: int
    timeout_ns: int
    seed: int
    container_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """What became of a run's requests. It began at `begin_ns` and was meant to last for `duration_ns`."""

    begin_ns: int
    duration_ns: int
    outcomes: tuple[Outcome, ...]


@dataclass(slots=True)
class _Sent:
    request: Request
    sent_ns: int
    give_up: Callable[[], None]
    given_up: bool = False


class Sender:
    """Sends one run to one system, from the thread that calls `run`."""

    def __init__(self, system: System, images: Sequence[Image]) -> None:
        self._system, self._images = system, images
        self._wake = threading.Condition()
        self._replies: deque[tuple[int, Reply]] = deque()

    def run(self, run: Run) -> Loaded:
        """Send all, and wait until each has ended. Raises Hangs."""
        begin_ns = now_ns()
        end_ns = begin_ns + run.duration_ns
        due = [
            (begin_ns + at_ns, place, user)
            for place, (at_ns, user) in enumerate(run.arrivals.first())
        ]
        heapq.heapify(due)
        more = len(due)
        number = 0
        open_: dict[int, _Sent] = {}
        outcomes: list[Outcome] = []
        by_time: deque[int] = deque()
        while True:
            while due and due[0][0] <= now_ns():
                intended_ns, _, user = heapq.heappop(due)
                if intended_ns >= end_ns:
                    continue
                request = self._request(run, number, user, intended_ns)
                number += 1
                by_time.append(request.number)
                self._send(request, open_)
            self._give_up(run, by_time, open_)
            for ended_, reply in self._taken():
                sent = open_.pop(ended_, None)
                if sent is None:
                    continue
                outcomes.append(_outcome(sent, reply))
                again_ns = run.arrivals.after(
                    sent.request.user, max(reply.done_ns, sent.request.intended_ns)
                )
                if again_ns is not None and again_ns < end_ns:
                    heapq.heappush(due, (again_ns, more, sent.request.user))
                    more += 1
            if not open_ and (not due or due[0][0] >= end_ns):
                return Loaded(
                    begin_ns=begin_ns,
                    duration_ns=run.duration_ns,
                    outcomes=tuple(sorted(outcomes, key=_number)),
                )
            if now_ns() > end_ns + run.timeout_ns + _DRAIN_NS:
                raise Hangs(
                    f"{self._system.name} did not end {len(open_)} requests that were given up"
                )
            self._wait(due[0][0] if due else None, self._next_give_up(run, by_time, open_))

    def _request(self, run: Run, number: int, user: int, intended_ns: int) -> Request:
        cold = run.rule.is_cold(number, user)
        picture = number % len(self._images)
        pause_ns = 0
        if cold and run.container_ns:
            pause_ns = container_pause_ns(run.seed, number, run.container_ns)
        return Request(
            number=number,
            user=user,
            intended_ns=intended_ns,
            picture=picture,
            image=self._images[picture],
            rung=run.rung if cold else WARM,
            pause_ns=pause_ns,
        )

    def _send(self, request: Request, open_: dict[int, _Sent]) -> None:
        if len(open_) >= MOST_UNANSWERED:
            open_[request.number] = _Sent(request, now_ns(), _nothing, given_up=True)
            reason = f"{MOST_UNANSWERED:,} requests were on their way"
            self._replies.append((request.number, ended("timeout", reason)))
            return
        sent_ns = now_ns()
        number = request.number
        sent = open_[number] = _Sent(request, sent_ns, _nothing)
        sent.give_up = self._system.submit(request, lambda reply: self._done(number, reply))

    def _done(self, number: int, reply: Reply) -> None:
        with self._wake:
            self._replies.append((number, reply))
            self._wake.notify()

    def _taken(self) -> list[tuple[int, Reply]]:
        with self._wake:
            taken = [*self._replies]
            self._replies.clear()
        return taken

    def _give_up(self, run: Run, by_time: deque[int], open_: dict[int, _Sent]) -> None:
        """Give up what is due. In a closed loop intended times do not rise with the numbers by much."""
        now = now_ns()
        while by_time:
            sent = open_.get(by_time[0])
            if sent is not None:
                if now < sent.request.intended_ns + run.timeout_ns:
                    return
                sent.given_up = True
                sent.give_up()
            by_time.popleft()

    def _next_give_up(self, run: Run, by_time: deque[int], open_: dict[int, _Sent]) -> int | None:
        sent = open_.get(by_time[0]) if by_time else None
        return None if sent is None else sent.request.intended_ns + run.timeout_ns

    def _wait(self, *times_ns: int | None) -> None:
        left_ns = (
            min((each for each in times_ns if each is not None), default=now_ns() + NS_PER_S)
            - now_ns()
        )
        if left_ns <= _SPIN_NS:
            return
        with self._wake:
            if not self._replies:
                self._wake.wait(min(left_ns - _SPIN_NS, NS_PER_S) / NS_PER_S)


def _nothing() -> None:
    """What was not sent need not be given up."""


def _number(outcome: Outcome) -> int:
    return outcome.number


def _outcome(sent: _Sent, reply: Reply) -> Outcome:
    request, answer = sent.request, reply.answer
    status = "timeout" if sent.given_up and reply.status != "refused" else reply.status
    fields = {} if answer is None else {"pid": answer["pid"], "cold_ns": answer["cold_ns"]}
    return Outcome(
        number=request.number,
        user=request.user,
        picture=request.picture,
        rung=request.rung,
        status=status,
        intended_ns=request.intended_ns,
        sent_ns=sent.sent_ns,
        done_ns=reply.done_ns,
        infer_ns=0 if answer is None else answer["infer_ns"],
        top=() if answer is None else tuple(answer["top"]),
        scores=() if answer is None else tuple(answer["scores"]),
        reason=reply.reason,
        **fields,
    )
