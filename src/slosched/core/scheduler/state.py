"""What the scheduler knows: requests, actions, models, GPUs, workers and clients.

A request moves only along `TRANSITIONS` (request_states.py), and is answered exactly once.

Who changes what, besides the constructors:

    Request    its state: `move`; its stage, queue and due date: stages.py; attempts: actions/infer.py;
               second tries: second_tries.py; policy_data: the policy
    Queue      its requests: the policy
    Instance   residency: the kinds of actions; users and state: catalog.py, preparations.py, unloading.py
    Lane, Gpu  lanes, pages and tables: the kinds of actions; held: second_tries.py; readings: sessions.py
    Worker     session and offers: sessions.py; what it prepared: preparations.py; latencies: paths.py
    Client     client_sessions.py; its requests: arrivals.py and answers.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from slosched.codes import ActionType
from slosched.core.scheduler.client_latency import ClientLatency
from slosched.core.scheduler.delays import Delays
from slosched.core.scheduler.driver_readings import DriverReadings
from slosched.core.scheduler.estimators import ExecTable, WindowEstimator
from slosched.core.scheduler.exec_tables import ExecTables
from slosched.core.scheduler.lane import Lane, WideLane
from slosched.core.scheduler.length_classes import class_for, program_of, programs, sized_program
from slosched.core.scheduler.load_pauses import LoadPauses
from slosched.core.scheduler.nested_calls import Nested
from slosched.core.scheduler.request_states import MAY_FOLLOW
from slosched.core.scheduler.request_states import RequestState as RequestState
from slosched.core.scheduler.stage_ends import BestAnswer, StageEnd
from slosched.core.values import Value
from slosched.messages import (
    HOST_PARTS,
    NO_BEAT,
    FunctionInfo,
    GpuInfo,
    Heartbeat,
    LoadModelResult,
    ModelInfo,
    Prepared,
    StageReply,
)


class Request:
    """An inference or a call of a function that a client asked for, or a call. Times: the controller's, ns."""

    __slots__ = (
        "arrival_count",
        "arrival_ns",
        "attempts",
        "best_answer",
        "brings",
        "call",
        "client",
        "deadline_ns",
        "due_ns",
        "excused",
        "input",
        "instance",
        "kept_bytes",
        "key",
        "length",
        "parent",
        "place",
        "policy_data",
        "queue",
        "queued_ns",
        "request_id",
        "slo_factor",
        "slo_ns",
        "stage",
        "state",
        "trail",
        "tried_alone",
        "user_id",
        "weight",
    )

    def __init__(
        self,
        key: int,
        client: Client,
        request_id: int,
        user_id: int,
        queue: Queue,
        slo_factor: float,
        slo_ns: int,
        arrival_ns: int,
        input: Value | None = None,
        weight: float = 1.0,
        parent: Request | None = None,
        length: int = 0,
        early_ns: int = 0,
    ) -> None:
        self.key = key
        self.client = client
        self.request_id = request_id
        self.user_id = user_id
        self.queue = queue  # where it waits, or last waited
        self.instance = queue.instance
        self.slo_factor = slo_factor
        self.slo_ns = slo_ns
        self.arrival_ns = arrival_ns
        #: After this nothing helps: only the deadline makes a request hopeless. An SLO that counts from the
        #: client's send leaves `early_ns` for the network (client_latency.py).
        self.deadline_ns = arrival_ns + slo_ns - early_ns
        #: Its place in its queue: the deadline less the expected rest, frozen while it is queued (stages.py).
        self.due_ns = self.deadline_ns - queue.rest_ns
        self.stage = 0  # stages that it has behind it
        self.queued_ns = arrival_ns  # when it entered the queue of its stage
        self.parent = parent  # the call that made it, whose budget it inherits
        self.call: Nested[Request, ActionState] | None = (
            None  # what a call of a function has besides
        )
        self.best_answer: BestAnswer | None = None
        self.kept_bytes = 0  # of outputs of its earlier stages
        self.trail: tuple[StageReply, ...] = ()  # the stages of a cascade that it has behind it
        self.input = input
        self.length = length  # of its inputs, where a dimension of the model's varies
        self.brings = input  # the input of its next action: its own, or a stage's output
        self.arrival_count = len(queue.instance.resident_on)
        self.attempts = 0
        self.excused = 0  # failed attempts that are not the request's fault
        #: Its action ended with its process: it is tried once more, alone (second_tries.py).
        self.tried_alone = False
        self.state = RequestState.QUEUED
        self.place = 0  # in a queue that is only appended to (queues.py)
        self.weight = weight  # what it is worth, compared with a request of weight 1 (weights.py)
        #: The policy's own notes about the request; only the policy reads, writes and types them.
        self.policy_data: Any = None

    def move(self, state: RequestState) -> None:
        """Change state along the table; any other change is a bug in the scheduler."""
        if not MAY_FOLLOW[self.state][state]:
            raise AssertionError(
                f"request {self.key}: {self.state.name} -> {state.name} is not a transition"
            )
        self.state = state

    def __lt__(self, other: Request) -> bool:
        """Order of a queue: by due date, then by arrival."""
        if self.due_ns != other.due_ns:
            return self.due_ns < other.due_ns
        return self.key < other.key


