"""Sessions with clients: hello, liveness by ticks (as with workers, sessions.py), and leaving."""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.config import CLIENT_LOST_AFTER_NS
from slosched.core.scheduler.interface import Effect, Note, ToClient
from slosched.core.scheduler.sessions import TICK_NS
from slosched.core.scheduler.state import Client, Request
from slosched.core.scheduler.weights import Weights, what_is_wrong_with_weight
from slosched.messages import PROTOCOL_VERSION, ClientHello, Refused, Welcome

_NAME_LENGTH = 64
_TICKS_UNTIL_LOST = CLIENT_LOST_AFTER_NS // TICK_NS


class ClientSessions:
    """Who is connected. `end_request` answers a leaving client's requests (for the records alone)."""

    def __init__(
        self,
        *,
        emit: Callable[[Effect], None],
        welcome: Welcome,
        weights: Weights,
        end_request: Callable[[Request, str], None],
        release: Callable[[Client], None],
    ) -> None:
        self._emit = emit
        self._welcome = welcome
        self._weights = weights
        self._end_request = end_request
        self._release = release
        self.by_identity: dict[bytes, Client] = {}

    def hello(self, identity: bytes, message: ClientHello) -> None:
        if message.protocol != PROTOCOL_VERSION:
            reason = (
                f"this controller speaks protocol {PROTOCOL_VERSION}, the client {message.protocol}: "
                "install the same version of slosched on both"
            )
            self._emit(ToClient(identity, Refused(-1, Code.INVALID_REQUEST, reason)))
            return
        wrong = what_is_wrong_with_weight(message.weight)
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
            client = Client(identity, message.incarnation, name, weight, name or identity)
            client.bundles = message.bundles
            self.by_identity[identity] = client
        self._emit(ToClient(identity, self._welcome))

    def drop(self, identity: bytes, why: str) -> None:
        """End its unanswered requests and release its models. Unknown identities are fine."""
        client = self.by_identity.pop(identity, None)
        if client is None:
            return
        for request in list(client.requests.values()):
            self._end_request(request, f"its client is gone: {why}")
        self._release(client)

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
