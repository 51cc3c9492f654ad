"""The HTTP port of a gateway: its sockets, its connections, the one timer of all their waits, and its end."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import resource
import ssl
from email.utils import formatdate

from slosched.addresses import is_loopback
from slosched.clock import now_ns
from slosched.errors import AddressInUse, InvalidConfig
from slosched.fronts.http.bounds import Bounds, Limits
from slosched.fronts.http.connection import Connection
from slosched.fronts.http.door import Door
from slosched.fronts.http.routes import Routes
from slosched.fronts.service import Service
from slosched.fronts.tls import TlsFiles
from slosched.gateway_config import GatewayConfig
from slosched.units import NS_PER_S

#: A TLS handshake, and a TLS connection's end, take at most so long, in seconds.
_HANDSHAKE_S, _SHUTDOWN_S = 10.0, 2.0
_BACKLOG = 1024
#: Connections beyond the most that get an answer before they are closed.
_MOST_TURNED_AWAY = 64
#: Files for everything but the connections that stay: sessions with the controller, gRPC, those turned away.
_OTHER_FILES = 512


class HttpFront:
    """Serves `service` by HTTP, and by HTTPS with `tls`, once `start` is called."""

    def __init__(
        self,
        service: Service,
        config: GatewayConfig,
        *,
        tls: TlsFiles | None = None,
        limits: Limits | None = None,
    ) -> None:
        self._config, self._tls = config, tls
        self._bounds = Bounds(
            most_bytes=config.max_request_bytes,
            most_held=config.max_in_flight_bytes,
            limits=limits or Limits(),
        )
        self._routes = Routes(
            service, shared_memory=config.shared_memory, most_bytes=config.max_request_bytes
        )
        own_host = not config.tokens and (config.bind == "localhost" or is_loopback(config.bind))
        self._door = Door(service, self._routes, self._bounds, own_host=own_host)
        self._most = config.max_connections
        self._connections: set[Connection] = set()
        self._turned_away: set[Connection] = set()  # they are told, and may not stay
        self._servers: list[asyncio.Server] = []
        self._timer: asyncio.TimerHandle | None = None
        self._empty = asyncio.Event()
        self.port = 0

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._connections)

    async def start(self) -> None:
        """Listen. Raises AddressInUse when the port is taken, InvalidConfig when it cannot be had."""
        self._most = _room_for(self._config.max_connections)
        bind, port = self._config.bind, self._config.http_port
        names = ("127.0.0.1", "localhost")
        advice = "take another --http-port, or -1 for none"
        try:
            server = await self._listen(names[0] if bind in names else bind, port)
        except (OSError, OverflowError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"HTTP port {port} on {bind} is in use; {advice}") from None
            raise InvalidConfig(
                f"cannot listen on HTTP port {port} of {bind}: {error}; {advice}"
            ) from None
        self.port = int(server.sockets[0].getsockname()[1])
        if bind in names:  # "localhost" is often ::1 first
            with contextlib.suppress(OSError):  # no IPv6 here, or the port is another's there
                await self._listen("::1", self.port)
        self._tick()

    async def _listen(self, bind: str, port: int) -> asyncio.Server:
        context: ssl.SSLContext | None = self._tls.context() if self._tls is not None else None
        times = (_HANDSHAKE_S, _SHUTDOWN_S) if context is not None else (None, None)
        server = await asyncio.get_running_loop().create_server(
            self._connection,
            None if bind == "*" else bind,
            port,
            ssl=context,
            backlog=_BACKLOG,
            ssl_handshake_timeout=times[0],
            ssl_shutdown_timeout=times[1],
        )
        self._servers.append(server)
        return server

    async def drain(self, within_s: float) -> None:
        """Take no new connections, answer what runs for at most `within_s`, and close."""
        self._bounds.draining = True
        for server in self._servers:
            server.close()
        for connection in list(self._connections):
            connection.drain()
        if self._connections:
            self._empty.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._empty.wait(), within_s)
        await self.close()

    async def close(self) -> None:
        """End everything at once; may be called again."""
        self._bounds.draining = True
        for server in self._servers:
            server.close()
        for connection in [*self._connections, *self._turned_away]:
            connection.abort()
        self._routes.close()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    # ------------------------------------------------------------------------- connections

    def _connection(self) -> Connection:
        return Connection(self._bounds, self._door, joined=self._joined, left=self._left)

    def _joined(self, connection: Connection) -> bool:
        """Count a new connection. Where there are too many, the one that waits longest makes way for it."""
        if len(self._connections) >= self._most:
            waiting = [each for each in self._connections if each.waits]
            if not waiting:
                if len(self._turned_away) >= _MOST_TURNED_AWAY:
                    connection.abort()
                self._turned_away.add(connection)
                return False
            oldest = min(waiting, key=lambda each: each.expires)
            self._connections.discard(oldest)
            oldest.abort()
        self._connections.add(connection)
        return True

    def _left(self, connection: Connection) -> None:
        self._connections.discard(connection)
        self._turned_away.discard(connection)
        if not self._connections:
            self._empty.set()

    def _tick(self) -> None:
        bounds = self._bounds
        bounds.tick += 1
        bounds.date = f"date: {formatdate(now_ns() / NS_PER_S, usegmt=True)}\r\n".encode()
        for connection in [*self._connections, *self._turned_away]:
            if connection.expires <= bounds.tick:
                connection.expired()
        self._timer = asyncio.get_running_loop().call_later(bounds.limits.tick_s, self._tick)


def _room_for(connections: int) -> int:
    """How many connections may be open: all, if the limit of this process's files can be raised for them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = connections + _OTHER_FILES
    if soft < wanted:
        raised = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    return max(min(connections, soft - _OTHER_FILES), min(connections, soft // 4), 1)
