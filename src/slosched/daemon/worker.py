"""The worker process: one thread and one loop that drive the brain (core/worker) and its devices.

A process that starts GPU work at exact times can afford only one busy Python thread: with a second one the 99th
percentile of start lateness was measured at 60 ms, alone at 23 us. So the loop drains sockets without blocking
and polls devices, and nothing in it may take longer than the time until the next start. Longer work is divided:
a GPU's backend prepares models in slices and copies inputs in pieces, and looks at the due start in between.
Between two turns the loop asks the backend to pass the time (a GPU's backend spins towards the next start), and
sleeps if it does not. Messages enter by worker_doorway.py, and worker_performer.py does what the brain decides.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable
from typing import NoReturn

from slosched.addresses import bracketed, parse_bind
from slosched.child_processes import on_signals
from slosched.clock import Clock, Waiter, now_ns, set_timer_slack
from slosched.config import WorkerConfig
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.interface import (
    ModelPrepared,
    Note,
    ToController,
)
from slosched.core.worker.lanes import gpu_lanes
from slosched.core.worker.stepping import Stepper
from slosched.daemon.backends.base import Backend, functions_of
from slosched.daemon.backends.opening import open_backend, shown_device
from slosched.daemon.blackbox import ENDED, READY, NoBlackbox
from slosched.daemon.housekeeping import Collector, check_core, own_process
from slosched.daemon.registration import Registration
from slosched.daemon.repository.served import ServedRepository
from slosched.daemon.repository.watch import RepositoryWatch
from slosched.daemon.watchdog import Watchdog
from slosched.daemon.worker_doorway import WorkerDoorway
from slosched.daemon.worker_performer import WorkerPerformer
from slosched.errors import DeviceLost, InvalidConfig, PeerUnreachable
from slosched.messages import (
    GpuStats,
)
from slosched.transport.sockets import BadMessages, Router, finish_sending
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__

#: The loop makes a turn at least this often.
_SLEEP_AT_MOST_NS = 100 * NS_PER_MS
#: Running work may take this long after the worker was asked to stop.
_DRAIN_NS = 2 * NS_PER_S
#: The last part of that time, in which calls of functions that still run are ended and answered.
_END_CALLS_NS = 500 * NS_PER_MS
#: A draining worker refuses actions (code 3) for at least this long: some are still in flight.
_REFUSE_NS = 100 * NS_PER_MS
#: Functions that a worker without models prepares side by side: their cold starts are measured meanwhile.
_FUNCTIONS_AT_ONCE = 2
_LINGER_MS = 500
_UNREAD = NoBlackbox()


class WorkerServer:
    """A worker that listens on `config.port` (0: any; see `port`), in the caller's process.

    Either call `run` in a thread of your own, or `start` and `stop`; a context manager calls the latter two.
    `announce` gets human-readable lines; a backend writes into `blackbox` which model's code it runs. Raises
    AddressInUse, InvalidConfig, MissingPackage or UnknownName at once if the worker cannot work.
    """

    def __init__(
        self,
        config: WorkerConfig,
        *,
        announce: Callable[[str], None] | None = None,
        backend: Backend | None = None,
        clock: Clock = now_ns,
        blackbox: NoBlackbox = _UNREAD,
    ) -> None:
        if not isinstance(config, WorkerConfig):
            raise InvalidConfig(f"config must be a WorkerConfig, not {config!r}")
        self.config = config
        self._announce = announce or _ignore
        self._clock = clock
        self._router = Router(config.bind, config.port)  # before torch's slow import: a taken port
        self._repository: ServedRepository | None = None
        try:
            if config.repository:  # it is read while torch is imported
                watch = RepositoryWatch(config.repository, self._announce)
                self._repository = ServedRepository(watch, self._announce)
            self._backend = backend or open_backend(config, blackbox)
        except BaseException:
            self._close_parts()
            raise
        backend = self._backend
        self._gpu_stats: tuple[GpuStats, ...] = ()  # the last that the brain has
        self.lost = ""  # why the devices are gone, once they are
        self._collector: Collector | None = None
        self.port = self._router.port
        incarnation = random.SystemRandom().getrandbits(62)
        self._brain = self._make_brain(incarnation)
        if not set(self._backend.loadable).difference(functions_of(backend)):
            self._brain.prepare_at_once(_FUNCTIONS_AT_ONCE)
        self._performer = WorkerPerformer(
            backend,
            self._router,
            announce=self._announce,
            prepared=self._model_prepared,
            clock=clock,
        )
        self._stepper = Stepper(self._brain, backend.devices, self._performer.perform)
        self._doorway = WorkerDoorway(
            self._brain, self._stepper, backend, bad=BadMessages(self._announce)
        )
        self._registration: Registration | None = None
        try:
            if self._repository is not None:
                self._repository.open(backend, self._brain, now_ns=clock())
            if config.controller:
                self._registration = self._register(incarnation)
        except BaseException:
            self._backend.close()
            self._close_parts()
            raise
        self._prepared: deque[ModelPrepared] = deque()
        self._bell = _Bell()
        self._stopping = False
        self.rounds = 0  # turns of the loop, for a watchdog
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None

    def _make_brain(self, incarnation: int) -> WorkerBrain:
        config, backend = self.config, self._backend
        return WorkerBrain(
            backend.gpus,
            backend.loadable,
            incarnation=incarnation,
            version=__version__,
            host=socket.gethostname(),
            pid=os.getpid(),
            device=shown_device(config, backend),
            allow_zero_size_inputs=config.allow_zero_size_inputs,
            put_aside=config.put_aside,
            lanes=gpu_lanes(preemptive=config.preempt),
            functions=functions_of(backend),
            most_calls=config.most_calls,
        )

    def _register(self, incarnation: int) -> Registration:
        return Registration(
            self.config,
            port=self.port,
            incarnation=incarnation,
            device=self._backend.device_name,
            announce=self._announce,
        )

    def _close_parts(self) -> None:
        """It cannot work: close what is open beside the backend."""
        self._router.close()
        if self._repository is not None:
            self._repository.close()

    @property
    def ready_line(self) -> str:
        host = bracketed(parse_bind(self.config.bind))
        models = f", {self._repository.count} in the repository" if self._repository else ""
        return f"slosched worker ready on {host}:{self.port}: {self._backend.describe()}{models}"

    # -------------------------------------------------------------------------- embedding

    def start(self) -> WorkerServer:
        """Run in a thread of its own; `stop` ends it."""
        self._thread = threading.Thread(
            target=self._run_in_thread, name="slosched-worker", daemon=True
        )
        self._thread.start()
        return self

    def _run_in_thread(self) -> None:
        with contextlib.suppress(DeviceLost):  # it was announced, and `lost` has the reason
            self.run()

    def stop(self, timeout_s: float = 5.0) -> None:
        """Drain and end, from any thread; returns when it has ended. Idempotent.

        Raises PeerUnreachable if the loop does not end within `timeout_s`.
        """
        self.request_stop()
        thread = self._thread
        if thread is None:
            if self._running.acquire(blocking=False):  # it never ran, so no loop closes it
                self._close()
            return
        thread.join(timeout_s)
        if thread.is_alive():
            raise PeerUnreachable(f"the worker's loop did not end within {timeout_s:g} s")

    def request_stop(self) -> None:
        """Ask the loop to drain and end; returns at once. Safe in a signal handler."""
        self._stopping = True
        self._bell.ring()

    def __enter__(self) -> WorkerServer:
        return self.start()

    def __exit__(self, *error: object) -> None:
        self.stop()

    # -------------------------------------------------------------------------------- loop

    def run(
        self, stop: threading.Event | None = None, *, collector: Collector | None = None
    ) -> None:
        """Serve until `request_stop`, or until `stop` is set (seen within 0.1 s); then drain.

        A `collector` may work while nothing is due. Raises DeviceLost when the devices are gone and everything
        was answered.
        """
        if not self._running.acquire(blocking=False):
            raise RuntimeError("this worker runs already, or has ended; make a new WorkerServer")
        self._collector = collector
        set_timer_slack()
        waiter = Waiter(self._router.fileno(), self._bell.fileno(), *self._backend.wake_fds())
        try:
            while not self._stopping and not (stop is not None and stop.is_set()):
                self._round()
                self._wait(waiter)
                self.rounds += 1
            self._drain(waiter)
        except DeviceLost:
            self._answer_the_lost(waiter)
            raise
        finally:
            waiter.close()
            self._close()

    def _round(self) -> None:
        try:
            self._turn()
        finally:  # also if a call to a dead device raised
            # While calls wait for a slot, the slots have work, and results may wait for others.
            self._performer.flush(at_once=self._stopping or not self._brain.calls_wait)
            self._watch()

    def _turn(self) -> None:
        """Do what is due, take in what has arrived, and do what follows from it."""
        stepper = self._stepper
        # The clock is read after the socket: if a message seemed older than it is, the latency of a heartbeat's
        # answer would look too short, and the clocks further apart than they are.
        arrived = list(self._router.receive())
        now = self._clock()
        if self._backend.exact:
            stepper.run_until(now)
        fresh = False
        if self._prepared and self._backend.warm_up(self._prepared[0]):
            stepper.handle(self._prepared.popleft(), now_ns=now)
            fresh = True
        for peer, frames in arrived:
            self._backend.glance()
            fresh = self._doorway.receive(peer, frames, now_ns=now) or fresh
        repository = self._repository
        if repository is not None and now >= repository.due_ns:
            fresh = repository.turn(self._brain, now_ns=now) or fresh
        due_ns = None if fresh or self._backend.exact else stepper.next_due_ns()
        if fresh or (due_ns is not None and due_ns <= now):
            stepper.step(now)
        for note in self._backend.take_notes():
            self._announce(note)
        registration = self._registration
        if registration is not None and now >= registration.due_ns and not self._brain.closing:
            registration.turn(served=self._brain.is_served(now_ns=now), now_ns=now)

    def _wait(self, waiter: Waiter) -> None:
        if self._prepared or self._stopping:
            return
        due_ns = self._stepper.next_due_ns()
        held_until_ns = self._performer.held_until_ns
        if held_until_ns:
            due_ns = held_until_ns if due_ns is None else min(held_until_ns, due_ns)
        collector = self._collector
        if collector is not None and self._clock() >= collector.due_ns:
            if not self._router.has_input():
                collector.tidy(due_ns, unused=self._brain.unused)
            return
        if self._backend.pass_time(due_ns) or (due_ns is not None and due_ns <= self._clock()):
            return
        if self._router.has_input():  # also clears the descriptor's edge
            return
        waiter.wait(due_ns, at_most_ns=_SLEEP_AT_MOST_NS)
        self._bell.clear()

    def _drain(self, waiter: Waiter) -> None:
        """Cancel what is queued, let what runs end (bounded), send every result."""
        now = self._clock()
        if self._backend.exact:
            self._stepper.run_until(now)
        self._brain.shutdown(now_ns=now)
        self._stepper.step(now)
        self._performer.flush(at_once=True)
        now = self._clock()
        refuse_ns, give_up_ns = now + _REFUSE_NS, now + _DRAIN_NS
        calls_end = False
        while now < refuse_ns or (not self._brain.idle and now < give_up_ns):
            if not calls_end and now >= give_up_ns - _END_CALLS_NS:
                self._brain.end_calls(now_ns=now)
                self._stepper.step(now)
                calls_end = True
            self._stopping = False  # `_wait` may sleep: what runs takes its time
            self._round()
            self._wait(waiter)
            self.rounds += 1
            now = self._clock()
        self._stopping = True

    def _watch(self) -> None:
        """Pass on the backend's reports about its GPUs. Raises DeviceLost if they are gone."""
        if self._backend.lost:
            self._give_up(self._backend.lost)
        stats = self._backend.gpu_stats()
        if stats is not self._gpu_stats:
            self._gpu_stats = stats
            self._brain.note_gpu_stats(stats)

    def _give_up(self, why: str) -> NoReturn:
        name = self._backend.device_name
        self.lost = why
        failed = self._brain.devices_lost(f"{name} is lost: {why}", now_ns=self._clock())
        self._announce(f"{name} is lost, and {failed} action(s) of it were answered so: {why}")
        raise DeviceLost(f"{name} is lost ({why}); this process cannot mend that, a new one may")

    def _answer_the_lost(self, waiter: Waiter) -> None:
        """Send what `_give_up` answered, without touching the devices, and fail what still comes.

        It lasts 0.1 s, as no op will end. A connection that is closed at once loses its unread messages, so the
        controller needs this time to read the answers.
        """
        now = self._clock()
        end_ns = now + _REFUSE_NS
        while now < end_ns:
            for peer, frames in self._router.receive():
                self._doorway.receive(peer, frames, now_ns=now)
            for effect in self._brain.schedule(now_ns=now):
                if isinstance(effect, ToController | Note):  # the others are for the devices
                    self._performer.perform(effect, now)
            self._performer.flush(at_once=True)
            if not self._router.has_input():
                waiter.wait(end_ns, at_most_ns=_REFUSE_NS)
                self._bell.clear()
            now = self._clock()

    def _close(self) -> None:
        self._backend.close()
        if self._repository is not None:
            self._repository.close()
        self._router.close_after(_LINGER_MS)
        if self._registration is not None:
            self._registration.close()
        self._bell.close()

    def _model_prepared(self, event: ModelPrepared) -> None:
        """Called in the thread that prepared the model; the loop continues with it."""
        self._prepared.append(event)
        self._bell.ring()


