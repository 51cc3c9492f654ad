"""Sessions with workers: hello, liveness by ticks, loss and return.

A worker is lost after `_TICKS_UNTIL_LOST` ticks in a row without a word. Counting ticks that really
happened, and not elapsed time, is what keeps a machine that stood still for seconds from declaring
every worker dead when it wakes: one late tick is one tick.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from slosched.codes import Code
from slosched.config import LOST_AFTER_NS
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.interface import ConnectWorker, Note, ToWorker
from slosched.core.scheduler.inventory import brought_weights, with_signatures
from slosched.core.scheduler.lane import Lane, WideLane
from slosched.core.scheduler.state import ActionState, Gpu, Worker, WorkerState
from slosched.core.scheduler.validation import reasons_of, worker_error
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ControllerToWorker,
    GpuInfo,
    Heartbeat,
    HeartbeatAck,
    Offer,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_TICKS_UNTIL_LOST = 4
#: Names that a note lists.
_NAMED = 5
TICK_NS = LOST_AFTER_NS // (_TICKS_UNTIL_LOST + 1)
_HELLO_EVERY_NS = NS_PER_S // 2
OVERDUE_TICKS_UNTIL_LOST = 5 * NS_PER_S // TICK_NS
_TRUSTED_CLOCK_ERROR_NS = 5 * NS_PER_MS
_REPORT_SILENCE_EVERY_NS = 3 * NS_PER_S
#: A lost worker has this long to return before a spare takes its place: most return, with models prepared.
_SPARE_AFTER_NS = 10 * NS_PER_S
_TICKS_UNTIL_REPLACED = _SPARE_AFTER_NS // TICK_NS
#: A worker that registered, and is silent for this long, is not waited for any more.
_WAITED_FOR_NS = 600 * NS_PER_S
_TICKS_UNTIL_FORGOTTEN = _WAITED_FOR_NS // TICK_NS


@dataclass(slots=True)
class _Liveness:
    """What is known of one worker's being there, by the ticks of this file."""

    heard: bool = False  # since the last tick
    silent_ticks: int = 0
    hello_due_ns: int = 0
    refusal_noted_ns: int = 0


