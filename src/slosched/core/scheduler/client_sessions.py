"""Sessions with clients: hello, liveness by ticks (as with workers, sessions.py), and leaving."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from slosched.codes import Code
from slosched.config import CLIENT_LOST_AFTER_NS
from slosched.core.scheduler.client_latency import ClientLatency
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import Note, ToClient
from slosched.core.scheduler.sessions import TICK_NS
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import Client, Request, RequestState
from slosched.core.scheduler.weights import Weights, weight_error
from slosched.messages import PROTOCOL_VERSION, ClientHello, Refused, Welcome

_NAME_LENGTH = 64
#: Requests that are answered between two looks at what a step has left.
_A_TIME = 4
_TICKS_UNTIL_LOST = CLIENT_LOST_AFTER_NS // TICK_NS


class ClientSessions:
    """Who is connected. `end_request` answers a leaving client's requests (for the records alone), and
    `cancel_request` one that its client has cancelled.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        incarnation: int,
        version: str,
        weights: Weights,
        end_request: Callable[[Request, str], None],
        cancel_request: Callable[[Request], None],
        release: Callable[[Client], Work],
    ) -> None:
        self._emit, self._slices = cluster.emit, cluster.slices
        self._weights = weights
        self._welcome = Welcome(
            protocol=PROTOCOL_VERSION,
            version=version,
            incarnation=incarnation,
            policy=cluster.config.policy,
            default_slo_ns=cluster.config.default_slo_ns,
        )
        self._end_request = end_request
        self._cancel_request = cancel_request
        self._release = release
        self.by_identity: dict[bytes, Client] = {}
        #: Clients that are gone and have requests or models left.
        self.leaving: list[Client] = []
        self._cancelled: deque[Request] = deque()  # and not answered yet
        self._cancelling = False

    def hello(self, identity: bytes, message: ClientHello) -> None:
        if message.protocol != PROTOCOL_VERSION:
            reason = (
                f"this controller speaks protocol {PROTOCOL_VERSION}, the client {message.protocol}: "
                "install the same version of slosched on both"
            )
            self._emit(ToClient(identity, Refused(-1, Code.INVALID_REQUEST, reason)))
            return
        wrong = weight_error(message.weight)
        if wrong:
            self._emit(ToClient(identity, Refused(-1, Code.INVALID_REQUEST, wrong)))
            return
        known = self.by_identity.get(identity)
        if known is not None and known.incarnation != message.incarnation:
            self.drop(identity, "it was restarted")
            known = None
        if known is None:
            name = "".join(c for c in message.name[:_NAME_LENGTH] if c.isprintable())
            weight = self._weights.of_client(name, message.weight)
            client = Client(identity, message.incarnation, name, weight)
            if message.slo_from_send:
                client.latency = ClientLatency()
            self.by_identity[identity] = client
        self._emit(ToClient(identity, self._welcome))

    def cancel(self, client: Client, request_id: int) -> None:
        """Answer a request that its client has cancelled; of many, some with each step."""
        request = client.requests.get(request_id)
        if request is None:
            return
        self._cancelled.append(request)
        if not self._cancelling:
            self._cancelling = True
            self._slices.begin(self._cancel())

    def _cancel(self) -> Work:
        while self._cancelled:
            request = self._cancelled.popleft()
            if request.state is not RequestState.ANSWERED:  # meanwhile
                self._cancel_request(request)
            yield ANSWER
        self._cancelling = False

    def drop(self, identity: bytes, why: str) -> None:
        """End its unanswered requests and release its models, in slices. Unknown identities are fine."""
        client = self.by_identity.pop(identity, None)
        if client is None:
            return
        client.gone = True
        self.leaving.append(client)
        release = self._release(client)
        self._slices.begin(self._leave(client, f"its client is gone: {why}", release))

    def _leave(self, client: Client, reason: str, release: Work) -> Work:
        while client.requests:
            some = some_requests(client)
            for request in some:
                self._end_request(request, reason)
            yield len(some) * ANSWER
        yield from release
        self.leaving.remove(client)

    def tick(self) -> None:
        for client in list(self.by_identity.values()):
            if client.heard:
                client.heard, client.silent_ticks = False, 0
                continue
            client.silent_ticks += 1
            if client.silent_ticks >= _TICKS_UNTIL_LOST:
                name = client.name or client.identity.hex()
                self._emit(Note("warning", f"client {name} is silent: its models are released"))
                self.drop(client.identity, "it fell silent")


def some_requests(client: Client) -> list[Request]:
    """The first of its unanswered requests, as many as one part of a slice answers."""
    return list(islice(client.requests.values(), _A_TIME))
