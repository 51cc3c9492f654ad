"""How many requests a step of the controller takes, when the controller's own core is the bottleneck.

A loop that cannot keep up finds more requests at each step than at the one before, takes them all, and
answers none of them in time. So the door watches how long requests wait before they are read (delays.py). It
is *behind* once each step of `_PATIENCE_NS` found one that had waited for too long: what a burst or a pause of
the process leaves is gone sooner. From then on a step takes only as many requests as keep steps short, and the
others are refused at once, unseen by the policy. Refusing costs a few per cent of serving, so most of the core
goes on serving.

A wait alone shows no overload. Requests of clients that keep a few dozen of them open over a busy core, or one
that others share, wait for milliseconds at each step, and for no longer ten minutes later. Refusing them gains
nothing, since the next request follows each refusal. So a wait of `_STANDING_NS` or more is too long where many
requests stand (their number is the rate at which they are read times the wait), or where it takes half of the
time that the request has.

A step is short when the next one begins within `_GAP_NS`, or when it uses so little CPU time that a smaller one
would do little but begin: a process that is given a tenth of a core loses the other nine tenths in
pauses, which no limit shortens. The limit follows from step to step what the last one took and cost.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

from slosched.core.scheduler.state import Client
from slosched.messages import InferRequest
from slosched.units import NS_PER_MS, NS_PER_S

P = TypeVar("P", bound=Hashable)

_PATIENCE_NS = 50 * NS_PER_MS
#: Messages that nothing holds up are read within a millisecond.
_STANDING_NS = 5 * NS_PER_MS
#: Requests that may stand unread. At 50 us each, a core needs 13 ms for them.
_MOST_STANDING = 256
#: A request may wait for one part in this number of its SLO.
_SLO_SHARE = 2
_GAP_NS = 15 * NS_PER_MS
#: CPU time of a step. Below the first, half of it is spent on what a step costs beside its requests; above the
#: second the GPUs run out of work meanwhile.
_SHORT_NS, _LONG_NS = NS_PER_MS, 4 * NS_PER_MS
#: What a controller that has not learned yet starts from; a request costs 50 us.
_FIRST = 64
#: Least limit: the fixed cost of a step is that of some sixteen requests.
_LEAST = 4.0
#: The limit follows the cost of one step by no more than this, since steps vary.
_DOWN, _UP = 0.7, 1.2
_PAUSE_AT_MOST = 4.0
#: The overload is over after this time without refusals.
_OVER_AFTER_NS = NS_PER_S
NO_LIMIT = 1 << 30
REASON = "requests come faster than the controller's core can take them"


class Door:
    """Sets how many requests a step may take (`limit`), from what earlier steps took (`step_ended`)."""

    def __init__(self) -> None:
        self._most = float(_FIRST)
        self._kept_up_ns = 0  # when requests were last read as they came
        self._needed_ns = 0  # when the limit last kept a request out, or should have
        self._ended_ns = 0  # when the last step ended
        self._cpu_ns = 0  # the CPU time that was reported then
        self._next_model = 0  # whose turn it is
        self._reading = _ReadingRate()
        self.limit = NO_LIMIT
        self.refused = 0  # requests, so far; not among those that arrived

    def step_ended(
        self, *, now_ns: int, cpu_ns: int, took: int, waited_ns: int, slo_ns: int
    ) -> None:
        """A step ended that took `took` requests; one that it read, with this SLO, had waited for `waited_ns`.

        `cpu_ns` is the CPU time of the loop's thread so far, less what refusals took of it.
        """
        cost_ns, self._cpu_ns = max(1, cpu_ns - self._cpu_ns), cpu_ns
        gap_ns, self._ended_ns = max(1, now_ns - self._ended_ns), now_ns
        standing = self._reading.standing(now_ns=now_ns, took=took, waited_ns=waited_ns)
        keeps_up = waited_ns < _STANDING_NS or (
            standing < _MOST_STANDING and waited_ns * _SLO_SHARE < slo_ns
        )
        if keeps_up:
            self._kept_up_ns = now_ns
        if self.limit == NO_LIMIT:
            if now_ns - self._kept_up_ns >= _PATIENCE_NS:
                self.limit, self._needed_ns = int(self._most), now_ns
            return
        if not keeps_up or took >= self.limit:
            self._needed_ns = now_ns
        if 2 * took >= self._most:  # else the limit had no part in what the step cost
            wanted_ns = min(_LONG_NS, max(_SHORT_NS, cost_ns * _GAP_NS // gap_ns))
            change = min(_UP, max(_DOWN, wanted_ns / cost_ns))
            self._most = max(_LEAST, self._most * change)
        is_over = now_ns - self._needed_ns > _OVER_AFTER_NS
        # What came during a pause of the process is not an overload yet.
        paused = min(_PAUSE_AT_MOST, max(1.0, gap_ns / _GAP_NS))
        self.limit = NO_LIMIT if is_over else int(self._most * paused)

    def choose(self, model_ids: Sequence[int], most: int) -> list[bool]:
        """Which of one client's requests are taken, `most` in all: for each whether it is.

        Those of one model make a batch, which costs the controller little more than one request. So models
        are taken whole, in turn, and of the last one the newest, which have most time left.
        """
        if most >= len(model_ids) or not most:
            return [most > 0] * len(model_ids)
        places: dict[int, list[int]] = {}
        for place, model_id in enumerate(model_ids):
            places.setdefault(model_id, []).append(place)
        in_turn = sorted(places, key=lambda model_id: (model_id < self._next_model, model_id))
        taken, left = [False] * len(model_ids), most
        for model_id in in_turn:
            for place in places[model_id][-left:]:
                taken[place] = True
            left -= min(left, len(places[model_id]))
            if not left:
                self._next_model = model_id + 1
                break
        return taken

    def refuse(self, client: Client, requests: Sequence[InferRequest]) -> list[int]:
        """Count `requests` as refused; returns their ids, without those that repeat one that was taken."""
        taken = client.requests
        ids = [request.request_id for request in requests if request.request_id not in taken]
        self.refused += len(ids)
        return ids


class _ReadingRate:
    """How many requests the last steps read, over one to two times `_PATIENCE_NS`."""

    def __init__(self) -> None:
        self._since_ns = self._before_ns = 0
        self._count = self._count_before = 0

    def standing(self, *, now_ns: int, took: int, waited_ns: int) -> int:
        """A step took `took` requests: how many stand unread if each waits for `waited_ns` (Little's law)."""
        self._count += took
        if now_ns - self._since_ns > _PATIENCE_NS:
            self._before_ns, self._since_ns = self._since_ns, now_ns
            self._count_before, self._count = self._count, 0
        window_ns = max(now_ns - self._before_ns, waited_ns, _PATIENCE_NS)
        return (self._count_before + self._count) * waited_ns // window_ns


def fair_parts(waiting: Mapping[P, int], most: int) -> dict[P, int]:
    """How many of each peer's `waiting` requests are taken, `most` in all (max-min fairness).

    A peer that sends less than an equal part is taken whole; the others share what that leaves.
    """
    parts: dict[P, int] = {}
    left = most
    by_count = sorted(waiting, key=waiting.__getitem__)
    for place, peer in enumerate(by_count):
        # Rounded up, so that a limit below the number of peers still takes one request.
        part = min(waiting[peer], -(-left // (len(by_count) - place)))
        parts[peer] = part
        left -= part
    return parts
