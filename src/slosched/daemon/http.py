"""The controller's small HTTP side: a table of paths, GET and HEAD only, one answer a connection.

A route is a path and a handler, which gets the `Request` and returns an `Answer` or an awaitable of one.
`probe_routes` has the three that were always here:

- /healthz: 200 while the controller's loop turns; the body says "ok" or "degraded" and which workers
  are missing. Restarting the controller would not bring a worker back, so this stays 200.
- /readyz: 200 while at least one GPU can be given work, else 503.
- /status: everything that `slosched status` shows.

Everything runs in the controller's own event loop. A handler that has more to do than half a millisecond
awaits in between. A reader that has not asked and taken its answer within 5 s is dropped.

On a loopback address only requests *for* a loopback name are answered. Otherwise any page in the
operator's browser could read this one, by a name of its own that it points at 127.0.0.1 (DNS rebinding).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import inspect
import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

import h11

from slosched.daemon.in_slices import PART_BYTES, json_parts
from slosched.errors import AddressInUse, InvalidConfig

_REQUEST_WITHIN_S = 5.0
_CLOSED_WITHIN_S = 1.0
_MAX_CONNECTIONS = 64

_LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

Report = Callable[[], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Request:
    """What a handler is asked. `query` has the last value of each name; header names are lower case."""

    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Answer:
    """What a handler says. A long body may be a list of its parts, which are written one in each turn of
    the loop.
    """

    status: int
    content_type: str
    body: bytes | list[bytes]
    headers: tuple[tuple[str, str], ...] = ()


Handler = Callable[[Request], Answer | Awaitable[Answer]]
Routes = Mapping[str, Handler]


def json_answer(status: int, body: Mapping[str, Any]) -> Answer:
    """An answer in indented, human-readable JSON."""
    return Answer(status, "application/json", json.dumps(body, indent=1).encode() + b"\n")


def probe_routes(
    *, status: Callable[[], dict[str, Any] | Awaitable[dict[str, Any]]], health: Report
) -> dict[str, Handler]:
    """/healthz, /readyz and /status, from `status()` and `health()` (status.py).

    The text of /status is written in slices, and `status` may be made in slices, too.
    """

    async def everything(_: Request) -> Answer:
        seen = status()
        if inspect.isawaitable(seen):
            seen = await seen
        return Answer(200, "application/json", await json_parts(seen))

    def ready(_: Request) -> Answer:
        seen = health()
        can_take_work = seen["ready"] and not seen["draining"]
        return json_answer(200 if can_take_work else 503, seen)

    return {
        "/healthz": lambda _: json_answer(200, health()),
        "/readyz": ready,
        "/status": everything,
    }


class HttpServer:
    """Serves `routes` (path -> handler). The mapping may grow until `start`."""

    def __init__(self, routes: Routes) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._also: asyncio.Server | None = None  # the same on ::1
        self._open = 0
        #: Connections that have not asked yet, the oldest first: they make way when there are too many.
        self._silent: dict[asyncio.StreamWriter, None] = {}
        self._loopback = True
        self.port = 0

    async def start(self, host: str, port: int) -> None:
        """Listen. Raises AddressInUse when the port is taken, InvalidConfig when it cannot be had."""
        advice = "take another --http-port, or -1 for none"
        try:
            self._server = await asyncio.start_server(self._serve, host, port)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"HTTP port {port} on {host} is in use; {advice}") from None
            raise InvalidConfig(f"cannot listen on HTTP port {port}: {error}; {advice}") from error
        if host == "127.0.0.1":  # "localhost" is often ::1 first
            number = self._server.sockets[0].getsockname()[1]
            with contextlib.suppress(OSError):  # no IPv6 here, or the port is another's there
                self._also = await asyncio.start_server(self._serve, "::1", number)
        self._loopback = f"[{host}]" in _LOOPBACK or host in _LOOPBACK
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        """Stop listening. Waits at most two seconds."""
        if self._server is None:
            return
        for server in filter(None, (self._server, self._also)):
            server.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._server.wait_closed(), 1.0)
        if self._also is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._also.wait_closed(), 1.0)

    # -------------------------------------------------------------------------- a connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open > _MAX_CONNECTIONS and self._silent:
                oldest = next(iter(self._silent))
                del self._silent[oldest]
                oldest.transport.abort()  # so that slow ones keep no probe out
            elif self._open > _MAX_CONNECTIONS:
                return
            await self._exchange(reader, writer)
        except (OSError, h11.ProtocolError):
            pass  # a peer that is slow, gone or speaks no HTTP is simply closed
        finally:
            self._open -= 1
            writer.close()
            try:
                await asyncio.wait_for(writer.wait_closed(), _CLOSED_WITHIN_S)
            except TimeoutError:
                writer.transport.abort()  # it reads nothing: what was written would stay for ever
            except OSError:
                pass  # it is gone

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
        async with asyncio.timeout(_REQUEST_WITHIN_S):
            self._silent[writer] = None
            try:
                event = await _first_event(connection, reader)
            finally:
                self._silent.pop(writer, None)
            if not isinstance(event, h11.Request):
                return
            answer = await self._answer(event)
            parts = _in_parts(answer.body)
            length = str(sum(map(len, parts)))
            if event.method == b"HEAD":
                parts = []
            for text in _whole(connection, _head(answer, length), parts):
                writer.write(text)
                await writer.drain()
                await asyncio.sleep(0)

    async def _answer(self, event: h11.Request) -> Answer:
        headers = {name.decode("latin-1"): v.decode("latin-1") for name, v in event.headers}
        path, _, query = event.target.decode("latin-1").partition("?")
        if self._loopback and not _is_loopback(headers.get("host")):
            return json_answer(
                421, {"error": "this answers only to localhost, 127.0.0.1 and [::1] as the host"}
            )
        if event.method not in (b"GET", b"HEAD"):
            return json_answer(405, {"error": "only GET is answered here"})
        handler = self._routes.get(path)
        if handler is None:
            *most, last = self._routes
            there = f"{', '.join(most)} and {last}" if most else last
            return json_answer(404, {"error": f"there are {there}"})
        try:
            answer = handler(Request(path, dict(parse_qsl(query)), headers))
            if inspect.isawaitable(answer):
                answer = await answer
        except Exception as error:  # a report must not take its reader's connection down unanswered
            return json_answer(500, {"error": f"{type(error).__name__}: {error}"})
        return answer


async def _first_event(connection: h11.Connection, reader: asyncio.StreamReader) -> Any:
    while (event := connection.next_event()) is h11.NEED_DATA:
        connection.receive_data(await reader.read(16 * 1024))
    return event


def _head(answer: Answer, length: str) -> h11.Response:
    headers = [
        ("content-type", answer.content_type),
        ("content-length", length),
        ("connection", "close"),
        *answer.headers,
    ]
    return h11.Response(status_code=answer.status, headers=headers)


def _in_parts(body: bytes | list[bytes]) -> list[bytes]:
    if isinstance(body, list):
        return body
    return [body[at : at + PART_BYTES] for at in range(0, len(body), PART_BYTES)]


def _whole(
    connection: h11.Connection, head: h11.Response, parts: Sequence[bytes]
) -> Iterator[bytes]:
    """An answer's bytes, in parts that are written between two turns of the event loop."""
    text = connection.send(head) or b""
    for place, part in enumerate(parts):
        text += connection.send(h11.Data(data=part)) or b""
        if place + 1 < len(parts):
            yield text
            text = b""
    yield text + (connection.send(h11.EndOfMessage()) or b"")


def _is_loopback(host: str | None) -> bool:
    """Whether a Host header names this machine to itself. HTTP/1.0 has none, and no browser speaks it."""
    if host is None:
        return True
    name, colon, port = host.rpartition(":")
    if not colon or host.endswith("]"):
        name, port = host, ""
    return name.lower() in _LOOPBACK and (not port or port.isdigit())
