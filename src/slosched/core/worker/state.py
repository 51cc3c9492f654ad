"""What the worker's brain keeps about instances, actions, executors and GPUs."""

from __future__ import annotations

from dataclasses import dataclass, field

from slosched.codes import ActionType
from slosched.config import ModelProfile
from slosched.core.worker.interface import OpKind
from slosched.core.worker.memory import WeightsCache
from slosched.messages import (
    NO_SPAN,
    Action,
    ClearCache,
    EvictWeights,
    GetWorkerState,
    GpuInfo,
    Infer,
    LoadModel,
    LoadWeights,
    Span,
    UnloadModel,
)

#: Priority of an op that need not wait.
NO_EARLIEST_NS = 0
#: A window's end that never comes.
NO_LATEST_NS = 2**63

ACTION_TYPES: dict[type[Action], ActionType] = {
    LoadModel: ActionType.LOAD_MODEL,
    LoadWeights: ActionType.LOAD_WEIGHTS,
    Infer: ActionType.INFER,
    EvictWeights: ActionType.EVICT_WEIGHTS,
    ClearCache: ActionType.CLEAR_CACHE,
    GetWorkerState: ActionType.GET_WORKER_STATE,
    UnloadModel: ActionType.UNLOAD_MODEL,
}


@dataclass(slots=True, eq=False)
class Instance:
    """A model that the controller may load onto GPUs. Copies of a name share everything but the id."""

    model_id: int
    name: str
    profile: ModelProfile
    max_batch: int  # the largest class that the controller was told of
    input_bytes: int
    pages: dict[int, int]  # gpu id -> pages of its weights there
    random_weights: bool = True
    labels: tuple[str, ...] = ()


@dataclass(slots=True, eq=False)
class PendingAction:
    """An action between its arrival and its one result. Times are on the worker's clock."""

    key: int
    message: Action
    peer: bytes
    session: int
    received_ns: int
    earliest_ns: int = NO_EARLIEST_NS
    latest_ns: int = NO_LATEST_NS
    instance: Instance | None = None
    copy_input: Span = NO_SPAN
    exec: Span = NO_SPAN
    weights_version: int = -1
    clock_before_mhz: int = 0
    clock_mhz: int = 0
    uses: GpuState | None = None  # set while the action keeps its instance's weights there in use


@dataclass(slots=True, eq=False)
class Executor:
    """One lane of a GPU: one op at a time, the others in a queue by (earliest, arrival)."""

    kind: OpKind | None  # None: the preparation of models, which belongs to no GPU
    gpu: GpuState | None
    queue: list[tuple[int, int, PendingAction]] = field(default_factory=list)
    running: PendingAction | None = None
    ahead: PendingAction | None = None  # armed behind `running`, on a device that arms
    ahead_ns: int = 0  # an action is due so long before its earliest
    armed_ns: int | None = None  # the earliest time for which it stands in the brain's wake heap
    dirty: bool = False

    @property
    def has_room(self) -> bool:
        """True if the device takes one more op."""
        return self.running is None or (self.ahead_ns > 0 and self.ahead is None)

    def drain(self) -> list[PendingAction]:
        """Empty the queue; returns what was in it, in order."""
        drained = [entry[2] for entry in sorted(self.queue, key=lambda entry: entry[:2])]
        self.queue.clear()
        return drained


class GpuState:
    """One GPU: its cache, its four executors, and which instances are in use on it."""

    def __init__(self, info: GpuInfo) -> None:
        self.info = info
        self.gpu_id = info.gpu_id
        self.cache = WeightsCache(info.pages)
        self.weights = Executor(OpKind.LOAD_WEIGHTS, self)
        self.inputs = Executor(OpKind.COPY_INPUT, self)
        self.exec = Executor(OpKind.EXEC, self)
        self.outputs = Executor(OpKind.COPY_OUTPUT, self)
        self.free_copies = False  # an Infer without inputs needs no copies to the device and back
        self._uses: dict[int, int] = {}  # model id -> Infers between arrival and the end of exec

    @property
    def executors(self) -> tuple[Executor, Executor, Executor, Executor]:
        return self.weights, self.inputs, self.exec, self.outputs

    def use(self, model_id: int) -> None:
        self._uses[model_id] = self._uses.get(model_id, 0) + 1

    def release(self, model_id: int) -> None:
        left = self._uses[model_id] - 1
        if left:
            self._uses[model_id] = left
        else:
            del self._uses[model_id]

    def in_use(self, model_id: int) -> bool:
        return model_id in self._uses

    def report(self) -> GpuInfo:
        """The GPU as a message shows it. Weights on their way count: their pages are taken."""
        info = self.info
        return GpuInfo(info.gpu_id, info.name, info.pages, info.page_bytes, self.cache.model_ids())
