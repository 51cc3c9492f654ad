"""The two kinds of stream: open loops, which wait for nobody, and closed loops, which wait for answers."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slosched.errors import InvalidConfig
from slosched.workloads.base import Step


class _Instances:
    """Takes a stream's instances in turn."""

    def __init__(self, instances: Sequence[int]) -> None:
        if not instances:
            raise InvalidConfig("a stream needs at least one model instance")
        self._instances = tuple(instances)
        self._turn = 0

    def instance(self) -> int:
        turn, self._turn = self._turn, (self._turn + 1) % len(self._instances)
        return self._instances[turn]


class OpenLoop(_Instances):
    """Requests at the times of `arrivals` (ns, never decreasing), whatever becomes of them.

    The SLO is each step's own, or `slo` (factor, ns) throughout where that is given.
    """

    def __init__(
        self,
        arrivals: Iterable[int],
        instances: Sequence[int],
        *,
        user_id: int,
        group: int = 0,
        slo: tuple[float, int] | None = None,
    ) -> None:
        super().__init__(instances)
        self.user_id = user_id
        self.group = group
        self._times = iter(arrivals)
        self._slo = slo

    def first(self) -> Sequence[int]:
        at_ns = next(self._times, None)
        return () if at_ns is None else (at_ns,)

    def after_send(self, at_ns: int) -> int | None:
        return next(self._times, None)

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        return None

    def slo(self, step: Step) -> tuple[float, int]:
        return self._slo or (step.slo_factor, step.slo_ns)


class ClosedLoop(_Instances):
    """`concurrency` requests outstanding, always; each answer is followed by the next request.

    Clockwork's ClosedLoop: success or error, the next one goes out at once. Its controller answers
    what it cannot serve when the deadline comes; ours refuses at once, and a loop that followed
    refusals at once would turn as fast as the network. So after a refusal the next request is due when
    the refused one's deadline has come. `requests` > 0 ends the stream after so many; it begins
    `delay_ns` after the start.
    """

    def __init__(
        self,
        concurrency: int,
        instances: Sequence[int],
        *,
        user_id: int,
        group: int = 0,
        slo: tuple[float, int] | None = None,
        requests: int = 0,
        delay_ns: int = 0,
    ) -> None:
        super().__init__(instances)
        if concurrency < 1:
            raise InvalidConfig(f"the concurrency must be at least 1, not {concurrency}")
        if requests < 0 or delay_ns < 0:
            raise InvalidConfig("a closed loop's requests and delay must be at least 0")
        self.user_id = user_id
        self.group = group
        self._slo = slo
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

    def slo(self, step: Step) -> tuple[float, int]:
        return self._slo or (step.slo_factor, step.slo_ns)
