"""Whether a request that arrives has a chance, judged by how the batches of its model came lately.

A queue that is longer than what will be served of it answers each request that it cannot serve at the
last moment. The fate of earlier requests predicts that when the request arrives:

    The scheduler watches each model that lost a request after it had waited, and averages over recent events:
    the time from one batch of these models to the next while requests waited (`between`); the part of
    their requests that each model receives (`asked`); and how much more GPU time a request of the model takes
    than in a full batch (`dear`, at least 1: full batches would follow one another that much sooner).
    A model that has one request in n is forecast to have one batch in n, but not fewer than if the models took
    turns: the number it had lately says nothing, or a model that fell behind would lose more and more. A
    request with p requests of its model before it goes with the (1 + p // b)-th batch of its model, b being
    the largest batch that its SLO allows; the first of these is due one interval after the last one sent, or
    now. It is refused if the wait until its batch, times `early_refusal`, is longer than the wait that its
    deadline allows, and that is at least `WORTH_NS`.

A forecast holds only while losses confirm it. A model that lost no request which had waited for twice the
longer of gap and SLO has none, so nothing is refused early where nothing is lost, and a queue that is cut
too short fills again and shows what it can do.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from slosched.core.scheduler.estimators import ExecTable
from slosched.core.scheduler.state import Queue, Request
from slosched.units import NS_PER_MS, format_duration

#: Weight of the latest batch in the moving averages, once 1 / _NEWEST batches were seen.
_NEWEST = 0.15
#: Number of requests of a model that determine its part of all.
_REMEMBERED = 50
#: Weight of the latest in the moving average over the batches of all watched models.
_NEWEST_OF_ALL = 0.03
#: A loss confirms the forecast for the longer of gap and SLO, times this.
_CONFIRMED = 2
#: A request that will be hopeless sooner than this waits: a client gains little from hearing earlier, and where
#: SLOs are this short, early refusals cost up to four points of goodput.
WORTH_NS = 10 * NS_PER_MS


class _Watched:
    """The recent batches of one model."""

    __slots__ = ("asked", "dear", "full", "gap_ns", "last_ns", "lost_ns", "pressed", "seen")

    def __init__(self, now_ns: int) -> None:
        self.lost_ns = now_ns  # when the last one that had waited was lost
        self.last_ns = now_ns  # when the last batch was sent; at first, when watching began
        self.pressed = True  # requests were refused since then: batches were wanted all the time
        self.seen = 0
        self.gap_ns = 0.0
        self.dear = 1.0
        self.asked = 0  # requests lately
        self.full = 1  # requests in a full batch


class Forecast:
    """The forecasts of one scheduler. A request must expect to wait for `early_refusal` (above 0) times what
    is forecast, since what comes to one may take longer than what came to those before it.
    """

    __slots__ = ("_asked", "_between_ns", "_early", "_last_ns", "_seen", "_watched")

    def __init__(self, early_refusal: float) -> None:
        self._early = early_refusal
        self._last_ns = 0  # when the last batch of a watched model was sent
        self._seen = 0  # such batches
        self._asked = 0  # requests of watched models lately
        self._between_ns = 0.0  # from each of these to the next, on average
        self._watched: dict[int, _Watched] = {}  # by queue id

    @property
    def idle(self) -> bool:
        """True while no model is watched: reports and questions can be left out."""
        return not self._watched

    def forget(self) -> None:
        """GPUs came that can serve at once: how batches came lately says nothing of what follows."""
        self._watched.clear()
        self._asked = 0

    def lost(self, queue: Queue, *, now_ns: int) -> None:
        """A request of `queue` that had waited was given up."""
        watched = self._watched.get(queue.queue_id)
        if watched is None:
            if not self._watched:
                self._last_ns, self._between_ns, self._seen = now_ns, 0.0, 0
            self._watched[queue.queue_id] = watched = _Watched(now_ns)
            watched.asked = max(1, self._asked // len(self._watched))
            self._asked += watched.asked
        else:
            watched.lost_ns = now_ns
            watched.pressed = True

    def served(
        self, requests: Sequence[Request], table: ExecTable, exec_ns: int, *, now_ns: int
    ) -> None:
        """A batch of `requests`, which is expected to take `exec_ns`, was sent."""
        first = requests[0]
        queue_id = first.queue.queue_id
        watched = self._watched.get(queue_id)
        if watched is None:
            return
        if now_ns - watched.lost_ns > _CONFIRMED * max(first.slo_ns, watched.gap_ns):
            del self._watched[queue_id]
            self._asked -= watched.asked
            return
        self._seen += 1
        newest = max(1 / self._seen, _NEWEST_OF_ALL)
        # Unless requests were refused, no batch was wanted before the oldest of these came.
        oldest_ns = min([request.arrival_ns for request in requests])
        since_ns = self._last_ns if watched.pressed else max(self._last_ns, oldest_ns)
        self._between_ns += newest * (now_ns - since_ns - self._between_ns)
        self._last_ns = now_ns
        full, full_ns = _full_batch(table, first.slo_ns)
        since_ns = watched.last_ns if watched.pressed else max(watched.last_ns, oldest_ns)
        watched.seen += 1
        newest = max(1 / watched.seen, _NEWEST)
        dear = max(1.0, exec_ns * full / (full_ns * len(requests)))
        watched.gap_ns += newest * (now_ns - since_ns - watched.gap_ns)
        watched.dear += newest * (dear - watched.dear)
        watched.full = full
        watched.last_ns = now_ns
        watched.pressed = False

    def _arrived(self, watched: _Watched) -> None:
        """Count a request, and halve all counts once there are about fifty for each model."""
        watched.asked += 1
        self._asked += 1
        if self._asked > _REMEMBERED * len(self._watched):
            for each in self._watched.values():
                each.asked = (each.asked + 1) // 2
            self._asked = sum([each.asked for each in self._watched.values()])

    def hopeless_start_ns(self, request: Request, latest_ns: int, *, now_ns: int) -> int:
        """When `request`, which arrives and must start by `latest_ns`, must expect to start if that is too
        late; 0: it has a chance, or there is no forecast.
        """
        watched = self._watched.get(request.queue.queue_id)
        if watched is None or not watched.seen or latest_ns - now_ns < WORTH_NS:
            return 0
        if now_ns - watched.lost_ns > _CONFIRMED * max(request.slo_ns, watched.gap_ns):
            return 0
        self._arrived(watched)
        batches = places_before(request) // watched.full
        turns = min(self._asked / watched.asked, len(self._watched))
        each_ns = self._between_ns * turns / watched.dear
        start_ns = max(watched.last_ns + each_ns, now_ns) + batches * each_ns
        wait_ns = round((start_ns - now_ns) * self._early)
        if now_ns + wait_ns <= latest_ns:
            return 0
        watched.pressed = True
        return now_ns + wait_ns


def places_before(request: Request) -> int:
    """How many requests of its model's queue come before `request`, which is not in it."""
    requests = request.queue.requests
    if requests and request < requests[-1]:
        return bisect_left(requests, request)
    return len(requests)


def _full_batch(table: ExecTable, slo_ns: int) -> tuple[int, int]:
    """The largest batch with which a request may be that has to wait for one of itself, and its exec."""
    room_ns = slo_ns - table.single.expected_ns
    full, full_ns = 1, table.single.expected_ns
    for batch, estimator in table.classes:
        if estimator.expected_ns > room_ns:
            break
        full, full_ns = batch, estimator.expected_ns
    return full, full_ns


def why_refused_early(request: Request, start_ns: int, exec_ns: int, now_ns: int) -> str:
    """The reason: `request` must expect to start at `start_ns`, which is too late."""
    before = places_before(request)
    first = f", behind {before} requests of its model" if before else ""
    return (
        f"refused on arrival: as the batches of its model came lately, it must expect to wait for "
        f"{format_duration(start_ns - now_ns)}{first}, and takes {format_duration(exec_ns)}; "
        f"the deadline is in {format_duration(request.slo_ns)}"
    )
