"""The Service of both protocols (service.py), in front of one controller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

from slosched.clients.inference import Model
from slosched.clock import now_ns
from slosched.fronts import service
from slosched.fronts.asked import Answered, Asked
from slosched.fronts.callers import Caller, Callers, Parted, Quota
from slosched.fronts.counting import CANCELLED, LATE, OK, Counting
from slosched.fronts.descriptions import model_config, model_metadata, server_metadata
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.inferences import Inference
from slosched.fronts.models import Models
from slosched.fronts.names import name_and_version
from slosched.fronts.regions import Regions, Room
from slosched.fronts.sessions import Session
from slosched.fronts.statistics import in_ms
from slosched.fronts.versions import Version, unknown_model
from slosched.gateway_config import GatewayConfig
from slosched.units import NS_PER_S

#: What the gateway's own session is called at the controller.
HOUSE = "gateway"
#: Requests of a token that is gone, or has another weight now, have this long.
_PARTED_WITHIN_NS, _PARTED_LOOK_S = 60 * NS_PER_S, 0.1


class Serving:
    """A gateway's service in the running event loop: `start`, and at the end `close`.

    `announce` gets lines for the operator. Raises InvalidConfig for a file of tokens that cannot be used.
    """

    def __init__(self, config: GatewayConfig, *, announce: Callable[[str], None]) -> None:
        self._config, self._announce = config, announce
        self._room = Room()
        self.callers = Callers(config.tokens, self._open_session, self._new_regions)
        self._room.shares = len(self.callers.all)
        self._house = Session(config.controller, name=HOUSE)
        self._sessions: dict[str, Session] = {}
        self.models = Models(self._house, config, sessions=self._all_sessions, announce=announce)
        self._quota = Quota(
            "the gateway", most_rows=config.max_in_flight, most_bytes=config.max_in_flight_bytes
        )
        self._counting = Counting()
        self._running = 0
        self._tasks: list[asyncio.Task[None]] = []
        self.draining = False

    def start(self) -> None:
        """Begin to look for the controller, and to load what it should hold from the start."""
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self.models.watch(), name="watch")]
        if self._config.load:
            self._tasks.append(loop.create_task(self.models.keep_loaded(self._config.load)))

    async def close(self) -> None:
        """End every session. Requests that run fail."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.models.close()
        for session in self._all_sessions():
            await session.close()
        for caller in self.callers.all:
            caller.regions.close()

    # ------------------------------------------------------------------------------ callers

    def caller(self, authorization: str) -> Caller:
        return self.callers.caller(authorization)

    def read_tokens_again(self) -> None:
        """Take the file of tokens anew. Raises InvalidConfig, and the old ones stay."""
        if self.callers.open:
            return
        loop = asyncio.get_running_loop()
        for parted in self.callers.read():
            if parted.session is not None:
                self._sessions.pop(parted.session.name, None)
            self._tasks.append(loop.create_task(_closed_later(parted)))
        self._tasks = [each for each in self._tasks if not each.done()]
        self._room.shares = len(self.callers.all)

    def _new_regions(self) -> Regions:
        return Regions(
            enabled=self._config.shared_memory,
            max_part_bytes=self._config.max_request_bytes,
            room=self._room,
        )

    def _open_session(self, caller: Caller) -> Session:
        if not caller.name:
            return self._house
        session = Session(self._config.controller, name=caller.name, weight=caller.row.weight)
        self._sessions[caller.name] = session
        return session

    def _all_sessions(self) -> list[Session]:
        return [self._house, *self._sessions.values()]

    # --------------------------------------------------------------------------- inferences

    @property
    def running(self) -> int:
        """Inferences that have begun and have no end yet."""
        return self._running

    def begin(self, asked: Asked, caller: service.Caller, on_end: service.OnEnd) -> Inference:
        theirs = cast(Caller, caller)
        inference = Inference(self, asked, theirs, on_end)
        self._running += 1
        try:
            size = sum([len(tensor.data) for tensor in asked.inputs])
            self._take(inference, size)
            model = self.models.versions.find(asked.model, asked.version)
            if model is not None:
                session = theirs.session
                handle = session.handles.get(model.full)
                if handle is not None and model.form is not None:
                    if not theirs.may_use(model.base):
                        raise unknown_model(name_and_version(asked.model)[0])
                    inference.send(model, model.form, session, handle)
                    return inference
            inference.send_later()
        except FrontError as error:
            inference.fail(error)
        except Exception as error:
            inference.broke(error)
        return inference

    def _take(self, inference: Inference, size: int) -> None:
        """Take what it needs of the quotas. Raises FrontError, 429."""
        if self.draining:
            raise FrontError(Status.UNAVAILABLE, "this gateway is being stopped")
        inference.caller.check()
        self._quota.take(1, size)
        try:
            inference.caller.quota.take(1, size)
        except FrontError:
            self._quota.give(1, size)
            raise
        inference.rows, inference.size = 1, size
        self._counting.input_bytes += size

    def take_rows(self, inference: Inference, rows: int) -> None:
        more = rows - inference.rows
        if more > 0:
            self._quota.take(more, 0)
            try:
                inference.caller.quota.take(more, 0, before=inference.rows)
            except FrontError:
                self._quota.give(more, 0)
                raise
            inference.rows = rows

    def gone(self, model: Version) -> None:
        self.models.lost(model)

    async def prepare(self, inference: Inference) -> tuple[Version, Session, Model]:
        asked, caller = inference.asked, inference.caller
        model = await self.models.ensure(asked.model, asked.version, allowed=caller.may_use)
        caller.check()  # it may be gone by now
        session = caller.session
        handle = session.handles.get(model.full)
        if handle is None:
            model.running += 1  # it is not given up before this session holds it
            try:
                handle = await session.load(model.full)
            finally:
                model.running -= 1
        return model, session, handle

    def ended(self, inference: Inference, result: Answered | FrontError | None) -> None:
        self._running -= 1
        model, caller = inference.model, inference.caller
        if inference.rows:
            self._quota.give(inference.rows, inference.size)
            caller.quota.give(inference.rows, inference.size)
        total_ns = now_ns() - inference.begun_ns
        name = "" if model is None else model.base
        if model is not None:
            model.running -= 1
            model.statistics.last_ms = in_ms(inference.begun_ns)
        if isinstance(result, Answered):
            assert model is not None and inference.slowest is not None
            model.statistics.served(inference.slowest, inference.replies, total_ns)
            self._counting.rows += len(inference.replies)
            self._counting.output_bytes += sum([len(each.data) for each in result.outputs])
            self._counting.answered(name, result.latency_ns)
            self._counting.ended(name, OK if result.in_time else LATE, caller.name)
            return
        if result is None:
            self._counting.ended(name, CANCELLED, caller.name)
            return
        self._counting.ended(name, result.status.name.lower(), caller.name)
        if model is not None and inference.ends_ns:  # else it was wrong, and was not sent
            model.statistics.failed(total_ns)

    async def infer(self, asked: Asked, caller: service.Caller) -> Answered:
        future: asyncio.Future[Answered] = asyncio.get_running_loop().create_future()

        def on_end(result: Answered | FrontError) -> None:
            if future.done():
                return
            if isinstance(result, FrontError):
                future.set_exception(result)
            else:
                future.set_result(result)

        running = self.begin(asked, caller, on_end)
        try:
            return await future
        finally:
            running.cancel()

    # --------------------------------------------------------------------------- what is said

    @property
    def unreachable(self) -> str:
        """Why the controller cannot be asked now; empty if it answers."""
        return self._house.unreachable

    def live(self) -> bool:
        return True

    def ready(self) -> bool:
        return not self.draining and not self._house.unreachable and self.models.gpus_ready

    async def model_ready(self, name: str, version: str, caller: service.Caller) -> bool:
        allowed = cast(Caller, caller).may_use
        return self.ready() and self.models.versions.is_ready(name, version, allowed=allowed)

    def server_metadata(self) -> service.Document:
        return server_metadata(shared_memory=self._config.shared_memory)

    async def model_metadata(
        self, name: str, version: str, caller: service.Caller
    ) -> service.Document:
        allowed = cast(Caller, caller).may_use
        model = await self.models.ensure(name, version, allowed=allowed)
        assert model.form is not None
        versions = [model.version] if version else self.models.versions.ready_versions(model.base)
        return model_metadata(model.form, name_and_version(name)[0], versions)

    async def model_config(
        self, name: str, version: str, caller: service.Caller
    ) -> service.Document:
        allowed = cast(Caller, caller).may_use
        model = await self.models.ensure(name, version, allowed=allowed)
        assert model.form is not None
        return model_config(model.form, name_and_version(name)[0], model.version)

    async def statistics(self, name: str, version: str, caller: service.Caller) -> service.Document:
        models = self.models.versions.counted(name, version, cast(Caller, caller).may_use)
        asked = name_and_version(name)[0]  # perf_analyzer looks for the name that it asked for
        return {
            "model_stats": [
                each.statistics.document(asked or each.base, each.version) for each in models
            ]
        }

    def metrics(self, caller: service.Caller) -> bytes:
        theirs = cast(Caller, caller)
        theirs.check_operator()
        return self._counting.text([*self._gauges()], theirs.may_use)

    def _gauges(self) -> Iterator[tuple[str, str, float]]:
        yield "in_flight", "Inferences that have begun and have no answer yet.", self._running
        yield "in_flight_bytes", "Bytes of their inputs.", self._quota.bytes_now
        yield "models_ready", "Versions of models that are loaded.", len(self.models.versions.ready)
        yield "ready", "1 if the controller answers, and has a GPU.", float(self.ready())
        restarts = self._house.client.restarts
        yield "controller_restarts", "Controllers that answered after the first.", restarts

    # --------------------------------------------------------------------------- repository

    async def index(self, caller: service.Caller, *, ready: bool) -> Sequence[service.Document]:
        return await self.models.index(cast(Caller, caller).may_use, ready=ready)

    async def load(self, name: str, parameters: Mapping[str, Any], caller: service.Caller) -> None:
        theirs = cast(Caller, caller)
        theirs.check_operator()
        if parameters:
            raise FrontError(
                Status.INVALID_ARGUMENT,
                f"load takes no parameters here, and has {', '.join(sorted(parameters))[:200]}: a model is "
                "what its worker offers",
            )
        await self.models.load(name, allowed=theirs.may_use)

    async def unload(
        self, name: str, parameters: Mapping[str, Any], caller: service.Caller
    ) -> None:
        theirs = cast(Caller, caller)
        theirs.check_operator()
        others = sorted(set(parameters) - {"unload_dependents"})  # there are no dependents
        if others:
            raise FrontError(
                Status.INVALID_ARGUMENT,
                f"unload takes no parameters here, and has {', '.join(others)[:200]}",
            )
        await self.models.unload(name, allowed=theirs.may_use)


async def _closed_later(parted: Parted) -> None:
    """Close what gets no more requests, once those in flight are answered."""
    session, ends_ns = parted.session, now_ns() + _PARTED_WITHIN_NS
    try:
        while session is not None and session.running and now_ns() < ends_ns:
            await asyncio.sleep(_PARTED_LOOK_S)
    finally:
        if parted.regions is not None:
            parted.regions.close()
        if session is not None:
            await session.close()
