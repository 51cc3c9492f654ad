"""What the worker's brain keeps about instances, actions, lanes and GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec

from slosched.codes import ActionType
from slosched.config import ModelProfile
from slosched.core.worker.calls import CallState
from slosched.core.worker.lanes import GPU_LANES, LaneSpec, Role, host_lanes
from slosched.core.worker.memory import WeightsCache
from slosched.messages import (
    NO_SPAN,
    Action,
    FunctionInfo,
    GpuInfo,
    LoadModel,
    LoadModelResult,
    Span,
)

#: Start time of work that need not wait.
NO_EARLIEST_NS = 0
#: A window's end that never comes.
NO_LATEST_NS = 2**63

M = TypeVar("M", bound=Action)


@dataclass(slots=True, eq=False)
class Instance:
    """A model or a function that the controller may load. Copies of a name share everything but the id."""

    model_id: int
    name: str
    profile: ModelProfile
    largest: dict[int, int]  # by length class (0: it has none), the largest batch that was offered
    input_bytes: int  # of each request's frame; -1: that depends on the request
    pages: dict[int, int]  # gpu id -> pages of its weights there
    random_weights: bool = True
    labels: tuple[str, ...] = ()
    #: By length class and batch size, the longest time until a run can be interrupted; empty: none can be.
    boundaries_ns: dict[int, dict[int, int]] = field(default_factory=dict)
    urgent_ns: int = 0  # a run of a class that takes no longer may interrupt others; 0: none may
    function: FunctionInfo | None = None  # None: it is a model
    digest: str = ""  # of the files that it was built of, if it is a version of a repository
    #: The last LoadModel of it, and the answer: what its worker tells the next controller of the cluster.
    request: LoadModel | None = None
    result: LoadModelResult | None = None


class KindFacts(Protocol):
    """What the end of an action asks of its kind (kinds/base.py)."""

    action_type: ActionType
    takes_inputs: bool


class Step(NamedTuple):
    """One stop of an action in a lane.

    `start(action, now_ns)` runs when the action's turn has come: it launches an op, or ends the action.
    `ended(action, event, now_ns)` runs with the OpDone of that op (in the host lane with ModelPrepared).
    """

    role: Role
    start: Callable[[PendingAction[Any], int], None]
    ended: Callable[[PendingAction[Any], Any, int], None]


@dataclass(slots=True, eq=False)
class PendingAction(Generic[M]):
    """An action between its arrival and its one result. Times are on the worker's clock."""

    key: int
    kind: KindFacts
    message: M
    peer: bytes
    received_ns: int
    earliest_ns: int = NO_EARLIEST_NS
    latest_ns: int = NO_LATEST_NS
    gpu: GpuState | None = None
    instance: Instance | None = None
    step: Step = field(init=False)  # where it waits or runs
    copy_input: Span = NO_SPAN
    exec: Span = NO_SPAN
    pause_ns: int = 0  # between the segments of `exec`; part of no estimate
    segments: tuple[Span, ...] = ()  # of `exec`; empty where it was not interrupted
    priority: int = 0
    weights_version: int = -1
    clock_before_mhz: int = 0
    clock_mhz: int = 0
    prepares: str = ""  # the model that it prepares on the host, named as the controller names it
    uses_weights: bool = False  # it keeps its instance's weights on its GPU in use
    call: CallState | None = None  # of a Call


@dataclass(slots=True, eq=False)
class Lane:
    """One lane as the brain sees it: what has started there, and the queue by (earliest, arrival)."""

    spec: LaneSpec
    gpu: GpuState | None = None  # None: the host lane
    queue: list[tuple[int, int, PendingAction[Any]]] = field(default_factory=list)
    started: list[PendingAction[Any]] = field(default_factory=list)  # in order, the armed ones too
    slots: int = field(init=False)  # how many may have started: the width, and one that is armed
    ahead_ns: int = 0  # an action starts at most this long before its earliest, and is armed
    wake_ns: int | None = None  # for which it stands in the pipeline's wake heap
    dirty: bool = False  # it may have something to start

    def __post_init__(self) -> None:
        self.slots = self.spec.width

    def arm_ahead(self, ahead_ns: int) -> None:
        """The device takes one op more than it runs, `ahead_ns` before its time, and starts it itself."""
        self.ahead_ns = ahead_ns
        self.slots = self.spec.width + (ahead_ns > 0)

    def drain(self) -> list[PendingAction[Any]]:
        """Empty the queue; returns what was in it, in order."""
        drained = [entry[2] for entry in sorted(self.queue, key=lambda entry: entry[:2])]
        self.queue.clear()
        return drained


class GpuState:
    """One GPU, or the host's slots: its cache, its lanes, and which instances are in use on it.

    `lanes` are those of a GPU; a host has its own.
    """

    def __init__(self, info: GpuInfo, lanes: Sequence[LaneSpec] = GPU_LANES) -> None:
        self.info = info
        self.gpu_id = info.gpu_id
        self.cache = WeightsCache(info.pages)
        specs = host_lanes(info.slots) if info.host else lanes
        self.lanes = {spec.role: Lane(spec, self) for spec in specs}
        self.free_copies = False  # an Infer without inputs needs no copies to the device and back
        self._uses: dict[int, int] = {}  # model id -> Infers between arrival and the end of exec

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
        """The GPU as a message shows it. Weights that are loading count: their pages are taken."""
        return msgspec.structs.replace(self.info, resident=self.cache.model_ids())
