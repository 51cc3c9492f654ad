"""How a request arrives: checked against its model and the limits, given its deadline, handed to the policy.

What cannot be taken is answered here and never becomes a request: it has no key and no telemetry.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.scheduler.answers import Answers
from slosched.core.scheduler.cascades import Cascade
from slosched.core.scheduler.catalog import Catalog
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.foreign_text import printable
from slosched.core.scheduler.interface import FromClient, Keep, ToClient
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.nested_calls import Nested
from slosched.core.scheduler.policies.base import Policy
from slosched.core.scheduler.state import (
    ActionState,
    Client,
    Instance,
    Queue,
    Request,
)
from slosched.core.scheduler.unready import Unready
from slosched.core.scheduler.validation import call_error, request_error
from slosched.core.scheduler.weights import Weights
from slosched.core.values import Value
from slosched.messages import ChildRequest, InferReply, InferRequest

#: A child's deadline is before its parent's by this: of calls with one deadline the deeper ones go first.
_SOONER_NS = 1000
#: Ids of children among the requests of their client: no client can name them, as a Number.
_CHILDREN_BELOW = -(2**62) - 1


class Arrivals:
    """Takes InferRequests. `answer` answers a request at once, with a code and a sentence."""

    def __init__(
        self,
        cluster: Cluster,
        catalog: Catalog,
        policy: Policy,
        weights: Weights,
        limits: Limits,
        answers: Answers,
        unready: Unready,
        answer: Callable[[Request, int, str], None],
    ) -> None:
        self._cluster, self._catalog, self._policy = cluster, catalog, policy
        self._weights, self._limits = weights, limits
        self._answers, self._answer = answers, answer
        self._unready = unready
        self._by_length = policy.about.length_classes
        self.count = 0  # requests that were taken; the next one's key
        self.invalid = 0  # those that could not be taken
        self.draining = False  # what still comes is answered with code 3
        self.children: dict[int, Request] = {}  # of calls, by key: those that are not answered
        self.ended = False  # also calls that are in flight get no more children

    def infer(self, client: Client, event: FromClient, message: InferRequest, now_ns: int) -> None:
        """Take the request that `event` brought, or answer it."""
        if message.request_id in client.requests:
            return  # it came twice, and is answered once
        bytes_behind = 0 if event.input is None else event.input.size
        model, cascade = self._meant(message)
        error = request_error(message, model, bytes_behind)
        code = Code.INVALID_REQUEST
        if self._cluster.put_aside and model is not None and not error:
            error = self._cluster.put_aside.get(model.name, "")  # it would only time out
            code = Code.PROCESS_ENDED
        if error:
            self._not_taken(client, message, code, error)
            return
        assert model is not None
        slo_ns = self._slo_ns(message, model, cascade)
        waiting = self.count - self._answers.count
        error = self._limits.exceeded(client, slo_ns, bytes_behind, waiting=waiting)
        if error:
            self._not_taken(client, message, Code.LIMIT_REACHED, error)
            return
        early_ns = 0
        if client.latency is not None:
            if message.round_trip_ns > 0:
                client.latency.learn(message.round_trip_ns)
            early_ns = client.latency.early_ns(slo_ns)
        key = self.count
        self.count += 1
        request = Request(
            key=key,
            client=client,
            request_id=message.request_id,
            user_id=message.user_id,
            queue=self._queue(message, model, cascade),
            slo_factor=message.slo_factor,
            slo_ns=slo_ns,
            arrival_ns=now_ns - event.waited_ns,
            input=event.input,
            weight=self._weights.of_request(client, slo_ns),
            length=message.length,
            early_ns=early_ns,
        )
        if model.function is not None:
            request.call = Nested(message.request_id, near=printable(message.near))
        client.requests[message.request_id] = request
        if model.model_id not in client.models:
            # The client was forgotten once, or has the id from another client.
            self._catalog.used_by(client, model)
        if cascade is not None and cascade.heavy is not None:
            heavy = cascade.heavy.instance
            if heavy.model_id not in client.models:
                self._catalog.used_by(client, heavy)
        if event.input is not None:
            self._limits.took(client, event.input.size)
            self._cluster.emit(Keep(event.input.value_id, key))
        if self.draining:
            self._answer(request, Code.SHUTTING_DOWN, "the controller is shutting down")
        elif request.call is not None and self._unready.is_coming(model.name, model):
            self._unready.hold(request)
        else:
            self._policy.enqueue(request, now_ns=now_ns)

    def child(
        self,
        parent: Request,
        call: Nested[Request, ActionState],
        message: ChildRequest,
        value: Value | None,
        *,
        now_ns: int,
    ) -> tuple[Code, str]:
        """Take a child of the call `parent`: a request of the same client, with what is left of its time.

        Returns a code and words if it cannot be taken; no words: it was.
        """
        client, size = parent.client, 0 if value is None else value.size
        if self.ended:
            return Code.SHUTTING_DOWN, "the controller is shutting down"
        model = self._catalog.function(message.function)
        coming = self._unready.is_coming(message.function, model)
        if model is None:
            if not coming:
                return self._unready.why_none(message.function)
            model = self._unready.stand_in(message.function)
        elif model.function is not None:
            error = call_error(model.name, model.function, message.size_class, size)
            if error:
                return Code.INVALID_REQUEST, error
        left_ns = max(0, parent.deadline_ns - _SOONER_NS - now_ns)
        slo_ns = min(message.slo_ns, left_ns) if message.slo_ns > 0 else left_ns
        waiting = self.count - self._answers.count
        error = self._limits.exceeded(client, slo_ns, size, waiting=waiting)
        if error:
            return Code.LIMIT_REACHED, error
        key = self.count
        self.count += 1
        request = Request(
            key=key,
            client=client,
            request_id=_CHILDREN_BELOW - key,
            user_id=parent.user_id,
            queue=model.queue_for(message.size_class),
            slo_factor=0.0,
            slo_ns=slo_ns,
            arrival_ns=now_ns,
            input=value,
            weight=parent.weight,
            parent=parent,
            length=message.size_class,
        )
        request.call = call
        client.requests[request.request_id] = request
        assert parent.call is not None
        parent.call.children[call.child] = request
        if value is not None:
            self._limits.took(client, value.size)
            self._cluster.emit(Keep(value.value_id, key))
        self.children[key] = request
        if coming:
            self._unready.hold(request)
        else:
            self._policy.enqueue(request, now_ns=now_ns)
        return Code.OK, ""

    def _queue(self, message: InferRequest, model: Instance, cascade: Cascade | None) -> Queue:
        if cascade is not None:
            assert cascade.light is not None
            return cascade.light
        return model.queue_for(message.length) if self._by_length else model.queue

    def slo_ns(self, message: InferRequest) -> int:
        """The SLO that `message` has, once it is taken; the default for one that cannot be."""
        model, cascade = self._meant(message)
        if model is None:
            return message.slo_ns or self._cluster.config.default_slo_ns
        return self._slo_ns(message, model, cascade)

    def _meant(self, message: InferRequest) -> tuple[Instance | None, Cascade | None]:
        """What runs the request, or its first stage, and the cascade that it is for."""
        model = self._cluster.models.get(message.model_id)
        cascade = None
        if model is None and (cascade := self._cluster.cascades.by_id.get(message.model_id)):
            model = cascade.light.instance if cascade.light and cascade.ready else None
        return model, cascade

    def _slo_ns(self, message: InferRequest, model: Instance, cascade: Cascade | None) -> int:
        if message.slo_ns:
            return message.slo_ns
        if message.slo_factor > 0:
            return round(model.b1_ns * message.slo_factor)
        if model.function is not None and model.function.slo_ns:
            return model.function.slo_ns
        return self._cluster.config.default_slo_ns if cascade is None else cascade.spec.slo_ns

    def _not_taken(self, client: Client, message: InferRequest, code: int, reason: str) -> None:
        self.invalid += 1
        reply = InferReply(message.request_id, code, reason, message.model_id, 0, 0, False)
        self._cluster.emit(ToClient(client.identity, reply))
