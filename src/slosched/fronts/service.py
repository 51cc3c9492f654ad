"""Serves requests of the protocol, for the shells of HTTP and gRPC.

The shells in `http/` and `rpc/` make an Asked of what they read, and write what they get back; models, batches,
quotas, statistics and the words of errors are here and below. All of it runs in one event loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from slosched.fronts.asked import Answered, Asked
from slosched.fronts.errors import FrontError
from slosched.fronts.regions import Regions

#: Hears the end of an inference, once; not one that was cancelled.
OnEnd = Callable[[Answered | FrontError], None]
Document = dict[str, Any]


class Caller(Protocol):
    """On whose behalf a request comes: a token's name, shared memory, session with the controller, quotas."""

    @property
    def name(self) -> str: ...

    @property
    def regions(self) -> Regions: ...


class Running(Protocol):
    """An inference that has begun."""

    def cancel(self) -> None:
        """Its client does not want it any more. Nothing is heard of it afterwards; safe after its end."""


class Service(Protocol):
    """What both shells call. Documents are the protocol's JSON, which the gRPC messages mirror field by field.

    Methods raise FrontError with the text and status of Triton where Triton has one. A model that a caller may
    not use is for it as one that does not exist.
    """

    def caller(self, authorization: str) -> Caller:
        """Who sends a request with this Authorization header (empty: none). Raises FrontError, 401."""

    def begin(self, asked: Asked, caller: Caller, on_end: OnEnd) -> Running:
        """Begin an inference. What is wrong with it is heard by `on_end`, perhaps before this returns."""

    async def infer(self, asked: Asked, caller: Caller) -> Answered:
        """`begin`, and wait for its end. Cancelling the task cancels the inference."""

    def live(self) -> bool: ...

    def ready(self) -> bool:
        """Whether the controller answers, and can give work to at least one GPU."""

    async def model_ready(self, name: str, version: str, caller: Caller) -> bool: ...

    def server_metadata(self) -> Document: ...

    async def model_metadata(self, name: str, version: str, caller: Caller) -> Document:
        """What it takes and gives, for which it is loaded."""

    async def model_config(self, name: str, version: str, caller: Caller) -> Document:
        """As `model_metadata`."""

    async def statistics(self, name: str, version: str, caller: Caller) -> Document:
        """The counts of one model, or with an empty name those of all that are loaded."""

    async def index(self, caller: Caller, *, ready: bool) -> Sequence[Document]:
        """The models of the repository: name, version, state, reason. With `ready` those that are loaded."""

    def metrics(self, caller: Caller) -> bytes:
        """The gateway's own metrics in Prometheus' text format, for GET /metrics; as `load` for operators."""

    async def load(self, name: str, parameters: Mapping[str, Any], caller: Caller) -> None:
        """403 for a caller that is not an operator's, whatever the name is."""

    async def unload(self, name: str, parameters: Mapping[str, Any], caller: Caller) -> None: ...
