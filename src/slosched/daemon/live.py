"""The live page at / and its data at /live.json (docs/live.md): the controller's state, human-readable.

The page is three files beside this one, without a build step; it asks for the data once a second. Nothing is
done between two questions. An answer is made in slices of at most some 0.5 ms, after each of which the
controller has its loop back, and has an upper size whatever the number of models, GPUs and clients: the
first ones of an order that is named here, and how many there are in all. Times are us since the epoch, which
JavaScript's numbers hold exactly.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import msgspec

from slosched.codes import ActionType, Code, code_name
from slosched.core.scheduler.interface import ActionRecord, RequestRecord
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu, Instance, ModelState, Worker, WorkerState
from slosched.daemon.cascade_status import cascade_reports
from slosched.daemon.function_status import function_reports, function_row, slots_of
from slosched.daemon.http import Answer, Handler, Request
from slosched.telemetry.call_tally import CallTally, FunctionTally
from slosched.telemetry.cascade_tally import CascadeTally
from slosched.telemetry.recent import KEPT_ACTIONS, LATE, OTHER, LastMinutes
from slosched.units import NS_PER_US
from slosched.version import __version__

#: Most of each kind in one answer.
MOST_GPUS = 256
MOST_LANES = 8
MOST_ACTIONS = 4_000
MOST_MODELS = 100
MOST_CLIENTS = 50
MOST_WORKERS = 100
MOST_CASCADES = 20
MOST_FUNCTIONS = 50
_LONGEST_TEXT = 300
#: Seconds over which the share of busy time of a GPU is averaged.
_MEAN_SECONDS = 10

# Items of a slice: each is some 0.2 to 0.4 ms of work.
_ACTIONS_A_SLICE = 128
_GPUS_A_SLICE = 8
_MODELS_A_SLICE = 250
_FUNCTIONS_A_SLICE = 25

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/style.css": ("style.css", "text/css; charset=utf-8"),
    "/live.js": ("live.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}
_HEADERS = (
    (
        "content-security-policy",
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'",
    ),
    ("x-content-type-options", "nosniff"),
    ("referrer-policy", "no-referrer"),
    ("cross-origin-resource-policy", "same-origin"),
    ("cache-control", "no-store"),
)

_WORDS = {
    LATE: "answered late",
    OTHER: "other codes",
    int(Code.CANCELLED): "cancelled or worker lost",
    int(Code.TIMED_OUT): "timed out in the queue",
    int(Code.SKIPPED): "given up for a better batch",
    int(Code.COULD_NOT_START_IN_TIME): "no plan in time",
}

Clock = Callable[[], int]
#: Part of an answer: a key of its object, and the value or, for a list, more of it. _PAUSE is none.
_Part = tuple[str, Any]
_PAUSE: _Part = ("", None)


def live_routes(
    scheduler: Scheduler,
    recent: LastMinutes,
    *,
    clock: Clock,
    cascades: CascadeTally | None = None,
    calls: CallTally | None = None,
) -> dict[str, Handler]:
    """The page's files and /live.json. `clock` gives ns since the epoch."""
    live = LiveState(scheduler, recent, life=str(clock()), cascades=cascades, calls=calls)

    async def state(request: Request) -> Answer:
        parts = live.parts(request.query, clock())
        return Answer(200, "application/json", await _joined(parts), _HEADERS)

    return {path: _file(*source) for path, source in _FILES.items()} | {"/live.json": state}


def _file(name: str, content_type: str) -> Handler:
    content = (resources.files("slosched.daemon") / "web" / name).read_bytes()
    return lambda _: Answer(200, content_type, content, _HEADERS)


async def _joined(parts: Iterable[_Part]) -> bytes:
    """One JSON object of all parts. The loop has a turn after each."""
    values: dict[str, msgspec.Raw] = {}
    lists: dict[str, list[bytes]] = {}
    for key, value in parts:
        if isinstance(value, list):
            pieces = lists.setdefault(key, [])
            if value:
                pieces.append(msgspec.json.encode(value)[1:-1])
        elif key:
            values[key] = msgspec.Raw(msgspec.json.encode(value))
        await asyncio.sleep(0)
    for key, pieces in lists.items():
        values[key] = msgspec.Raw(b"[%s]" % b",".join(pieces))
    return msgspec.json.encode(values)


