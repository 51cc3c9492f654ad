"""What a client asks the controller beside inferences: load and unload, the list of models, the status.

Each question has one answer, and each wait for it an end.
"""

from __future__ import annotations

import asyncio
from typing import Any, TypeVar

from slosched.clients.arguments import copy_count, flag, model_name, time_limit_s
from slosched.clients.inference import Model, Unloaded
from slosched.clients.session import Session
from slosched.clock import now_ns
from slosched.codes import Code
from slosched.core.client.interface import (
    Drain,
    HeldModel,
    ListModels,
    Load,
    Question,
    Replied,
    Status,
    Unload,
)
from slosched.errors import InvalidRequest, MalformedMessage, RequestFailed, shown_name
from slosched.messages import (
    DrainWorkerReply,
    ListModelsReply,
    LoadModelReply,
    Message,
    ModelInfo,
    StatusReply,
    UnloadModelReply,
)
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.zoo import profile_hint

#: No time limit is shorter: an answer must have a chance.
_LEAST_NS = NS_PER_MS
_Reply = TypeVar("_Reply", bound=Message)


class Questions(Session):
    """A session that asks. The base of AsyncClient, which adds inference."""

    async def _ask(
        self, question: Question, kind: type[_Reply], what: str
    ) -> tuple[_Reply, tuple[HeldModel, ...]]:
        """Ask, and return the answer with the models that it loaded.

        Raises PeerUnreachable when the question's time has passed, ConnectionLost when the controller went
        away, MalformedMessage for an answer of another kind.
        """
        self._check_open()
        now = now_ns()
        number = self._brain.handle(question, now_ns=now)
        assert number is not None
        future: asyncio.Future[Replied] = self._loop.create_future()
        self._futures[number] = future  # before the step, in which the controller may be found lost
        try:
            self._step(now)
            replied = await future
        finally:
            self._cancel(number)
        if not isinstance(replied.reply, kind):
            raise MalformedMessage(
                f"the controller at {self.address} answered {what} with a {type(replied.reply).__name__}"
            )
        return replied.reply, replied.models

    async def load(self, name: str, copies: int = 1, *, timeout_s: float = 60.0) -> list[Model]:
        """Load `copies` instances of the model `name` and return their handles.

        Instances that are there already are shared. While no worker is connected the call waits
        for one. Raises InvalidRequest for a name that no worker offers, RequestFailed when loading
        fails or no worker came, PeerUnreachable without an answer for `timeout_s`, ConnectionLost
        when the controller went away.
        """
        name, copies, within_ns = model_name(name), copy_count(copies), limit_ns(timeout_s)
        load = Load(name, copies, within_ns)
        reply, models = await self._ask(load, LoadModelReply, f"load {name!r}")
        hint = profile_hint(name) if reply.code == Code.UNKNOWN_MODEL else ""
        _raise_for_code(reply, f"{reply.reason}{hint}")
        return [Model.of(held) for held in models]

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
        unload = Unload(name, force, limit_ns(timeout_s))
        reply, _ = await self._ask(unload, UnloadModelReply, f"unload {name!r}")
        if reply.code == Code.UNKNOWN_MODEL:
            _raise_for_code(reply, f"{reply.reason}; `slosched models` lists those that are")
        _raise_for_code(reply, f"model {shown_name(name)} is not unloaded: {reply.reason}")
        return Unloaded(reply.unloaded, reply.kept)

    async def drain_worker(
        self, worker: str, *, undo: bool = False, timeout_s: float = 5.0
    ) -> tuple[int, str]:
        """Take a worker (its name, number or address) out of use, or back with `undo`: its number and state.

        Raises InvalidRequest if there is no such worker, or the controller does not list this client's name in
        its option `--operators`; PeerUnreachable without an answer for `timeout_s`.
        """
        question = Drain(worker, flag("undo", undo), limit_ns(timeout_s))
        reply, _ = await self._ask(question, DrainWorkerReply, f"drain {worker!r}")
        _raise_for_code(reply, f"worker {shown_name(worker)} is not drained: {reply.reason}")
        return reply.worker_id, reply.state

    async def models(
        self, *, timeout_s: float = 5.0
    ) -> tuple[tuple[ModelInfo, ...], tuple[str, ...]]:
        """Return the instances that are loaded, and the names that can be."""
        reply = await self.listing(timeout_s=timeout_s)
        return reply.models, reply.loadable

    async def listing(self, *, timeout_s: float = 5.0) -> ListModelsReply:
        """All that the controller says of models and of the names that workers offer."""
        reply, _ = await self._ask(ListModels(limit_ns(timeout_s)), ListModelsReply, "models")
        return reply

    async def status(self, *, brief: bool = False, timeout_s: float = 5.0) -> dict[str, Any]:
        """Return the controller's report: plain dicts and lists, times in ns.

        A `brief` one is without the list of models, and costs the controller little.
        """
        question = Status(flag("brief", brief), limit_ns(timeout_s))
        reply, _ = await self._ask(question, StatusReply, "status")
        return dict(reply.report)


def limit_ns(timeout_s: float) -> int:
    """A time limit in ns. Raises InvalidRequest."""
    return max(_LEAST_NS, round(time_limit_s(timeout_s) * NS_PER_S))


def _raise_for_code(reply: LoadModelReply | UnloadModelReply | DrainWorkerReply, text: str) -> None:
    """Raise the error that `text` explains, unless the answer's code is 0."""
    if reply.code in (Code.UNKNOWN_MODEL, Code.INVALID_REQUEST):
        raise InvalidRequest(text, code=reply.code, reply=reply)
    if reply.code != Code.OK:
        raise RequestFailed(text, code=reply.code, reply=reply)
