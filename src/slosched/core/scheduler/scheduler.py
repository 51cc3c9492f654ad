"""The scheduler's brain: facts in, decisions out. No IO, no clock, no thread.

The law it keeps, whatever the policy and whatever fails (checked in core/invariants.py):

- every request is answered exactly once;
- a request's state moves along request_states.TRANSITIONS and no other way;
- pages used never exceed the pages there are; nothing is sent to weights that are not resident;
- the same events at the same times give the same effects, byte for byte.

`handle` only takes facts in; the policy decides in `schedule`, once per wake-up, after everything
that had arrived was handled. That batching is what keeps a busy controller cheap.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.codes import Code
from slosched.config import SchedulerConfig
from slosched.core.scheduler.action_ends import ActionEnds
from slosched.core.scheduler.answers import NO_PLAN, Answers, Plan
from slosched.core.scheduler.arrivals import Arrivals
from slosched.core.scheduler.catalog import Catalog
from slosched.core.scheduler.chains import Chains
from slosched.core.scheduler.client_sessions import ClientSessions, some_requests
from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.door import Door
from slosched.core.scheduler.foreign_text import made_safe
from slosched.core.scheduler.full_hosts import FullHosts
from slosched.core.scheduler.interface import (
    ClientLost,
    Drain,
    Effect,
    Event,
    FromClient,
    FromWorker,
    Joining,
    Note,
    SendFailed,
    StageDone,
    StatusAsked,
    ToClient,
)
from slosched.core.scheduler.length_classes import lengths_of
from slosched.core.scheduler.limits import Limits
from slosched.core.scheduler.membership import JoinRules, Membership
from slosched.core.scheduler.overdue import Overdue
from slosched.core.scheduler.policies import (
    adopts_weights,
    make_policy,
    resolved,
    serves_functions,
)
from slosched.core.scheduler.second_tries import SecondTries
from slosched.core.scheduler.sessions import OVERDUE_TICKS_UNTIL_LOST, TICK_NS, Sessions
from slosched.core.scheduler.slices import ANSWER, Work
from slosched.core.scheduler.stages import best_instead, gave_up
from slosched.core.scheduler.state import (
    ActionState,
    Client,
    Gpu,
    Instance,
    Request,
    RequestState,
    Worker,
    WorkerState,
)
from slosched.core.scheduler.unready import Unready
from slosched.core.scheduler.weights import Weights
from slosched.messages import (
    CallNews,
    CancelRequest,
    ClientHeartbeat,
    ClientHello,
    ClientMessage,
    DrainWorkerRequest,
    Goodbye,
    Heartbeat,
    InferRequest,
    ListModelsRequest,
    LoadModelRequest,
    Offer,
    Refused,
    StatusRequest,
    UnloadModelRequest,
    WorkerGoodbye,
    WorkerRefused,
    WorkerWelcome,
)
from slosched.signature import described

#: Workers of this host alone may register.
NO_KEY = JoinRules()


class Scheduler:
    """One controller's decisions. `worker_count` workers are expected, and others may register by the rules
    `join`; `incarnation` is random. A controller with the `cluster_id` of the one before it takes over what the
    workers hold (inventory.py); empty: it finds them empty. With `takes_over` there may have been one before.

    Clients get the incarnation, workers the `secret` (None: the incarnation): a peer that knows the number
    which a worker's controller gave it can take over that worker's session.
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
        join: JoinRules = NO_KEY,
        cluster_id: str = "",
        takes_over: bool = False,
    ) -> None:
        self._effects: list[Effect] = []
        self.cluster = Cluster(resolved(config), emit=self._effects.append)
        self.policy = make_policy(self.cluster.config, self.cluster, self)
        self.cluster.serves_functions = serves_functions(self.cluster.config)
        secret = incarnation if secret is None else secret
        self.sessions = self._worker_sessions(secret, worker_count, worker_addresses, cluster_id)
        self.membership = Membership(self.cluster, self.sessions, join)
        self.catalog = Catalog(
            self.cluster,
            takes_over=takes_over,
            on_loaded=self.policy.model_loaded,
            on_changed=self._model_changed,
            settled=self.policy.settled,
            end_request=self._end,
        )
        config = self.cluster.config
        self._overdue = Overdue(self.cluster, self._not_reported)
        self._full_hosts = FullHosts(self.cluster, self._end)
        self.second_tries = SecondTries(
            self.cluster,
            end=self._answer,
            full=self._full_hosts.full,
            wanted=lambda request, now_ns: self._ends.weights_wanted(request, now_ns),
        )
        weights = Weights(config)
        self._clients = self._client_sessions(incarnation, version, weights)
        self.clients = self._clients.by_identity
        self.limits = Limits(config)
        self.door = Door()
        self.answers = Answers(emit=self._effects.append, limits=self.limits)
        self._unready = Unready(self.cluster, self.catalog, self.policy, self._end)
        self.arrivals = Arrivals(
            self.cluster,
            self.catalog,
            self.policy,
            weights,
            self.limits,
            self.answers,
            self._unready,
            self._answer,
        )
        self.chains = Chains(
            self.cluster,
            self.policy,
            self.arrivals,
            self.answers,
            self._full_hosts,
            self._end,
            self._answer,
        )
        self._ends = ActionEnds(
            self.cluster, self.policy, self.second_tries, self.answers, self.chains, self._answer
        )
        self._abandoned = False
        self.incarnation, self.cluster_id = incarnation, cluster_id
        self._tick_due_ns = self._now_ns = 0  # now is that of the current call: answers depart then

    def _worker_sessions(
        self, secret: int, worker_count: int, addresses: Sequence[str], cluster_id: str
    ) -> Sessions:
        return Sessions(
            self.cluster,
            worker_count=worker_count,
            incarnation=secret,
            cluster_id=cluster_id,
            keeps_weights=adopts_weights(self.cluster.config),
            addresses=addresses,
            on_joined=self._worker_joined,
            on_gpu_removed=self.policy.gpu_removed,
            on_lost=self._worker_lost,
            forgotten=self._forgotten,
        )

    def _forgotten(self, worker: Worker, now_ns: int) -> str:
        """What was sent to `worker` and lost, in words; empty: nothing."""
        lost = self.catalog.forgotten(worker, now_ns=now_ns)
        return lost or self.chains.forgotten(worker, now_ns=now_ns)

    def _client_sessions(self, incarnation: int, version: str, weights: Weights) -> ClientSessions:
        return ClientSessions(
            self.cluster,
            incarnation=incarnation,
            version=version,
            weights=weights,
            end_request=self._client_gone,
            cancel_request=self._cancel,
            release=self.catalog.release,
        )

    # ------------------------------------------------------------------------------- verbs

    def handle(self, event: Event, *, now_ns: int) -> None:
        """Take a fact in. Unknown or unexpected ones are answered or ignored, never raised."""
        self._now_ns = now_ns
        if isinstance(event, FromClient):
            self._from_client(event, now_ns)
        elif isinstance(event, FromWorker):
            worker = self.cluster.workers.get(event.worker_id)
            if worker is not None:
                self._from_worker(worker, event, now_ns)
                if worker.leaving or worker.retired:
                    self.sessions.end_if_idle(worker, now_ns=now_ns)
        elif isinstance(event, SendFailed):
            worker = self.cluster.workers.get(event.worker_id)
            if worker is not None:
                self.sessions.send_failed(worker, event.message, now_ns=now_ns)
        elif isinstance(event, Joining):
            self.membership.register(event, now_ns=now_ns)
        elif isinstance(event, ClientLost):
            self._clients.drop(event.client, "its connection broke")
        elif isinstance(event, Drain):
            self.arrivals.draining = True

    def schedule(self, *, now_ns: int) -> list[Effect]:
        """Decide everything that can be decided now, and return it in order."""
        self._now_ns = now_ns
        if now_ns >= self._tick_due_ns:
            self._tick_due_ns = now_ns + TICK_NS
            self._tick(now_ns)
        self._overdue.look(now_ns=now_ns)
        if self.cluster.slices.under_way:
            self.cluster.slices.go_on()
        self.second_tries.plan(now_ns=now_ns)
        self._unready.plan(now_ns=now_ns)
        self.policy.plan(now_ns=now_ns)
        if self._full_hosts.full:
            loading = bool(self._unready) or bool(self.catalog.waiting)
            self._full_hosts.plan(self.arrivals.children, loading=loading)
        if self.catalog.waiting:
            self.catalog.advance(now_ns=now_ns)
        return self._step_ended()

    def _step_ended(self) -> list[Effect]:
        if self.cluster.slices.done:
            self.cluster.slices.renew()
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
        unready_ns = self._unready.next_wakeup_ns()
        if unready_ns is not None and unready_ns < due_ns:
            due_ns = unready_ns
        return due_ns if policy_ns is None or due_ns < policy_ns else policy_ns

    @property
    def slicing(self) -> bool:
        """Long work is under way, and goes on with the next step."""
        return self.cluster.slices.under_way or self.catalog.hurried

    @property
    def leaving(self) -> list[Client]:
        """Clients that are gone and have requests or models left."""
        return self._clients.leaving

    @property
    def arrived(self) -> int:
        """Requests taken so far."""
        return self.arrivals.count

    @property
    def invalid(self) -> int:
        """Requests that could not be taken; not among those that arrived."""
        return self.arrivals.invalid

    @property
    def draining(self) -> bool:
        """No request is taken any more."""
        return self.arrivals.draining

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
            self._abandoned = self.arrivals.draining = self.arrivals.ended = True
            self.catalog.abandon()
            self.cluster.slices.begin(self._abandon_all(list(self.clients.values())))
        self.cluster.slices.go_on()
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
            self.arrivals.infer(client, event, message, now_ns)
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
        elif isinstance(message, UnloadModelRequest):
            self.catalog.unloading.unload(client, message)
        elif isinstance(message, ListModelsRequest):
            self.catalog.list_models(client, message)
        elif isinstance(message, DrainWorkerRequest):
            self.membership.drain(client, message, now_ns=now_ns)
        elif isinstance(message, StatusRequest):
            asked = StatusAsked(client.identity, message.request_id, message.brief)
            self._effects.append(asked)
        elif isinstance(message, Goodbye):
            self._clients.drop(client.identity, "it left")

    # ----------------------------------------------------------------------------- workers

    def _from_worker(self, worker: Worker, event: FromWorker, now_ns: int) -> None:
        message = made_safe(event.message)
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
        self.sessions.heard(worker)
        if isinstance(message, Heartbeat):
            refused = self.answers.by_code.get(Code.COULD_NOT_START_IN_TIME, 0)
            self.sessions.heartbeat(worker, message, refused=refused, now_ns=now_ns)
        elif isinstance(message, Offer):
            fresh = self.sessions.offered(worker, message)
            if fresh is not None:
                self.catalog.offered(worker, fresh, now_ns=now_ns)
        elif isinstance(message, CallNews):
            self.chains.heard(worker, message, event.outputs, now_ns=now_ns)
        elif not self.catalog.ended(worker, message, now_ns=now_ns):
            self._ends.reported(worker, message, event.outputs, now_ns=now_ns)

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

    def _model_changed(self, model: Instance) -> None:
        """Its workers are gone, and the next one has it with other tensors: old inputs do not fit."""
        assert model.result is not None
        if lengths_of(model.result) == model.lengths:
            unfit = [each for each in model.waiting() if each.input is not None]
            self.cluster.slices.begin(self._end_unfit(unfit, model))
            return
        # Its queues end with this step, so that no request may be left in one.
        for _ in self._end_unfit([*model.waiting(), *self.second_tries.of(model)], model):
            pass

    def _end_unfit(self, requests: list[Request], model: Instance) -> Work:
        for request in requests:
            waits = request.state in (RequestState.QUEUED, RequestState.ASIDE)
            if waits and model.result is not None:
                takes = described(model.result.inputs)
                reason = (
                    f"model {model.name!r} was changed and takes {takes} now; load it once more"
                )
                self._end(request, Code.INVALID_REQUEST, reason)
            yield ANSWER

    def _worker_lost(self, worker: Worker, lost: list[ActionState], now_ns: int) -> None:
        self._ends.lost(worker, lost, now_ns=now_ns)
        self.catalog.worker_lost(worker, now_ns=now_ns)

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

    def _cancel(self, request: Request) -> None:
        request.best_answer = None  # its client wants none
        self._end(request, Code.CANCELLED, "cancelled by its client")

    def _client_gone(self, request: Request, reason: str) -> None:
        request.best_answer = None
        self._end(request, Code.CANCELLED, reason, tell=False)

    def _answer(
        self,
        request: Request,
        code: int,
        reason: str,
        plan: Plan = NO_PLAN,
        *,
        tell: bool = True,
    ) -> None:
        output, ended_with = None, code
        if request.best_answer is not None:
            code, reason, output = best_instead(request, code, reason)
        if request.trail:
            record = gave_up(request, ended_with, self._now_ns, answered=code == Code.OK)
            self._effects.append(StageDone(record))
        self.answers.give(
            request, code, reason, plan, now_ns=self._now_ns, output=output, tell=tell
        )

    def _tick(self, now_ns: int) -> None:
        self.sessions.tick(now_ns=now_ns)
        stuck = self.chains.stuck(OVERDUE_TICKS_UNTIL_LOST)
        if stuck is not None:
            self.sessions.lose(*stuck, now_ns=now_ns)
        self._clients.tick()
        self.catalog.unloading.tick(now_ns=now_ns)
