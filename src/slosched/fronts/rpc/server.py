"""The gRPC side: a server of grpc.aio in the running event loop, and the methods it serves.

No process may be forked from one that runs it: grpc's threads do not survive that.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import Callable
from functools import partial
from typing import Protocol

import grpc

from slosched.addresses import bracketed
from slosched.errors import AddressInUse, InvalidConfig
from slosched.fronts.rpc.calls import Call, handler
from slosched.fronts.rpc.documents import METHODS
from slosched.fronts.rpc.health import HEALTH_SERVICE, check
from slosched.fronts.rpc.inference import Circumstances, answer_bytes, asked, parsed
from slosched.fronts.rpc.messages import SERVICE
from slosched.fronts.rpc.peers import Peers
from slosched.fronts.rpc.streams import IN_TIME, Streams
from slosched.fronts.service import Service
from slosched.gateway_config import GatewayConfig

#: RPCs beside inferences and streams: health and metadata are answered under full load too.
_SPARE_RPCS = 64
#: RPCs of one connection at a time; more wait at their client.
_MOST_PER_CONNECTION = 1024
#: What a message has beside the tensors that `max_request_bytes` bounds.
_HEAD_BYTES = 64 * 1024
_METADATA_BYTES = 16 * 1024
_UNREAD_BYTES = 1024**2
#: Inputs in flight, HTTP bodies that are being read, answers by HTTP, and those by gRPC have that bound each.
_MEMORY_OF_BODIES = 4
_HANDSHAKE_WITHIN_MS = 10_000
_KEEPALIVE_MS, _KEEPALIVE_WITHIN_MS = 60_000, 20_000
#: A connection without an RPC; its client makes another with its next one.
_IDLE_WITHIN_MS = 600_000


class Certificates(Protocol):
    """The PEM bytes of a certificate chain and of its private key (fronts/tls.py)."""

    @property
    def certificate(self) -> bytes: ...

    @property
    def key(self) -> bytes: ...


class RpcFront:
    """The gRPC port of a gateway. `port` is known after `start`.

    Without `tls` it speaks plain text.
    """

    def __init__(
        self,
        service: Service,
        config: GatewayConfig,
        *,
        tls: Certificates | None = None,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.port = 0
        self._service, self._config, self._tls = service, config, tls
        self.peers = Peers(
            most_untaken=config.max_in_flight_bytes,
            most_memory=config.max_memory_bytes or _MEMORY_OF_BODIES * config.max_in_flight_bytes,
            announce=announce,
        )
        self._streams = Streams(
            service, self.peers, most=config.max_connections, max_bytes=config.max_request_bytes
        )
        self._look: asyncio.Task[None] | None = None
        self._server: grpc.aio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises AddressInUse when the port is taken, InvalidConfig when it cannot be had."""
        host, port = self._config.bind, self._config.grpc_port
        check_port(host, port)
        server = grpc.aio.server(
            options=tuple(_options(self._config).items()),
            maximum_concurrent_rpcs=self._config.max_in_flight
            + self._config.max_connections
            + _SPARE_RPCS,
        )
        # For each registered method grpc would have a wait of its own; for generic ones there is one for all.
        handlers = grpc.method_handlers_generic_handler(SERVICE, self._handlers())
        health = grpc.method_handlers_generic_handler(
            HEALTH_SERVICE, {"Check": handler(self._service, self.peers, check)}
        )
        server.add_generic_rpc_handlers((handlers, health))
        address = f"{bracketed('::' if host == '*' else host)}:{port}"
        try:
            if self._tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, _credentials(self._tls))
        except RuntimeError as error:
            raise InvalidConfig(f"cannot listen on {address} for gRPC: {error}") from None
        self._server = server
        await server.start()
        self.peers.port = self.port
        self._look = asyncio.get_running_loop().create_task(self.peers.look_after())

    async def drain(self, within_s: float) -> None:
        """Take no new RPCs, let those that run end within this time, and cancel the rest."""
        self._streams.finish()
        if self._server is not None:
            await self._server.stop(within_s)

    async def close(self) -> None:
        """End at once. Safe to call again."""
        if self._look is not None:
            self._look.cancel()
        if self._server is not None:
            server, self._server = self._server, None
            await server.stop(None)

    def _handlers(self) -> dict[str, grpc.RpcMethodHandler]:
        methods = {**METHODS, "ModelInfer": self._infer}
        found = {
            name: handler(self._service, self.peers, method) for name, method in methods.items()
        }
        return found | {"ModelStreamInfer": self._streams.handler()}

    async def _infer(self, call: Call) -> bytes:
        caller = call.caller()
        incoming = parsed(await call.request())
        circumstances = Circumstances(
            call.slo_header,
            call.deadline_ns(),
            partial(call.regions, caller),
            self._config.max_request_bytes,
        )
        answered = await self._service.infer(asked(incoming, circumstances), caller)
        if not answered.in_time:
            call.context.set_trailing_metadata(((IN_TIME, "0"),))
        return answer_bytes(answered)


def _credentials(tls: Certificates) -> grpc.ServerCredentials:
    """Credentials that follow `tls` when it reads its files again; grpc asks at each handshake."""

    def current() -> grpc.ServerCertificateConfiguration:
        return grpc.ssl_server_certificate_configuration([(tls.key, tls.certificate)])

    return grpc.dynamic_ssl_server_credentials(current(), current)


def _options(config: GatewayConfig) -> dict[str, int]:
    """The settings of grpc's core (its channel arguments)."""
    return {
        "grpc.so_reuseport": 0,  # a second process would take half of the connections
        "grpc.max_receive_message_length": min(config.max_request_bytes + _HEAD_BYTES, 2**31 - 1),
        "grpc.max_send_message_length": -1,
        "grpc.max_concurrent_streams": _MOST_PER_CONNECTION,
        # What is kept of an RPC that is not read; with probing it is up to 8 MiB. A message that is waited for
        # gets a window of its own size in any case.
        "grpc.http2.bdp_probe": 0,
        "grpc.http2.lookahead_bytes": _UNREAD_BYTES,
        "grpc.max_allowed_incoming_connections": config.max_connections,
        "grpc.max_metadata_size": _METADATA_BYTES,
        "grpc.absolute_max_metadata_size": _METADATA_BYTES,
        "grpc.server_handshake_timeout_ms": _HANDSHAKE_WITHIN_MS,
        "grpc.max_connection_idle_ms": _IDLE_WITHIN_MS,
        "grpc.keepalive_time_ms": _KEEPALIVE_MS,
        "grpc.keepalive_timeout_ms": _KEEPALIVE_WITHIN_MS,
    }


def check_port(host: str, port: int) -> None:
    """Whether this process may listen there; grpc itself does not say why it cannot.

    Raises AddressInUse, or InvalidConfig.
    """
    try:
        places = socket.getaddrinfo(
            None if host == "*" else host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        family, kind, protocol, _, address = places[0]
        with contextlib.closing(socket.socket(family, kind, protocol)) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise AddressInUse(
                f"gRPC port {port} on {host} is in use; choose another with --grpc-port (-1: none)"
            ) from None
        raise InvalidConfig(
            f"cannot listen on {host}, port {port}, for gRPC: {error.strerror}"
        ) from None