class ActionState:
    """One action that was sent and has not been reported yet."""

    __slots__ = (
        "action_id",
        "action_type",
        "alone",
        "batch_class",
        "copies_loaded",
        "expected_duration_ns",
        "expected_end_ns",
        "expected_start_ns",
        "gpu",
        "instance",
        "latest_ns",
        "patience_ns",
        "paused_ns",
        "predicted_end_ns",
        "predicted_start_ns",
        "priority",
        "queue",
        "reaches_ns",
        "requests",
        "requests_queued",
        "sent_ns",
        "spread_ns",
    )

    def __init__(
        self,
        *,
        action_id: int,
        action_type: ActionType,
        gpu: Gpu,
        instance: Instance,
        queue: Queue | None = None,
        requests: tuple[Request, ...] = (),
        batch_class: int = 1,
        sent_ns: int,
        expected_start_ns: int,
        expected_duration_ns: int,
        latest_ns: int,
        priority: int = 0,
    ) -> None:
        self.action_id = action_id
        self.action_type = action_type
        self.gpu = gpu
        self.instance = instance
        self.queue = queue if queue is not None else instance.queue  # of an Infer: what it serves
        self.requests = requests
        self.batch_class = batch_class
        self.sent_ns = sent_ns
        self.reaches_ns = sent_ns + gpu.worker.transit.expected_ns  # predicted receipt there
        #: What was expected when it was sent: kept for telemetry and for the answers.
        self.expected_start_ns = expected_start_ns
        self.expected_end_ns = expected_start_ns + expected_duration_ns
        self.expected_duration_ns = expected_duration_ns
        #: What is expected now, corrected by each report of the actions before it.
        self.predicted_start_ns = expected_start_ns
        self.predicted_end_ns = self.expected_end_ns
        self.latest_ns = latest_ns
        self.priority = priority  # above 0: it interrupts what runs
        #: It is overdue when it ends later by this than predicted: then it may never be reported.
        self.patience_ns = expected_duration_ns
        self.paused_ns = 0  # expected pauses, for urgent actions that were sent after it
        self.requests_queued = len(self.queue.requests)
        self.copies_loaded = len(instance.resident_on)
        #: How much longer than expected it may take, as a promise of what follows should allow for.
        self.spread_ns = 0
        #: Nothing else is outstanding on its GPU until it ends.
        self.alone = False


