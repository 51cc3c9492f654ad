"""The controller's shell: sockets, one timer and the log files round the scheduler's brain.

One step, whatever woke it: drain every socket that said it has input, hand each message to `handle`, call
`schedule` once, perform the effects in order, arm the one timer. Everything runs in one thread; the
log writers' threads wait in write(2), and form the few rows that wait with them.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from slosched import clock
from slosched.addresses import bracketed, parse_bind
from slosched.config import CONTROLLER_PORT, ControllerConfig
from slosched.core.scheduler.interface import (
    ActionDone,
    ClientLost,
    Drain,
    Effect,
    Event,
    FromWorker,
    Keep,
    Note,
    RequestDone,
    SendFailed,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.report import health_report, status_parts
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.daemon.doorway import Doorway
from slosched.daemon.http import HttpServer, probe_routes
from slosched.daemon.in_slices import Slice, joined
from slosched.daemon.live import live_routes
from slosched.daemon.metrics import ControllerCollector, metrics_routes
from slosched.daemon.run_log import RunLog
from slosched.errors import AddressInUse, InvalidConfig, MalformedMessage
from slosched.messages import (
    Action,
    ControllerHello,
    ControllerToWorker,
    HeartbeatAck,
    Infer,
    InferReply,
    WorkerToController,
)
from slosched.transport.bundles import ActionBundle, ForClients, ReplyBundle, ResultBundle
from slosched.transport.codec import (
    Frame,
    decode_from_worker,
    is_long,
    pieces_of,
)
from slosched.transport.frames import random_input
from slosched.transport.outbox import Outbox
from slosched.transport.sockets import AsyncReader, BadMessages, Dealer, Router, finish_sending
from slosched.units import NS_PER_S
from slosched.version import __version__

_DRAIN_WITHIN_S = 5.0
_LAST_ANSWERS_MS = 500
#: A step that read many messages, and all there were, is followed by a rest, so that the next one again
#: finds many: what a step costs beside its messages is then shared by more of them, here and at every peer.
_REST_NS = 20_000
_REST_FROM, _REST_AT_MOST_NS = 4, 400_000

Announce = Callable[[str], None]


class ControllerServer:
    """A controller in the running event loop: `await start()`, then `await run()` until stopped.

    `announce` gets each line for the operator. Raises AddressInUse, InvalidConfig, UnknownName.
    """

    def __init__(self, config: ControllerConfig, *, announce: Announce) -> None:
        if not config.workers:
            raise InvalidConfig("no worker is named; give --workers host:port[,host:port...]")
        self.config = config
        self._announce = announce
        self.scheduler = Scheduler(
            config.scheduler,
            worker_count=len(config.workers),
            incarnation=int.from_bytes(os.urandom(7), "little"),
            secret=int.from_bytes(os.urandom(7), "little"),
            version=__version__,
            worker_addresses=config.workers,
        )
        self._router = Router(config.bind, config.port)
        self.port = self._router.port
        self._dealers = [Dealer(address) for address in config.workers]
        self._to_clients: Outbox[bytes, InferReply] = Outbox(
            self._send_to_client, ReplyBundle, failed=self._client_failed
        )
        self._to_workers: Outbox[int, Action] = Outbox(
            self._send_to_worker, ActionBundle, failed=self._worker_failed
        )
        self._bad = BadMessages(announce)
        self._routes = probe_routes(
            status=self._status,
            health=lambda: health_report(self.scheduler),
        )
        self._http = HttpServer(self._routes)
        self._values: ValueStore[Frame] = ValueStore(random_input)
        self._long: set[asyncio.Task[None]] = set()  # long replies that are being encoded
        self._doorway = Doorway(
            self.scheduler, self._router, self._values, answer=self._tell_client, bad=self._bad
        )
        self._backlog: list[Event] = []  # facts that performing effects brought to light
        self._stop = asyncio.Event()
        self._stop_requested = 0
        self._scheduled = False
        self._heard = 0  # messages of this step
        self._rested_ns = 0  # no message wakes the loop before this
        self._resting = False  # one came, and the timer is armed for that
        self._due = True  # something was heard, or the timer rang: time to decide
        self._clients_wait = False  # the clients' socket has input,
        self._workers_wait: set[int] = set()  # and the sockets of these workers
        self._router_touched = False  # sent to, or read in part, in this step
        self._dealers_touched: set[int] = set()
        self._closed = False
        self._failure: Exception | None = None
        self.run_log: RunLog | None = None

    # ------------------------------------------------------------------------------ running

    async def start(self) -> None:
        """Listen, greet the workers, open the run directory, and say so in one line."""
        config = self.config
        loop = self._loop = asyncio.get_running_loop()
        self.run_log = RunLog.open(config, announce=self._announce)
        self._routes |= live_routes(self.scheduler, self.run_log.last_minutes, clock=clock.now_ns)
        self._add_metrics(self.run_log)
        self._timer = clock.Timer()
        loop.add_reader(self._timer.fileno(), self._on_timer)
        self._reader = AsyncReader(self._router, self._clients_said)
        self._worker_readers = [
            AsyncReader(dealer, partial(self._worker_said, worker_id))
            for worker_id, dealer in enumerate(self._dealers)
        ]
        await self._start_http()
        self._wake()
        if config.busy_poll:
            loop.call_soon(self._poll)
        http = f"; http://127.0.0.1:{self._http.port}" if self._http.port else ""
        host = bracketed(parse_bind(config.bind))
        self._announce(
            f"slosched controller ready on {host}:{self.port}: {config.scheduler.policy}"
            f"{' (paper)' if config.scheduler.fidelity == 'paper' else ''}, "
            f"{len(config.workers)} worker address(es){http}; telemetry in {self.run_log.directory}"
        )

    async def _start_http(self) -> None:
        wanted = self.config.http_port
        if wanted < 0:
            return
        default = self.port + 1 if self.config.port == CONTROLLER_PORT else 0
        try:
            await self._http.start("127.0.0.1", wanted or default)
        except AddressInUse as error:
            if wanted:
                raise
            self._announce(f"no HTTP: {error}")

    def _add_metrics(self, log: RunLog) -> None:
        collector = ControllerCollector(
            self.scheduler, log.tally, log.recent,
            bad_messages=lambda: self._bad.count, rows_dropped=log.rows_dropped,
        )  # fmt: skip
        self._routes.update(metrics_routes(collector))
        self.scheduler.counted = log.tally.report

    async def run(self) -> None:
        """Serve until `stop` is called, then finish what is in flight and close everything."""
        try:
            await self._console_until_stopped()
            if self._failure is None:
                await self._drain()
        finally:
            await self.close()
        if self._failure is not None:
            raise self._failure

    def stop(self) -> None:
        """End in good order; called a second time, at once. Safe from signal handlers of the loop."""
        self._stop_requested += 1
        self._stop.set()

    async def _console_until_stopped(self) -> None:
        while not self._stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 10.0)
            assert self.run_log is not None
            for line in self.run_log.console_lines(clock.now_ns()):
                self._announce(line)
            if line := self._doorway.console_line():
                self._announce(line)

    async def _drain(self) -> None:
        self._backlog.append(Drain())
        self._wake()
        deadline_ns = clock.now_ns() + int(_DRAIN_WITHIN_S * NS_PER_S)
        while not self.scheduler.idle and clock.now_ns() < deadline_ns and self._stop_requested < 2:
            await asyncio.sleep(0.02)
        again = True
        while again:
            self._perform_all(self.scheduler.abandon(now_ns=clock.now_ns()))
            await asyncio.sleep(0)  # so many answers at a time as hold up nobody
            again = self.scheduler.slicing
        if self._long:
            await asyncio.wait(self._long, timeout=1.0)

    async def close(self) -> None:
        """Close sockets, timer and files. Idempotent."""
        if self._closed:
            return
        self._closed = True
        for task in self._long:
            task.cancel()
        if hasattr(self, "_reader"):
            for reader in (self._reader, *getattr(self, "_worker_readers", ())):
                reader.close()
        if hasattr(self, "_timer"):
            with suppress(ValueError, OSError):
                self._loop.remove_reader(self._timer.fileno())
            self._timer.close()
        self._router.close_after(_LAST_ANSWERS_MS)
        for dealer in self._dealers:
            dealer.close()
        await self._http.close()
        if self.run_log is not None:
            scheduler = self.scheduler
            self.run_log.close(
                arrived=scheduler.arrived, answered=scheduler.answered, by_code=scheduler.by_code,
                refused_at_door=scheduler.door.refused, bad_messages=self._bad.count,
            )  # fmt: skip

    # --------------------------------------------------------------------------------- step

    def _on_timer(self) -> None:
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
            self._timer.arm(min(self._rested_ns, self._timer.armed_for_ns or self._rested_ns))
        else:
            self._loop.call_soon(self._step)

    def _clients_said(self) -> None:
        self._clients_wait = True
        self._wake()
        if self._resting:
            self._router.has_input()  # takes the edge off, or the loop would call again and again

    def _worker_said(self, worker_id: int) -> None:
        self._workers_wait.add(worker_id)
        self._wake()
        if self._resting:
            self._dealers[worker_id].has_input()

    def _poll(self) -> None:
        """Look at the sockets once per round of the event loop, which then never sleeps."""
        if self._closed or self._failure is not None:
            return
        for reader in (self._reader, *self._worker_readers):
            reader.recheck()
        self._loop.call_soon(self._poll)

    def _step(self) -> None:
        self._scheduled = self._resting = False
        if self._closed:
            return
        try:
            self._turn()
        except Exception as error:
            # A bug of ours. Half a step was done, so going on could break any promise: end, loudly.
            self._failure = error
            self._stop_requested = 2
            self._stop.set()

    def _turn(self) -> None:
        scheduler = self.scheduler
        if self._workers_wait:
            self._receive_from_workers()
        clients_wait, self._clients_wait = self._clients_wait, False
        if clients_wait:
            heard = self._doorway.receive()
            self._heard += heard
            self._due |= heard > 0
        if not self._due and not self._backlog:
            return  # a descriptor becomes readable also when there is nothing to read
        self._due = False
        now_ns = clock.now_ns()
        backlog, self._backlog = self._backlog, []
        for event in backlog:
            scheduler.handle(event, now_ns=now_ns)
        self._perform_all(scheduler.schedule(now_ns=now_ns))
        self._values.step_ended()
        heard, self._heard = self._heard, 0
        if heard >= _REST_FROM and not self.config.busy_poll and not self._router.unread:
            self._rested_ns = clock.now_ns() + min(heard * _REST_NS, _REST_AT_MOST_NS)
        self._timer.arm(scheduler.next_wakeup_ns())
        if clients_wait:
            self._doorway.step_ended()
        self._look_again()
        if self._backlog:
            self._wake()

    def _look_again(self) -> None:
        """Ask each socket that was sent to, or read in part, whether more has come: its edge may be gone."""
        if self._router_touched or self._router.unread:
            self._router_touched = False
            self._reader.recheck()
        if self._dealers_touched:
            for worker_id in self._dealers_touched:
                self._worker_readers[worker_id].recheck()
            self._dealers_touched.clear()

    def _receive_from_workers(self) -> None:
        # In the order of their numbers, so that the same messages give the same decisions.
        for worker_id in sorted(self._workers_wait):
            dealer = self._dealers[worker_id]
            for frames in dealer.receive():
                self._due = True
                try:
                    if not frames:
                        raise MalformedMessage("an empty message")
                    message = decode_from_worker(frames[0])
                    if len(frames) > 1 and isinstance(message, ResultBundle):
                        raise MalformedMessage("a bundle with a frame behind it")
                except MalformedMessage as error:
                    self._bad.note(dealer.address.encode(), f"worker {dealer.address}: {error}")
                    continue
                outputs = tuple([self._values.came(frame) for frame in frames[1:]])
                now_ns = clock.now_ns()
                said: tuple[WorkerToController, ...] = (
                    message.results if isinstance(message, ResultBundle) else (message,)
                )
                self._heard += len(said)
                for each in said:
                    self.scheduler.handle(FromWorker(worker_id, each, outputs), now_ns=now_ns)
            if dealer.unread:
                self._dealers_touched.add(worker_id)
        self._workers_wait.clear()

    # ------------------------------------------------------------------------------ effects

    def _perform_all(self, effects: list[Effect]) -> None:
        log = self.run_log
        assert log is not None
        for effect in effects:
            if isinstance(effect, ToClient):
                self._to_client(effect)
            elif isinstance(effect, ToWorker):
                self._to_worker(effect)
            elif isinstance(effect, RequestDone):
                self._values.release(effect.record.key)
                log.request(effect.record)
            elif isinstance(effect, ActionDone):
                log.action(effect.record)
            elif isinstance(effect, Keep):
                self._values.keep(effect.value_id, effect.owner)
            elif isinstance(effect, Note):
                self._announce(effect.text if effect.level == "info" else f"warning: {effect.text}")
        self._to_workers.flush()
        self._to_clients.flush()

    def _to_client(self, effect: ToClient) -> None:
        frames = self._values.get(effect.output)
        if frames:
            self._to_clients.send(effect.client, effect.message, frames)
        else:
            self._tell_client(effect.client, effect.message)

    def _tell_client(self, peer: bytes, message: ForClients) -> None:
        if type(message) is InferReply:
            self._to_clients.put(peer, message)
            return
        if is_long(message):
            task = self._loop.create_task(self._send_long(peer, message))
            self._long.add(task)
            task.add_done_callback(self._long.discard)
            return
        self._to_clients.send(peer, message, [])

    async def _send_long(self, client: bytes, message: ForClients) -> None:
        """Encode and send what takes longer than requests should wait; others may overtake it."""
        encoded = await joined(pieces_of(message))
        if not self._closed:
            self._to_clients.send(client, message, [], encoded)
            self._look_again()
            if self._backlog:  # it could not be sent
                self._wake()

    async def _status(self) -> dict[str, Any]:
        report: dict[str, Any] = {}
        slice_ = Slice()
        for _ in status_parts(report, self.scheduler, now_ns=clock.now_ns()):
            if slice_.over():
                await slice_.rest()
        return report

    def _to_worker(self, effect: ToWorker) -> None:
        message, worker_id = effect.message, effect.worker_id
        frames: list[Frame] = []
        if isinstance(message, Infer):
            frames = self._values.inputs(effect.inputs, message.input_sizes)
        if frames or isinstance(message, ControllerHello | HeartbeatAck):
            self._to_workers.send(worker_id, message, frames)
        else:
            self._to_workers.put(worker_id, message)

    def _send_to_client(self, client: bytes, frames: list[Frame]) -> bool:
        self._router_touched = True
        return self._router.send(client, frames)

    def _send_to_worker(self, worker_id: int, frames: list[Frame]) -> bool:
        self._dealers_touched.add(worker_id)
        return self._dealers[worker_id].send(frames)

    def _worker_failed(self, worker_id: int, message: ControllerToWorker) -> None:
        self._backlog.append(SendFailed(worker_id, message))

    def _client_failed(self, client: bytes, message: object) -> None:
        self._backlog.append(ClientLost(client))


def run_controller(config: ControllerConfig, *, announce: Announce) -> int:
    """Run a controller until SIGINT or SIGTERM; returns the exit code."""
    import uvloop

    # The log writers wait in write(2); a switch asked for by one of them must not take 5 ms.
    sys.setswitchinterval(0.001)
    clock.set_timer_slack()

    async def main() -> None:
        server = ControllerServer(config, announce=announce)
        try:
            await server.start()
        except BaseException:
            await server.close()
            raise
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, server.stop)
        # What exists now lives for ever; the rest is young. Full collections would cost milliseconds, and one
        # of 50,000 young objects, which a load of 10,000 copies makes, nearly three.
        gc.collect()
        gc.freeze()
        gc.set_threshold(2_000, 5, 1_000)
        await server.run()

    uvloop.run(main())
    finish_sending(2 * _LAST_ANSWERS_MS)
    return 0
