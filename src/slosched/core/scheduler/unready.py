"""Calls of functions that a worker is still making ready: they wait for that, within their deadlines.

A worker that has just joined prepares what it offers: it imports a module and runs an `init`, for seconds at
times. A call that comes meanwhile is set aside (ASIDE, in no queue of the policy) and enters its queue when the
function is ready. Where the function cannot become ready, since no worker offers it or its load has failed, the
call is refused at once.

A child names its function by a text, and may come before an instance of it exists. Until then it belongs to
a stand-in, which is in no table and has its name alone.
"""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush

from slosched.codes import Code
from slosched.config import canonical_model
from slosched.core.scheduler.catalog import Catalog
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.policies.base import Policy
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import Instance, Request, RequestState
from slosched.core.scheduler.validation import call_error
from slosched.errors import known_names, shown_name
from slosched.message_types import FunctionInfo

_NO_MODEL_ID = -1


class Unready:
    """The calls that are set aside. `end` ends one, wherever it is: (request, code, words)."""

    def __init__(
        self,
        cluster: Cluster,
        catalog: Catalog,
        policy: Policy,
        end: Callable[[Request, int, str], None],
    ) -> None:
        self._cluster, self._catalog, self._policy = cluster, catalog, policy
        self._end = end
        self._waiting: dict[str, list[Request]] = {}  # by function
        self._expiry: list[tuple[int, int, Request]] = []  # a heap; some have ended

    def __bool__(self) -> bool:
        return bool(self._waiting)

    # ------------------------------------------------------------------------------- arrival

    def is_coming(self, name: str, model: Instance | None) -> bool:
        """Whether the function `name` runs nowhere yet, and is being made ready. `model` is its instance."""
        if model is not None:
            if model.resident_on or model.loading_on or not self._cluster.serves_functions:
                return False
            if any(model.model_id in worker.instances for worker in self._cluster.serving()):
                return False
        name = canonical_model(name)
        offered = any(name in worker.functions for worker in self._cluster.serving())
        return offered and self._catalog.is_loading(name)

    def why_none(self, name: str) -> tuple[Code, str]:
        """Why no call of `name`, which is not coming, is possible: a code and words."""
        shown, name = shown_name(name), canonical_model(name)
        offered = dict.fromkeys(n for w in self._cluster.serving() for n in w.functions)
        if name not in offered:
            known = known_names(name, sorted(offered))
            return Code.UNKNOWN_MODEL, f"no worker offers a function {shown}; they offer: {known}"
        failure = self._catalog.failure_of(name)
        if failure is not None:
            return Code.UNKNOWN_MODEL, f"the function {shown} cannot be loaded: {failure[1]}"
        return Code.UNKNOWN_MODEL, f"the function {shown} is not loaded; a client may load it"

    def stand_in(self, name: str) -> Instance:
        """What a child belongs to while no instance of its function is known."""
        return Instance(_NO_MODEL_ID, canonical_model(name), 0, function=FunctionInfo())

    def hold(self, request: Request) -> None:
        """Set `request` aside, which has just arrived, until its function is ready."""
        request.move(RequestState.ASIDE)
        self._waiting.setdefault(request.instance.name, []).append(request)
        heappush(self._expiry, (request.deadline_ns, request.key, request))

    # ------------------------------------------------------------------------------ progress

    def plan(self, *, now_ns: int) -> None:
        """Let calls go on whose function is ready, or cannot become so; end those that have no time left."""
        if not self._waiting:
            return
        while self._expiry and self._expiry[0][0] <= now_ns:
            _, _, request = heappop(self._expiry)
            if request.state is RequestState.ASIDE:
                name = shown_name(request.instance.name)
                self._end(request, Code.TIMED_OUT, f"the function {name} was not ready in time")
        for name in list(self._waiting):
            model = self._catalog.function(name)
            if not self.is_coming(name, model):
                requests = self._waiting.pop(name)
                self._cluster.slices.begin(self._go_on(name, requests, now_ns))
        if not self._waiting:
            self._expiry.clear()

    def next_wakeup_ns(self) -> int | None:
        """When `plan` has something to do although nothing happens."""
        return self._expiry[0][0] if self._waiting and self._expiry else None

    def _go_on(self, name: str, requests: list[Request], now_ns: int) -> Work:
        for request in requests:
            if request.state is RequestState.ASIDE:
                self._enqueue(name, request, now_ns)
                yield ANSWER

    def _enqueue(self, name: str, request: Request, now_ns: int) -> None:
        model = self._catalog.function(name)
        if model is None or model.function is None:
            self._end(request, *self.why_none(name))
            return
        size = 0 if request.input is None else request.input.size
        error = call_error(name, model.function, request.length, size)
        if error:
            self._end(request, Code.INVALID_REQUEST, error)
            return
        request.instance, request.queue = model, model.queue_for(request.length)
        request.move(RequestState.QUEUED)
        self._policy.enqueue(request, now_ns=now_ns)
