"""What must hold after every step, whatever happens. Checked in tests and in simulation.

- Every request is answered exactly once, and queued + in flight + answered = arrived.
- A request is in one place: in no two actions at once, and in none after its answer.
- A GPU's exec timeline never overlaps, segment by segment, and every exec starts within its action's window.
- Pages used never exceed the pages there are, and every page is accounted for.
- Nothing is sent to run on weights that are not resident.
- A request whose action ended with its process runs at most once more, alone, and meanwhile its GPU gets
  nothing else. The next stage of a request that then ran well is an action like others.
- An Infer ends well only if its worker reported it, in the session that it was sent in.
- The stages of a request follow each other: each waits from when the one before it ended, in the same cascade,
  and the last one has an end before the answer.
- A controller that drains takes nothing new: it answers each new request in the same step, but for the children
  of calls that are under way.
- Of calls of functions, what call_invariants.py says.

The cost of a check grows with the effects of the step alone: the checker keeps a ledger of its own from the
effects, and compares all of it with the scheduler's state only every `RECOUNT_STEPS` steps (sooner after an
action failed or a client left) and in `recount`. Messages may be lost, late or doubled, and a controller may
begin anew (with a checker of its own), so a report is judged only if it is the first one of an action that
this scheduler still waits for.

A failure prints the story of the request concerned: every fact and decision that touched it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from slosched.codes import ENDED, ActionType, Verdict
from slosched.core.call_invariants import CallInvariants
from slosched.core.scheduler.interface import (
    ActionDone,
    CallDone,
    ClientLost,
    Drain,
    Effect,
    Event,
    FromWorker,
    RequestDone,
    StageDone,
    StageRecord,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu, RequestState
from slosched.core.timeline import Timeline
from slosched.messages import (
    Call,
    CallPrepared,
    CallResult,
    CallResumed,
    CallSuspended,
    ChildReply,
    ChildRequest,
    ErrorResult,
    EvictWeights,
    EvictWeightsResult,
    Goodbye,
    Infer,
    InferResult,
    LoadWeights,
    LoadWeightsResult,
    Span,
)

RECOUNT_STEPS = 4096
#: Verdicts on a stage that never ran: its request gets an earlier answer, or none.
_WAITED_IN_VAIN = (Verdict.INSTEAD, Verdict.OUTRANKED, Verdict.UNANSWERED)
#: Steps until the next one after an action failed or a client left: their requests must not be forgotten.
_RECOUNT_SOON_STEPS = 64
_STORY_LINES = 64
#: Stories of answered requests are kept this long: a second answer would come soon.
_ANSWERED_KEPT = 2048

#: action id of the Infer that a request is in; those that wait in a queue have none.
_QUEUED = -1
#: A time, a template and its values. The template is formatted only when the story is printed.
_Line = tuple[int, str, tuple[object, ...]]


class InvariantViolated(AssertionError):
    """The message names the invariant and tells the story."""


class InvariantChecker:
    """Watches one scheduler: call `saw` for each event and `check` after each `schedule`.

    Reported times are the worker's, converted by its estimate of the offset between the clocks. Where that
    estimate is exact (`drift_ns` None: no jitter, no drift), so are the checks of these times. Otherwise two
    estimates may differ by twice the error that the worker reports, and by `drift_ns`, the possible drift of
    its clock since the exchange that it uses.
    """

    def __init__(self, scheduler: Scheduler, *, drift_ns: int | None = None) -> None:
        self._scheduler = scheduler
        self._drift_ns = drift_ns
        self._steps = 0
        self._recount_at = RECOUNT_STEPS
        self._arrived = 0  # requests known; their keys are the numbers below
        self._live: dict[int, int] = {}  # unanswered request -> the action it is in, or _QUEUED
        #: By action: the message, the keys of its requests, the worker.
        self._sent: dict[int, tuple[Infer | Call, tuple[int, ...], int]] = {}
        #: By unanswered request: the number of its actions that ended with their process.
        self._ends: dict[int, int] = {}
        #: By (worker, GPU id): its actions, and whether each must be alone.
        self._aboard: dict[tuple[int, int], dict[int, bool]] = {}
        #: By unanswered request: the record of its last stage, after which it goes on.
        self._stages: dict[int, StageRecord] = {}
        self._failed: set[int] = set()  # actions that their workers reported as failed in this step
        self._ran: set[int] = set()  # and those reported as run
        self._drains_from: int | None = None  # the first key that came after the drain began
        self._stories: dict[int, list[_Line]] = {}
        self._answered: deque[int] = deque()  # answered requests with a story, oldest first
        #: By (worker, GPU id): its last execs, as they were reported.
        self._execs: dict[tuple[int, int], Timeline] = {}
        self._session_of: dict[int, int] = {}  # by worker: the session of these execs
        self._gpus: dict[tuple[int, int], Gpu] = {}
        self._touched: dict[int, Gpu] = {}  # GPUs whose pages changed, by index
        self._calls = CallInvariants(scheduler, self._live, self._fail)

    # ---------------------------------------------------------------------------- observing

    def saw(self, event: Event, *, now_ns: int) -> None:
        """Note a fact before the scheduler handles it, and check what it reports about a GPU's timeline."""
        if not isinstance(event, FromWorker):
            if isinstance(event, Drain) and self._drains_from is None:
                self._drains_from = self._scheduler.arrived
            elif isinstance(getattr(event, "message", event), Goodbye | ClientLost):
                self._recount_soon()
            return
        message = event.message
        if isinstance(message, InferResult | CallResult | ErrorResult):
            sent = self._sent.get(message.action_id)
            if isinstance(message, ErrorResult):
                self._touch_action(message.action_id)  # a load, or weights that are missing
            if sent is None:
                return
            action, keys, worker_id = sent
            if worker_id != event.worker_id or message.session != action.session:
                return  # from an earlier process, the worker's or the controller's
            if isinstance(message, ErrorResult):
                self._failed.add(message.action_id)
                self._tell(keys, now_ns, "action {} failed: {}", message.action_id, message.code)
                return
            if message.action_id not in self._scheduler.cluster.actions:
                return  # a second report of the same, in the same step
            self._ran.add(message.action_id)
            self._tell(keys, now_ns, "action {} ran {}", message.action_id, message.exec)
            if not (isinstance(action, Call) and self._calls.has_host_part(action)):
                self._check_window(action, keys, worker_id, message.exec)
            if isinstance(action, Infer) and isinstance(message, InferResult):
                self._check_exec(action, keys, worker_id, message)
        elif isinstance(message, CallPrepared | CallSuspended | CallResumed | ChildRequest):
            sent = self._sent.get(message.action_id)
            if sent is not None:
                self._tell(sent[1], now_ns, "says {}", message)
                if isinstance(message, CallPrepared):  # the window is that of its host part
                    self._check_window(*sent, message.part)
        elif isinstance(message, LoadWeightsResult | EvictWeightsResult):
            self._touch_action(message.action_id)

    def check(self, effects: Sequence[Effect], *, now_ns: int) -> None:
        """Check everything after a `schedule` that returned `effects`. Raises InvariantViolated."""
        scheduler = self._scheduler
        for key in range(self._arrived, scheduler.arrived):
            self._live[key] = _QUEUED
        self._arrived = scheduler.arrived
        for effect in effects:
            if isinstance(effect, RequestDone):
                self._calls.request_done(effect.record.key)
                self._request_done(effect, now_ns)
            elif isinstance(effect, ToWorker):
                if isinstance(effect.message, Infer | Call):
                    self._check_send(effect, effect.message, now_ns)
                elif isinstance(effect.message, ChildReply):
                    self._calls.replied(effect.message, effect.requests)
                elif isinstance(effect.message, LoadWeights | EvictWeights):
                    self._touch(effect.worker_id, effect.message.gpu_id)
            elif isinstance(effect, ActionDone):
                self._action_done(effect, now_ns)
            elif isinstance(effect, CallDone):
                self._calls.call_done(effect.record)
            elif isinstance(effect, StageDone):
                self._stage_done(effect, now_ns)
        if len(self._live) + scheduler.answered != scheduler.arrived:
            self._fail(
                f"unanswered {len(self._live)} + answered {scheduler.answered} is not arrived "
                f"{scheduler.arrived}",
                (),
            )
        if self._drains_from is not None:
            self._check_draining(self._drains_from)
        self._ran.clear()
        if self._touched:
            for gpu in self._touched.values():
                self._check_pages(gpu)
            self._touched.clear()
        self._steps += 1
        if self._steps >= self._recount_at:
            self.recount()

    def _recount_soon(self) -> None:
        self._recount_at = min(self._recount_at, self._steps + _RECOUNT_SOON_STEPS)

    def recount(self) -> None:
        """Compare the whole ledger with the scheduler's state, as at the end of a run."""
        self._recount_at = self._steps + RECOUNT_STEPS
        scheduler = self._scheduler
        cluster = scheduler.cluster
        queued = sum(model.queued for model in cluster.models.values())
        queued += scheduler.second_tries.waiting
        in_flight = sum(
            request.state is RequestState.IN_FLIGHT
            for action in cluster.actions.values()
            for request in action.requests
        )
        if queued + in_flight + scheduler.answered != scheduler.arrived:
            self._fail(
                f"queued {queued} + in flight {in_flight} + answered {scheduler.answered} "
                f"is not arrived {scheduler.arrived}",
                (),
            )
        noted = sum(action_id != _QUEUED for action_id in self._live.values())
        if noted != in_flight:
            self._fail(f"effects leave {noted} in flight, the scheduler has {in_flight}", ())
        kinds = (ActionType.INFER, ActionType.CALL)
        infers = [i for i, a in cluster.actions.items() if a.action_type in kinds]
        if infers != list(self._sent):
            self._fail(f"actions {infers} are outstanding, effects leave {list(self._sent)}", ())
        clients = [*scheduler.clients.values(), *scheduler.leaving]
        unanswered = sum(len(client.requests) for client in clients)
        if unanswered != queued + in_flight:
            self._fail(f"clients wait for {unanswered}, the scheduler has {queued + in_flight}", ())
        self._calls.recount()
        for gpu in cluster.gpus.values():
            self._check_pages(gpu)

    # ------------------------------------------------------------------------------- ledger

    def _request_done(self, effect: RequestDone, now_ns: int) -> None:
        record = effect.record
        key = record.key
        self._tell((key,), now_ns, "answered {} {}", record.code, record.reason)
        self._ends.pop(key, None)
        before = self._stages.pop(key, None)
        if before is not None and before.verdict:
            self._fail(
                f"request {key} is answered, and its stage {before.stage + 1} has no end", (key,)
            )
        if self._live.pop(key, None) is None:
            when = "although it was answered" if key < self._arrived else "although it never came"
            self._fail(f"request {key} is answered {when}", (key,))
        self._answered.append(key)
        if len(self._answered) > _ANSWERED_KEPT:
            self._stories.pop(self._answered.popleft(), None)

    def _check_draining(self, first: int) -> None:
        children = self._scheduler.arrivals.children
        newest = (key for key in reversed(self._live) if key not in children)
        taken = next((key for key in newest if key >= first), None)
        if taken is not None:
            self._fail(f"request {taken} came when the controller drained, and is taken", (taken,))

    def _action_done(self, effect: ActionDone, now_ns: int) -> None:
        """An action was reported, failed or was lost: its requests are answered or queued again."""
        record = effect.record
        sent = self._sent.pop(record.action_id, None)
        if sent is None:
            return
        del self._aboard[record.worker_id, record.gpu_id][record.action_id]
        # An action that failed without a report was lost with its worker.
        reported = record.action_id in self._failed
        if isinstance(sent[0], Call):
            self._calls.ended(record, sent[0].call_id, reported=reported)
        ended = record.code in ENDED or not reported
        self._failed.discard(record.action_id)
        if record.code == 0 and record.action_id not in self._ran:
            self._fail(
                f"action {record.action_id} ends well, and its worker did not say so", sent[1]
            )
        if record.code:
            self._recount_soon()
        for key in sent[1]:
            if self._live.get(key, _QUEUED) != record.action_id:
                continue
            if record.code == 0:
                self._fail(f"action {record.action_id} ended well without an answer", (key,))
            self._live[key] = _QUEUED
            if ended:
                self._ends[key] = self._ends.get(key, 0) + 1
            self._tell((key,), now_ns, "action {} came to nothing", record.action_id)

    def _stage_done(self, effect: StageDone, now_ns: int) -> None:
        """A stage ended; unless its output answers the request, that waits for its next one."""
        key, stage = effect.record.key, effect.record.stage
        self._check_order(effect.record)
        place = self._live.get(key, _QUEUED)
        if effect.record.verdict in _WAITED_IN_VAIN:
            self._tell((key,), now_ns, "stage {} is given up", stage)
            return
        if place not in self._ran:
            self._fail(
                f"stage {stage} of request {key} ends, and no action that ran has it", (key,)
            )
        if not effect.record.answers:
            self._stages[key] = effect.record
            self._live[key] = _QUEUED
            self._ends.pop(key, None)  # of this stage, which ran well in the end
            self._tell((key,), now_ns, "stage {} ended, and it goes on", stage)

    def _check_order(self, record: StageRecord) -> None:
        """A stage begins to wait where the one before it ended."""
        key, before = record.key, self._stages.pop(record.key, None)
        place = (0, record.queued_ns, record.cascade)
        if before is not None:
            place = (before.stage + 1, before.end_ns, before.cascade)
        if (record.stage, record.queued_ns, record.cascade) != place:
            self._fail(
                f"stage {record.stage} of request {key} in {record.cascade!r} waited from {record.queued_ns}; "
                f"stage {place[0]} in {place[2]!r}, from {place[1]} on, was to end next",
                (key,),
            )

    def _check_send(self, effect: ToWorker, infer: Infer | Call, now_ns: int) -> None:
        action_id, keys, worker_id = infer.action_id, effect.requests, effect.worker_id
        batch = infer.batch_size if isinstance(infer, Infer) else 1
        template = "sent in action {} (batch {}) to worker {} GPU {}"
        self._tell(keys, now_ns, template, action_id, batch, worker_id, infer.gpu_id)
        for key in keys:
            place = self._live.get(key)
            if place is None:
                self._fail(f"action {action_id} carries request {key}, which is answered", (key,))
            if place != _QUEUED:
                self._fail(f"request {key} is in actions {place} and {action_id}", (key,))
            self._live[key] = action_id
        self._sent[action_id] = (infer, keys, worker_id)
        gpu = self._gpu(worker_id, infer.gpu_id)
        if isinstance(infer, Infer):
            self._check_company(infer, keys, worker_id)
        else:
            self._calls.sent(infer, keys, gpu)
            self._aboard.setdefault((worker_id, infer.gpu_id), {})[action_id] = False
        if gpu is None:  # lost within the same step
            return
        if infer.model_id not in gpu.resident:
            self._fail(f"action {action_id} needs weights that {gpu.name} does not hold", keys)
        if infer.latest_ns < infer.earliest_ns:
            self._fail(f"action {action_id} has an empty window", keys)
        if len(keys) > batch:
            self._fail(f"action {action_id} carries more requests than its class", keys)
        if isinstance(infer, Call):
            return
        if any(length > infer.length for length in infer.lengths):
            self._fail(f"action {action_id} carries a request that is longer than its class", keys)

    def _check_company(self, infer: Infer, keys: tuple[int, ...], worker_id: int) -> None:
        """A request that ended a process has its GPU to itself, and ends no third process."""
        ends = max((self._ends.get(key, 0) for key in keys), default=0)
        aboard = self._aboard.setdefault((worker_id, infer.gpu_id), {})
        what = f"action {infer.action_id}"
        if ends > 1:
            self._fail(f"{what} may end a third process", keys)
        if ends and (aboard or len(keys) > 1):
            self._fail(f"{what} may end a process, and is not alone: {sorted(aboard)}", keys)
        if any(aboard.values()):
            self._fail(f"{what} goes to a GPU where {sorted(aboard)} must be alone", keys)
        aboard[infer.action_id] = bool(ends)

    # ------------------------------------------------------------------------------ workers

    def _slack_ns(self, worker_id: int) -> int:
        if self._drift_ns is None:
            return 0
        return self._drift_ns + 2 * self._scheduler.cluster.workers[worker_id].beat.clock_error_ns

    def _check_window(
        self, sent: Infer | Call, keys: tuple[int, ...], worker_id: int, exec_: Span
    ) -> None:
        """What was sent begins in its window."""
        begin_ns, slack_ns = exec_.begin_ns, self._slack_ns(worker_id)
        if not sent.earliest_ns - slack_ns <= begin_ns <= sent.latest_ns + slack_ns:
            what = f"exec of action {sent.action_id} began at {begin_ns}"
            self._fail(f"{what}, outside {sent.earliest_ns}..{sent.latest_ns}", keys)

    def _check_exec(
        self, infer: Infer, keys: tuple[int, ...], worker_id: int, result: InferResult
    ) -> None:
        """No segment of the exec overlaps another one that was reported."""
        what = f"exec of action {infer.action_id} began at {result.exec.begin_ns}"
        slack_ns = self._slack_ns(worker_id)
        if self._session_of.get(worker_id) != infer.session:
            self._session_of[worker_id] = infer.session
            # A new session is a process that began anew, with all of its GPUs.
            for place in [p for p in self._execs if p[0] == worker_id]:
                del self._execs[place]
        place = (worker_id, infer.gpu_id)
        timeline = self._execs.setdefault(place, Timeline())
        for segment in _segments(result):
            overlap = timeline.add(segment.begin_ns, segment.end_ns, slack_ns=slack_ns)
            if overlap:
                self._fail(f"{what} on {place}, {overlap}", keys)

    def _gpu(self, worker_id: int, gpu_id: int) -> Gpu | None:
        """The GPU that is in use under these numbers."""
        cluster = self._scheduler.cluster
        gpu = self._gpus.get((worker_id, gpu_id))
        if gpu is None or cluster.gpus.get(gpu.index) is not gpu:
            gpus = cluster.workers[worker_id].gpus
            gpu = next((g for g in gpus if g.gpu_id == gpu_id), None)
            if gpu is not None:
                self._gpus[worker_id, gpu_id] = gpu
        return gpu

    def _touch_action(self, action_id: int) -> None:
        action = self._scheduler.cluster.actions.get(action_id)
        if action is not None:
            self._touched[action.gpu.index] = action.gpu

    def _touch(self, worker_id: int, gpu_id: int) -> None:
        gpu = self._gpu(worker_id, gpu_id)
        if gpu is not None:
            self._touched[gpu.index] = gpu

    def _check_pages(self, gpu: Gpu) -> None:
        if self._scheduler.cluster.gpus.get(gpu.index) is not gpu:
            return  # lost, and its pages with it
        held = sum(m.pages for m in gpu.resident.values()) + sum(
            m.pages for m in gpu.loading.values()
        )
        held += sum(gpu.brought.values())
        if gpu.free_pages < 0 or gpu.free_pages + held != gpu.pages:
            self._fail(
                f"{gpu.name}: {gpu.free_pages} free + {held} held is not {gpu.pages} pages", ()
            )

    # --------------------------------------------------------------------------------- words

    def _tell(self, keys: tuple[int, ...], now_ns: int, template: str, *values: object) -> None:
        for key in keys:
            story = self._stories.setdefault(key, [])
            if len(story) < _STORY_LINES:
                story.append((now_ns, template, values))

    def _fail(self, what: str, keys: tuple[int, ...]) -> None:
        raise InvariantViolated("\n".join([what, *self.stories(keys)]))

    def stories(self, keys: Sequence[int]) -> list[str]:
        """The story of each of these requests, as text."""
        stories = []
        for key in keys:
            lines = [
                f"{now_ns}: {template.format(*values)}"
                for now_ns, template, values in self._stories.get(key, [])
            ]
            stories.append(f"request {key}:\n  " + "\n  ".join(lines))
        return stories


def _segments(result: InferResult) -> tuple[Span, ...]:
    """The segments in which an Infer ran."""
    return result.segments or (result.exec,)
