"""INFER5's early refusal as its law reads: all that happened, gone through from the start at each question.

See naive_infer5.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from slosched.core.scheduler.forecast import (
    _CONFIRMED,
    _NEWEST,
    _NEWEST_OF_ALL,
    _REMEMBERED,
    WORTH_NS,
)
from slosched.core.scheduler.state import Gpu, Instance, Request


@dataclass(frozen=True)
class _Batch:
    """What a batch that was sent says of those to come."""

    oldest_ns: int
    slo_ns: int
    full: int
    dear: float


@dataclass
class _Known:
    """What its history says of one model."""

    late_ns: int
    last_ns: int
    turned_away: bool = True
    batches: int = 0
    asked: int = 0
    gap_ns: float = 0.0
    dear: float = 1.0
    full: int = 1

    def sent(self, batch: _Batch, ns: int) -> None:
        self.batches += 1
        share = max(1 / self.batches, _NEWEST)
        wanted_ns = self.last_ns if self.turned_away else max(self.last_ns, batch.oldest_ns)
        self.gap_ns += share * (ns - wanted_ns - self.gap_ns)
        self.dear += share * (batch.dear - self.dear)
        self.full, self.last_ns, self.turned_away = batch.full, ns, False


def _count(known: dict[int, _Known], about: _Known) -> None:
    """One more request of a model; half of what is remembered goes once that is much."""
    about.asked += 1
    if sum(each.asked for each in known.values()) > _REMEMBERED * len(known):
        for each in known.values():
            each.asked -= each.asked // 2


class NaiveForecast:
    """All that happened to all models, gone through from the start at every question."""

    def __init__(self, early: float) -> None:
        self._early = early
        self._history: list[tuple[str, int, int, _Batch | None]] = []  # what, model id, when

    def note(
        self,
        kind: str,
        model: Instance,
        now_ns: int,
        requests: list[Request],
        gpu: Gpu | None = None,
    ) -> None:
        """A batch was sent ("batch"), or a request of `model` was lost late ("late") or early ("early")."""
        batch = None
        if gpu is not None:
            table = gpu.exec_table(model.queue)
            exec_ns = {b: e.expected_ns for b, e in table.estimators.items()}
            room_ns = requests[0].slo_ns - exec_ns[1]
            full = max((b for b, ns in exec_ns.items() if ns <= room_ns), default=1)
            own_ns = exec_ns[table.class_for(len(requests))]
            batch = _Batch(
                oldest_ns=min(r.arrival_ns for r in requests),
                slo_ns=requests[0].slo_ns,
                full=full,
                dear=max(1.0, own_ns * full / (exec_ns[full] * len(requests))),
            )
        if self._early and (self._history or kind == "late"):
            self._history.append((kind, model.model_id, now_ns, batch))

    def start_ns(self, request: Request, latest_ns: int, now_ns: int) -> int | None:
        """When `request` would start, if that is too late; None: it has a chance."""
        known: dict[int, _Known] = {}
        count, between_ns, last_ns = 0, 0.0, 0
        for kind, model_id, ns, batch in self._history:
            if kind == "late" and model_id not in known:
                if not known:
                    count, between_ns, last_ns = 0, 0.0, ns
                known[model_id] = _Known(late_ns=ns, last_ns=ns)
                others = sum(each.asked for each in known.values())
                known[model_id].asked = max(1, others // len(known))
            about = known.get(model_id)
            if about is None:
                continue
            if kind == "asked":
                _count(known, about)
            elif batch is None:
                about.turned_away = True
                about.late_ns = ns if kind == "late" else about.late_ns
            elif ns - about.late_ns > _CONFIRMED * max(batch.slo_ns, about.gap_ns):
                del known[model_id]  # all was well for long: nothing is known until the next loss
            else:
                wanted_ns = last_ns if about.turned_away else max(last_ns, batch.oldest_ns)
                about.sent(batch, ns)
                count += 1
                between_ns += max(1 / count, _NEWEST_OF_ALL) * (ns - wanted_ns - between_ns)
                last_ns = ns
        about = known.get(request.instance.model_id)
        if about is None or not about.batches:
            return None
        if now_ns - about.late_ns > _CONFIRMED * max(request.slo_ns, about.gap_ns):
            return None
        if latest_ns - now_ns < WORTH_NS:
            return None
        self._history.append(("asked", request.instance.model_id, now_ns, None))
        _count(known, about)
        before = sum(other < request for other in request.instance.queue.requests)
        all_asked = sum(each.asked for each in known.values())
        each_ns = between_ns * min(all_asked / about.asked, len(known)) / about.dear
        start_ns = max(about.last_ns + each_ns, now_ns) + before // about.full * each_ns
        expected_ns = now_ns + round((start_ns - now_ns) * self._early)
        return expected_ns if expected_ns > latest_ns else None
