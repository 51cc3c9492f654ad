"""The paths of the protocol, and what each does. Words and statuses are Triton's.

Paths by method: GET /v2, /v2/health/live|ready, /v2/models/M[/versions/V][/ready|config|stats],
/v2/models/stats, /v2/systemsharedmemory[/region/R]/status, /v2/cudasharedmemory likewise, /metrics; POST
/v2/models/M[/versions/V]/infer, /v2/repository/index, /v2/repository/models/M/load|unload, and of shared memory
register|unregister; POST /v1/infer/M (plain.py).
Tracing and dynamic logging answer as in a Triton that was built without them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Annotated, Any, NamedTuple
from urllib.parse import parse_qsl, unquote_to_bytes

import msgspec

from slosched.fronts.errors import FrontError, Status
from slosched.fronts.http import plain
from slosched.fronts.http.answers import TEXT, Answer, Rejected, document, error_answer
from slosched.fronts.http.bodies import Reader, decoded, refused
from slosched.fronts.http.exchange import Exchange, internal_error
from slosched.fronts.names import name_and_version
from slosched.fronts.regions import Regions
from slosched.fronts.service import Caller, Service
from slosched.fronts.slo import SLO_HEADER

#: Bodies of all requests but inferences.
_MOST_CONTROL_BYTES = 1024**2
_EMPTY = Answer(200)
_SLO = SLO_HEADER.encode()
_LENGTH = b"inference-header-content-length"

Handler = Callable[[Exchange], Answer | Coroutine[Any, Any, Answer] | None]


class Route(NamedTuple):
    """What a path does. A handler returns the answer, or what makes it; None: it is given later."""

    methods: tuple[str, ...]
    handler: Handler
    needs_caller: bool = True
    has_tensors: bool = False  # else its body is small


_Size = Annotated[int, msgspec.Meta(ge=0, le=2**62)]


class _Index(msgspec.Struct):
    ready: bool = False


class _Control(msgspec.Struct):
    parameters: dict[str, bool | int | float | str] = {}  # Triton has no others


class _Register(msgspec.Struct):
    key: str | None = None
    byte_size: _Size | None = None
    offset: _Size = 0


_index = msgspec.json.Decoder(_Index).decode
_control = msgspec.json.Decoder(_Control).decode
_register = msgspec.json.Decoder(_Register).decode

_GET, _POST = ("GET", "HEAD"), ("POST",)
_MODELS, _PLAIN = "/v2/models/", "/v1/infer/"
_REPOSITORY = "/v2/repository/models/"
_SYSTEM, _CUDA = "/v2/systemsharedmemory/", "/v2/cudasharedmemory/"


class Routes:
    """Finds and serves. `shared_memory` off: no client may register regions."""

    def __init__(self, service: Service, *, shared_memory: bool, most_bytes: int) -> None:
        self._service = service
        self._shared_memory = shared_memory
        #: Tasks that may outlive their connection; the loop itself does not hold them.
        self._running: set[asyncio.Task[None]] = set()
        self._most_bytes = most_bytes
        off = "shared memory is off in this gateway; send tensors as binary data"
        far = "shared memory is for clients on the gateway's host; send tensors as binary data"
        self._whys = {True: off, False: far if shared_memory else off}
        self._fixed = {
            "/v2": Route(_GET, lambda _: document(service.server_metadata())),
            "/v2/health/live": Route(_GET, lambda _: _health(service.live()), needs_caller=False),
            "/v2/health/ready": Route(_GET, lambda _: _health(service.ready()), needs_caller=False),
            "/v2/models/stats": Route(_GET, self._statistics),
            "/v2/repository/index": Route(_POST, self._index),
            "/v2/trace/setting": Route((*_GET, *_POST), _no_tracing),
            "/v2/logging": Route((*_GET, *_POST), _no_logging),
            "/metrics": Route(_GET, self._metrics),
        }
        self._of_models = {
            "infer": Route(_POST, self._infer, has_tensors=True),
            "ready": Route(_GET, self._model_ready),
            "config": Route(_GET, self._config),
            "stats": Route(_GET, self._statistics),
            "trace/setting": Route((*_GET, *_POST), _no_tracing),
        }
        self._metadata_route = Route(_GET, self._metadata)
        self._plain_route = Route(_POST, self._plain, has_tensors=True)
        self._of_repository = {
            "load": Route(_POST, self._load),
            "unload": Route(_POST, self._unload),
        }
        self._of_regions = {
            _SYSTEM: {
                "status": Route(_GET, self._region_status),
                "register": Route(_POST, self._region_register),
                "unregister": Route(_POST, self._region_unregister),
            },
            _CUDA: {
                "status": Route(_GET, _cuda_status),
                "register": Route(_POST, _no_cuda),
                "unregister": Route(_POST, lambda _: _EMPTY),
            },
        }

    def close(self) -> None:
        """Cancel what still runs for clients that have left."""
        for task in self._running:
            task.cancel()

    # ----------------------------------------------------------------------------- finding

    def find(self, exchange: Exchange) -> Route:
        """The route of a request, whose name and version are set. Raises Rejected or FrontError."""
        path = exchange.path
        route = self._fixed.get(path)
        if route is None:
            if path.startswith(_MODELS):
                route = self._find_model(exchange, path[len(_MODELS) :])
            elif path.startswith(_PLAIN) and len(path) > len(_PLAIN):
                exchange.name = _decoded(path[len(_PLAIN) :])
                route = self._plain_route
            elif path.startswith(_REPOSITORY):
                name, _, action = path[len(_REPOSITORY) :].rpartition("/")
                exchange.name = _decoded(name)
                route = self._of_repository.get(action) if name else None
            else:
                route = self._find_region(exchange, path)
        if route is None:
            raise Rejected(404, "Not Found")
        if exchange.method not in route.methods:
            allowed = ", ".join(route.methods)
            raise Rejected(405, "Method Not Allowed", f"allow: {allowed}\r\n".encode())
        exchange.route = route
        return route

    def _find_model(self, exchange: Exchange, rest: str) -> Route | None:
        name, _, action = rest.rpartition("/")
        if rest.endswith("/trace/setting"):
            name, action = rest[: -len("/trace/setting")], "trace/setting"
        route = self._of_models.get(action) if name else None
        if route is None:
            name, route = rest, self._metadata_route
        front, _, version = name.rpartition("/")
        if front.endswith("/versions") and version.isascii() and version.isdecimal():
            name, exchange.version = front[: -len("/versions")], version
        exchange.name = _decoded(name) if "%" in name else name
        return route if name and "/" not in name else None

    def _find_region(self, exchange: Exchange, path: str) -> Route | None:
        for prefix, routes in self._of_regions.items():
            if path.startswith(prefix):
                region, _, action = path[len(prefix) :].rpartition("/")
                if region and (not region.startswith("region/") or region == "region/"):
                    return None
                exchange.name = _decoded(region[len("region/") :])
                return routes.get(action)
        return None

    @staticmethod
    def most_bytes(route: Route, most: int) -> int:
        """The bytes that a body on this route may have, where inferences may have `most`."""
        return most if route.has_tensors else min(most, _MOST_CONTROL_BYTES)

    # ----------------------------------------------------------------------------- serving

    def serve(self, exchange: Exchange) -> None:
        """Answer a request whose body is there, now or later."""
        try:
            made = exchange.route.handler(exchange)
        except (FrontError, Rejected) as error:
            exchange.answer(error_answer(error))
        except Exception as error:
            exchange.answer(internal_error(error))
        else:
            if isinstance(made, Answer):
                exchange.answer(made)
            elif made is not None:
                task = asyncio.get_running_loop().create_task(_answer_later(exchange, made))
                if exchange.route.has_tensors:
                    exchange.task = task
                else:  # a load that has begun ends, also when its client leaves
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)

    def _infer(self, exchange: Exchange) -> None:
        reads = Reader(self._regions(exchange), self._whys[exchange.local], self._most_bytes)
        exchange.read = reads.read(
            exchange.body,
            exchange.header(_LENGTH),
            exchange.header(_SLO) or "",
            model=exchange.name,
            version=exchange.version,
        )
        exchange.running = self._service.begin(
            exchange.read.asked, _caller(exchange), exchange.ended
        )

    async def _plain(self, exchange: Exchange) -> Answer:
        try:
            request = plain.read(exchange.body)
            slo = _queried_slo(exchange.query) or request.slo or exchange.header(_SLO) or ""
            name, version = name_and_version(exchange.name)
            caller = _caller(exchange)
            metadata = await self._service.model_metadata(name, version, caller)
            asked = plain.asked(request, slo, metadata, model=name, version=version)
            return plain.answer(await self._service.infer(asked, caller))
        except FrontError as error:
            return plain.error_answer(error)

    async def _model_ready(self, exchange: Exchange) -> Answer:
        caller = _caller(exchange)
        if not await self._service.model_ready(exchange.name, exchange.version, caller):
            return error_answer(Rejected(400, "Model version not ready"))
        return _EMPTY

    async def _metadata(self, exchange: Exchange) -> Answer:
        caller = _caller(exchange)
        return document(await self._service.model_metadata(exchange.name, exchange.version, caller))

    async def _config(self, exchange: Exchange) -> Answer:
        caller = _caller(exchange)
        return document(await self._service.model_config(exchange.name, exchange.version, caller))

    async def _statistics(self, exchange: Exchange) -> Answer:
        caller = _caller(exchange)
        return document(await self._service.statistics(exchange.name, exchange.version, caller))

    def _metrics(self, exchange: Exchange) -> Answer:
        return Answer(200, (self._service.metrics(_caller(exchange)),), b"", TEXT)

    async def _index(self, exchange: Exchange) -> Answer:
        asked = decoded(_index, exchange.body) if exchange.body else _Index()
        return document(await self._service.index(_caller(exchange), ready=asked.ready))

    async def _load(self, exchange: Exchange) -> Answer:
        asked = decoded(_control, exchange.body) if exchange.body else _Control()
        await self._service.load(exchange.name, asked.parameters, _caller(exchange))
        return _EMPTY

    async def _unload(self, exchange: Exchange) -> Answer:
        asked = decoded(_control, exchange.body) if exchange.body else _Control()
        await self._service.unload(exchange.name, asked.parameters, _caller(exchange))
        return _EMPTY

    # ----------------------------------------------------------------------------- regions

    def _regions(self, exchange: Exchange) -> Regions | None:
        """The caller's shared memory; None if its client may have none."""
        shares = self._shared_memory and exchange.local
        return _caller(exchange).regions if shares else None

    def _region_status(self, exchange: Exchange) -> Answer:
        regions = self._regions(exchange)
        return document([] if regions is None else regions.status(exchange.name))

    def _region_register(self, exchange: Exchange) -> Answer:
        if not exchange.name:
            raise refused("'region name' is necessary to register system shared memory region")
        regions = self._regions(exchange)
        if regions is None:
            raise FrontError(Status.UNIMPLEMENTED, self._whys[exchange.local])
        asked = decoded(_register, exchange.body)
        for field in ("key", "byte_size"):
            if getattr(asked, field) is None:
                raise refused(f"Shared memory register request has no '{field}' field")
        regions.register(exchange.name, asked.key, asked.offset, asked.byte_size)
        return _EMPTY

    def _region_unregister(self, exchange: Exchange) -> Answer:
        # Clients elsewhere have none, and perf_analyzer unregisters all in any case.
        regions = self._regions(exchange)
        if regions is not None:
            regions.unregister(exchange.name)
        return _EMPTY