class LiveState:
    """Says what `scheduler`, `recent`, `cascades` and `calls` know, part by part.

    `life` tells one controller from the next.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        recent: LastMinutes,
        *,
        life: str,
        cascades: CascadeTally | None = None,
        calls: CallTally | None = None,
    ) -> None:
        self._scheduler, self._recent, self._life = scheduler, recent, life
        self._counted = cascades or CascadeTally()
        self._calls = calls or CallTally()

    def parts(self, query: Mapping[str, str], now_ns: int) -> Iterator[_Part]:
        """Everything that one answer says. The query may have these, and anything else is ignored:

        - gpus, models: only GPUs or models whose name has this text in it, in any case
        - since: the `next` of an answer; only actions that ended after it are told
        """
        yield "life", self._life
        yield "now_us", now_ns // NS_PER_US
        yield from self._summary()
        if self._scheduler.cluster.cascades.by_name:
            reports = cascade_reports(self._scheduler, self._counted.report())
            yield "cascades", reports[:MOST_CASCADES]
        yield "series", self._series(now_ns)
        missed = list(self._recent.missed)[::-1]
        yield "missed", [self._miss(record) for record in missed[:50]]
        yield "missed", [self._miss(record) for record in missed[50:]]
        yield from self._gpus(query.get("gpus", "").lower(), query.get("since", ""), now_ns)
        yield from self._models(query.get("models", "").lower())
        yield from self._functions(query.get("models", "").lower())
        yield from self._clients()

    def _summary(self) -> Iterator[_Part]:
        scheduler = self._scheduler
        config = scheduler.cluster.config
        yield (
            "controller",
            {
                "version": __version__,
                "policy": config.policy,
                "fidelity": config.fidelity,
                "ready": scheduler.ready(),
                "draining": scheduler.draining,
            },
        )
        yield (
            "requests",
            {
                "arrived": scheduler.arrived,
                "answered": scheduler.answered,
                "by_code": [[code_name(c), n] for c, n in sorted(scheduler.by_code.items())],
            },
        )
        workers = sorted(
            scheduler.cluster.workers.values(),
            key=lambda w: (w.state is WorkerState.JOINED, w.worker_id),
        )
        joined = sum(w.state is WorkerState.JOINED for w in workers)
        yield "workers_in_all", {"workers": len(workers), "joined": joined}
        yield "workers", [_worker(w) for w in workers[:MOST_WORKERS]]

    def _series(self, now_ns: int) -> dict[str, Any]:
        series = self._recent.series(now_ns)
        return {
            "second": series.second,
            "offered": series.offered,
            "satisfied": series.satisfied,
            "misses": [
                {"code": code, "text": _code_text(code), "counts": counts}
                for code, counts in series.misses.items()
            ],
            "p50_us": series.p50_us,
            "p99_us": series.p99_us,
        }

    def _miss(self, record: RequestRecord) -> dict[str, Any]:
        latency_ns = record.departure_ns - record.arrival_ns
        return {
            "at_us": record.departure_ns // NS_PER_US,
            "request": record.request_id,
            "model": self._instance(record.model_id),
            "slo_us": record.slo_ns // NS_PER_US,
            "left_us": (record.slo_ns - latency_ns) // NS_PER_US,
            "what": _code_text(record.code),
            "reason": record.reason[:_LONGEST_TEXT],
        }

    def _instance(self, model_id: int) -> str:
        model = self._scheduler.cluster.models.get(model_id)
        return f"{model.name} #{model.copy}" if model is not None else f"model {model_id}"

    # ---------------------------------------------------------------------------------- GPUs

    def _gpus(self, wanted: str, since: str, now_ns: int) -> Iterator[_Part]:
        every = sorted(
            self._scheduler.cluster.gpus.values(), key=lambda g: (g.worker.worker_id, g.gpu_id)
        )
        gpus = [gpu for gpu in every if wanted in gpu.name.lower()]
        means = []
        for at in range(0, len(every), _GPUS_A_SLICE):
            some = every[at : at + _GPUS_A_SLICE]
            means += [self._means(gpu, now_ns)[0] for gpu in some if not gpu.host]
            yield _PAUSE
        yield (
            "gpus_in_all",
            {
                "gpus": len(every),
                "hosts": sum(gpu.host for gpu in every),
                "matching": len(gpus),
                "exec_mean": sum(means) / max(1, len(means)),
            },
        )
        yield "gpus", []
        gpus = gpus[:MOST_GPUS]
        for at in range(0, len(gpus), _GPUS_A_SLICE):
            yield "gpus", [self._gpu(gpu, now_ns) for gpu in gpus[at : at + _GPUS_A_SLICE]]
        narrow = [gpu for gpu in gpus if gpu.exec.width == 1][:MOST_LANES]
        lanes = {(g.worker.worker_id, g.gpu_id): i for i, g in enumerate(narrow)}
        yield "lanes", [gpu.name for gpu in narrow]
        yield from self._actions(lanes, since)

    def _gpu(self, gpu: Gpu, now_ns: int) -> dict[str, Any]:
        exec_mean, load_mean = self._means(gpu, now_ns)
        return {
            "name": gpu.name,
            "exec": self._recent.exec_percent(
                gpu.worker.worker_id, gpu.gpu_id, now_ns, width=gpu.exec.width
            ),
            "exec_mean": exec_mean,
            "load_mean": load_mean,
            "resident": len(gpu.resident),
            "pages": gpu.pages,
            "free_pages": gpu.free_pages,
            "outstanding": len(gpu.exec.outstanding),
            **slots_of(gpu),
        }

    def _means(self, gpu: Gpu, now_ns: int) -> tuple[float, float]:
        worker_id = gpu.worker.worker_id
        return self._recent.busy_mean(
            worker_id, gpu.gpu_id, now_ns, seconds=_MEAN_SECONDS, width=gpu.exec.width
        )

    def _actions(self, lanes: Mapping[tuple[int, int], int], since: str) -> Iterator[_Part]:
        """The newest actions of these lanes, the newest slice first, and their instances' names."""
        last = self._recent.next_action
        first = max(self._number(since), last - KEPT_ACTIONS)
        left, models = MOST_ACTIONS, dict[int, str]()
        yield "next", f"{self._life}-{last}"
        yield "actions", []
        while last > first and left > 0:
            begin = max(first, last - _ACTIONS_A_SLICE)
            rows = []
            for record in self._recent.actions(begin, last):
                lane = lanes.get((record.worker_id, record.gpu_id))
                if lane is not None:
                    rows.append(_action(lane, record))
                    if record.model_id not in models:
                        models[record.model_id] = self._instance(record.model_id)
            rows = rows[-left:]
            left, last = left - len(rows), begin
            yield "actions", rows
        yield "instances", {str(model_id): name for model_id, name in models.items()}

    def _number(self, since: str) -> int:
        """The first action to tell; 0 where `since` is of another controller, or nonsense."""
        life, _, number = since.partition("-")
        return int(number) if life == self._life and number.isdecimal() else 0

    # ------------------------------------------------------------------------ models, clients

    def _models(self, wanted: str) -> Iterator[_Part]:
        """By name: all instances of it together. Those with the longest queues first."""
        names: dict[str, _Name] = {}
        models = list(self._scheduler.cluster.models.values())
        instances = 0
        for at in range(0, len(models), _MODELS_A_SLICE):
            for model in models[at : at + _MODELS_A_SLICE]:
                if model.state is not ModelState.FAILED and model.function is None:
                    instances += 1
                    name = names.get(model.name)
                    if name is None:
                        name = names[model.name] = _Name(model.name)
                    name.add(model)
            yield _PAUSE
        matching = [name for name in names.values() if wanted in name.name.lower()]
        yield (
            "models_in_all",
            {"names": len(names), "instances": instances, "matching": len(matching)},
        )
        best: list[_Name] = []
        for at in range(0, len(matching), _MODELS_A_SLICE):
            best = heapq.nsmallest(
                MOST_MODELS, best + matching[at : at + _MODELS_A_SLICE], key=_Name.rank
            )
            yield _PAUSE
        yield "models", [name.row() for name in best]

    def _functions(self, wanted: str) -> Iterator[_Part]:
        """Those with the most calls first; without functions there are no parts."""
        functions = [m for m in list(self._scheduler.cluster.models.values()) if m.function]
        if not functions:
            return
        yield "functions_in_all", len(functions)
        yield _PAUSE
        matching = [each for each in functions if wanted in each.name.lower()]
        counted = self._calls.functions
        first = heapq.nsmallest(
            MOST_FUNCTIONS,
            matching,
            key=lambda each: (-each.queued, -_calls(counted, each.name), each.name),
        )
        yield _PAUSE
        for at in range(0, len(first), _FUNCTIONS_A_SLICE):
            some = first[at : at + _FUNCTIONS_A_SLICE]
            tallies = {m.name: counted[m.name].as_dict() for m in some if m.name in counted}
            yield "functions", [function_row(each) for each in function_reports(some, tallies)]

    def _clients(self) -> Iterator[_Part]:
        """Those with the most unanswered requests first."""
        clients = self._scheduler.clients.values()
        yield "clients_in_all", len(clients)
        first = heapq.nsmallest(MOST_CLIENTS, clients, key=lambda c: (-len(c.requests), c.name))
        yield (
            "clients",
            [
                {
                    "name": c.name[:_LONGEST_TEXT],
                    "unanswered": len(c.requests),
                    "models": len(c.models),
                    "weight": c.weight,
                }
                for c in first
            ],
        )


