"""Carries out the scheduler's effects: sends to clients and workers, keeps tensors, writes log rows.

Nothing else sends to a peer or writes a row. What one peer is sent in a step leaves when the step's effects are
performed, as one message where its frames are small (transport/outbox.py). A send that fails becomes a fact for
the next step, in `backlog`; the performer never calls the scheduler.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from slosched.core.scheduler.interface import (
    ActionDone,
    CallDone,
    CallPartDone,
    ClientLost,
    ConnectWorker,
    Effect,
    Event,
    Keep,
    Note,
    PlanMade,
    RequestDone,
    SendFailed,
    StageDone,
    StatusAsked,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.daemon.long_replies import LongReplies
from slosched.daemon.run_log import Announce, RunLog
from slosched.messages import (
    ControllerHello,
    ControllerToWorker,
    HeartbeatAck,
    Infer,
    InferReply,
)
from slosched.transport.bundles import ActionBundle, Bundled, ForClients, ReplyBundle
from slosched.transport.codec import Frame, is_long
from slosched.transport.outbox import Outbox
from slosched.transport.sockets import Dealer, Router


class Performer:
    """`log` must be set before the first effect.

    `dealers` are the workers' sockets by their numbers, and `connect` opens the one of a worker at another
    address (or closes it: ""). `after_long` is called after a send between two steps, and `failed` with an
    exception from there.

    `router_touched` and `dealers_touched` say what was sent to: a send can take the edge of a socket's
    descriptor (transport/sockets.py). Steps clears them.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        router: Router,
        dealers: Mapping[int, Dealer],
        values: ValueStore[Frame],
        *,
        announce: Announce,
        connect: Callable[[int, str], None],
        after_long: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None:
        self._router, self._dealers, self._values = router, dealers, values
        self._announce, self._connect, self._after_long = announce, connect, after_long
        self._to_clients: Outbox[bytes, InferReply] = Outbox(
            self._send_to_client, ReplyBundle, failed=self._client_failed
        )
        self._to_workers: Outbox[int, Bundled] = Outbox(
            self._send_to_worker, ActionBundle, failed=self._worker_failed
        )
        self.long_replies = LongReplies(scheduler, send=self._send_long, failed=failed)
        self.log: RunLog | None = None
        #: Facts that sending brought to light; Steps takes them.
        self.backlog: list[Event] = []
        self.router_touched = False
        self.dealers_touched: set[int] = set()

    def perform(self, effects: Sequence[Effect]) -> None:
        """Carry out the effects of one step, in order."""
        log = self.log
        assert log is not None
        for effect in effects:
            if isinstance(effect, ToClient):
                self._to_client(effect)
            elif isinstance(effect, ToWorker):
                self._to_worker(effect)
            elif isinstance(effect, RequestDone):
                self._values.release(effect.record.key)
                if not effect.child:
                    log.request(effect.record)
            elif isinstance(effect, ActionDone):
                log.action(effect.record)
            elif isinstance(effect, Keep):
                self._values.keep(effect.value_id, effect.owner)
            elif isinstance(effect, StageDone):
                log.stage(effect.record)
            elif isinstance(effect, PlanMade):
                log.plan(effect.record)
            elif isinstance(effect, CallDone):
                log.call(effect.record)
            elif isinstance(effect, CallPartDone):
                log.call_part(effect.record)
            elif isinstance(effect, Note):
                self._announce(effect.text if effect.level == "info" else f"warning: {effect.text}")
            elif isinstance(effect, ConnectWorker):
                self._connect(effect.worker_id, effect.address)
            elif isinstance(effect, StatusAsked):
                self.long_replies.status(effect)
        self._to_workers.flush()
        self._to_clients.flush()

    def tell_client(self, client: bytes, message: ForClients) -> None:
        """Send a message without frames."""
        if type(message) is InferReply:
            self._to_clients.put(client, message)
        elif is_long(message):
            self.long_replies.encode(client, message)
        else:
            self._to_clients.send(client, message, [])

    def _to_client(self, effect: ToClient) -> None:
        message = effect.message
        if type(message) is InferReply:
            self._to_clients.put(effect.client, message, self._values.get(effect.output))
        else:
            self.tell_client(effect.client, message)

    def _to_worker(self, effect: ToWorker) -> None:
        message, worker_id = effect.message, effect.worker_id
        frames: list[Frame] = []
        if isinstance(message, Infer):
            frames = self._values.inputs(effect.inputs, message.input_sizes)
        elif effect.inputs:  # of a Call, or of a ChildReply
            frames = self._values.get(effect.inputs[0])
        if isinstance(message, ControllerHello | HeartbeatAck):
            self._to_workers.send(worker_id, message, frames)
        else:
            self._to_workers.put(worker_id, message, frames)

    def _send_long(self, client: bytes, message: ForClients, encoded: bytes) -> None:
        self._to_clients.send(client, message, [], encoded)
        self._after_long()

    def _send_to_client(self, client: bytes, frames: list[Frame]) -> bool:
        self.router_touched = True
        return self._router.send(client, frames)

    def _send_to_worker(self, worker_id: int, frames: list[Frame]) -> bool:
        dealer = self._dealers.get(worker_id)
        if dealer is None:  # it has left
            return False
        self.dealers_touched.add(worker_id)
        return dealer.send(frames)

    def _worker_failed(self, worker_id: int, message: ControllerToWorker) -> None:
        self.backlog.append(SendFailed(worker_id, message))

    def _client_failed(self, client: bytes, message: object) -> None:
        self.backlog.append(ClientLost(client))
