"""The parts that all RPCs have in common: their caller, their request, and how an error ends them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from urllib.parse import unquote

import grpc

from slosched.addresses import is_loopback
from slosched.fronts.errors import FrontError, Status
from slosched.fronts.regions import Regions
from slosched.fronts.rpc.peers import Peers
from slosched.fronts.rpc.statuses import fail, internal
from slosched.fronts.service import Caller, Service
from slosched.fronts.slo import SLO_HEADER
from slosched.units import NS_PER_S

#: A request has arrived whole within this, or its RPC ends; those that need no token are empty or small, and
#: who has none shall not hold RPCs for long.
_ARRIVES_WITHIN_S, _BARE_ARRIVES_WITHIN_S = 30.0, 1.0


class Call:
    """One RPC. `context` is grpc's."""

    def __init__(self, service: Service, peers: Peers, context: grpc.aio.ServicerContext) -> None:
        self.service, self.context = service, context
        self.peer = peers.of(context.peer())
        metadata: dict[str, str | bytes] = {}
        for key, value in context.invocation_metadata() or ():
            metadata.setdefault(key, value)
        self._metadata = metadata
        self._arrives_within_s = _BARE_ARRIVES_WITHIN_S

    def metadata(self, key: str) -> str:
        """The first value of a key of the client's metadata; empty if there is none."""
        value = self._metadata.get(key, "")
        return value if isinstance(value, str) else value.decode("ascii", "replace")

    def caller(self) -> Caller:
        """Who calls. Raises FrontError, 401."""
        caller = self.service.caller(self.metadata("authorization"))
        self._arrives_within_s = _ARRIVES_WITHIN_S
        return caller

    @property
    def slo_header(self) -> str:
        return self.metadata(SLO_HEADER)

    def deadline_ns(self) -> int:
        """What is left of the RPC's deadline; 0: it has none."""
        left_s = self.context.time_remaining()
        return 0 if left_s is None else max(1, int(left_s * NS_PER_S))

    def is_local(self) -> bool:
        """Whether the client is on this host."""
        return is_local(self.peer.name)

    def regions(self, caller: Caller) -> Regions:
        """The caller's shared memory, for a client of this host. Raises FrontError, 400, for another."""
        if not self.is_local():
            raise FrontError(
                Status.INVALID_ARGUMENT,
                "shared memory is for clients on the gateway's own host (loopback)",
            )
        return caller.regions

    async def request(self) -> bytes:
        """The only message of an RPC that takes one. Raises FrontError."""
        try:
            async with asyncio.timeout(self._arrives_within_s):
                data = await self.context.read()
        except TimeoutError:
            raise FrontError(
                Status.DEADLINE_EXCEEDED,
                f"the request did not arrive within {self._arrives_within_s:g} s",
            ) from None
        if data is grpc.aio.EOF:
            raise FrontError(Status.INVALID_ARGUMENT, "the RPC ended without a request")
        assert isinstance(data, bytes)
        self.peer.got(len(data))
        return data


def is_local(peer: str) -> bool:
    """Whether grpc's name of a peer is of this host: ipv4:127.0.0.1:40000, ipv6:%5B::1%5D:40000."""
    kind, _, address = peer.partition(":")
    host = unquote(address).rpartition(":")[0].strip("[]")
    return kind == "unix" or (kind in ("ipv4", "ipv6") and is_loopback(host))


#: An RPC of a request and an answer, which is bytes.
Method = Callable[[Call], Awaitable[bytes]]


def handler(service: Service, peers: Peers, method: Method) -> grpc.RpcMethodHandler:
    """grpc's handler of a method with a request and an answer.

    For grpc the request is a stream, which is the same to a client; so the method reads it itself, and one that
    has no token sends no body.
    """

    async def handle(_requests: object, context: grpc.aio.ServicerContext) -> bytes:
        try:
            call = Call(service, peers, context)
            data = await method(call)
            peers.answers(call.peer, len(data), context)
            return data
        except FrontError as error:
            failure = error
        except grpc.aio.BaseError:  # the RPC has ended already, or its client is gone
            raise
        except Exception as error:  # a bug must not take the client's connection down unanswered
            report(error)
            failure = internal(error)
        await fail(context, failure)
        return b""

    return grpc.stream_unary_rpc_method_handler(handle)


def report(error: Exception) -> None:
    """Tell the event loop's owner about a bug."""
    asyncio.get_running_loop().call_exception_handler(
        {"message": "a gRPC request failed", "exception": error}
    )
