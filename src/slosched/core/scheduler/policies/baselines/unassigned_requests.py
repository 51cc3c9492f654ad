"""Requests of models that no GPU holds, for policies that bind each request to a GPU."""

from __future__ import annotations

from slosched.core.scheduler.slices import Slices
from slosched.core.scheduler.state import Model, Request

#: Units (slices.py) of binding a request to a GPU, or of the opposite.
A_BINDING = 4


class UnassignedRequests:
    """Queued requests by model, in the order in which they came."""

    __slots__ = ("_by_model",)

    def __init__(self) -> None:
        self._by_model: dict[int, dict[int, Request]] = {}  # model id -> request key -> request

    def __bool__(self) -> bool:
        return bool(self._by_model)

    def add(self, request: Request) -> None:
        self._by_model.setdefault(request.model.model_id, {})[request.key] = request

    def discard(self, request: Request) -> None:
        """Take `request` out if it is here."""
        requests = self._by_model.get(request.model.model_id)
        if requests is not None and requests.pop(request.key, None) is not None and not requests:
            del self._by_model[request.model.model_id]

    def models(self) -> list[Model]:
        """Whose requests these are."""
        return [head.model for head in self.oldest()]

    def head(self, model: Model) -> Request | None:
        """The first request of `model`."""
        return next(iter(self._by_model.get(model.model_id, {}).values()), None)

    def oldest(self) -> list[Request]:
        """The first request of each model."""
        return [next(iter(requests.values())) for requests in self._by_model.values()]

    def take_ready(self, slices: Slices) -> list[Request]:
        """Take out those whose model some GPU holds by now: as many as this step may bind."""
        ready: list[Request] = []
        for model in [head.model for head in self.oldest() if head.model.resident_on]:
            requests = self._by_model[model.model_id]
            while requests and slices.spend(A_BINDING):
                ready.append(requests.pop(next(iter(requests))))
            if not requests:
                del self._by_model[model.model_id]
        return ready
