"""Loading a cascade: both of its programs are loaded, and one reply answers for the two."""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.scheduler.cascades import Cascade, Cascades
from slosched.core.scheduler.state import Client, Instance
from slosched.messages import LoadModelReply, LoadModelRequest


class _Load:
    """A load of a cascade: its parts, which name its programs, and the replies to them so far."""

    __slots__ = ("cascade", "client", "parts", "replies")

    def __init__(self, cascade: Cascade, client: Client, parts: list[LoadModelRequest]) -> None:
        self.cascade, self.client, self.parts = cascade, client, parts
        self.replies: dict[str, LoadModelReply] = {}


class CascadeLoads:
    """The loads of cascades that are under way. `instance_of` finds an instance by its number."""

    def __init__(self, cascades: Cascades, instance_of: Callable[[int], Instance | None]) -> None:
        self._cascades, self._instance_of = cascades, instance_of
        #: By the id of each part, a message that was made here: a client may use a request id twice.
        self._loads: dict[int, _Load] = {}

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
        parts = [LoadModelRequest(message.request_id, name) for name in self.programs(message.name)]
        load = _Load(cascade, client, parts)
        self._loads.update((id(part), load) for part in parts)
        return parts

    def replied(self, part: LoadModelRequest, reply: LoadModelReply) -> LoadModelReply | None:
        """The load `part` has ended. Returns the reply for the client; None: it has to wait.

        A reply to anything but a part is returned as it is.
        """
        load = self._loads.pop(id(part), None)
        if load is None:
            return reply
        load.replies[part.name] = reply
        if len(load.replies) < len(load.parts):
            return None
        failed = next((each for each in load.replies.values() if each.code != Code.OK), None)
        if failed is not None:
            return failed
        light, heavy = (
            self._instance_of(load.replies[each.name].models[0].model_id) for each in load.parts
        )
        if light is None or heavy is None:
            reason = "one of its programs was unloaded meanwhile; ask once more"
            return LoadModelReply(reply.request_id, int(Code.CANCELLED), reason)
        wrong = load.cascade.bind(light, heavy)
        if wrong:
            return LoadModelReply(reply.request_id, int(Code.INVALID_REQUEST), wrong)
        return LoadModelReply(reply.request_id, int(Code.OK), "", (load.cascade.info(),))

    def forget(self, client: Client) -> None:
        """The client is gone."""
        for key in [key for key, load in self._loads.items() if load.client is client]:
            del self._loads[key]
