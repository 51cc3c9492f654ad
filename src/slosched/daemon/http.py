"""The controller's small HTTP side: /healthz, /readyz and /status, JSON, GET and HEAD only.

- /healthz: 200 while the controller's loop turns; the body says "ok" or "degraded" and which workers
  are missing. Restarting the controller would not bring a worker back, so this stays 200.
- /readyz: 200 while at least one GPU can be given work, else 503.
- /status: everything that `slosched status` shows.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
from collections.abc import Callable
from typing import Any

import h11

from slosched.errors import AddressInUse, InvalidConfig

_REQUEST_WITHIN_S = 5.0
_MAX_CONNECTIONS = 64

Report = Callable[[], dict[str, Any]]


class HttpServer:
    """Serves `status()` and `health()` (report.py) as JSON."""

    def __init__(self, *, status: Report, health: Report) -> None:
        self._status = status
        self._health = health
        self._server: asyncio.Server | None = None
        self._open = 0
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
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._server.wait_closed(), 1.0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            if self._open <= _MAX_CONNECTIONS:
                await asyncio.wait_for(self._answer(reader, writer), _REQUEST_WITHIN_S)
        except (OSError, h11.ProtocolError):
            pass  # a peer that is slow, gone or speaks no HTTP is simply closed
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await asyncio.wait_for(writer.wait_closed(), 1.0)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                connection.receive_data(await reader.read(16 * 1024))
                continue
            if not isinstance(event, h11.Request):
                return
            break
        try:
            status, body = self._respond(event.method, event.target.split(b"?")[0])
        except Exception as error:  # a report must not take its reader's connection down unanswered
            status, body = 500, {"error": f"{type(error).__name__}: {error}"}
        payload = json.dumps(body, indent=1).encode() + b"\n"
        headers = [
            ("content-type", "application/json"),
            ("content-length", str(len(payload))),
            ("connection", "close"),
        ]
        answer: list[h11.Event] = [h11.Response(status_code=status, headers=headers)]
        if event.method != b"HEAD":
            answer.append(h11.Data(data=payload))
        answer.append(h11.EndOfMessage())
        writer.write(b"".join(connection.send(part) or b"" for part in answer))
        await writer.drain()

    def _respond(self, method: bytes, path: bytes) -> tuple[int, dict[str, Any]]:
        if method not in (b"GET", b"HEAD"):
            return 405, {"error": "only GET is answered here"}
        if path not in (b"/healthz", b"/readyz", b"/status"):
            return 404, {"error": "there are /healthz, /readyz and /status"}
        if path == b"/status":
            return 200, self._status()
        health = self._health()
        can_take_work = health["ready"] and not health["draining"]
        return (200 if path == b"/healthz" or can_take_work else 503), health
