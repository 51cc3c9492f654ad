"""Requests of models that no GPU holds, for policies that bind each request to a GPU."""

from __future__ import annotations

from slosched.core.scheduler.state import Request


class Unbound:
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

    def by_model(self) -> list[list[Request]]:
        """All of them, those of a model together; no list is empty."""
        return [list(requests.values()) for requests in self._by_model.values()]

    def oldest(self) -> list[Request]:
        """The first request of each model."""
        return [next(iter(requests.values())) for requests in self._by_model.values()]

    def take_ready(self) -> list[Request]:
        """Take out those whose model some GPU holds by now."""
        ready = [head.model for head in self.oldest() if head.model.resident_on]
        return [r for model in ready for r in self._by_model.pop(model.model_id).values()]