@dataclass(slots=True, eq=False)
class Gpu:
    """One GPU of one worker, or the slots of its host, as the scheduler sees them."""

    index: int  # order in the cluster: the tie-break
    gpu_id: int
    worker: Worker
    pages: int
    free_pages: int
    page_bytes: int
    clock_mhz: int = 0
    exec: Lane[ActionState] = field(default_factory=lambda: Lane("exec"))
    load: Lane[ActionState] = field(default_factory=lambda: Lane("load"))
    #: Calls whose host parts run or were asked for. They are among `suspended` too.
    prepare: Lane[ActionState] = field(
        default_factory=lambda: WideLane("prepare", width=HOST_PARTS)
    )
    #: Models whose weights are here -> when they were last used, least recently used first.
    resident: dict[int, Instance] = field(default_factory=dict)
    loading: dict[int, Instance] = field(default_factory=dict)
    #: Exec times by model name, seeded from what the worker measured when one is first asked for.
    tables: ExecTables = field(init=False)
    transfers: dict[str, WindowEstimator] = field(default_factory=dict)
    busy_ns: int = 0  # exec time so far, for status
    held: bool = False  # kept free for what must run alone
    retired: bool = False  # off the books: what is outstanding ends, and nothing follows
    #: Pages of weights that the worker brought along and that are not adopted, by model id (inventory.py).
    brought: dict[int, int] = field(default_factory=dict)
    driver: DriverReadings = field(default_factory=DriverReadings)
    load_pauses: LoadPauses = field(default_factory=LoadPauses)
    host: bool = False  # the slots of its worker's host: calls of functions run here, and no models
    #: Calls that await children or prepare, by action id: they are outstanding, and hold no slot.
    suspended: dict[int, ActionState] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = ExecTables(self.worker.prepared)

    @property
    def runs_alone(self) -> bool:
        """True if what is outstanding must have the GPU to itself."""
        outstanding = self.exec.outstanding
        return bool(outstanding) and outstanding[0].alone

    @property
    def name(self) -> str:
        return f"W{self.worker.worker_id}-GPU{self.gpu_id}"

    def serves(self, model: Instance) -> bool:
        """Whether `model` may run here: models and functions for GPUs on GPUs, other functions on hosts."""
        return self.host is model.on_host

    def may_load(self, model: Instance, now_ns: int) -> bool:
        return now_ns >= self.load_pauses.until_ns(model.model_id)

    def can_load(self, model: Instance, now_ns: int) -> bool:
        """Whether `model` is in host memory here, would fit, and may be tried (again)."""
        return (
            model.model_id in self.worker.instances
            and self.pages >= model.pages
            and self.host is model.on_host
            and self.may_load(model, now_ns)
        )

    def exec_table(self, queue: Queue) -> ExecTable:
        return self.tables[queue.program]

    def transfer(self, model: Instance) -> WindowEstimator:
        estimator = self.transfers.get(model.name)
        if estimator is None:
            seed_ns = max(1, self.worker.prepared[model.name].weights_ns)
            estimator = self.transfers[model.name] = WindowEstimator(seed_ns)
        return estimator


class WorkerState(IntEnum):
    SILENT = 0  # never answered, or lost: it is greeted
    JOINED = 1
    DRAINED = 2  # out of use until an operator takes it back, or a new process of it registers
    LEFT = 3  # it registered and said goodbye, or was away for long: only its name is kept


#: Latency of a message before any was measured: a LAN's round trip and a busy event loop.
_UNMEASURED_NS = 500_000


def _message_latency() -> WindowEstimator:
    return WindowEstimator(_UNMEASURED_NS, percentile=0.9)


@dataclass(slots=True, eq=False)
class Unlike:
    """What a worker prepared under a name that other workers have with other tensors or pages."""

    result: LoadModelResult
    models: list[Instance]
    reason: str


