"""The kinds of stream: open loops, which never wait, and closed loops, which wait for answers."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from math import log

from slosched.errors import InvalidConfig
from slosched.workloads.base import Step

#: (slo_factor, slo_ns); both 0 is the controller's default.
Slo = tuple[float, int]


class _Source:
    """Who sends, to which instances in turn, and with which SLO.

    The SLO is each step's own, or `slo` throughout, or `slos` by the step's index.
    """

    __slots__ = ("_instances", "_last", "_slo", "_slos", "_turn", "group", "lengths", "user_id")

    def __init__(
        self,
        instances: Sequence[int],
        *,
        user_id: int,
        group: int = 0,
        slo: Slo | None = None,
        slos: Sequence[Slo] = (),
    ) -> None:
        if not instances:
            raise InvalidConfig("a stream needs at least one model instance")
        self.user_id = user_id
        self.group = group
        self.lengths: Iterator[int] | None = None
        self._instances = instances
        self._last = len(instances) - 1
        self._turn = 0
        self._slo = slo
        self._slos = slos

    def instance(self) -> int:
        turn = self._turn
        if self._last:
            self._turn = turn + 1 if turn < self._last else 0
        return self._instances[turn]

    def slo(self, step: Step) -> Slo:
        if self._slo is not None:
            return self._slo
        if self._slos:
            return self._slos[step.index]
        return step.slo_factor, step.slo_ns


class OpenLoop(_Source):
    """Requests at the times of `arrivals` (ns, never decreasing), whatever becomes of them."""

    __slots__ = ("_times",)

    def __init__(
        self,
        arrivals: Iterable[int],
        instances: Sequence[int],
        *,
        user_id: int,
        group: int = 0,
        slo: Slo | None = None,
        slos: Sequence[Slo] = (),
        lengths: Iterator[int] | None = None,
    ) -> None:
        super().__init__(instances, user_id=user_id, group=group, slo=slo, slos=slos)
        self.lengths = lengths
        self._times = iter(arrivals)

    def first(self) -> Sequence[int]:
        at_ns = next(self._times, None)
        return () if at_ns is None else (at_ns,)

    def after_send(self, at_ns: int) -> int | None:
        return next(self._times, None)

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        return None


class ClosedLoop(_Source):
    """`concurrency` requests outstanding, always; each answer is followed by the next request.

    Clockwork's ClosedLoop: success or error, the next one goes out at once. Its controller answers
    what it cannot serve when the deadline comes; ours refuses at once, and a loop that followed
    refusals at once would turn as fast as the network. So after a refusal the next request is due when
    the refused one's deadline has come. `requests` > 0 ends the stream after that number; it begins
    `delay_ns` after the start.
    """

    __slots__ = ("_concurrency", "_delay_ns", "_left")

    def __init__(
        self,
        concurrency: int,
        instances: Sequence[int],
        *,
        user_id: int,
        group: int = 0,
        slo: Slo | None = None,
        slos: Sequence[Slo] = (),
        requests: int = 0,
        delay_ns: int = 0,
    ) -> None:
        super().__init__(instances, user_id=user_id, group=group, slo=slo, slos=slos)
        if concurrency < 1:
            raise InvalidConfig(f"the concurrency must be at least 1, not {concurrency}")
        if requests < 0 or delay_ns < 0:
            raise InvalidConfig("a closed loop's requests and delay must be at least 0")
        self._concurrency = concurrency
        self._left = requests or None
        self._delay_ns = delay_ns

    def first(self) -> Sequence[int]:
        count = self._concurrency if self._left is None else min(self._concurrency, self._left)
        if self._left is not None:
            self._left -= count
        return (self._delay_ns,) * count

    def after_send(self, at_ns: int) -> int | None:
        return None

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        if self._left is not None:
            if self._left == 0:
                return None
            self._left -= 1
        return at_ns if ok else max(at_ns, deadline_ns)


class BurstyClosedLoop(_Source):
    """A closed loop that is on and off: Clockwork's BurstyPoissonClosedLoop.

    A burst of `concurrency` requests begins at the start; while it lasts (exponential, mean
    `burst_ns`), each answer is followed by the next request. When it is over and everything is
    answered, the next one begins after a pause, which the published code draws from the bursts'
    distribution. What is refused is followed at its deadline, as in a ClosedLoop.
    """

    __slots__ = (
        "_burst_end_ns",
        "_burst_ns",
        "_concurrency",
        "_outstanding",
        "_to_start",
        "_uniform",
    )

    def __init__(
        self,
        concurrency: int,
        instances: Sequence[int],
        *,
        burst_ns: int,
        seed: int,
        user_id: int,
        group: int = 0,
    ) -> None:
        super().__init__(instances, user_id=user_id, group=group)
        if concurrency < 1:
            raise InvalidConfig(f"the concurrency must be at least 1, not {concurrency}")
        self._concurrency = concurrency
        self._burst_ns = burst_ns
        self._uniform = random.Random(seed).random
        self._burst_end_ns = 0
        self._to_start = 0  # requests of the beginning burst that are not sent yet
        self._outstanding = 0

    def _draw_ns(self) -> int:
        return int(-log(1.0 - self._uniform()) * self._burst_ns + 0.5)

    def _begin_burst(self, at_ns: int) -> int:
        self._burst_end_ns = at_ns + self._draw_ns()
        self._to_start = self._concurrency - 1
        self._outstanding = self._concurrency
        return at_ns

    def first(self) -> Sequence[int]:
        return (self._begin_burst(0),)

    def after_send(self, at_ns: int) -> int | None:
        if self._to_start == 0:
            return None
        self._to_start -= 1
        return at_ns

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        due_ns = at_ns if ok else max(at_ns, deadline_ns)
        if due_ns < self._burst_end_ns:
            return due_ns
        self._outstanding -= 1
        return None if self._outstanding else self._begin_burst(due_ns + self._draw_ns())
