"""The worker's brain: what each GPU does, when, with the actions that the controller sent.

The brain puts each action that arrives on the ledger and hands it to its kind (kinds/), which checks it and
takes it through the lanes of the pipeline. Each accepted action is answered exactly once; an action of another
session is dropped and counted. The class is pure: every call brings the time, and a shell (daemon/worker.py
live, sim/ in virtual time) performs the effects. Times inside are on the worker's clock.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slosched.codes import Code
from slosched.config import HEARTBEAT_NS
from slosched.core.worker.calls import MOST_CALLS
from slosched.core.worker.interface import (
    CallAwaits,
    CallChained,
    CallLost,
    ChildTakenBack,
    Effect,
    Event,
    FromController,
    ModelPrepared,
    Note,
    OpDone,
    ToController,
    WeightsLost,
)
from slosched.core.worker.inventory import MOST_RESIDENT, ids_of, inventory_of
from slosched.core.worker.kinds import kinds_of
from slosched.core.worker.kinds.base import Acceptance
from slosched.core.worker.kinds.call import CallKind
from slosched.core.worker.lanes import GPU_LANES, LaneSpec, Role
from slosched.core.worker.ledger import Ledger
from slosched.core.worker.link import HelloOutcome, Identity, Link
from slosched.core.worker.offers import Offers
from slosched.core.worker.pipeline import Pipeline
from slosched.core.worker.state import PendingAction
from slosched.messages import (
    MOST_BEAT_CALLS,
    PROTOCOL_VERSION,
    Action,
    Call,
    CancelCall,
    ChildReply,
    ControllerHello,
    GpuInfo,
    GpuStats,
    Heartbeat,
    HeartbeatAck,
    SessionMessage,
    WorkerGoodbye,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.units import NS_PER_S

#: A note about a controller that is refused comes at most this often.
_REFUSAL_EVERY_NS = 60 * NS_PER_S
_SHUTTING_DOWN = "the worker is shutting down"


class WorkerBrain:
    """Decides for `gpus`, each with `lanes`.

    `loadable` has the canonical names of the models that can be prepared, except those in `put_aside` (name,
    reason), which are refused with the reason; those that are `functions` are called, at most `most_calls` of
    them unfinished at a time. `incarnation` is random, one per process start. A shell calls
    `note_bad_message` for each message that it could not decode.
    """

    def __init__(
        self,
        gpus: Sequence[GpuInfo],
        loadable: Sequence[str],
        *,
        incarnation: int,
        version: str,
        host: str,
        pid: int,
        device: str,
        allow_zero_size_inputs: bool = True,
        heartbeat_ns: int = HEARTBEAT_NS,
        put_aside: Sequence[tuple[str, str]] = (),
        lanes: Sequence[LaneSpec] = GPU_LANES,
        functions: Collection[str] = (),
        most_calls: int = MOST_CALLS,
    ) -> None:
        self._offers = Offers(loadable, put_aside, functions)
        self._identity = Identity(
            incarnation=incarnation,
            version=version,
            host=host,
            pid=pid,
            device=device,
        )
        self._link = Link(incarnation, heartbeat_ns=heartbeat_ns)
        self._ledger = Ledger(gpus, self._link, lanes, most_calls)
        self._pipeline = Pipeline(self._ledger)
        acceptance = Acceptance(self._offers, allow_zero_size_inputs)
        self._kinds = kinds_of(self._pipeline, acceptance)
        calls = self._kinds[Call]
        assert isinstance(calls, CallKind)
        self._calls = calls
        self._refusal_due_ns = 0
        self._lost = ""
        self._gpu_stats: tuple[GpuStats, ...] = ()
        self._stats_are_new = False
        self.dropped = 0  # stale, malformed and oversized messages

    def arm_ahead(self, gpu_id: int, ahead_ns: int) -> None:
        """The device of this GPU takes each EXEC `ahead_ns` before its time and starts it itself."""
        self._ledger.gpus[gpu_id].lanes[Role.EXEC].arm_ahead(ahead_ns)

    def prepare_at_once(self, count: int) -> None:
        """Up to `count` LoadModels are prepared side by side: one that hangs does not hold up the others."""
        self._ledger.host.slots = count

    def skip_empty_copies(self, gpu_ids: Collection[int]) -> None:
        """The devices of these GPUs need not be asked for copies of nothing."""
        for gpu_id, gpu in self._ledger.gpus.items():
            gpu.free_copies = gpu_id in gpu_ids

    # ------------------------------------------------------------------------- three verbs

    def handle(self, event: Event, *, now_ns: int) -> int | None:
        """Take in a fact. For an action that now waits or runs, returns its key.

        Effects and ops name the action by that key (`action_id` there); the shell keeps the frames that came
        behind the message under it until DropInputs, or until they were copied. For a ChildReply, returns the
        key of the call that gets it. None: the frames can go.
        """
        if self._lost and not isinstance(event, FromController):
            return None  # from a device whose work was given up
        if isinstance(event, OpDone):
            self._pipeline.op_done(event, now_ns)
            return None
        if isinstance(event, ModelPrepared):
            self._pipeline.prepared(event, now_ns)
            return None
        if not isinstance(event, FromController):
            self._reported(event, now_ns)
            return None
        message = event.message
        if isinstance(message, HeartbeatAck):
            if not self._link.acknowledge(event.peer, message, now_ns=now_ns):
                self.dropped += 1
            elif self._offers.unheard(message.offer, now_ns=now_ns):
                self._say_offer()
            return None
        if isinstance(message, ControllerHello):
            self._hello(event.peer, message, now_ns)
            return None
        if isinstance(message, CancelCall | ChildReply):
            return self._of_a_call(message, now_ns)
        return self._accept(event, message, now_ns)

    def _reported(
        self,
        event: WeightsLost | CallAwaits | CallChained | ChildTakenBack | CallLost,
        now_ns: int,
    ) -> None:
        """A device says more than that an op has ended."""
        if isinstance(event, CallAwaits):
            self._calls.awaits(event, now_ns)
        elif isinstance(event, CallChained):
            self._calls.chained(event, now_ns)
        elif isinstance(event, ChildTakenBack):
            self._calls.taken_back(event)
        elif isinstance(event, CallLost):
            self._calls.lost(event, now_ns)
        else:
            self._weights_lost(event)

    def _of_a_call(self, message: CancelCall | ChildReply, now_ns: int) -> int | None:
        """The controller says something to a call that it sent before."""
        if self._is_stale(message, now_ns):
            return None
        if isinstance(message, ChildReply):
            return self._calls.answered(message)
        self._calls.cancel(message, now_ns)
        return None

    def schedule(self, *, now_ns: int) -> list[Effect]:
        """Start everything whose time has come; returns what the shell must do, in order."""
        if self._lost:
            return self._ledger.take_effects()
        if self._link.handing_over and self.idle:
            self._open_session(now_ns)
        self._pipeline.run_due(now_ns)
        if self._link.session is not None and self._link.due_ns <= now_ns:
            self._heartbeat(now_ns)
        return self._ledger.take_effects()

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` next has something to do, if no event comes before."""
        wake_ns = self._pipeline.next_wakeup_ns()
        if self._link.session is None:
            return wake_ns
        heartbeat_ns = self._link.due_ns
        return heartbeat_ns if wake_ns is None or heartbeat_ns < wake_ns else wake_ns

    # ------------------------------------------------------------------------------ the end

    def shutdown(self, *, now_ns: int) -> None:
        """Say goodbye, hand back what is queued (code 1), refuse what still comes (3); what runs may end.

        Suspended calls end with code 100: their children cannot run here.
        """
        self._pipeline.closing = True
        self._calls.end_begun(_SHUTTING_DOWN, now_ns, running=False)
        if self._link.session is not None:
            goodbye = WorkerGoodbye(self._link.session)
            self._ledger.effects.append(ToController(self._link.peer, goodbye))
        self._pipeline.cancel_queued(_SHUTTING_DOWN, now_ns)

    def end_calls(self, *, now_ns: int) -> None:
        """End the calls that still run while it shuts down, with code 100."""
        self._calls.end_begun(_SHUTTING_DOWN, now_ns, running=True)

    def devices_lost(self, reason: str, *, now_ns: int) -> int:
        """The devices are gone: fail everything unanswered (code 100), also what runs; returns the number.

        From now on nothing is launched, the ends of ops are ignored, and every new action fails too.
        """
        self._lost = reason
        waiting = list(self._ledger.unanswered.values())
        for action in waiting:
            self._ledger.fail(action, Code.PROCESS_ENDED, reason, now_ns)
        return len(waiting)

    # ---------------------------------------------------------------------------- questions

    @property
    def idle(self) -> bool:
        """True if every action was answered and no device works."""
        return not self._ledger.unanswered and self._pipeline.idle

    @property
    def calls_wait(self) -> bool:
        """True if a call waits for a slot of the host."""
        return any(
            gpu.lanes[Role.EXEC].queue for gpu in self._ledger.gpus.values() if gpu.info.host
        )

    @property
    def closing(self) -> bool:
        """True once `shutdown` was called."""
        return self._pipeline.closing

    @property
    def unused(self) -> bool:
        """True if it is idle and knows no model."""
        return not self._ledger.instances and self.idle

    @property
    def session(self) -> int | None:
        """The number of the open session; None: there is none."""
        return self._link.session

    @property
    def pending(self) -> int:
        """Actions that wait for their result."""
        return len(self._ledger.unanswered)

    @property
    def waiting_since_ns(self) -> int | None:
        """When the oldest action arrived that waits for its result. None: none does."""
        return next((action.received_ns for action in self._ledger.unanswered.values()), None)

    @property
    def errors(self) -> int:
        """ErrorResults sent."""
        return self._ledger.errors

    @property
    def clock_error_ns(self) -> int:
        """A bound on the error of the controller's times, once converted."""
        return self._link.clock.error_ns

    def is_served(self, *, now_ns: int) -> bool:
        """True if a controller has this worker, and was heard within two heartbeats and some."""
        return self._link.is_served(now_ns=now_ns)

    def gpu_reports(self) -> tuple[GpuInfo, ...]:
        return tuple(gpu.report() for gpu in self._ledger.gpus.values())

    def free_pages(self, gpu_id: int) -> int:
        return self._ledger.gpus[gpu_id].cache.free_pages

    @property
    def model_ids(self) -> Collection[int]:
        """The instances that it has prepared."""
        return self._ledger.instances.keys()

    def note_gpu_stats(self, stats: tuple[GpuStats, ...]) -> None:
        """The driver was asked again: the next heartbeat carries its answer."""
        self._gpu_stats = stats
        self._stats_are_new = True

    def offer(
        self, loadable: Collection[str], left_out: Sequence[tuple[str, str]], *, now_ns: int
    ) -> None:
        """Tell the controller what can be prepared from now on: `loadable`, and the functions as before.

        `left_out` has (name, reason) of what is there and cannot be offered. Instances that are prepared stay.
        """
        if self._offers.change(loadable, left_out, now_ns=now_ns):
            self._say_offer()

    def _say_offer(self) -> None:
        session = self._link.session
        if session is not None and not self._pipeline.closing and not self._lost:
            message = self._offers.message(session)
            self._ledger.effects.append(ToController(self._link.peer, message))

    def note_bad_message(self) -> None:
        """A message was malformed or oversized; heartbeats carry the count."""
        self.dropped += 1

    # ----------------------------------------------------------------------------- sessions

    def _hello(self, peer: bytes, message: ControllerHello, now_ns: int) -> None:
        if self._pipeline.closing:
            refused = WorkerRefused(Code.SHUTTING_DOWN, "this worker is shutting down")
            self._ledger.effects.append(ToController(peer, refused))
            return
        serving = self._link.session is not None
        outcome = self._link.hello(peer, message, version=self._identity.version, now_ns=now_ns)
        if isinstance(outcome, WorkerRefused):
            self._ledger.effects.append(ToController(peer, outcome))
            if now_ns >= self._refusal_due_ns:  # a controller says hello twice a second
                self._refusal_due_ns = now_ns + _REFUSAL_EVERY_NS
                self._ledger.effects.append(
                    Note("warning", f"controller refused: {outcome.reason}")
                )
        elif outcome is HelloOutcome.REPEATED:
            if self._link.session is not None:  # its Welcome may have been lost
                self._welcome(self._link.session)
        elif serving:
            reason = "its session has ended"
            self._calls.end_begun(reason, now_ns, running=True)
            self._pipeline.cancel_queued(reason, now_ns)

    def _open_session(self, now_ns: int) -> None:
        """Begin a session. Nothing of the old one runs any more, so what the caches say is so."""
        link, ledger = self._link, self._ledger
        kept: Collection[int] = ledger.instances.keys()
        if link.forgetting:
            # Another cluster numbers its models as it likes, so none of the old one may stay.
            kept = ()
        elif link.tells_inventory:
            kept = ids_of(inventory_of(ledger.instances.values()))
        self._give_up_weights(kept if link.keeps_weights else ())
        for model_id in [i for i in ledger.instances if i not in kept]:
            ledger.forget(model_id)
        self._stats_are_new = True  # for this controller
        self._welcome(link.open(now_ns=now_ns))

    def _give_up_weights(self, kept: Collection[int]) -> None:
        """Evict all weights but those of the instances `kept`, which the Welcome lists.

        It counts pages by the Welcome. To load again costs milliseconds, a wrong count costs failed loads for
        ever.
        """
        count = 0
        for gpu in self._ledger.gpus.values():
            for model_id in gpu.cache.model_ids():
                if model_id in kept and count < MOST_RESIDENT:
                    count += 1
                else:
                    self._ledger.evict(gpu, model_id)

    def _welcome(self, session: int) -> None:
        identity, link = self._identity, self._link
        incarnation, times_lost = link.answers
        tells = link.tells_inventory
        message = WorkerWelcome(
            protocol=PROTOCOL_VERSION,
            session=session,
            version=identity.version,
            host=identity.host,
            pid=identity.pid,
            device=identity.device,
            gpus=self.gpu_reports(),
            loadable=self._offers.loadable,
            put_aside=self._offers.put_aside,
            functions=self._offers.functions,
            offer=self._offers.number,
            left_out=self._offers.left_out,
            inventory=inventory_of(self._ledger.instances.values()) if tells else (),
            incarnation=incarnation,
            times_lost=times_lost,
        )
        self._ledger.effects.append(ToController(self._link.peer, message))

    def _heartbeat(self, now_ns: int) -> None:
        link = self._link
        assert link.session is not None
        self._calls.end_forgotten(now_ns)
        beat = Heartbeat(
            session=link.session,
            sent_ns=now_ns,
            clock_offset_ns=link.clock.offset_ns,
            clock_error_ns=link.clock.error_ns,
            activity=self._pipeline.activity(),
            pending=self.pending,
            errors=self.errors,
            dropped=self.dropped,
            preparing=self._pipeline.preparing,
            gpus=self._gpu_stats if self._stats_are_new else (),
            calls=self._ledger.calls.numbers(MOST_BEAT_CALLS),
        )
        self._stats_are_new = False
        self._ledger.effects.append(ToController(link.peer, beat))
        link.heartbeat_sent(now_ns=now_ns)

    # ------------------------------------------------------------------------------ arrival

    def _is_stale(self, message: SessionMessage, now_ns: int) -> bool:
        """True, and it is counted, if the message is of another session; else the controller was heard."""
        if self._link.session is None or message.session != self._link.session:
            self.dropped += 1
            return True
        self._link.heard(now_ns)
        return False

    def _accept(self, event: FromController, message: Action, now_ns: int) -> int | None:
        if self._is_stale(message, now_ns):
            return None
        if not self._link.is_new(message.action_id):
            self.dropped += (
                1  # a second copy: weights would be loaded again beside those that use them
            )
            return None
        ledger = self._ledger
        kind = self._kinds[type(message)]
        key = ledger.next_seq()
        action = PendingAction(key, kind, message, event.peer, now_ns)
        ledger.unanswered[key] = action
        if self._lost:
            ledger.fail(action, Code.PROCESS_ENDED, self._lost, now_ns)
        elif self._pipeline.closing:
            ledger.fail(action, Code.SHUTTING_DOWN, _SHUTTING_DOWN, now_ns)
        else:
            fault = kind.check(action, event.input_sizes)
            if fault is not None:
                ledger.fail(action, *fault, now_ns)
            else:
                kind.begin(action, now_ns)
        return key if key in ledger.unanswered else None

    def _weights_lost(self, event: WeightsLost) -> None:
        """Their pages are free. The controller learns it from the next Infer (code 82), and loads again."""
        gpu = self._ledger.gpus[event.gpu_id]
        for model_id in event.model_ids:
            if gpu.cache.resident(model_id):
                self._ledger.evict(gpu, model_id)
