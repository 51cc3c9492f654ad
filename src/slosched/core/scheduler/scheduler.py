"""The scheduler's brain: facts in, decisions out. No IO, no clock, no thread.

The law it keeps, whatever the policy and whatever fails (checked in core/invariants.py):

- every request is answered exactly once;
- a request's state moves along state.TRANSITIONS and no other way;
- pages used never exceed the pages there are; nothing is sent to weights that are not resident;
- the same events at the same times give the same effects, byte for byte.

`handle` only takes facts in; the policy decides in `schedule`, once per wake-up, after everything
that had arrived was handled. That batching is what keeps a busy controller cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from slosched.codes import ENDED, ActionType, Code, code_name
from slosched.config import SchedulerConfig
from slosched.core.scheduler.answers import NO_PLAN, Answers, Plan
from slosched.core.scheduler.catalog import Catalog
from slosched.core.scheduler.client_sessions import ClientSessions, some_requests
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.door import Door
from slosched.core.scheduler.interface import (
    Accepted,
    ClientLost,
    Drain,
    Effect,
    Event,
    FromClient,
    FromWorker,
    Note,
    SendFailed,
    StatusAsked,
    ToClient,
)
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.overdue import Overdue
from slosched.core.scheduler.policies import make_policy
from slosched.core.scheduler.policies.base import LoadsByDemand
from slosched.core.scheduler.second_tries import MODEL_FAILED, SecondTries
from slosched.core.scheduler.sessions import TICK_NS, Sessions
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.state import (
    ActionState,
    Client,
    Gpu,
    Model,
    Request,
    RequestState,
    Worker,
    WorkerState,
)
from slosched.core.scheduler.validation import plausible, what_is_wrong
from slosched.core.scheduler.weights import Weights
from slosched.core.scheduler.words import made_safe
from slosched.messages import (
    PROTOCOL_VERSION,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    ErrorResult,
    EvictWeightsResult,
    Goodbye,
    Heartbeat,
    InferReply,
    InferRequest,
    InferResult,
    ListModelsRequest,
    LoadModelRequest,
    LoadModelResult,
    LoadWeightsResult,
    Refused,
    StatusRequest,
    Welcome,
    WorkerGoodbye,
    WorkerRefused,
    WorkerToController,
    WorkerWelcome,
)

#: A request whose actions keep failing is answered after this many, not counting those in which the model
#: or its process failed (second_tries.py bounds them).
_MAX_ATTEMPTS = 3
#: How a worker that has said goodbye fails what it has not begun.
_HANDED_BACK = (Code.CANCELLED, Code.SHUTTING_DOWN)


class Scheduler:
    """One controller's decisions. `worker_count` workers are expected; `incarnation` is random.

    Clients are told the incarnation, workers the `secret` (None: the incarnation): who says a worker the
    number of its controller gets its session.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        worker_count: int,
        incarnation: int,
        secret: int | None = None,
        version: str,
        worker_addresses: Sequence[str] = (),
    ) -> None:
        self._effects: list[Effect] = []
        self.cluster = Cluster(config, emit=self._effects.append)
        self._slices = self.cluster.slices
        self.policy = make_policy(self.cluster.config, self.cluster, self)
        self.sessions = Sessions(
            self.cluster,
            worker_count=worker_count,
            incarnation=incarnation if secret is None else secret,
            addresses=worker_addresses,
            on_joined=self._worker_joined,
            on_gpu_removed=self.policy.gpu_removed,
            on_lost=self._worker_lost,
            forgotten=lambda worker, now_ns: self.catalog.forgotten(worker, now_ns=now_ns),
        )
        self.catalog = Catalog(
            self.cluster,
            on_loaded=self._model_loaded,
            on_changed=self._model_changed,
            settled=self.policy.settled,
        )
        config = self.cluster.config
        welcome = Welcome(
            PROTOCOL_VERSION,
            incarnation,
            version,
            config.policy,
            config.default_slo_ns,
        )
        self._overdue = Overdue(self.cluster, self._not_reported)
        self.second_tries = SecondTries(
            self.cluster, end=self._answer_from_queue, wanted=self._weights_wanted
        )
        self._weights = Weights(config)
        self._clients = ClientSessions(
            emit=self._effects.append,
            welcome=welcome,
            weights=self._weights,
            slices=self._slices,
            end_request=self._client_gone,
            cancel_request=self._cancel,
            release=self.catalog.release,
        )
        self.clients = self._clients.by_identity
        self.limits = Limits(config)
        self.door = Door()
        self.leaving = self._clients.leaving
        self.answers = Answers(emit=self._effects.append, limits=self.limits)
        self.arrived = 0
        self.invalid = 0  # requests that could not be taken; not among those that arrived
        self.draining = False
        self._abandoned = False
        self.incarnation = incarnation
        self._next_key = 0
        self._tick_due_ns = 0
        self._now_ns = 0  # of the current call: answers depart now

    # ------------------------------------------------------------------------------- verbs

    def handle(self, event: Event, *, now_ns: int) -> None:
        """Take a fact in. Unknown or unexpected ones are answered or ignored, never raised."""
        self._now_ns = now_ns
        if isinstance(event, FromClient):
            self._from_client(event, now_ns)
        elif isinstance(event, FromWorker):
            worker = self.cluster.workers[event.worker_id]
            self._from_worker(worker, event.message, now_ns)
            if worker.leaving and worker.state is WorkerState.JOINED and not worker.busy:
                self.sessions.lose(worker, "it said goodbye", now_ns=now_ns)
        elif isinstance(event, SendFailed):
            worker = self.cluster.workers[event.worker_id]
            self.sessions.send_failed(worker, event.message, now_ns=now_ns)
        elif isinstance(event, ClientLost):
            self._clients.drop(event.client, "its connection broke")
        elif isinstance(event, Drain):
            self.draining = True

    def schedule(self, *, now_ns: int) -> list[Effect]:
        """Decide everything that can be decided now, and return it in order."""
        self._now_ns = now_ns
        if now_ns >= self._tick_due_ns:
            self._tick_due_ns = now_ns + TICK_NS
            self._tick(now_ns)
        self._overdue.look(now_ns=now_ns)
        if self._slices.under_way:
            self._slices.go_on()
        self.second_tries.plan(now_ns=now_ns)
        self.policy.plan(now_ns=now_ns)
        if self.catalog.waiting:
            self.catalog.advance(now_ns=now_ns)
        return self._step_ended()

    def _step_ended(self) -> list[Effect]:
        if self._slices.done:
            self._slices.renew()
        effects = self._effects.copy()
        self._effects.clear()
        return effects

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` must be called although nothing arrives."""
        if self.slicing:
            return self._now_ns
        policy_ns = self.policy.next_wakeup_ns()
        due_ns = self._tick_due_ns
        again_ns = self.second_tries.next_wakeup_ns(self._now_ns)
        if again_ns is not None and again_ns < due_ns:
            due_ns = again_ns
        return due_ns if policy_ns is None or due_ns < policy_ns else policy_ns

    @property
    def slicing(self) -> bool:
        """Long work is under way, and goes on with the next step."""
        return self._slices.under_way or self.catalog.hurried

    @property
    def answered(self) -> int:
        """Requests answered so far."""
        return self.answers.count

    @property
    def by_code(self) -> dict[int, int]:
        """Answers so far, by code."""
        return self.answers.by_code

    @property
    def idle(self) -> bool:
        """No request waits for its answer."""
        return self.arrived == self.answers.count

    def ready(self) -> bool:
        """At least one GPU can be given work."""
        return bool(self.cluster.gpus)

    def abandon(self, *, now_ns: int) -> list[Effect]:
        """Answer what is left with code 3, as the process ends: a slice of it, until not `slicing`."""
        self._now_ns = now_ns
        if not self._abandoned:
            self._abandoned = self.draining = True
            self.catalog.abandon()
            self._slices.begin(self._abandon_all(list(self.clients.values())))
        self._slices.go_on()
        return self._step_ended()

    def _abandon_all(self, clients: list[Client]) -> Work:
        for client in clients:
            yield 1
            while client.requests:
                some = some_requests(client)
                for request in some:
                    self._end(request, Code.SHUTTING_DOWN, "the controller is shutting down")
                yield len(some) * ANSWER

    # ----------------------------------------------------------------------------- clients

    def _from_client(self, event: FromClient, now_ns: int) -> None:
        message = event.message
        client = self.clients.get(event.client)
        if client is not None and isinstance(message, InferRequest):
            client.heard = True
            self._infer(client, message, event, now_ns)
            return
        if isinstance(message, ClientHello):
            self._clients.hello(event.client, message)
            return
        if client is None:
            if not isinstance(message, (Goodbye, CancelRequest)):
                reason = "say hello first (this controller may have been restarted)"
                request_id = -1 if isinstance(message, ClientHeartbeat) else message.request_id
                refused = Refused(request_id, Code.INVALID_REQUEST, reason)
                self._effects.append(ToClient(event.client, refused))
            return
        client.heard = True
        self._client_message(client, message, now_ns)

    def _client_message(self, client: Client, message: ClientMessage, now_ns: int) -> None:
        if isinstance(message, CancelRequest):
            self._clients.cancel(client, message.request_id)
        elif isinstance(message, LoadModelRequest):
            self.catalog.request_load(client, message, now_ns=now_ns)
        elif isinstance(message, ListModelsRequest):
            self.catalog.list_models(client, message)
        elif isinstance(message, StatusRequest):
            asked = StatusAsked(client.identity, message.request_id, message.brief)
            self._effects.append(asked)
        elif isinstance(message, Goodbye):
            self._clients.drop(client.identity, "it left")

    def _infer(self, client: Client, message: InferRequest, event: FromClient, now_ns: int) -> None:
        if message.request_id in client.requests:
            return  # it came twice, and is answered once
        bytes_behind = event.input_bytes
        model = self.cluster.models.get(message.model_id)
        wrong = what_is_wrong(client, message, model, bytes_behind)
        code = Code.INVALID_REQUEST
        if self.cluster.put_aside and model is not None and not wrong:
            wrong = self.cluster.put_aside.get(model.name, "")  # it would only time out
            code = Code.PROCESS_ENDED
        if wrong:
            self._not_taken(client, message, code, wrong)
            return
        assert model is not None
        slo_ns = message.slo_ns
        if slo_ns == 0:
            factor = message.slo_factor
            slo_ns = (
                round(model.b1_ns * factor) if factor > 0 else self.cluster.config.default_slo_ns
            )
        waiting = self.arrived - self.answers.count
        wrong = self.limits.exceeded(client, slo_ns, bytes_behind, waiting=waiting)
        if wrong:
            self._not_taken(client, message, Code.LIMIT_REACHED, wrong)
            return
        key = self._next_key
        self._next_key += 1
        request = Request(
            key, client, message.request_id, message.user_id, model, message.slo_factor, slo_ns,
            now_ns - event.waited_ns, bytes_behind, self._weights.of_request(client, slo_ns),
        )  # fmt: skip
        self.arrived += 1
        client.requests[message.request_id] = request
        if model.model_id not in client.models:
            self.catalog.used_by(client, model)  # it was forgotten once, or has the id from another
        if bytes_behind:
            self.limits.took(client, bytes_behind)
            self._effects.append(Accepted(key, event.input_key))
        if self.draining:
            self._answer(request, Code.SHUTTING_DOWN, "the controller is shutting down")
            return
        self.policy.enqueue(request, now_ns=now_ns)

    def _not_taken(self, client: Client, message: InferRequest, code: int, reason: str) -> None:
        """Answer a request that never was one of ours."""
        self.invalid += 1
        reply = InferReply(message.request_id, code, reason, message.model_id, 0, 0, False)
        self._effects.append(ToClient(client.identity, reply))

    # ----------------------------------------------------------------------------- workers

    def _from_worker(self, worker: Worker, message: WorkerToController, now_ns: int) -> None:
        message = made_safe(message)
        if isinstance(message, WorkerWelcome):
            self.sessions.welcome(worker, message, now_ns=now_ns)
            return
        if isinstance(message, WorkerGoodbye):
            if worker.state is WorkerState.JOINED and message.session == worker.session:
                self._worker_leaves(worker)
            return
        if isinstance(message, WorkerRefused):
            self.sessions.refused(worker, message, now_ns=now_ns)
            return
        if worker.state is not WorkerState.JOINED or message.session != worker.session:
            return  # of a session that ended; what it was about was dealt with then
        worker.heard = True
        if isinstance(message, InferResult):
            self._infer_result(worker, message, now_ns)
        elif isinstance(message, Heartbeat):
            self.sessions.heartbeat(worker, message, now_ns=now_ns)
        elif isinstance(message, ErrorResult):
            self._error_result(worker, message, now_ns)
        elif isinstance(message, LoadModelResult):
            self.catalog.prepared(worker, message, now_ns=now_ns)
        elif isinstance(message, LoadWeightsResult):
            self._load_result(worker, message, now_ns)
        elif isinstance(message, EvictWeightsResult):
            action = self.cluster.action_of(worker, message.action_id, ActionType.EVICT_WEIGHTS)
            if action is not None:
                self.cluster.evict_finished(action, message, now_ns=now_ns)

    def _load_result(self, worker: Worker, result: LoadWeightsResult, now_ns: int) -> None:
        action = self.cluster.action_of(worker, result.action_id, ActionType.LOAD_WEIGHTS)
        if action is None:
            return
        span = plausible(result.span, sent_ns=action.sent_ns, now_ns=now_ns)
        if span is not result.span:
            result = msgspec.structs.replace(result, span=span)
        self.cluster.load_finished(action, result, now_ns=now_ns)
        self.policy.action_done(
            action, code=Code.OK, end_ns=span.end_ns, duration_ns=span.duration_ns, clock_mhz=0
        )

    def _infer_result(self, worker: Worker, result: InferResult, now_ns: int) -> None:
        action = self.cluster.action_of(worker, result.action_id, ActionType.INFER)
        if action is None:
            return
        span = plausible(result.exec, sent_ns=action.sent_ns, now_ns=now_ns)
        if span is not result.exec:
            result = msgspec.structs.replace(result, exec=span)
        self.cluster.infer_finished(action, result, now_ns=now_ns)
        self.policy.action_done(
            action,
            code=Code.OK,
            end_ns=result.exec.end_ns,
            duration_ns=result.exec.duration_ns,
            clock_mhz=(result.gpu_clock_before_mhz + result.gpu_clock_mhz) // 2,
        )
        met = frames = 0
        sizes = result.output_sizes
        plan = Plan.of(action, start_ns=result.exec.begin_ns, exec_ns=result.exec.duration_ns)
        for place, request in enumerate(action.requests):
            size = sizes[place] if place < len(sizes) else 0
            frame = frames
            frames += 1 if size else 0  # an output of 0 bytes has no frame
            if request.state is RequestState.ANSWERED:  # cancelled meanwhile
                continue
            output_of = (action.action_id, frame) if size and request.input_bytes else None
            met += self.answers.give(
                request, Code.OK, "", plan, now_ns=now_ns, output_of=output_of, tell=True
            )
        self.cluster.answered(action, result, now_ns=now_ns, met=met)

    def _error_result(self, worker: Worker, result: ErrorResult, now_ns: int) -> None:
        if self.catalog.preparation_failed(worker, result, now_ns=now_ns):
            return
        action = self.cluster.action_of(worker, result.action_id)
        if action is None:
            return
        if result.code == Code.SHUTTING_DOWN:  # an older worker says no goodbye
            self._worker_leaves(worker)
        self.cluster.failed(action, result.code, now_ns=now_ns, result=result)
        self.policy.action_done(action, code=result.code, end_ns=now_ns, duration_ns=0, clock_mhz=0)
        self._try_again(action, result.code, result.reason, now_ns)
        model = action.model
        took = action.action_type is ActionType.INFER and not model.resident_on
        if took and model.queue:  # the weights went with the action
            self._weights_wanted(model.queue[0], now_ns)

    def _worker_joined(self, worker: Worker, gpus: list[Gpu], now_ns: int) -> None:
        for gpu in gpus:
            self.policy.gpu_added(gpu)
        self.catalog.worker_joined(worker, gpus, now_ns=now_ns)

    def _worker_leaves(self, worker: Worker) -> None:
        if not worker.leaving:
            worker.leaving = True
            for gpu in worker.gpus:
                self.second_tries.leaves(gpu)
            text = f"worker {worker.label} says goodbye: it gets nothing new"
            self._effects.append(Note("info", text))

    def _model_loaded(self, model: Model, gpus: list[Gpu], now_ns: int) -> None:
        self.policy.model_loaded(model, gpus, now_ns=now_ns)

    def _model_changed(self, model: Model) -> None:
        """Its workers are gone, and the next one has it with other tensors: old inputs do not fit."""
        self._slices.begin(self._end_unfit([r for r in model.queue if r.input_bytes], model))

    def _end_unfit(self, requests: list[Request], model: Model) -> Work:
        for request in requests:
            if request.state is RequestState.QUEUED and model.result is not None:
                loaded = model.result
                takes = f"{loaded.input_dtype} of shape {loaded.input_shape}"
                reason = (
                    f"model {model.name!r} was changed and takes {takes} now; load it once more"
                )
                self._end(request, Code.INVALID_REQUEST, reason)
            yield ANSWER

    def _worker_lost(self, worker: Worker, lost: list[ActionState], now_ns: int) -> None:
        for action in lost:
            self.policy.action_done(
                action, code=Code.CANCELLED, end_ns=now_ns, duration_ns=0, clock_mhz=0
            )
            reason = f"worker {worker.worker_id} was lost while it had the request"
            self._try_again(action, Code.CANCELLED, reason, now_ns, process_ended=True)
        self.catalog.worker_lost(worker, now_ns=now_ns)

    def _try_again(
        self,
        action: ActionState,
        code: int,
        reason: str,
        now_ns: int,
        *,
        process_ended: bool = False,
    ) -> None:
        """An action came to nothing: its requests are tried again while that can help, else answered."""
        if self.policy.replans:
            if process_ended or code in ENDED:
                ending = code == Code.PROCESS_ENDED
                self.second_tries.process_ended(action, code, reason, now_ns=now_ns, ending=ending)
                return
            if code in MODEL_FAILED:
                self.second_tries.model_failed(action, code, reason)
                return
        for request in action.requests:
            self._retry(request, action, code, reason, now_ns)

    def _retry(
        self, request: Request, action: ActionState, code: int, reason: str, now_ns: int
    ) -> None:
        """Its action failed for a reason other than the model: replan while that can help, else answer."""
        if request.state is RequestState.ANSWERED:
            return
        if action.gpu.worker.leaving and code in _HANDED_BACK:
            request.excused += 1
        hopeless = (
            request.attempts - request.excused >= _MAX_ATTEMPTS
            or now_ns >= request.deadline_ns
            or not self.cluster.gpus
            or not self.policy.replans
        )
        if hopeless:
            words = f"{code_name(code)}: {reason}" if reason else code_name(code)
            self._answer(request, code, words, Plan.of(action))
        elif request.tried_alone:
            self.second_tries.again(request)
        else:
            request.move(RequestState.QUEUED)
            self.policy.enqueue(request, now_ns=now_ns)

    def _weights_wanted(self, request: Request, now_ns: int) -> None:
        """A queued request lost its model's weights to a second try, or with a process."""
        if isinstance(self.policy, LoadsByDemand):
            self.policy.asked_for(request, now_ns=now_ns)

    # ------------------------------------------------------------------------------ answers

    def refuse(
        self, request: Request, code: int, reason: str, *, start_ns: int = -1, exec_ns: int = 0
    ) -> None:
        """A policy ends a queued request (policies/base.py, Refusals)."""
        self._answer(request, code, reason, Plan(start_ns, exec_ns))

    def succeed(self, request: Request) -> None:
        """A policy answers a queued request with success and no output (ECHO)."""
        self._answer(request, Code.OK, "")

    def _end(self, request: Request, code: int, reason: str, *, tell: bool = True) -> None:
        """End a request from outside the policy, wherever it is."""
        if request.state is RequestState.QUEUED:
            self.policy.forget(request)
        elif request.state is RequestState.ASIDE:
            self.second_tries.forget(request)
        self._answer(request, code, reason, tell=tell)

    def _not_reported(self, request: Request, action: ActionState) -> None:
        """A request whose deadline has passed, aboard an action that is long overdue."""
        worker = action.gpu.worker
        reason = f"worker {worker.worker_id} has not reported the action that carried it"
        self._answer(request, Code.TIMED_OUT, reason, Plan.of(action))

    def _answer_from_queue(self, request: Request, code: int, reason: str) -> None:
        self._answer(request, code, reason)

    def _cancel(self, request: Request) -> None:
        self._end(request, Code.CANCELLED, "cancelled by its client")

    def _client_gone(self, request: Request, reason: str) -> None:
        self._end(request, Code.CANCELLED, reason, tell=False)

    def _answer(
        self,
        request: Request,
        code: int,
        reason: str,
        plan: Plan = NO_PLAN,
        *,
        output_of: tuple[int, int] | None = None,
        tell: bool = True,
    ) -> bool:
        return self.answers.give(
            request, code, reason, plan, now_ns=self._now_ns, output_of=output_of, tell=tell
        )

    def _tick(self, now_ns: int) -> None:
        self.sessions.tick(now_ns=now_ns)
        self._clients.tick()
        self.catalog.unused.tick(now_ns=now_ns)