class _Bell:
    """Wakes the loop from a signal handler or another thread."""

    def __init__(self) -> None:
        self._near, self._far = socket.socketpair()
        self._near.setblocking(False)
        self._far.setblocking(False)

    def fileno(self) -> int:
        return self._near.fileno()

    def ring(self) -> None:
        with contextlib.suppress(OSError):  # full: it rings already; closed: the loop has ended
            self._far.send(b"!")

    def clear(self) -> None:
        with contextlib.suppress(OSError):
            self._near.recv(4096)

    def close(self) -> None:
        self._near.close()
        self._far.close()


def run_worker(
    config: WorkerConfig,
    *,
    announce: Callable[[str], None],
    stop: threading.Event | None = None,
    blackbox: NoBlackbox = _UNREAD,
) -> int:
    """Run a worker until SIGINT, SIGTERM or `stop`; returns 0 after a drain.

    `announce` gets the ready line once the port listens and the backend is open, and a line for each event that
    needs an operator's attention. `config.cpu` and `config.gc` apply to this process until it returns. Raises
    what WorkerServer and its `run` raise, and InvalidConfig if there is no core `config.cpu`.
    """
    check_core(config.cpu)  # before the slow part
    server = WorkerServer(config, announce=announce, blackbox=blackbox)
    in_main = threading.current_thread() is threading.main_thread()  # no other may ask for signals
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()
    try:
        with (
            on_signals(numbers, lambda number: server.request_stop()),
            own_process(config) as collector,
        ):
            announce(server.ready_line)
            blackbox.state(READY)
            with Watchdog(lambda: server.rounds):
                server.run(stop, collector=collector)
            blackbox.state(ENDED)
    finally:
        if in_main:  # else the process goes on
            finish_sending(2 * _LINGER_MS)
    return 0


def _ignore(line: str) -> None:
    pass
