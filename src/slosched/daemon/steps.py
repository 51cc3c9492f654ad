"""When the controller reads its sockets and decides: the steps of its event loop.

One step, whatever woke it: drain each socket that has input, hand every message to `Scheduler.handle`, call
`schedule` once, have the effects performed in order, arm the one timer. Only Steps calls `schedule`, and
only Steps and Doorway (for clients' messages) call `handle`.

After a step that read many messages the loop rests a little, so that the next step again finds many: more
messages then share the cost of a step, here and at every peer. Descriptors of ZeroMQ sockets are
edge-triggered, so after each send and each partial read the socket is asked again (transport/sockets.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

from slosched import clock
from slosched.core.scheduler.interface import Event, FromWorker
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.daemon.doorway import Doorway
from slosched.daemon.performer import Performer
from slosched.daemon.run_log import Announce
from slosched.errors import MalformedMessage, SloschedError
from slosched.messages import WorkerToController
from slosched.transport.bundles import ResultBundle, with_frames
from slosched.transport.codec import Frame, decode_from_worker
from slosched.transport.sockets import AsyncReader, BadMessages, Dealer, Router

#: A rest follows a step that read `_REST_FROM` messages or more: `_REST_NS` for each, with an upper limit.
_REST_NS = 20_000
_REST_FROM, _REST_AT_MOST_NS = 4, 400_000


class Steps:
    """The steps of the running event loop, from `begin` to `close`.

    With `busy_poll` the sockets are looked at in each round of the loop, which never sleeps. `failed` gets an
    exception of a step, and no further step follows.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        router: Router,
        dealers: dict[int, Dealer],
        values: ValueStore[Frame],
        *,
        doorway: Doorway,
        performer: Performer,
        bad: BadMessages,
        busy_poll: bool,
        announce: Announce,
        failed: Callable[[Exception], None],
    ) -> None:
        self._scheduler, self._router, self._dealers = scheduler, router, dealers
        self._values, self._doorway, self._performer = values, doorway, performer
        self._bad, self._busy_poll, self._failed = bad, busy_poll, failed
        self._announce = announce
        self._scheduled = False  # a step follows soon
        self._heard = 0  # messages of this step
        self._rested_ns = 0  # no message wakes the loop before this
        self._resting = False  # one came, and the timer is armed for the end of the rest
        self._due = True  # a message came or the timer rang: time to decide
        self._clients_wait = False  # the clients' socket has input,
        self._workers_wait: set[int] = set()  # and the sockets of these workers
        self._ended = False
        self._timer: clock.Timer | None = None
        self._client_reader: AsyncReader | None = None
        self._worker_readers: dict[int, AsyncReader] = {}

    def begin(self) -> None:
        """Listen to the sockets and the timer in the running event loop, and take the first step."""
        loop = self._loop = asyncio.get_running_loop()
        self._timer = clock.Timer()
        loop.add_reader(self._timer.fileno(), self._on_timer)
        self._client_reader = AsyncReader(self._router, self._clients_said)
        for worker_id in self._dealers:
            self._listen(worker_id)
        self._wake()
        if self._busy_poll:
            loop.call_soon(self._poll)

    def close(self) -> None:
        """No further step. Idempotent."""
        self._ended = True
        for reader in self._readers():
            reader.close()
        if self._timer is not None:
            with suppress(ValueError, OSError):
                self._loop.remove_reader(self._timer.fileno())
            self._timer.close()
            self._timer = None

    def connect(self, worker_id: int, address: str) -> None:
        """Reach a worker at `address` from now on, and no longer where it was; "": nowhere."""
        reader, dealer = (
            self._worker_readers.pop(worker_id, None),
            self._dealers.pop(worker_id, None),
        )
        if reader is not None:
            reader.close()
        if dealer is not None:
            dealer.close()
        self._workers_wait.discard(worker_id)
        self._performer.dealers_touched.discard(worker_id)
        if not address:
            return
        try:
            self._dealers[worker_id] = Dealer(address)
        except SloschedError as error:
            self._announce(f"warning: worker {worker_id} at {address} cannot be reached: {error}")
            return
        self._listen(worker_id)

    def _listen(self, worker_id: int) -> None:
        dealer = self._dealers[worker_id]
        self._worker_readers[worker_id] = AsyncReader(dealer, partial(self._worker_said, worker_id))

    def _readers(self) -> list[AsyncReader]:
        clients = [self._client_reader] if self._client_reader is not None else []
        return [*clients, *self._worker_readers.values()]

    def take(self, event: Event) -> None:
        """Hand this fact to the scheduler in a step that follows soon."""
        self._performer.backlog.append(event)
        self._wake()

    def sent_between(self) -> None:
        """A message was sent between two steps: its socket may have input, or the send may have failed."""
        if self._ended:
            return
        self._look_again()
        if self._performer.backlog:
            self._wake()

    # ------------------------------------------------------------------------------- waking

    def _on_timer(self) -> None:
        assert self._timer is not None
        self._timer.clear()
        self._due = True
        self._step()

    def _wake(self) -> None:
        """Run one step soon: several sockets that became readable together share it."""
        if self._scheduled:
            return
        self._scheduled = True
        self._resting = self._rested_ns > clock.now_ns()
        if self._resting:
            assert self._timer is not None
            self._timer.arm(min(self._rested_ns, self._timer.armed_for_ns or self._rested_ns))
        else:
            self._loop.call_soon(self._step)

    def _clients_said(self) -> None:
        self._clients_wait = True
        self._wake()
        if self._resting:
            self._router.has_input()  # takes the edge off, or the loop would call again and again

    def _worker_said(self, worker_id: int) -> None:
        dealer = self._dealers.get(worker_id)
        if dealer is None:  # it has left
            return
        self._workers_wait.add(worker_id)
        self._wake()
        if self._resting:
            dealer.has_input()

    def _poll(self) -> None:
        """Look at the sockets once per round of the event loop, which then never sleeps."""
        if self._ended:
            return
        for reader in self._readers():
            reader.recheck()
        self._loop.call_soon(self._poll)

    # ------------------------------------------------------------------------------- a step

    def _step(self) -> None:
        self._scheduled = self._resting = False
        if self._ended:
            return
        try:
            self._turn()
        except Exception as error:
            self._ended = True  # half of a step was done: going on could break any promise
            self._failed(error)

    def _turn(self) -> None:
        scheduler, performer = self._scheduler, self._performer
        if self._workers_wait:
            self._receive_from_workers()
        clients_wait, self._clients_wait = self._clients_wait, False
        if clients_wait:
            heard = self._doorway.receive()
            self._heard += heard
            self._due |= heard > 0
        if not self._due and not performer.backlog:
            return  # a descriptor becomes readable also when there is nothing to read
        self._due = False
        now_ns = clock.now_ns()
        backlog, performer.backlog = performer.backlog, []
        for event in backlog:
            scheduler.handle(event, now_ns=now_ns)
        performer.perform(scheduler.schedule(now_ns=now_ns))
        self._values.step_ended()
        heard, self._heard = self._heard, 0
        if heard >= _REST_FROM and not self._busy_poll and not self._router.unread:
            self._rested_ns = clock.now_ns() + min(heard * _REST_NS, _REST_AT_MOST_NS)
        assert self._timer is not None
        self._timer.arm(scheduler.next_wakeup_ns())
        if clients_wait:
            self._doorway.step_ended()
        self._look_again()
        if performer.backlog:
            self._wake()

    def _look_again(self) -> None:
        """Ask each socket that was sent to, or read in part, whether more has come: its edge may be gone."""
        performer = self._performer
        if performer.router_touched or self._router.unread:
            performer.router_touched = False
            assert self._client_reader is not None
            self._client_reader.recheck()
        if performer.dealers_touched:
            for worker_id in performer.dealers_touched:
                self._worker_readers[worker_id].recheck()
            performer.dealers_touched.clear()

    def _receive_from_workers(self) -> None:
        # In the order of their numbers, so that the same messages give the same decisions.
        for worker_id in sorted(self._workers_wait):
            dealer = self._dealers[worker_id]
            for frames in dealer.receive():
                self._due = True
                try:
                    messages = _from_worker(frames)
                except MalformedMessage as error:
                    self._bad.note(dealer.address.encode(), f"worker {dealer.address}: {error}")
                    continue
                now_ns, came = clock.now_ns(), self._values.came
                self._heard += len(messages)
                for each, its in messages:
                    outputs = tuple([came(frame) for frame in its])
                    self._scheduler.handle(FromWorker(worker_id, each, outputs), now_ns=now_ns)
            if dealer.unread:
                self._performer.dealers_touched.add(worker_id)
        self._workers_wait.clear()


def _from_worker(
    frames: Sequence[Frame],
) -> Sequence[tuple[WorkerToController, Sequence[Frame]]]:
    """The messages of a worker's frames, each with its own. Raises MalformedMessage if they hold none."""
    if not frames:
        raise MalformedMessage("an empty message")
    message = decode_from_worker(frames[0])
    if isinstance(message, ResultBundle):
        return with_frames(message.results, message.frames, frames[1:])
    return [(message, frames[1:])]