@dataclass(slots=True)
class _Name:
    """All instances of one model name."""

    name: str
    instances: int = 0
    loading: int = 0
    queued: int = 0
    resident: int = 0
    b1_ns: int = 0

    def add(self, model: Instance) -> None:
        self.instances += 1
        self.loading += model.state is ModelState.LOADING
        self.queued += model.queued
        self.resident += len(model.resident_on)
        self.b1_ns = max(self.b1_ns, model.b1_ns)

    def rank(self) -> tuple[int, int, str]:
        return -self.queued, -self.resident, self.name

    def row(self) -> dict[str, Any]:
        return {
            "name": self.name[:_LONGEST_TEXT],
            "instances": self.instances,
            "loading": self.loading,
            "queued": self.queued,
            "resident": self.resident,
            "b1_us": self.b1_ns / NS_PER_US,
        }


def _calls(counted: Mapping[str, FunctionTally], name: str) -> int:
    tally = counted.get(name)
    return 0 if tally is None else tally.calls


def _code_text(code: int) -> str:
    return _WORDS.get(code) or code_name(code)


def _worker(worker: Worker) -> dict[str, Any]:
    return {
        "worker": worker.worker_id,
        "address": worker.address,
        "state": worker.standing,
        "device": worker.device,
        "gpus": len(worker.gpus),
        "clock_error_us": worker.beat.clock_error_ns / NS_PER_US,
        "there_us": worker.transit.expected_ns / NS_PER_US,
        "back_us": worker.returns.expected_ns / NS_PER_US,
        "times_lost": worker.times_lost,
        "errors": worker.beat.errors,
        "activity": worker.beat.activity[:_LONGEST_TEXT],
    }


def _action(lane: int, r: ActionRecord) -> list[int]:
    """lane, action, is it a load, code, instance, requests, then us: expected begin, end, begin, end."""
    return [
        lane,
        r.action_id,
        int(r.action_type == ActionType.LOAD_WEIGHTS),
        r.code,
        r.model_id,
        r.batch_size,
        r.expected_start_ns // NS_PER_US,
        r.expected_complete_ns // NS_PER_US,
        r.exec.begin_ns // NS_PER_US,
        r.exec.end_ns // NS_PER_US,
    ]