@dataclass(slots=True, eq=False)
class Worker:
    """One worker process and the session with it."""

    worker_id: int
    address: str = ""
    state: WorkerState = WorkerState.SILENT
    session: int = 0
    host: str = ""
    pid: int = 0
    device: str = ""
    version: str = ""
    gpus: list[Gpu] = field(default_factory=list)
    #: Beyond `max_gpus`: used when others are gone.
    spare: list[GpuInfo] = field(default_factory=list)
    loadable: tuple[str, ...] = ()
    functions: dict[str, None] = field(
        default_factory=dict
    )  # those of `loadable` that are functions
    #: What LoadModel measured, by model name, and which instances are in its host memory.
    prepared: dict[str, LoadModelResult] = field(default_factory=dict)
    instances: dict[int, Instance] = field(default_factory=dict)
    #: What it brought along and is not looked at yet.
    inventory: tuple[Prepared, ...] = ()
    #: By name: models that differ from those of the workers that are used, and are not used here.
    unlike: dict[str, Unlike] = field(default_factory=dict)
    times_lost: int = 0
    leaving: bool = False  # it said goodbye
    draining: bool = False  # an operator takes it out of use
    retired: bool = False  # its GPUs take nothing new, and its session ends with what they hold
    listed: bool = (
        False  # on the controller's list of addresses: it is waited for as long as that lives
    )
    #: A worker that registered has a name, and the number of the process that has it.
    name: str = ""
    incarnation: int = 0
    #: Name -> why it does not offer the model.
    put_aside: dict[str, str] = field(default_factory=dict)
    #: What its repository holds and it cannot offer: name -> why; and the number of its last Offer.
    left_out: dict[str, str] = field(default_factory=dict)
    offer: int = 0
    #: Its last heartbeat, which may be of an earlier session.
    beat: Heartbeat = NO_BEAT
    #: Decision here until received there; exec end there until handled here. paths.py measures them.
    transit: WindowEstimator = field(default_factory=_message_latency)
    returns: WindowEstimator = field(default_factory=_message_latency)

    def has_prepared(self, name: str, result: LoadModelResult) -> None:
        """The model `name` is in its host memory; what an earlier preparation taught is forgotten."""
        for gpu in self.gpus if name not in self.prepared else ():
            for program in programs(result, name):
                gpu.tables.pop(program, None)
        self.prepared[name] = result

    @property
    def label(self) -> str:
        """Human-readable: its number, its name and where it is."""
        where = ", ".join(text for text in (self.name, self.address) if text)
        return f"{self.worker_id} ({where})" if where else str(self.worker_id)

    @property
    def standing(self) -> str:
        """One word for an operator: joined, silent, draining, drained or left."""
        if self.state is WorkerState.JOINED and self.draining:
            return "draining"
        return self.state.name.lower()

    @property
    def busy(self) -> bool:
        """True if an action of its GPUs is not reported yet."""
        return any(
            gpu.exec.outstanding or gpu.load.outstanding or gpu.suspended for gpu in self.gpus
        )


class ModelState(IntEnum):
    LOADING = 0
    LOADED = 1
    FAILED = 2


#: What follows a stage of a request, one of after.py's `Follows`. It sends nothing and reads no clock.
After = Callable[["Request", StageEnd], object]


class Queue:
    """The requests that wait for one program class of an instance, and by which exec table it is predicted.

    A plain model has one queue. A length class, a stage and a function are each another queue, so that a policy
    looks at queues alone. `after` decides what follows when an action of one of its requests ends (stages.py).
    """

    __slots__ = (
        "after",
        "by_score",
        "cascade",
        "instance",
        "length",
        "program",
        "queue_id",
        "requests",
        "rest_ns",
    )

    def __init__(
        self,
        queue_id: int,
        instance: Instance,
        program: str,
        after: After | None = None,
        length: int = 0,
    ) -> None:
        self.queue_id = queue_id
        self.instance = instance
        self.program = program  # names the exec tables (Gpu.tables)
        self.length = length  # the length class of its program; 0: the model has none
        self.requests: list[Request] = []  # ascending (due, key), or in the order of a policy's own
        #: What a request expects to need after this stage, ns: it is due that much before its deadline.
        self.rest_ns = 0
        self.after = after  # None: a plain model answers
        self.cascade = ""  # the name of the cascade whose stage this is
        self.by_score = False  # the policy serves the lowest scores first, and skips the others


