"""Loading a cascade: both of its programs are loaded, and one reply answers for the two."""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.scheduler.cascades import Cascade, Cascades
from slosched.core.scheduler.state import Client, Instance
from slosched.messages import LoadModelReply, LoadModelRequest


class CascadeLoads:
    """The loads of cascades that are under way. `instance_of` finds an instance by its number."""

    def __init__(self, cascades: Cascades, instance_of: Callable[[int], Instance | None]) -> None:
        self._cascades, self._instance_of = cascades, instance_of
        #: By client and request: the cascade, and the replies about its programs so far.
        self._loads: dict[tuple[bytes, int], tuple[Cascade, dict[str, LoadModelReply]]] = {}

    def __bool__(self) -> bool:
        return bool(self._loads)

    def programs(self, name: str) -> tuple[str, ...]:
        """What a load of `name` loads: the programs of a cascade, or the model of that name."""
        cascade = self._cascades.by_name.get(name)
        if cascade is None:
            return (name,)
        return cascade.spec.light.model, cascade.spec.heavy.model

    def begin(self, client: Client, message: LoadModelRequest) -> list[LoadModelRequest]:
        """The loads that `message` stands for; empty if it names no cascade."""
        cascade = self._cascades.by_name.get(message.name)
        if cascade is None:
            return []
        self._loads[client.identity, message.request_id] = cascade, {}
        return [LoadModelRequest(message.request_id, name) for name in self.programs(message.name)]

    def replied(self, client: Client, name: str, reply: LoadModelReply) -> LoadModelReply | None:
        """A load of the program `name` has ended. Returns the reply for the client; None: it has to wait.

        A reply about anything else is returned as it is.
        """
        load = self._loads.get((client.identity, reply.request_id))
        if load is None:
            return reply
        cascade, replies = load
        replies[name] = reply
        if len(replies) < 2:
            return None
        del self._loads[client.identity, reply.request_id]
        failed = next((each for each in replies.values() if each.code != Code.OK), None)
        if failed is not None:
            return failed
        light, heavy = (
            self._instance_of(replies[stage.model].models[0].model_id)
            for stage in (cascade.spec.light, cascade.spec.heavy)
        )
        if light is None or heavy is None:
            reason = "one of its programs was unloaded meanwhile; ask once more"
            return LoadModelReply(reply.request_id, int(Code.CANCELLED), reason)
        wrong = cascade.bind(light, heavy)
        if wrong:
            return LoadModelReply(reply.request_id, int(Code.INVALID_REQUEST), wrong)
        return LoadModelReply(reply.request_id, int(Code.OK), "", (cascade.info(),))

    def forget(self, client: Client) -> None:
        """The client is gone."""
        for key in [key for key in self._loads if key[0] == client.identity]:
            del self._loads[key]