class Sessions:
    """Who is there. `on_lost` gets the actions that were outstanding on a lost worker, and `on_joined` the
    GPUs that a worker brings into use: when it joins, or when it takes the place of one that is lost.

    `forgotten(worker, now_ns)` returns, in words, what was sent to the worker and lost; empty: nothing.
    """

    def __init__(
        self,
        cluster: Cluster,
        *,
        worker_count: int,
        incarnation: int,
        cluster_id: str = "",
        keeps_weights: bool = False,
        addresses: Sequence[str] = (),
        on_joined: Callable[[Worker, list[Gpu], int], None],
        on_gpu_removed: Callable[[Gpu], None],
        on_lost: Callable[[Worker, list[ActionState], int], None],
        forgotten: Callable[[Worker, int], str],
    ) -> None:
        self._cluster = cluster
        self._incarnation, self._cluster_id = incarnation, cluster_id
        self._keeps_weights = keeps_weights
        self._on_joined = on_joined
        self._on_gpu_removed = on_gpu_removed
        self._on_lost = on_lost
        self._forgotten = forgotten
        self._next_gpu_index = 0
        self._room_ticks = 0  # how long spares could have been used
        #: By GPU index: how long its action has been overdue.
        self._overdue_ticks: dict[int, int] = {}
        self._liveness: dict[int, _Liveness] = {}
        self._next_worker_id = 0
        self._report_due_ns = 0
        for worker_id in range(worker_count):
            address = addresses[worker_id] if worker_id < len(addresses) else ""
            self._add(Worker(worker_id, address, listed=True))

    # --------------------------------------------------------------------------- places

    def _add(self, worker: Worker) -> None:
        self._next_worker_id = worker.worker_id + 1
        self._cluster.workers[worker.worker_id] = worker
        self._liveness[worker.worker_id] = _Liveness()

    def new_place(self, name: str, incarnation: int, address: str) -> Worker:
        """A worker registered that this controller does not know."""
        worker = Worker(self._next_worker_id, address, name=name, incarnation=incarnation)
        self._add(worker)
        self._cluster.emit(ConnectWorker(worker.worker_id, address))
        return worker

    def take_place(self, worker: Worker, name: str, incarnation: int, address: str) -> None:
        """The process that registers has the place of `worker` from now on. It must not be joined."""
        moved = worker.state is WorkerState.LEFT or worker.address != address
        worker.name, worker.incarnation, worker.address = name, incarnation, address
        worker.state = WorkerState.SILENT
        worker.draining = worker.leaving = False
        self._liveness[worker.worker_id] = _Liveness()
        if moved:
            self._cluster.emit(ConnectWorker(worker.worker_id, address))

    def forget_left(self) -> None:
        """Give up the names of workers that have left, so that what is kept of them has a bound."""
        left = [w for w in self._cluster.workers.values() if w.state is WorkerState.LEFT]
        for worker in left:
            del self._cluster.workers[worker.worker_id], self._liveness[worker.worker_id]

    def drain(self, worker: Worker, *, now_ns: int) -> None:
        """Give the worker nothing new; it is out of use once it has ended what it holds."""
        worker.draining = True
        if worker.state is WorkerState.SILENT:
            worker.state = WorkerState.DRAINED
        elif worker.state is WorkerState.JOINED and not worker.retired:
            worker.retired = True
            for gpu in worker.gpus:
                self._cluster.retire_gpu(gpu)
                self._on_gpu_removed(gpu)
            self.end_if_idle(worker, now_ns=now_ns)

    def undrain(self, worker: Worker) -> None:
        """Greet a drained worker again. One that still drains comes back when that has ended."""
        worker.draining = False
        if worker.state is WorkerState.DRAINED:
            worker.state = WorkerState.SILENT
            self._liveness[worker.worker_id].hello_due_ns = 0

    def end_if_idle(self, worker: Worker, *, now_ns: int) -> None:
        """End the session of a worker that said goodbye, or drains, and has nothing left to do."""
        if worker.state is not WorkerState.JOINED or worker.busy:
            return
        if worker.leaving:
            self.lose(worker, "it said goodbye", now_ns=now_ns)
        elif worker.retired:
            self.lose(worker, "it is drained", now_ns=now_ns)

    # ------------------------------------------------------------------------------ facts

    def heard(self, worker: Worker) -> None:
        """A message of `worker`'s session came: it is alive."""
        self._liveness[worker.worker_id].heard = True

    def welcome(self, worker: Worker, message: WorkerWelcome, *, now_ns: int) -> None:
        """A worker answered our hello: take its GPUs into the cluster."""
        if worker.state in (WorkerState.DRAINED, WorkerState.LEFT):
            return  # the hello was sent before
        if self._has_two_places(worker, message, now_ns):
            return
        if message.protocol != PROTOCOL_VERSION:
            self._note(
                "warning",
                f"worker {worker.label} speaks protocol {message.protocol}, this controller "
                f"{PROTOCOL_VERSION}: install the same version of slosched on both",
            )
            return
        if not self._answers_us(worker, message):
            return
        message = with_signatures(message)
        wrong = worker_error(message)
        if wrong:
            self._note("warning", f"worker {worker.label} is not used: {wrong}")
            return
        if worker.state is WorkerState.JOINED:
            if worker.session == message.session:
                return
            self.lose(worker, "restarted", now_ns=now_ns)
        worker.state = WorkerState.JOINED
        worker.session = message.session
        worker.host, worker.pid = message.host, message.pid
        worker.device, worker.version = message.device, message.version
        worker.loadable, worker.functions = message.loadable, dict.fromkeys(message.functions)
        worker.put_aside = reasons_of(message.put_aside)
        worker.offer, worker.left_out = message.offer, reasons_of(message.left_out)
        self._note_put_aside()
        self.heard(worker)
        self._liveness[worker.worker_id].silent_ticks = 0
        worker.leaving = False
        serves = self._cluster.serves_functions
        worker.spare = [info for info in message.gpus if serves or not info.host]
        worker.inventory = message.inventory
        self._use_spares(worker)
        hosts = [gpu for gpu in worker.gpus if gpu.host]
        slots = f"{sum(gpu.exec.width for gpu in hosts)} slot(s) for functions" if hosts else ""
        spare = f"{len(worker.spare)} kept as spare(s)" if worker.spare else ""
        in_use = len(worker.gpus) - len(hosts)
        gpus = f"{in_use} GPU(s) in use" if in_use or not hosts else ""
        device = worker.device if worker.device != "none" else ""
        parts = ", ".join(filter(None, (gpus, spare, slots, device)))
        again = f" (back after {worker.times_lost} loss(es))" if worker.times_lost else ""
        self._note("info", f"worker {worker.label} on {worker.host} joined: {parts}{again}")
        for name, reason in worker.put_aside.items():
            self._note("warning", f"worker {worker.label} put {name!r} aside: {reason}")
        self._note_left_out(worker, {})
        self._on_joined(worker, worker.gpus, now_ns)

    def offered(self, worker: Worker, message: Offer) -> list[str] | None:
        """What a joined worker can prepare has changed. Returns the new names; None: it was known."""
        if message.number <= worker.offer:
            return None
        before, left_out = dict.fromkeys(worker.loadable), worker.left_out
        worker.offer, worker.left_out = message.number, reasons_of(message.left_out)
        names = dict.fromkeys((*message.loadable, *worker.functions))
        worker.loadable = tuple(names)
        fresh = [name for name in names if name not in before]
        gone = [name for name in before if name not in names]
        for found, what in ((fresh, "offers"), (gone, "does not offer any more")):
            if found:
                shown = ", ".join(found[:_NAMED])
                more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
                self._note("info", f"worker {worker.label} {what} {shown}{more}")
        self._note_left_out(worker, left_out)
        self._note_put_aside()
        return fresh

    def _note_left_out(self, worker: Worker, before: Mapping[str, str]) -> None:
        for name, reason in worker.left_out.items():
            if before.get(name) != reason:
                text = f"worker {worker.label} leaves {name!r} of its repository out: {reason}"
                self._note("warning", text)

    def _answers_us(self, worker: Worker, message: WorkerWelcome) -> bool:
        """False for a Welcome that comes late: what it says of the worker's memory is not so any more."""
        return message.incarnation in (0, self._incarnation) and message.times_lost in (
            -1,
            worker.times_lost,
        )

    def _has_two_places(self, worker: Worker, message: WorkerWelcome, now_ns: int) -> bool:
        """True if `worker` is the second place of a process: it is listed and registered another address.

        The process answers where it was greeted last, so its other place is lost in any case.
        """
        for other in self._cluster.joined():
            if other is worker or other.session != message.session or other.listed == worker.listed:
                continue
            text = (
                f"worker {worker.label} and worker {other.label} are one process: it is used once"
            )
            self._note("warning", text)
            if other.listed:
                self._leave_place(worker)
                return True
            self.lose(other, f"it is worker {worker.label}", now_ns=now_ns)
            self._leave_place(other)
        return False

    def _leave_place(self, worker: Worker) -> None:
        worker.state = WorkerState.LEFT
        worker.draining = False
        self._cluster.emit(ConnectWorker(worker.worker_id, ""))

    def _use_spares(self, worker: Worker) -> list[Gpu]:
        """Take as many of the worker's spare GPUs into use as `max_gpus` allows."""
        room = max(0, self._cluster.config.max_gpus - self._gpus_in_use)
        hosts = [info for info in worker.spare if info.host]
        gpus = [info for info in worker.spare if not info.host]
        taken = [self._new_gpu(worker, info) for info in (*gpus[:room], *hosts)]
        worker.spare = gpus[room:]
        worker.gpus.extend(taken)
        for gpu in taken:
            self._cluster.add_gpu(gpu)
        return taken

    @property
    def _gpus_in_use(self) -> int:
        """GPUs that count against `max_gpus`."""
        return sum([not gpu.host for gpu in self._cluster.gpus.values()])

    def _new_gpu(self, worker: Worker, info: GpuInfo) -> Gpu:
        index = self._next_gpu_index
        self._next_gpu_index += 1
        brought = brought_weights(worker, info.resident)
        return Gpu(
            index=index,
            gpu_id=info.gpu_id,
            worker=worker,
            pages=info.pages,
            free_pages=info.pages - sum(brought.values()),
            page_bytes=info.page_bytes,
            brought=brought,
            exec=Lane("exec") if info.slots == 1 else WideLane("exec", width=info.slots),
            host=info.host,
        )

    def _replace_lost(self, now_ns: int) -> None:
        """Spares take the place of GPUs that were lost and do not come back; those are spares then."""
        room = self._cluster.config.max_gpus > self._gpus_in_use
        joined = self._cluster.joined() if room else []
        spares = [w for w in joined if w.spare and not w.leaving and not w.retired]
        self._room_ticks = self._room_ticks + 1 if spares else 0
        if self._room_ticks < _TICKS_UNTIL_REPLACED:
            return
        away = ", ".join(
            w.label for w in self._cluster.workers.values() if w.state is WorkerState.SILENT
        )
        why = f" in the place of worker(s) {away}" if away else ""
        for worker in spares:
            taken = self._use_spares(worker)
            if taken:
                text = f"worker {worker.label} takes over{why}: {len(taken)} spare GPU(s) are in use now"
                self._note("warning", text)
                self._on_joined(worker, taken, now_ns)

    def _note_put_aside(self) -> None:
        """Note the models that no joined worker offers, because each was put aside."""
        joined = self._cluster.joined()
        aside = {name: (w, why) for w in reversed(joined) for name, why in w.put_aside.items()}
        self._cluster.put_aside = {
            name: f"put aside on worker {w.worker_id}: {why}"
            for name, (w, why) in aside.items()
            if not any(name in other.loadable for other in joined)
        }

    def refused(self, worker: Worker, message: WorkerRefused, *, now_ns: int) -> None:
        live = self._liveness[worker.worker_id]
        if now_ns >= live.refusal_noted_ns:
            live.refusal_noted_ns = now_ns + _REPORT_SILENCE_EVERY_NS
            self._note("warning", f"worker {worker.label} cannot be used: {message.reason}")
        if message.code == Code.INITIALIZING:  # another controller is about to lose it, perhaps
            live.hello_due_ns = min(live.hello_due_ns, now_ns + TICK_NS)

    def send_failed(self, worker: Worker, message: ControllerToWorker, *, now_ns: int) -> None:
        """A message could not be queued: the session it belongs to is over."""
        if isinstance(message, ControllerHello):
            # The hello was not sent: try again as soon as there is a connection.
            self._liveness[worker.worker_id].hello_due_ns = now_ns
            return
        ours = getattr(message, "session", worker.session) == worker.session
        if worker.state is WorkerState.JOINED and ours:
            self.lose(worker, "its connection broke", now_ns=now_ns)

    def heartbeat(self, worker: Worker, message: Heartbeat, *, refused: int, now_ns: int) -> None:
        """`refused` requests could not start in time so far."""
        self._cluster.emit(
            ToWorker(
                worker.worker_id,
                HeartbeatAck(
                    heartbeat_sent_ns=message.sent_ns,
                    received_ns=now_ns,
                    sent_ns=now_ns,
                    offer=worker.offer,
                ),
            )
        )
        delay_ns = now_ns - (message.sent_ns - message.clock_offset_ns)
        if message.clock_error_ns < _TRUSTED_CLOCK_ERROR_NS:
            self._cluster.paths.beat(worker, delay_ns, refused=refused)
        worker.beat = message
        for stats in message.gpus:
            for gpu in worker.gpus:
                if gpu.gpu_id == stats.gpu_id:
                    gpu.driver.note(stats, now_ns=now_ns)

    # ------------------------------------------------------------------------------- time

    def tick(self, *, now_ns: int) -> None:
        """Called each TICK_NS: greet the silent, lose the dead, say who does not answer."""
        for worker in self._cluster.workers.values():
            live = self._liveness[worker.worker_id]
            if worker.state is WorkerState.SILENT:
                self._wait_for(worker, live, now_ns=now_ns)
            elif worker.state is not WorkerState.JOINED:
                continue
            elif live.heard:
                live.heard, live.silent_ticks = False, 0
                self._watch(worker, now_ns=now_ns)
            else:
                live.silent_ticks += 1
                if live.silent_ticks >= _TICKS_UNTIL_LOST:
                    self.lose(worker, "silent", now_ns=now_ns)
        self._report_silence(now_ns)
        self._replace_lost(now_ns)

    def _watch(self, worker: Worker, *, now_ns: int) -> None:
        """Lose a worker that is alive but does not report what it was given.

        Its result was lost, or its device hangs: without an end to it, that GPU would stay closed and
        the action's requests unanswered for ever. Counted in ticks, as silence is.
        """
        for gpu in worker.gpus:
            heads = [e.outstanding[0] for e in (gpu.exec, gpu.load) if e.outstanding]
            if gpu.exec.width > 1:
                heads += gpu.exec.outstanding
            late = [a for a in heads if now_ns > a.predicted_end_ns + a.patience_ns]
            if not late:
                self._overdue_ticks.pop(gpu.index, None)
                continue
            ticks = self._overdue_ticks[gpu.index] = self._overdue_ticks.get(gpu.index, 0) + 1
            if ticks >= OVERDUE_TICKS_UNTIL_LOST:
                action_id = late[0].action_id
                self.lose(worker, f"it does not report action {action_id}", now_ns=now_ns)
                return
        forgotten = self._forgotten(worker, now_ns)
        if forgotten:
            self.lose(worker, f"it knows nothing of {forgotten}", now_ns=now_ns)

    def _wait_for(self, worker: Worker, live: _Liveness, *, now_ns: int) -> None:
        """Greet a silent worker; one that registered is given up in the end."""
        live.silent_ticks += 1
        if not worker.listed and live.silent_ticks >= _TICKS_UNTIL_FORGOTTEN:
            away = format_duration(_WAITED_FOR_NS)
            self._note("warning", f"worker {worker.label} was silent for {away}: it has left")
            self._leave_place(worker)
        elif now_ns >= live.hello_due_ns:
            self._greet(worker, live, now_ns=now_ns)

    def _greet(self, worker: Worker, live: _Liveness, *, now_ns: int) -> None:
        live.hello_due_ns = now_ns + _HELLO_EVERY_NS
        hello = ControllerHello(
            protocol=PROTOCOL_VERSION,
            incarnation=self._incarnation,
            times_lost=worker.times_lost,
            cluster=self._cluster_id,
            keeps_weights=self._keeps_weights,
        )
        self._cluster.emit(ToWorker(worker.worker_id, hello))

    def _report_silence(self, now_ns: int) -> None:
        if self._report_due_ns == 0:
            self._report_due_ns = now_ns + _REPORT_SILENCE_EVERY_NS
        if now_ns < self._report_due_ns:
            return
        self._report_due_ns = now_ns + _REPORT_SILENCE_EVERY_NS
        silent = [w for w in self._cluster.workers.values() if w.state is WorkerState.SILENT]
        if silent:
            workers = len(silent) + len(self._cluster.joined())
            names = ", ".join(w.label for w in silent)
            silence = f"worker {names} does" if len(silent) == 1 else f"workers {names} do"
            self._note(
                "warning",
                f"{silence} not answer; {len(self._cluster.joined())} of {workers} joined; trying again every "
                f"{format_duration(_HELLO_EVERY_NS)}",
            )

    def lose(self, worker: Worker, why: str, *, now_ns: int) -> None:
        """Drop the worker's GPUs; its outstanding actions go to `on_lost`. It may come back."""
        worker.state = WorkerState.DRAINED if worker.draining else WorkerState.SILENT
        worker.retired = False
        worker.times_lost += 1
        self._liveness[worker.worker_id] = _Liveness()
        lost: list[ActionState] = []
        for gpu in worker.gpus:
            lost.extend(self._cluster.remove_gpu(gpu))
            self._overdue_ticks.pop(gpu.index, None)
            if not gpu.retired:
                self._on_gpu_removed(gpu)
        worker.gpus, worker.spare = [], []
        worker.prepared.clear()
        worker.inventory = ()
        worker.instances.clear()
        worker.unlike.clear()
        worker.functions = {}
        self._note_put_aside()
        if worker.leaving and not lost:
            self._note("info", f"worker {worker.label} has left")
        elif worker.state is WorkerState.DRAINED and not lost:
            self._note("info", f"worker {worker.label} is drained: it is out of use")
        else:
            again = f"{len(lost)} action(s) of it are planned anew or answered"
            self._note("warning", f"worker {worker.label} lost ({why}); {again}")
        if worker.leaving and not worker.listed:
            self._leave_place(worker)
        self._on_lost(worker, lost, now_ns)

    def _note(self, level: str, text: str) -> None:
        self._cluster.emit(Note(level, text))