async def _answer_later(exchange: Exchange, made: Awaitable[Answer]) -> None:
    try:
        answer = await made
    except (FrontError, Rejected) as error:
        answer = error_answer(error)
    except Exception as error:
        answer = internal_error(error)
    exchange.answer(answer)


def _caller(exchange: Exchange) -> Caller:
    assert exchange.caller is not None  # its route needs one
    return exchange.caller


def _queried_slo(query: str) -> str:
    """The `slo` of a query; empty without one. Raises FrontError, 400."""
    if not query:
        return ""
    try:
        return dict(parse_qsl(query, max_num_fields=16)).get("slo", "")
    except ValueError as error:
        raise refused(f"the query is wrong: {error}") from None


def _health(good: bool) -> Answer:
    return Answer(200 if good else 400)


def _decoded(text: str) -> str:
    """A part of a path without its escapes. Raises FrontError, 400."""
    try:
        return unquote_to_bytes(text).decode()
    except UnicodeDecodeError:
        raise refused("the path is not in UTF-8") from None


def _no_tracing(_: Exchange) -> Answer:
    raise FrontError(Status.UNAVAILABLE, "the server does not support tracing")


def _no_logging(_: Exchange) -> Answer:
    raise FrontError(Status.UNAVAILABLE, "the server does not support dynamic logging")


def _cuda_status(exchange: Exchange) -> Answer:
    if exchange.name:
        text = f"Unable to find cuda shared memory region: '{exchange.name[:200]}'"
        raise FrontError(Status.NOT_FOUND, text)
    return document([])


def _no_cuda(exchange: Exchange) -> Answer:
    raise FrontError(
        Status.UNIMPLEMENTED,
        f"failed to register CUDA shared memory region: '{exchange.name}', GPUs not supported",
    )
