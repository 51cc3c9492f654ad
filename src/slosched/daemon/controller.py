"""The controller's shell: sockets, one timer and the log files round the scheduler's brain.

Everything runs in one thread; the log writers' threads wait in write(2), and form the few rows that wait
with them. Who may change what:

    ControllerServer   here             starts, ends and owns every part below; counts stop requests
    Steps              steps.py         when to read and decide; alone calls `schedule` and arms the timer
    Doorway            doorway.py       reads clients' messages, and refuses some, between Steps' two halves
    Performer          performer.py     alone sends to peers and writes log rows
    LongReplies        long_replies.py  makes long replies in parts, between steps
    HttpServer         http.py          answers from status.py, live.py and metrics.py, which change nothing

Only Steps and Doorway hand facts to the scheduler; at the end ControllerServer asks it for the last answers.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import sys
from contextlib import suppress
from typing import Any

from slosched import clock
from slosched.addresses import bracketed, parse_bind
from slosched.config import CONTROLLER_PORT, ControllerConfig
from slosched.core.scheduler.interface import Drain
from slosched.core.scheduler.membership import JoinRules
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.daemon.doorway import Doorway
from slosched.daemon.http import HttpServer, probe_routes
from slosched.daemon.in_slices import Slice
from slosched.daemon.live import live_routes
from slosched.daemon.metrics import ControllerCollector, metrics_routes
from slosched.daemon.performer import Performer
from slosched.daemon.run_log import Announce, RunLog
from slosched.daemon.status import Counted, health_report, status_parts
from slosched.daemon.steps import Steps
from slosched.errors import AddressInUse
from slosched.join_key import KEY_BYTES, read_join_key
from slosched.transport.codec import Frame
from slosched.transport.frames import random_input
from slosched.transport.sockets import (
    BadMessages,
    Dealer,
    Router,
    finish_sending,
    use_io_threads,
)
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__

_DRAIN_WITHIN_S = 5.0
#: Long replies that are under way when the controller drains have this long.
_LONG_REPLIES_WITHIN_S = 1.0
_LAST_ANSWERS_MS = 500
_CONSOLE_EVERY_S = 10.0


def io_threads_for(cpus: int) -> int:
    """The usual number of IO threads on this number of CPUs: the loop keeps one to itself."""
    return 1 if cpus < 4 else min(4, cpus // 2)


class ControllerServer:
    """A controller in the running event loop: `await start()`, then `await run()` until stopped.

    `announce` gets each line for the operator. Workers that `config` does not name may register. Raises
    AddressInUse, InvalidConfig, UnknownName.
    """

    def __init__(self, config: ControllerConfig, *, announce: Announce) -> None:
        key = read_join_key(config.join_key) if config.join_key else b""
        self.config = config
        self._announce = announce
        self.scheduler = Scheduler(
            config.scheduler,
            worker_count=len(config.workers),
            incarnation=int.from_bytes(os.urandom(7), "little"),
            secret=int.from_bytes(os.urandom(7), "little"),
            version=__version__,
            worker_addresses=config.workers,
            takes_over=bool(config.cluster_id),
            cluster_id=config.cluster_id or f"random-{os.urandom(8).hex()}",
            join=JoinRules(key, nonce_seed=os.urandom(KEY_BYTES)),
        )
        use_io_threads(config.io_threads or io_threads_for(len(os.sched_getaffinity(0))))
        self._router = Router(config.bind, config.port)
        self.port = self._router.port
        self._dealers = {number: Dealer(address) for number, address in enumerate(config.workers)}
        self._bad = BadMessages(announce)
        self._values: ValueStore[Frame] = ValueStore(random_input)
        self._performer = Performer(
            self.scheduler,
            self._router,
            self._dealers,
            self._values,
            announce=announce,
            connect=lambda worker_id, address: self._steps.connect(worker_id, address),
            after_long=self._sent_long,
            failed=self._failed,
        )
        self._doorway = Doorway(
            self.scheduler,
            self._router,
            self._values,
            answer=self._performer.tell_client,
            bad=self._bad,
        )
        self._steps = Steps(
            self.scheduler,
            self._router,
            self._dealers,
            self._values,
            doorway=self._doorway,
            performer=self._performer,
            bad=self._bad,
            busy_poll=config.busy_poll,
            announce=announce,
            failed=self._failed,
        )
        self._counted: Counted = dict
        self._routes = probe_routes(
            status=self._status,
            health=lambda: health_report(self.scheduler),
        )
        self._http = HttpServer(self._routes)
        self._stop = asyncio.Event()
        self._stop_requests = 0
        self._closed = False
        self._failure: Exception | None = None
        self.run_log: RunLog | None = None

    # ------------------------------------------------------------------------------ running

    async def start(self) -> None:
        """Listen, greet the workers, open the run directory, and announce all that in one line."""
        config = self.config
        log = self.run_log = self._performer.log = RunLog.open(config, announce=self._announce)
        self._routes |= live_routes(
            self.scheduler,
            log.last_minutes,
            clock=clock.now_ns,
            cascades=log.tally.cascades,
            calls=log.tally.calls,
        )
        self._add_metrics(log)
        await self._start_http()
        self._steps.begin()
        http = f"; http://127.0.0.1:{self._http.port}" if self._http.port else ""
        host = bracketed(parse_bind(config.bind))
        count = len(config.workers)
        workers = f"{count} worker address(es)" if count else "waits for workers to register"
        if config.cluster_id:
            workers += f", cluster {config.cluster_id}"
        self._announce(
            f"slosched controller ready on {host}:{self.port}: {config.scheduler.policy}"
            f"{' (paper)' if config.scheduler.fidelity == 'paper' else ''}, "
            f"{workers}{http}; telemetry in {log.directory}"
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
            self.scheduler,
            log.tally,
            log.recent,
            bad_messages=lambda: self._bad.count,
            rows_dropped=log.rows_dropped,
        )
        self._routes.update(metrics_routes(collector))
        self._counted = self._performer.long_replies.counted = log.tally.report

    async def _status(self) -> dict[str, Any]:
        """The report for GET /status, built in slices."""
        report: dict[str, Any] = {}
        slice_ = Slice()
        for _ in status_parts(report, self.scheduler, now_ns=clock.now_ns(), counted=self._counted):
            if slice_.is_over():
                await slice_.rest()
        return report

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
        self._stop_requests += 1
        self._stop.set()

    def _failed(self, error: Exception) -> None:
        """An internal error left half of a step or a reply done: end loudly, without a drain."""
        self._failure = error
        self._stop_requests = 2
        self._stop.set()

    def _sent_long(self) -> None:
        self._steps.sent_between()

    async def _console_until_stopped(self) -> None:
        while not self._stop.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), _CONSOLE_EVERY_S)
            assert self.run_log is not None
            for line in self.run_log.console_lines(clock.now_ns()):
                self._announce(line)
            if line := self._doorway.console_line():
                self._announce(line)

    async def _drain(self) -> None:
        owes_answers = not self.scheduler.idle
        self._steps.take(Drain())
        deadline_ns = clock.now_ns() + int(_DRAIN_WITHIN_S * NS_PER_S)
        while not self.scheduler.idle and clock.now_ns() < deadline_ns and self._stop_requests < 2:
            await asyncio.sleep(0.02)
        again = True
        while again:
            self._performer.perform(self.scheduler.abandon(now_ns=clock.now_ns()))
            await asyncio.sleep(0)  # a slice of the answers at a time, and other work in between
            again = self.scheduler.slicing
        await self._performer.long_replies.finish(within_s=_LONG_REPLIES_WITHIN_S)
        if owes_answers:
            await self._until_read()

    async def _until_read(self) -> None:
        """Leave clients time to read the last answers: a connection that is closed loses those unread."""
        deadline_ns = clock.now_ns() + _LAST_ANSWERS_MS * NS_PER_MS
        while clock.now_ns() < deadline_ns and self._stop_requests < 2:
            await asyncio.sleep(0.02)

    async def close(self) -> None:
        """Close sockets, timer and files. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._performer.long_replies.close()
        self._steps.close()
        self._router.close_after(_LAST_ANSWERS_MS)
        for dealer in self._dealers.values():
            dealer.close()
        await self._http.close()
        if self.run_log is not None:
            scheduler = self.scheduler
            self.run_log.close(
                arrived=scheduler.arrived,
                answered=scheduler.answered,
                by_code=scheduler.by_code,
                refused_at_door=scheduler.door.refused,
                bad_messages=self._bad.count,
            )


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
        # What exists now lives for ever; the rest is young. A full collection would cost milliseconds, and a
        # collection of the 50,000 young objects that a load of 10,000 copies makes nearly three.
        gc.collect()
        gc.freeze()
        gc.set_threshold(2_000, 5, 1_000)
        await server.run()

    uvloop.run(main())
    finish_sending(2 * _LAST_ANSWERS_MS)
    return 0