@dataclass(slots=True, eq=False)
class Instance:
    """One instance of a model: its weights, where they are, its queues and its users."""

    model_id: int
    name: str
    copy: int
    state: ModelState = ModelState.LOADING
    b1_ns: int = 0  # frozen when loaded: the unit of SLO factors
    pages: int = 1
    result: LoadModelResult | None = None  # the first worker's answer: shapes and dtypes
    #: The first is that of the whole model; then those of length classes, the shortest first.
    queues: list[Queue] = field(default_factory=list)
    lengths: tuple[int, ...] = ()  # of the length classes, ascending
    resident_on: dict[int, Gpu] = field(default_factory=dict)  # by GPU index
    loading_on: dict[int, Gpu] = field(default_factory=dict)
    clients: dict[bytes, Client | None] = field(default_factory=dict)  # its users, by identity
    last_used_ns: int = 0
    unused_since_ns: int = 0  # when its last client left, if it has none
    weights_ns: int = 0  # the time of a load, frozen when loaded
    queues_made: int = 0  # besides the first
    #: An operator unloads it: requests are refused until a client loads it again.
    taken: bool = False
    adopted: bool = False  # a worker brought it along, and no client has loaded it since
    function: FunctionInfo | None = None  # None: it is a model
    on_host: bool = False  # a function that runs in slots of a host

    def __post_init__(self) -> None:
        if not self.queues:
            self.queues.append(Queue(self.model_id, self, self.name))

    @property
    def queue(self) -> Queue:
        """The queue of the whole model."""
        return self.queues[0]

    def add_queue(self, program: str, after: After | None = None, *, length: int = 0) -> Queue:
        """Make another queue, for `program`: a length class, a stage, a function."""
        self.queues_made += 1
        queue = Queue(self.model_id + (self.queues_made << 40), self, program, after, length)
        self.queues.append(queue)
        return queue

    def set_lengths(self, lengths: Sequence[int]) -> None:
        """Have a queue for each length class. Nothing may wait in those of other lengths."""
        if self.lengths == lengths:
            return
        self.lengths = tuple(lengths)
        stages = [queue for queue in self.queues[1:] if queue.after is not None]
        for queue in (self.queues[0], *stages):
            queue.length = lengths[-1] if lengths else 0
        del self.queues[1:]
        for length in lengths[:-1]:
            self.add_queue(program_of(self.name, length), length=length)
        self.queues += stages

    def set_function(self, function: FunctionInfo | None) -> None:
        """It is a function: a queue for each size class. Nothing may wait in those of other classes."""
        if function == self.function:
            return
        self.function, self.on_host = function, function is not None and not function.gpu
        if function is None:
            return
        del self.queues[function.size_classes :]
        for size_class in range(len(self.queues), function.size_classes):
            self.add_queue(sized_program(self.name, size_class))

    def queue_for(self, length: int) -> Queue:
        """The queue of the shortest length class that takes a request of `length`; of a function, that of the
        size class `length`.
        """
        if self.function is not None:
            return self.queues[length if length < len(self.queues) else -1]
        place = class_for(self.lengths, length) + 1
        return self.queues[place if place < len(self.lengths) else 0]

    @property
    def waits(self) -> bool:
        """True if a request waits in one of its queues."""
        return any(queue.requests for queue in self.queues)

    @property
    def queued(self) -> int:
        """Number of requests in its queues."""
        return sum([len(queue.requests) for queue in self.queues])

    def waiting(self) -> Sequence[Request]:
        """The requests of its queues, each queue in its order."""
        if len(self.queues) == 1:
            return self.queues[0].requests
        return sorted(request for queue in self.queues for request in queue.requests)

    def info(self) -> ModelInfo:
        loaded = self.result
        assert loaded is not None, "info() of a model that no worker has loaded"
        return ModelInfo(
            model_id=self.model_id,
            name=self.name,
            copy=self.copy,
            batch_sizes=loaded.batch_sizes,
            b1_ns=self.b1_ns,
            weights_ns=loaded.weights_ns,
            weights_bytes=loaded.weights_bytes,
            input_shape=loaded.input_shape,
            input_dtype=loaded.input_dtype,
            output_shape=loaded.output_shape,
            output_dtype=loaded.output_dtype,
            random_weights=loaded.random_weights,
            gpus_resident=len(self.resident_on),
            clients=len(self.clients),
            labels=loaded.labels,
            inputs=loaded.inputs,
            outputs=loaded.outputs,
            lengths=self.lengths,
            function=loaded.function,
        )


@dataclass(slots=True, eq=False)
class Client:
    """One connected client."""

    identity: bytes
    incarnation: int
    name: str
    weight: float = 1.0
    heard: bool = True
    silent_ticks: int = 0
    gone: bool = False  # it left; what is left of it goes in slices
    requests: dict[int, Request] = field(default_factory=dict)  # unanswered, by its request_id
    input_bytes: int = 0  # of these
    delays: Delays = field(default_factory=Delays)  # of its messages
    latency: ClientLatency | None = None  # None: its SLOs count from arrival here
    models: dict[int, Instance] = field(default_factory=dict)
