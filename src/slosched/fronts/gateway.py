"""The gateway's process: one event loop, the service, and the two protocols in front of it.

    starting --both ports listen--> serving --SIGTERM, SIGINT--> draining --all is answered, or 10 s--> ended
    serving --SIGHUP--> serving            the tokens and the certificate of HTTP are read again

It does not wait for its controller: until that answers, /v2/health/ready says no, and requests get 503.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
from collections.abc import Awaitable, Callable
from typing import Protocol

from slosched.addresses import bracketed, parse_bind
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, MissingPackage
from slosched.fronts.serving import Serving
from slosched.fronts.tls import read_tls
from slosched.gateway_config import GatewayConfig
from slosched.transport.sockets import finish_sending
from slosched.units import NS_PER_S

#: What runs at a SIGTERM has this long.
DRAIN_WITHIN_S = 10.0
#: The controller may take a moment to answer before a line says that it is waited for.
_SAID_AFTER_S = 1.0
_LOOK_EVERY_S = 1.0
_CLOSED_WITHIN_S = 5.0
_LAST_WORDS_MS = 500

Announce = Callable[[str], None]


class Front(Protocol):
    """One protocol's server."""

    @property
    def port(self) -> int: ...

    async def start(self) -> None:
        """Listen. Raises AddressInUse."""

    async def drain(self, within_s: float) -> None:
        """Take no more connections, and answer what runs."""

    def close(self) -> Awaitable[None] | None:
        """End at once."""


class GatewayServer:
    """A gateway in the running event loop: `await start()`, then `await run()` until stopped.

    `announce` gets each line for the operator. Raises AddressInUse, InvalidConfig, MissingPackage.
    """

    def __init__(self, config: GatewayConfig, *, announce: Announce) -> None:
        self.config, self._announce = config, announce
        self._tls = read_tls(config.tls_cert, config.tls_key) if config.tls_cert else None
        self.service = Serving(config, announce=announce)
        self.http, self.rpc = self._http(), self._rpc()
        self._fronts: list[Front] = [each for each in (self.http, self.rpc) if each is not None]
        self._stop = asyncio.Event()
        self._stop_requests = 0

    async def start(self) -> None:
        """Listen on both ports, and announce that in one line."""
        for front in self._fronts:
            await front.start()
        self.service.start()
        if warning := self.service.callers.warning:
            self._announce(warning)
        self._announce(self._ready_line())

    def _http(self) -> Front | None:
        if self.config.http_port < 0:
            return None
        try:
            from slosched.fronts.http.server import HttpFront
        except ImportError as error:
            raise _missing(error) from None
        return HttpFront(self.service, self.config, tls=self._tls)

    def _rpc(self) -> Front | None:
        if self.config.grpc_port < 0:
            return None
        try:
            from slosched.fronts.rpc.server import RpcFront
        except ImportError as error:
            raise _missing(error) from None
        return RpcFront(self.service, self.config, tls=self._tls, announce=self._announce)

    def _ready_line(self) -> str:
        host = bracketed(parse_bind(self.config.bind))
        secure = " with TLS" if self.config.tls_cert else ""
        what = [f"HTTP{secure}"] if self.http is not None else []
        if self.rpc is not None:
            what.append(f"gRPC{secure} on {host}:{self.rpc.port}")
        first = self._fronts[0].port
        tokens = "" if self.service.callers.open else f", {len(self.service.callers.all)} token(s)"
        return (
            f"slosched gateway ready on {host}:{first}: {', '.join(what)}; controller "
            f"{self.config.controller}{tokens}"
        )

    async def run(self) -> None:
        """Serve until `stop`, then answer what runs, and close everything."""
        look = asyncio.get_running_loop().create_task(self._say_who_is_there())
        try:
            await self._stop.wait()
            await self._drain()
        finally:
            look.cancel()
            await self.close()

    def stop(self) -> None:
        """End in good order; called a second time, at once. For signal handlers of the loop."""
        self._stop_requests += 1
        self._stop.set()

    def reload(self) -> None:
        """Read the certificate and the tokens again; a faulty file changes nothing."""
        parts: dict[str, Callable[[], None]] = {}
        if not self.service.callers.open:
            parts["tokens"] = self.service.read_tokens_again
        if self._tls is not None:
            parts["certificate (of HTTP)"] = self._tls.reload
        for name, again in parts.items():
            try:
                again()
            except InvalidConfig as error:
                self._announce(f"{name}: what was read before stays: {error}")
            else:
                self._announce(f"{name}: read again")

    async def _drain(self) -> None:
        self.service.draining = True
        running = self.service.running
        if running:
            self._announce(f"stopping: {running} request(s) have {DRAIN_WITHIN_S:g} s to end")
        drains = [
            asyncio.get_running_loop().create_task(front.drain(DRAIN_WITHIN_S))
            for front in self._fronts
        ]
        ends_ns = now_ns() + int((DRAIN_WITHIN_S + _CLOSED_WITHIN_S) * NS_PER_S)
        while now_ns() < ends_ns and self._stop_requests < 2:
            _, left = await asyncio.wait(drains, timeout=0.02)
            if not left:
                break
        for task in drains:
            task.cancel()
        for ended in await asyncio.gather(*drains, return_exceptions=True):
            if isinstance(ended, Exception):
                self._announce(f"a port was not closed in good order: {ended!r}")

    async def close(self) -> None:
        """Close ports and sessions. Idempotent."""
        for front in self._fronts:
            closed = front.close()
            if closed is not None:
                await closed
        await self.service.close()

    async def _say_who_is_there(self) -> None:
        """A line when the controller is waited for, is there, or is lost."""
        last = ""
        await asyncio.sleep(_SAID_AFTER_S)
        while True:
            why = self.service.unreachable
            if why and why != last:
                self._announce(f"no inference is served now: {why}")
            elif last and not why:
                self._announce(f"the controller at {self.config.controller} answers")
            last = why
            await asyncio.sleep(_LOOK_EVERY_S)


def _missing(error: ImportError) -> Exception:
    """MissingPackage where a package of the extra lacks; anything else is a fault of this program."""
    package = (error.name or "").partition(".")[0]
    if package in ("httptools", "grpc", "google"):
        return MissingPackage(
            f"the gateway needs {package}; install it with: pip install 'slosched[gateway]'"
        )
    return error


def run_gateway(config: GatewayConfig, *, announce: Announce) -> int:
    """Run a gateway until SIGINT or SIGTERM; returns the exit code."""
    import uvloop

    # grpc's core writes lines of its own to stderr, several for each connection that a peer breaks.
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")

    async def main() -> None:
        server = GatewayServer(config, announce=announce)
        loop = asyncio.get_running_loop()
        try:
            await server.start()
        except BaseException:
            await server.close()
            raise
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        loop.add_signal_handler(signal.SIGHUP, server.reload)
        gc.collect()
        gc.freeze()  # what exists now lives for ever
        await server.run()

    uvloop.run(main())
    finish_sending(2 * _LAST_WORDS_MS)
    return 0
