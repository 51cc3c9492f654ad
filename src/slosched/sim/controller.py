"""The controller's shell in virtual time: facts in, one decision for each instant, effects out.

As the live one (daemon/controller.py): everything that is due at an instant is handled, `schedule` is
called once behind it, effects are performed in order, and one timer is armed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from slosched.core.invariants import InvariantChecker, InvariantViolated
from slosched.core.scheduler.interface import (
    ActionDone,
    ActionRecord,
    CallDone,
    CallPart,
    CallPartDone,
    CallRecord,
    ClientLost,
    Drain,
    Effect,
    Event,
    FromClient,
    FromWorker,
    Keep,
    Note,
    PlanMade,
    PlanRecord,
    RequestDone,
    RequestRecord,
    StageDone,
    StageRecord,
    ToClient,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.values import ValueStore
from slosched.join_messages import MembershipReply
from slosched.messages import Call, ChildReply, ControllerToClient, ControllerToWorker, Infer
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed, Payload, made_up
from slosched.sim.network import SMALL_MESSAGE_BYTES, Wire

#: Limit of consecutive times that a scheduler may ask to be woken at once.
_MOST_RESTLESS = 100

#: A violation of the marks tells the stories of requests answered as recently as this.
_ANSWERED_KEPT = 2048

#: Take a row, or a line for the operator.
OnRequest = Callable[[RequestRecord], None]
OnAction = Callable[[ActionRecord], None]
OnNote = Callable[[Note], None]


class SimController:
    """Drives `scheduler`. `to_workers` and `to_clients` are its wires, and may be filled later.

    The three `on_...` get every record and note, in the order of their rows. `checker` holds the
    invariants at every step; a violation is raised as InvariantViolated. StatusAsked is not answered: no
    simulated client asks.
    """

    def __init__(
        self,
        kernel: Kernel,
        scheduler: Scheduler,
        *,
        on_request: OnRequest,
        on_action: OnAction,
        on_note: OnNote,
        checker: InvariantChecker | None = None,
    ) -> None:
        self.scheduler = scheduler
        self.to_workers: dict[int, Wire] = {}
        self.to_clients: dict[bytes, Wire] = {}
        self._kernel = kernel
        self._on_request = on_request
        self._on_action = on_action
        self._on_note = on_note
        self.checker = checker
        #: Observers of each event that is handled, and of each message to a client (truth.py).
        self.on_event: Callable[[Event], None] | None = None
        self.on_reply: Callable[[bytes, ControllerToClient | MembershipReply], None] | None = None
        #: Wants to see each message to a worker (take_over.py).
        self.on_action_sent: Callable[[int, ControllerToWorker], None] | None = None
        #: Takes the record of each stage of a request that has more than one (stages.tsv).
        self.on_stage: Callable[[StageRecord], None] | None = None
        #: Takes each plan for a cascade (cascade_plans.tsv).
        self.on_plan: Callable[[PlanRecord], None] | None = None
        #: Take each call of a function that ended, and each part of one's run (calls.tsv, call_parts.tsv).
        self.on_call: Callable[[CallRecord], None] | None = None
        self.on_call_part: Callable[[CallPart], None] | None = None
        #: Room in the queues of clients that do not read, or are gone (0), in messages. Messages beyond that
        #: fail, as they do live.
        self.room: dict[bytes, int] = {}
        self._values: ValueStore[Payload] = ValueStore(made_up)
        self._framed = False  # nothing with frames has come yet: most runs have none
        self._recent: deque[tuple[int, int]] = deque(maxlen=_ANSWERED_KEPT)  # request id, key
        self._restless = 0  # steps in a row that asked for a time that has passed
        self._life = 1  # counts the processes; 0 while none runs
        self._lives = 1
        self._held: list[Event | Framed] | None = None  # a list: the process stands still
        self._due_ns = -1  # of the next step; -1: none is due
        self._armed: set[int] = set()  # times for which an event is on the heap

    @property
    def life(self) -> int:
        """The number of its current life: 1, 2, ...; 0 while no process runs."""
        return self._life

    @property
    def answers(self) -> bool:
        """True if a process runs, and does not stand still."""
        return self._held is None

    @property
    def inputs_kept(self) -> int:
        """Inputs of requests that have no answer yet."""
        return self._values.owners

    def story(self, request_ids: Sequence[int]) -> str:
        """What is known of the requests that were answered lately under these ids, of any client."""
        keys = [key for request_id, key in self._recent if request_id in request_ids]
        return "" if self.checker is None else "\n".join(self.checker.stories(keys))

    def receive(self, event: Event | Framed) -> None:
        """A fact reaches the controller now; the step follows at the end of this instant."""
        if self._held is not None:
            self._held.append(event)
            return
        if isinstance(event, Framed):
            event = self._take_frames(event.message, event.frames)
        now_ns = self._kernel.now_ns
        if self.checker is not None:
            self.checker.saw(event, now_ns=now_ns)
        if self.on_event is not None:
            self.on_event(event)
        self.scheduler.handle(event, now_ns=now_ns)
        if self._due_ns != now_ns:
            self._arm(now_ns)

    def _take_frames(self, event: Event, frames: Sequence[Payload]) -> Event:
        """Keep what came behind the message of `event`; returns the event that the scheduler gets."""
        self._framed = True
        if isinstance(event, FromClient):
            return FromClient(event.client, event.message, self._values.came(frames[0]))
        if isinstance(event, FromWorker):
            outputs = tuple([self._values.came(frame) for frame in frames])
            return FromWorker(event.worker_id, event.message, outputs)
        return event

    # ------------------------------------------------------------------------------- faults

    def pause(self) -> int:
        """The process stands still: what reaches it waits. Returns the number of its life."""
        if self._held is None:
            self._held = []
        return self._life

    def resume(self, life: int) -> None:
        """It continues, unless it has died since `life`."""
        if life == self._life and self._life and self._held is not None:
            held, self._held = self._held, None
            for event in held:
                self.receive(event)
            self._arm(self._kernel.now_ns)

    def kill(self) -> None:
        """The process is gone; what is sent to it until `start` is lost."""
        self._life = 0
        self._held = []
        self._due_ns = -1

    def start(self, scheduler: Scheduler, checker: InvariantChecker | None) -> None:
        """A new process, with this scheduler."""
        self._lives += 1
        self._life = self._lives
        self._held = None
        self._values = ValueStore(made_up)
        self._recent.clear()
        self.scheduler, self.checker = scheduler, checker
        self._arm(self._kernel.now_ns)

    # --------------------------------------------------------------------------------- end

    def drain(self) -> None:
        """Take no new requests; those in flight are finished, the rest are answered by `abandon`."""
        self.receive(Drain())

    def abandon(self) -> None:
        """Answer what is left: the controller ends."""
        now_ns = self._kernel.now_ns
        again = True
        while again:
            effects = self.scheduler.abandon(now_ns=now_ns)
            if self.checker is not None:
                self.checker.check(effects, now_ns=now_ns)
            self._perform_all(effects)
            self._values.step_ended()
            again = self.scheduler.slicing

    def recount(self) -> None:
        """At the end of a run: the checker's whole ledger must be the scheduler's state.

        Nothing is asked while the process stands still or is gone: it may have taken in facts of which
        it has not decided anything yet.
        """
        if self.checker is not None and self._held is None:
            self.checker.recount()

    def _arm(self, due_ns: int) -> None:
        """The next step is at `due_ns`. What was armed for another time stays, and is passed over."""
        self._due_ns = due_ns
        if due_ns not in self._armed:
            self._armed.add(due_ns)
            self._kernel.at_end_of(due_ns, self._step, due_ns)

    def _step(self, due_ns: int) -> None:
        self._armed.discard(due_ns)
        if due_ns != self._due_ns or self._held is not None:
            return
        scheduler = self.scheduler
        effects = scheduler.schedule(now_ns=due_ns)
        if self.checker is not None:
            self.checker.check(effects, now_ns=due_ns)
        if effects:
            self._perform_all(effects)
        if self._framed:
            self._values.step_ended()
        wake_ns = scheduler.next_wakeup_ns()
        if wake_ns is None:
            self._due_ns = -1
            return
        if self.checker is not None and not scheduler.slicing:
            self._hold_to_rest(wake_ns, due_ns)
        # A wake-up that has passed means: again, but time must pass in between.
        self._arm(wake_ns if wake_ns > due_ns else due_ns + 1)

    def _hold_to_rest(self, wake_ns: int, now_ns: int) -> None:
        """A scheduler that goes on asking for a time that has passed would keep a core busy for nothing."""
        self._restless = self._restless + 1 if wake_ns <= now_ns else 0
        if self._restless > _MOST_RESTLESS:
            raise InvariantViolated(
                f"{self.scheduler.cluster.config.policy} asked {self._restless} times in a row to be woken "
                f"at a time that has passed, last at {now_ns} for {wake_ns}"
            )

    def _perform_all(self, effects: list[Effect]) -> None:
        for effect in effects:
            kind = type(effect)
            if kind is ToClient:
                self._to_client(effect)  # type: ignore[arg-type]
            elif kind is ToWorker:
                self._to_worker(effect)  # type: ignore[arg-type]
            elif kind is RequestDone:
                record = effect.record  # type: ignore[union-attr]
                if self._framed:
                    self._forget_input(record)  # type: ignore[arg-type]
                if not effect.child:  # type: ignore[union-attr]
                    self._on_request(record)  # type: ignore[arg-type]
            elif kind is Keep:
                self._values.keep(effect.value_id, effect.owner)  # type: ignore[union-attr]
            elif kind is ActionDone:
                self._on_action(effect.record)  # type: ignore[union-attr, arg-type]
            elif kind is StageDone:
                if self.on_stage is not None:
                    self.on_stage(effect.record)  # type: ignore[union-attr, arg-type]
            elif kind is PlanMade:
                if self.on_plan is not None:
                    self.on_plan(effect.record)  # type: ignore[union-attr, arg-type]
            elif kind is CallDone:
                if self.on_call is not None:
                    self.on_call(effect.record)  # type: ignore[union-attr, arg-type]
            elif kind is CallPartDone:
                if self.on_call_part is not None:
                    self.on_call_part(effect.record)  # type: ignore[union-attr, arg-type]
            elif kind is Note:
                self._on_note(effect)  # type: ignore[arg-type]

    def _forget_input(self, record: RequestRecord) -> None:
        self._values.release(record.key)
        if self.checker is not None:
            self._recent.append((record.request_id, record.key))

    def _to_client(self, effect: ToClient) -> None:
        if self.room:
            room = self.room.get(effect.client, 1)
            if not room:
                self._kernel.at(self._kernel.now_ns, self.receive, ClientLost(effect.client))
                return
            if effect.client in self.room:
                self.room[effect.client] = room - 1
        if self.on_reply is not None:
            self.on_reply(effect.client, effect.message)
        wire = self.to_clients.get(effect.client)
        if wire is None:
            return
        message = effect.message
        frames = self._values.get(effect.output)
        if frames:
            wire.send(Framed(message, frames), SMALL_MESSAGE_BYTES + sum(map(len, frames)))
        else:
            wire.send(message)

    def _to_worker(self, effect: ToWorker) -> None:
        message, wire = effect.message, self.to_workers[effect.worker_id]
        if self.on_action_sent is not None:
            self.on_action_sent(effect.worker_id, message)
        if type(message) is Infer and message.input_sizes:
            frames = self._values.inputs(effect.inputs, message.input_sizes)
            if frames:
                wire.send(Framed(message, frames), SMALL_MESSAGE_BYTES + sum(map(len, frames)))
                return
        elif effect.inputs and type(message) in (Call, ChildReply):
            frames = [frame for value in effect.inputs for frame in self._values.get(value)]
            if frames:
                wire.send(Framed(message, frames), SMALL_MESSAGE_BYTES + sum(map(len, frames)))
                return
        wire.send(message)
