"""What the scheduler knows: requests, actions, models, GPUs, workers and clients.

A request moves only along `TRANSITIONS`:

    (arrives) -> QUEUED -> IN_FLIGHT -> ANSWERED
                   |  ^        |
                   |  +--------+  its action failed, not its model, and slack is left
                   |  ASIDE <-> IN_FLIGHT   its model or process failed (second_tries.py)
                   +-> ANSWERED   refused, timed out, given up, cancelled

It is answered exactly once, because ANSWERED leads nowhere.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import IntEnum

from slosched.codes import ActionType
from slosched.config import LOST_AFTER_NS
from slosched.core.scheduler.delays import Delays
from slosched.core.scheduler.estimators import ExecTable, WindowEstimator
from slosched.messages import NO_BEAT, GpuInfo, GpuStats, Heartbeat, LoadModelResult, ModelInfo
from slosched.units import NS_PER_MS, NS_PER_S


class RequestState(IntEnum):
    QUEUED = 0
    IN_FLIGHT = 1
    ANSWERED = 2
    ASIDE = 3  # waits for a second try, outside the policy's queues


TRANSITIONS: dict[tuple[RequestState, RequestState], str] = {
    (RequestState.QUEUED, RequestState.IN_FLIGHT): "put into an action",
    (RequestState.IN_FLIGHT, RequestState.QUEUED): "replanned",
    (RequestState.IN_FLIGHT, RequestState.ASIDE): "set aside for a second try",
    (RequestState.ASIDE, RequestState.IN_FLIGHT): "tried again",
    (RequestState.ASIDE, RequestState.ANSWERED): "answered while it waited for a second try",
    (RequestState.QUEUED, RequestState.ANSWERED): "answered from the queue",
    (RequestState.IN_FLIGHT, RequestState.ANSWERED): "answered with its action's outcome",
}


#: The table as rows of booleans: looked at two times for every request.
_MAY_FOLLOW = tuple(
    tuple((before, after) in TRANSITIONS for after in RequestState) for before in RequestState
)


class Request:
    """One inference that a client asked for. Times on the controller's clock, ns."""

    __slots__ = (
        "arrival_count",
        "arrival_ns",
        "attempts",
        "client",
        "deadline_ns",
        "excused",
        "input_bytes",
        "key",
        "model",
        "place",
        "request_id",
        "slo_factor",
        "slo_ns",
        "state",
        "stepped_over",
        "tried_alone",
        "user_id",
        "value",
        "weight",
    )

    def __init__(
        self,
        key: int,
        client: Client,
        request_id: int,
        user_id: int,
        model: Model,
        slo_factor: float,
        slo_ns: int,
        arrival_ns: int,
        input_bytes: int,
        weight: float = 1.0,
    ) -> None:
        self.key = key
        self.client = client
        self.request_id = request_id
        self.user_id = user_id
        self.model = model
        self.slo_factor = slo_factor
        self.slo_ns = slo_ns
        self.arrival_ns = arrival_ns
        self.deadline_ns = arrival_ns + slo_ns
        self.input_bytes = input_bytes
        self.arrival_count = len(model.resident_on)
        self.attempts = 0
        self.excused = 0  # those of them that failed at the model's hands
        #: A larger batch was preferred that this request was too old for.
        self.stepped_over = False
        #: Its action ended with its process: it is tried once more, alone (second_tries.py).
        self.tried_alone = False
        self.state = RequestState.QUEUED
        self.place = 0  # in a queue that others append to (queues.py)
        #: What it is worth beside a request of weight 1, and what it counts while it is queued.
        self.weight = weight
        self.value = 1.0

    def move(self, state: RequestState) -> None:
        """Change state along the table; any other change is a bug in the scheduler."""
        if not _MAY_FOLLOW[self.state][state]:
            raise AssertionError(
                f"request {self.key}: {self.state.name} -> {state.name} is no transition"
            )
        self.state = state

    def __lt__(self, other: Request) -> bool:
        """Order of a model's queue: by deadline, then by arrival."""
        if self.deadline_ns != other.deadline_ns:
            return self.deadline_ns < other.deadline_ns
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
        "latest_ns",
        "model",
        "predicted_end_ns",
        "predicted_start_ns",
        "reaches_ns",
        "requests",
        "requests_queued",
        "sent_ns",
        "spread_ns",
    )

    def __init__(
        self,
        action_id: int,
        action_type: ActionType,
        gpu: Gpu,
        model: Model,
        requests: tuple[Request, ...],
        batch_class: int,
        sent_ns: int,
        reaches_ns: int,
        expected_start_ns: int,
        expected_duration_ns: int,
        latest_ns: int,
        requests_queued: int,
    ) -> None:
        self.action_id = action_id
        self.action_type = action_type
        self.gpu = gpu
        self.model = model
        self.requests = requests
        self.batch_class = batch_class
        self.sent_ns = sent_ns
        self.reaches_ns = reaches_ns  # predicted receipt at the worker
        #: What was expected when it was sent: kept for telemetry and for the answers.
        self.expected_start_ns = expected_start_ns
        self.expected_end_ns = expected_start_ns + expected_duration_ns
        self.expected_duration_ns = expected_duration_ns
        #: What is expected now, corrected by each report of the actions before it.
        self.predicted_start_ns = expected_start_ns
        self.predicted_end_ns = self.expected_end_ns
        self.latest_ns = latest_ns
        self.requests_queued = requests_queued
        self.copies_loaded = len(model.resident_on)
        #: How much longer than expected it may take, as a promise of what follows should allow for.
        self.spread_ns = 0
        #: Nothing else is outstanding on its GPU until it ends.
        self.alone = False


