"""A caller's session with the controller: an AsyncClient, and the inferences that wait for its answers.

    connecting --Welcome--> connected        a hello every 0.5 s, for as long as it takes
    connecting --another protocol--> refused

What `submit` gets within one turn of the loop leaves as one message. A request has its end within its SLO and
five seconds whatever the controller does: a look every half second ends what is over.
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Protocol

from slosched.clients.aio import AsyncClient
from slosched.clients.inference import Model
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.errors import (
    ConnectionLost,
    InvalidRequest,
    PeerUnreachable,
    ProtocolMismatch,
    RequestFailed,
    SloschedError,
)
from slosched.fronts.errors import FrontError, Status
from slosched.messages import InferReply
from slosched.transport.codec import Frame
from slosched.units import NS_PER_S, format_duration

#: A request has its end this long after its SLO.
GRACE_NS = 5 * NS_PER_S
#: How long a load may take.
LOAD_WITHIN_S = 60.0
_LOOK_EVERY_S = 0.5
_HELLO_WITHIN_S = 5.0
#: What an SLO counts as where the controller does not tell its default.
_UNKNOWN_SLO_NS = 60 * NS_PER_S


class Row(Protocol):
    """What waits for the answer to one request."""

    ends_ns: int

    def replied(self, reply: InferReply, frame: Frame | None) -> None: ...
    def lost(self, request_id: int, error: FrontError) -> None:
        """No answer will come."""


class Session:
    """One client of the controller at `address`, in the running loop. `refused` says why it is not welcome."""

    def __init__(self, address: str, *, name: str, weight: float = 1.0) -> None:
        self.address, self.name = address, name
        self.client = AsyncClient(address, name=name, weight=weight, on_restart=self._restarted)
        self.client.on_lost = self._lost
        self.handles: dict[str, Model] = {}
        self.connected = asyncio.Event()
        self.refused = ""
        self._loop = asyncio.get_running_loop()
        self._running: dict[int, Row] = {}
        self._loads: dict[str, asyncio.Task[Model]] = {}
        self._cancelled: list[int] = []
        self._soon = False
        self._closed = False
        self._connecting = self._loop.create_task(self._connect(), name=f"session {name}")
        self._look = self._loop.call_later(_LOOK_EVERY_S, self._look_after)

    async def _connect(self) -> None:
        while not self.connected.is_set():
            try:
                await self.client.open(timeout_s=_HELLO_WITHIN_S)
                self.connected.set()
            except ProtocolMismatch as error:
                self.refused = str(error)
                return
            except PeerUnreachable:
                pass  # it says hello again

    def _restarted(self, text: str) -> None:
        """The client loads its models again by itself."""

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._look.cancel()
        tasks = [self._connecting, *self._loads.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.client.close()

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def unreachable(self) -> str:
        """Why the controller does not answer now; empty if it does."""
        if self.refused:
            return self.refused
        if not self.connected.is_set():
            return f"no controller has answered at {self.address} yet"
        return self.client.lost

    # ----------------------------------------------------------------------------- requests

    def submit(self, model: Model, *, slo_ns: int, frame: Frame, length: int, row: Row) -> int:
        """Send a request at the end of this turn of the loop; `row` hears its end. Raises FrontError, 503."""
        if lost := self.client.lost:
            raise FrontError(Status.UNAVAILABLE, lost)
        try:
            request_id = self.client.submit(
                model, slo_ns=slo_ns, frame=frame, length=length, on_reply=row.replied, later=True
            )
        except ConnectionLost as error:
            raise FrontError(Status.UNAVAILABLE, str(error)) from None
        self._running[request_id] = row
        self._flush_soon()
        return request_id

    def replied(self, request_id: int) -> None:
        """The request has its answer."""
        self._running.pop(request_id, None)

    def cancel(self, request_id: int) -> None:
        """Nothing is heard of the request any more. Safe within the callbacks of others."""
        if self._running.pop(request_id, None) is not None:
            self._cancelled.append(request_id)
            self._flush_soon()

    def _flush_soon(self) -> None:
        if not self._soon:
            self._soon = True
            self._loop.call_soon(self._flush)

    def _flush(self) -> None:
        self._soon = False
        if self._closed:
            return
        cancelled, self._cancelled = self._cancelled, []
        self.client.cancel(*cancelled)
        for request_id in self.client.flush():
            text = f"the controller at {self.address} takes no messages now"
            self._lost(request_id, text)

    def _lost(self, request_id: int, reason: str) -> None:
        row = self._running.pop(request_id, None)
        if row is not None:
            row.lost(request_id, FrontError(Status.UNAVAILABLE, reason))

    def _look_after(self) -> None:
        """End what has waited for too long, and everything while the controller is silent."""
        if self._closed:
            return
        self._look = self._loop.call_later(_LOOK_EVERY_S, self._look_after)
        now, silent = now_ns(), self.client.lost
        for request_id, row in [*self._running.items()]:
            if not silent and now < row.ends_ns:
                continue
            reason = silent or (
                f"the controller at {self.address} did not answer within the SLO and "
                f"{format_duration(GRACE_NS)}"
            )
            self.cancel(request_id)
            row.lost(request_id, FrontError(Status.UNAVAILABLE, reason))

    def limit_ns(self, slo_ns: int) -> int:
        """How long a request with this SLO (0: the default) is waited for."""
        return (slo_ns or self.default_slo_ns or _UNKNOWN_SLO_NS) + GRACE_NS

    @property
    def default_slo_ns(self) -> int:
        """The controller's; 0 if it does not tell it."""
        return self.client.controller.default_slo_ns if self.connected.is_set() else 0

    # -------------------------------------------------------------------------------- models

    async def load(self, name: str) -> Model:
        """The model that the controller knows as `name`, loaded for this session. Raises FrontError."""
        task = self._loads.get(name)
        if task is None:
            task = self._loads[name] = self._loop.create_task(self._load(name))
            task.add_done_callback(lambda ended: self._loaded(name, ended))
        # A client that leaves does not end the load: others may wait for it, and the next will.
        return await asyncio.shield(task)

    def _loaded(self, name: str, ended: asyncio.Task[Model]) -> None:
        self._loads.pop(name, None)
        if not ended.cancelled():
            ended.exception()  # it was heard by those who waited, if anyone still did

    async def _load(self, name: str) -> Model:
        await self._until_connected()
        try:
            [model] = await self.client.load(name, timeout_s=LOAD_WITHIN_S)
        except SloschedError as error:
            raise _load_error(name, error) from None
        self.handles[name] = model
        return model

    async def _until_connected(self) -> None:
        """Wait for the first Welcome, within the time of one hello. Raises FrontError, 503."""
        if not self.connected.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_HELLO_WITHIN_S):
                    await self.connected.wait()
        if reason := self.unreachable:
            raise FrontError(Status.UNAVAILABLE, reason)

    async def unload(self, name: str) -> None:
        """Give the model up. Others may use it still. Raises FrontError unless it is given up, or unknown."""
        if self.handles.pop(name, None) is None:
            return
        try:
            await self.client.unload(name, timeout_s=LOAD_WITHIN_S)
        except InvalidRequest:
            pass  # it is gone already
        except SloschedError as error:
            raise _load_error(name, error) from None


def _load_error(name: str, error: SloschedError) -> FrontError:
    """A load or unload that failed, as the protocol has it."""
    if isinstance(error, PeerUnreachable | ConnectionLost):
        return FrontError(Status.UNAVAILABLE, str(error))
    if isinstance(error, RequestFailed):
        if error.code == Code.UNKNOWN_MODEL:  # its words list others' names
            return FrontError(Status.NOT_FOUND, f"no worker offers model '{name}' now")
        if error.code == Code.LIMIT_REACHED:
            return FrontError(Status.RESOURCE_EXHAUSTED, str(error))
        if error.code in (Code.INITIALIZING, Code.SHUTTING_DOWN):
            return FrontError(Status.UNAVAILABLE, str(error))
    return FrontError(Status.INTERNAL, str(error))
