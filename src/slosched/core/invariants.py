"""What must hold after every step, whatever happens. Checked in tests and in simulation.

- Every request is answered exactly once, and queued + in flight + answered = arrived.
- A GPU's exec timeline never overlaps, and every exec starts within its action's window.
- Pages used never exceed the pages there are, and every page is accounted for.
- Nothing is sent to run on weights that are not resident.

A failure prints the story of the request concerned: every fact and decision that touched it.
"""

from __future__ import annotations

from slosched.core.scheduler.interface import (
    Effect,
    Event,
    FromWorker,
    RequestDone,
    ToWorker,
)
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu, RequestState
from slosched.messages import ErrorResult, Infer, InferResult

_STORY_LINES = 64


class InvariantViolated(AssertionError):
    """The message names the invariant and tells the story."""


class InvariantChecker:
    """Watches one scheduler: call `saw` for each event and `check` after each `schedule`.

    Reported times are the worker's, converted by its estimate of the offset between the clocks. Where
    that is exact (`drift_ns` None: no jitter, no drift), so are the checks of them. Else two estimates may
    differ by twice the error that the worker reports, and by `drift_ns`, what its clock can have
    drifted since the exchange that it goes by.
    """

    def __init__(self, scheduler: Scheduler, *, drift_ns: int | None = None) -> None:
        self._scheduler = scheduler
        self._drift_ns = drift_ns
        self._stories: dict[int, list[str]] = {}
        self._answered: dict[int, int] = {}
        self._sent: dict[
            int, tuple[Infer, tuple[int, ...], int]
        ] = {}  # action -> what, who, worker
        self._exec_end_ns: dict[tuple[int, int], int] = {}  # (worker, gpu) -> end of its last exec
        self._incarnation_of: dict[int, int] = {}

    # ---------------------------------------------------------------------------- observing

    def saw(self, event: Event, *, now_ns: int) -> None:
        """Note a fact before the scheduler handles it, and check what it says of a GPU's timeline."""
        if not isinstance(event, FromWorker):
            return
        message = event.message
        if isinstance(message, InferResult):
            sent = self._sent.pop(message.action_id, None)
            if sent is None:
                return
            infer, keys, worker_id = sent
            for key in keys:
                self._tell(key, now_ns, f"action {message.action_id} ran {message.exec}")
            begin_ns, end_ns = message.exec.begin_ns, message.exec.end_ns
            slack_ns = self._slack_ns(worker_id)
            if not infer.earliest_ns - slack_ns <= begin_ns <= infer.latest_ns + slack_ns:
                window = f"{infer.earliest_ns}..{infer.latest_ns}"
                self._fail(
                    f"exec of action {infer.action_id} began at {begin_ns}, outside {window}", keys
                )
            place = (worker_id, infer.gpu_id)
            if self._incarnation_of.get(worker_id) != infer.session:
                self._incarnation_of[worker_id] = infer.session
                # A new session is a process that began anew, with all of its GPUs.
                for gpu in [g for g in self._exec_end_ns if g[0] == worker_id]:
                    del self._exec_end_ns[gpu]
            last_end_ns = self._exec_end_ns.get(place, 0)
            if begin_ns < last_end_ns - slack_ns:
                self._fail(
                    f"exec of action {infer.action_id} began at {begin_ns} on {place}, before the one "
                    f"ahead of it ended at {last_end_ns}",
                    keys,
                )
            self._exec_end_ns[place] = end_ns
        elif isinstance(message, ErrorResult):
            sent = self._sent.pop(message.action_id, None)
            for key in sent[1] if sent else ():
                self._tell(key, now_ns, f"action {message.action_id} failed: {message.code}")

    def _slack_ns(self, worker_id: int) -> int:
        if self._drift_ns is None:
            return 0
        return self._drift_ns + 2 * self._scheduler.cluster.workers[worker_id].clock_error_ns

    def check(self, effects: list[Effect], *, now_ns: int) -> None:
        """Check everything after a `schedule` that returned `effects`. Raises InvariantViolated."""
        for effect in effects:
            if isinstance(effect, ToWorker) and isinstance(effect.message, Infer):
                self._check_send(effect, effect.message, now_ns)
            elif isinstance(effect, RequestDone):
                record = effect.record
                self._tell(record.key, now_ns, f"answered {record.code} {record.reason}")
                times = self._answered[record.key] = self._answered.get(record.key, 0) + 1
                if times > 1:
                    self._fail(f"request {record.key} was answered {times} times", (record.key,))
        self._forget_lost()
        self._check_counts()
        for gpu in self._scheduler.cluster.gpus.values():
            self._check_pages(gpu)

    def _forget_lost(self) -> None:
        """Nobody will report an action that the scheduler gave up with its worker."""
        actions = self._scheduler.cluster.actions
        for action_id in [a for a in self._sent if a not in actions]:
            del self._sent[action_id]

    # ----------------------------------------------------------------------------- checking

    def _check_send(self, effect: ToWorker, infer: Infer, now_ns: int) -> None:
        for key in effect.requests:
            where = f"worker {effect.worker_id} GPU {infer.gpu_id}"
            self._tell(
                key,
                now_ns,
                f"sent in action {infer.action_id} (batch {infer.batch_size}) to {where}",
            )
        worker = self._scheduler.cluster.workers[effect.worker_id]
        gpu = next((g for g in worker.gpus if g.gpu_id == infer.gpu_id), None)
        self._sent[infer.action_id] = (infer, effect.requests, effect.worker_id)
        if gpu is None:  # lost within the same step
            return
        if infer.model_id not in gpu.resident:
            self._fail(
                f"action {infer.action_id} needs weights that {gpu.name} does not hold",
                effect.requests,
            )
        if infer.latest_ns < infer.earliest_ns:
            self._fail(f"action {infer.action_id} has an empty window", effect.requests)
        if len(effect.requests) > infer.batch_size:
            self._fail(
                f"action {infer.action_id} carries more requests than its class", effect.requests
            )

    def _check_counts(self) -> None:
        scheduler = self._scheduler
        cluster = scheduler.cluster
        queued = sum(len(model.queue) for model in cluster.models.values())
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
        unanswered = sum(len(client.requests) for client in scheduler.clients.values())
        if unanswered != queued + in_flight:
            self._fail(f"clients wait for {unanswered}, the scheduler has {queued + in_flight}", ())

    def _check_pages(self, gpu: Gpu) -> None:
        held = sum(m.pages for m in gpu.resident.values()) + sum(
            m.pages for m in gpu.loading.values()
        )
        if gpu.free_pages < 0 or gpu.free_pages + held != gpu.pages:
            self._fail(
                f"{gpu.name}: {gpu.free_pages} free + {held} held is not {gpu.pages} pages", ()
            )

    # --------------------------------------------------------------------------------- words

    def _tell(self, key: int, now_ns: int, line: str) -> None:
        story = self._stories.setdefault(key, [])
        if len(story) < _STORY_LINES:
            story.append(f"{now_ns}: {line}")

    def _fail(self, what: str, keys: tuple[int, ...]) -> None:
        stories = [f"request {k}:\n  " + "\n  ".join(self._stories.get(k, [])) for k in keys]
        raise InvariantViolated("\n".join([what, *stories]))