class Executor:
    """The actions that one GPU executor (exec, or weights) has outstanding, in the order sent."""

    __slots__ = ("busy_until_ns", "outstanding")

    def __init__(self) -> None:
        self.outstanding: deque[ActionState] = deque()
        #: Predicted end of the last action sent; in the past when idle.
        self.busy_until_ns = 0

    def add(self, action: ActionState) -> None:
        self.outstanding.append(action)
        self.busy_until_ns = action.predicted_end_ns

    def finish(self, action: ActionState, *, end_ns: int) -> None:
        """Take `action` off; it ended at `end_ns`. What stands behind it is predicted anew."""
        was_head = self.outstanding[0] is action
        if was_head:
            self.outstanding.popleft()
        else:
            self.outstanding.remove(action)
        previous_end_ns = end_ns
        for waiting in self.outstanding:
            if was_head:
                # It starts when the one before it ends, unless it is still on its way.
                waiting.predicted_start_ns = max(previous_end_ns, waiting.reaches_ns)
                waiting.predicted_end_ns = waiting.predicted_start_ns + waiting.expected_duration_ns
            previous_end_ns = waiting.predicted_end_ns
        self.busy_until_ns = previous_end_ns


class ExecTables(dict[str, ExecTable]):
    """Of one GPU of `worker`: `tables[name]` is there for every model that the worker prepared."""

    def __init__(self, worker: Worker) -> None:
        super().__init__()
        self._worker = worker

    def __missing__(self, name: str) -> ExecTable:
        loaded = self._worker.prepared[name]
        table = ExecTable(dict(zip(loaded.batch_sizes, loaded.exec_ns, strict=True)))
        self[name] = table
        return table


