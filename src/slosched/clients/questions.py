"""What a client asks the controller beside inferences: load and unload, the list of models, the status.

Each question has one answer, and each wait for it an end.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, TypeVar

from slosched.clients.arguments import copy_count, flag, model_name, time_limit_s
from slosched.clients.inference import Model, Unloaded
from slosched.clients.session import HELLO_EVERY_S, SEND_AGAIN_S, Session
from slosched.codes import Code
from slosched.config import canonical_model
from slosched.errors import (
    InvalidRequest,
    MalformedMessage,
    PeerUnreachable,
    RequestFailed,
    shown_name,
)
from slosched.messages import (
    DrainWorkerReply,
    DrainWorkerRequest,
    ListModelsReply,
    ListModelsRequest,
    LoadModelReply,
    LoadModelRequest,
    Message,
    ModelInfo,
    StatusReply,
    StatusRequest,
    UnloadModelReply,
    UnloadModelRequest,
)
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.zoo import profile_hint

_Reply = TypeVar("_Reply", bound=Message)


class Questions(Session):
    """A session that asks. The base of AsyncClient, which adds inference."""

    def __init__(self, address: str, *, name: str = "", weight: float = 1.0) -> None:
        super().__init__(address, name=name, weight=weight)
        self._next_id = 1
        #: Incarnations of the controllers through which this client has loaded models.
        self._loaded_through: set[int] = set()
        #: Names that were unloaded, and not loaded again since: a restart must not load these again by itself.
        self._given_up: set[str] = set()

    def _new_id(self) -> int:
        request_id = self._next_id
        self._next_id += 1
        return request_id

    async def _call(
        self, make: Callable[[int], Message], kind: type[_Reply], what: str, timeout_s: float
    ) -> _Reply:
        """Send `make(request_id)` and return the answer. Raises PeerUnreachable after `timeout_s`."""
        self._check_process()
        timeout_s = time_limit_s(timeout_s)
        try:
            async with asyncio.timeout(timeout_s):
                try:
                    reply = await self._ask(make)
                except InvalidRequest:  # forgotten, after a silence; the hello went ahead of this
                    reply = await self._ask(make)
        except TimeoutError:
            raise PeerUnreachable(
                f"the controller at {self.address} did not answer {what} within "
                f"{format_duration(timeout_s * NS_PER_S)}"
            ) from None
        if not isinstance(reply, kind):
            raise MalformedMessage(
                f"the controller at {self.address} answered {what} with a {type(reply).__name__}"
            )
        return reply

    async def _ask(self, make: Callable[[int], Message]) -> Message:
        request_id = self._new_id()
        future: asyncio.Future[Message] = self._loop.create_future()
        self._futures[request_id] = future
        self._until_silence[request_id] = None
        try:
            while not self._send(make(request_id)):
                await asyncio.sleep(SEND_AGAIN_S)
            return await future
        finally:
            self._futures.pop(request_id, None)
            self._until_silence.pop(request_id, None)

    async def load(self, name: str, copies: int = 1, *, timeout_s: float = 60.0) -> list[Model]:
        """Load `copies` instances of the model `name` and return their handles.

        Instances that are there already are shared. While no worker is connected the call waits
        for one. Raises InvalidRequest for a name that no worker offers, RequestFailed when loading
        fails or no worker came, PeerUnreachable without an answer for `timeout_s`, ConnectionLost
        when the controller went away.
        """
        name, copies, timeout_s = model_name(name), copy_count(copies), time_limit_s(timeout_s)
        reply = await self._load_when_ready(name, copies, timeout_s)
        hint = profile_hint(name) if reply.code == Code.UNKNOWN_MODEL else ""
        _raise_for_code(reply, f"{reply.reason}{hint}")
        self._given_up.discard(canonical_model(name))
        self._infos.update((info.model_id, info) for info in reply.models)
        incarnation = self.controller.incarnation
        self._loaded_through.add(incarnation)
        return [Model(info, incarnation) for info in reply.models[:copies]]

    async def _load_when_ready(self, name: str, copies: int, timeout_s: float) -> LoadModelReply:
        """Ask until the answer is another than INITIALIZING; after `timeout_s`, return the last."""
        ends_s = self._loop.time() + timeout_s
        reply: LoadModelReply | None = None
        while reply is None or self._loop.time() + HELLO_EVERY_S < ends_s:
            if reply is not None:
                await asyncio.sleep(HELLO_EVERY_S)
            try:
                reply = await self._call(
                    lambda request_id: LoadModelRequest(request_id, name, copies),
                    LoadModelReply,
                    f"load {name!r}",
                    timeout_s if reply is None else max(0.001, ends_s - self._loop.time()),
                )
            except PeerUnreachable:
                if reply is None:
                    raise
                break  # what it said before tells more: no worker was there
            if reply.code != Code.INITIALIZING:
                break
        return reply

    async def unload(self, name: str, *, force: bool = False, timeout_s: float = 60.0) -> Unloaded:
        """Give up the use of the model `name`. Return how many instances are unloaded, and how many stay.

        Instances that no other client uses leave the workers' host memory. With `force` other clients lose
        theirs as well; only a client whose `name` the controller's option `--operators` lists may do that.
        Requests that wait for the model fail with code 1, and those that are in flight are served. A later
        `infer` on it raises InvalidRequest until the model is loaded again.

        Raises InvalidRequest for a name of which no instance is loaded, for `force` without the right to it,
        and where the controller's policy keeps every instance; PeerUnreachable without an answer for
        `timeout_s`, ConnectionLost when the controller went away.
        """
        name, force = model_name(name), flag("force", force)
        reply = await self._call(
            lambda request_id: UnloadModelRequest(request_id, name, force),
            UnloadModelReply,
            f"unload {name!r}",
            timeout_s,
        )
        if reply.code in (Code.OK, Code.UNKNOWN_MODEL):
            self._give_up(canonical_model(name))
        if reply.code == Code.UNKNOWN_MODEL:
            _raise_for_code(reply, f"{reply.reason}; `slosched models` lists those that are")
        _raise_for_code(reply, f"model {shown_name(name)} is not unloaded: {reply.reason}")
        return Unloaded(reply.unloaded, reply.kept)

    def _give_up(self, name: str) -> None:
        self._given_up.add(name)
        for model_id in [each for each, info in self._infos.items() if info.name == name]:
            del self._infos[model_id]

    async def drain_worker(
        self, worker: str, *, undo: bool = False, timeout_s: float = 5.0
    ) -> tuple[int, str]:
        """Take a worker (its name, number or address) out of use, or back with `undo`: its number and state.

        Raises InvalidRequest if there is no such worker, or the controller does not list this client's name in
        its option `--operators`; PeerUnreachable without an answer for `timeout_s`.
        """
        back = flag("undo", undo)
        reply = await self._call(
            lambda request_id: DrainWorkerRequest(request_id, worker, back),
            DrainWorkerReply,
            f"drain {worker!r}",
            timeout_s,
        )
        _raise_for_code(reply, f"worker {shown_name(worker)} is not drained: {reply.reason}")
        return reply.worker_id, reply.state

    async def models(
        self, *, timeout_s: float = 5.0
    ) -> tuple[tuple[ModelInfo, ...], tuple[str, ...]]:
        """Return the instances that are loaded, and the names that can be."""
        reply = await self._call(ListModelsRequest, ListModelsReply, "models", timeout_s)
        return reply.models, reply.loadable

    async def status(self, *, brief: bool = False, timeout_s: float = 5.0) -> dict[str, Any]:
        """Return the controller's report: plain dicts and lists, times in ns.

        A `brief` one is without the list of models, and costs the controller little.
        """
        only_brief = flag("brief", brief)

        def question(request_id: int) -> StatusRequest:
            return StatusRequest(request_id, only_brief)

        return dict((await self._call(question, StatusReply, "status", timeout_s)).report)


def _raise_for_code(reply: LoadModelReply | UnloadModelReply | DrainWorkerReply, text: str) -> None:
    """Raise the error that `text` explains, unless the answer's code is 0."""
    if reply.code in (Code.UNKNOWN_MODEL, Code.INVALID_REQUEST):
        raise InvalidRequest(text, code=reply.code, reply=reply)
    if reply.code != Code.OK:
        raise RequestFailed(text, code=reply.code, reply=reply)