@dataclass(slots=True, eq=False)
class Gpu:
    """One GPU of one worker, as the scheduler sees it."""

    index: int  # order in the cluster: the tie-break
    gpu_id: int
    worker: Worker
    pages: int
    free_pages: int
    page_bytes: int
    clock_mhz: int = 0
    exec: Executor = field(default_factory=Executor)
    weights: Executor = field(default_factory=Executor)
    #: Models whose weights are here -> when they were last used, least recently used first.
    resident: dict[int, Model] = field(default_factory=dict)
    loading: dict[int, Model] = field(default_factory=dict)
    #: Exec times by model name, seeded from what the worker measured when one is first asked for.
    tables: ExecTables = field(init=False)
    transfers: dict[str, WindowEstimator] = field(default_factory=dict)
    busy_ns: int = 0  # exec time so far, for status
    held: bool = False  # kept free for what must run alone
    overdue_ticks: int = 0  # how long an action has been due that was not reported
    #: What its driver said last, when that came, and its count of energy when the worker joined.
    stats: GpuStats | None = None
    stats_ns: int = 0
    joined_energy_mj: int = -1
    #: Model id -> (not before, pause): loads that failed here are tried again after a pause.
    failed_loads: dict[int, tuple[int, int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tables = ExecTables(self.worker)

    @property
    def runs_alone(self) -> bool:
        """True if what is outstanding must have the GPU to itself."""
        outstanding = self.exec.outstanding
        return bool(outstanding) and outstanding[0].alone

    @property
    def name(self) -> str:
        return f"W{self.worker.worker_id}-GPU{self.gpu_id}"

    def note_stats(self, stats: GpuStats, *, now_ns: int) -> None:
        last_mj = self.stats.energy_mj if self.stats is not None else -1
        # A counter that went back was reset, with the driver: count from there.
        if self.joined_energy_mj < 0 or 0 <= stats.energy_mj < last_mj:
            self.joined_energy_mj = stats.energy_mj
        self.stats, self.stats_ns = stats, now_ns

    def load_failed(self, model: Model, *, now_ns: int) -> None:
        """Wait before the next try, twice as long each time."""
        _, pause_ns = self.failed_loads.get(model.model_id, (0, _FIRST_PAUSE_NS // 2))
        pause_ns = min(2 * pause_ns, _LONGEST_PAUSE_NS)
        self.failed_loads[model.model_id] = (now_ns + pause_ns, pause_ns)

    def may_load(self, model: Model, now_ns: int) -> bool:
        return now_ns >= self.failed_loads.get(model.model_id, (0, 0))[0]

    def exec_table(self, model: Model) -> ExecTable:
        return self.tables[model.name]

    def transfer(self, model: Model) -> WindowEstimator:
        estimator = self.transfers.get(model.name)
        if estimator is None:
            seed_ns = max(1, self.worker.prepared[model.name].weights_ns)
            estimator = self.transfers[model.name] = WindowEstimator(seed_ns)
        return estimator


class WorkerState(IntEnum):
    SILENT = 0  # never answered, or lost
    JOINED = 1


#: Before anything was measured: a LAN's round trip and a busy event loop.
_DEFAULT_TRANSIT_NS = 500_000
_DEFAULT_RETURN_NS = 500_000
#: A longer way than this was no way but a pause of one of the two; it would teach nothing else.
_LONGEST_PATH_NS = LOST_AFTER_NS
_FIRST_PAUSE_NS = 100 * NS_PER_MS
_LONGEST_PAUSE_NS = 10 * NS_PER_S


@dataclass(slots=True, eq=False)
class Unlike:
    """What a worker prepared under a name that other workers have with other tensors or pages."""

    result: LoadModelResult
    models: list[Model]
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
    spare: list[GpuInfo] = field(
        default_factory=list
    )  # beyond `max_gpus`: used when others are gone
    loadable: tuple[str, ...] = ()
    #: What LoadModel measured, by model name, and which instances are in its host memory.
    prepared: dict[str, LoadModelResult] = field(default_factory=dict)
    instances: dict[int, Model] = field(default_factory=dict)
    #: By name: models that differ from those of the workers that are used, and are not used here.
    unlike: dict[str, Unlike] = field(default_factory=dict)
    heard: bool = False  # since the last liveness tick
    silent_ticks: int = 0
    hello_due_ns: int = 0
    refusal_noted_ns: int = 0
    times_lost: int = 0
    leaving: bool = False  # it said goodbye
    put_aside: dict[str, str] = field(
        default_factory=dict
    )  # name -> why it does not offer the model
    #: Its last heartbeat, which may be of an earlier session.
    beat: Heartbeat = NO_BEAT
    #: Decision here until received there; exec end there until handled here.
    transit: WindowEstimator = field(
        default_factory=lambda: WindowEstimator(_DEFAULT_TRANSIT_NS, percentile=0.9)
    )
    returns: WindowEstimator = field(
        default_factory=lambda: WindowEstimator(_DEFAULT_RETURN_NS, percentile=0.9)
    )

    @property
    def label(self) -> str:
        """For people: its number and where it is."""
        return f"{self.worker_id} ({self.address})" if self.address else str(self.worker_id)

    @property
    def busy(self) -> bool:
        """True if an action of its GPUs is not reported yet."""
        return any(gpu.exec.outstanding or gpu.weights.outstanding for gpu in self.gpus)

    def learn_path(self, *, there_ns: int, back_ns: int) -> bool:
        """Take one measurement of each way. True if a prediction moved; paths.py tells of it."""
        moved = 0 <= there_ns < _LONGEST_PATH_NS and self.transit.add(there_ns)
        if 0 <= back_ns < _LONGEST_PATH_NS and self.returns.add(back_ns):
            moved = True
        return moved


class ModelState(IntEnum):
    LOADING = 0
    LOADED = 1
    FAILED = 2


@dataclass(slots=True, eq=False)
class Model:
    """One model instance: its weights, its queue, its users."""

    model_id: int
    name: str
    copy: int
    state: ModelState = ModelState.LOADING
    b1_ns: int = 0  # frozen when loaded: the unit of SLO factors
    pages: int = 1
    result: LoadModelResult | None = None  # the first worker's answer: shapes and dtypes
    queue: list[Request] = field(default_factory=list)  # ascending (deadline, key)
    #: Queued requests whose value is not 1 (INFER5), and, while there are any, the highest of them or 1.
    weighted: int = 0
    heaviest: float = 1.0
    resident_on: dict[int, Gpu] = field(default_factory=dict)  # by GPU index
    loading_on: dict[int, Gpu] = field(default_factory=dict)
    clients: dict[bytes, Client | None] = field(default_factory=dict)  # its users, by identity
    last_used_ns: int = 0
    unused_since_ns: int = 0  # when its last client left, if it has none
    weights_ns: int = 0  # time of a load, and
    cold_ns: int = 1  # of a load and the exec of one request; both frozen when loaded
    #: Scores (popularity.py): requests lately, those by their need of weights, those lost for want of GPUs.
    asked: float = 0.0
    need: float = 0.0
    shortage: float = 0.0

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
        )


@dataclass(slots=True, eq=False)
class Client:
    """One connected client."""

    identity: bytes
    incarnation: int
    name: str
    weight: float = 1.0
    account: str | bytes = b""  # whom its share of the GPUs is counted with (shares.py)
    heard: bool = True
    silent_ticks: int = 0
    gone: bool = False  # it left; what is left of it goes in slices
    requests: dict[int, Request] = field(default_factory=dict)  # unanswered, by its request_id
    input_bytes: int = 0  # of these
    delays: Delays = field(default_factory=Delays)  # of its messages
    models: dict[int, Model] = field(default_factory=dict)
