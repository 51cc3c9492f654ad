"""What goes into the scheduler and what comes out of it: events, effects and the records they carry.

    handle(event, *, now_ns)               a fact arrived
    schedule(*, now_ns) -> list[Effect]    decide; every send, answer and row comes out here
    next_wakeup_ns() -> int | None         the one timer the shell needs

A shell (daemon/controller.py live, sim/ in virtual time) turns sockets into events and effects into
sends. Telemetry rows are derived from `RequestDone` and `ActionDone` and from nothing else.
"""

from __future__ import annotations

import msgspec

from slosched.core.values import Value
from slosched.join_messages import MembershipReply, Register
from slosched.messages import (
    NO_SPAN,
    Action,
    ClientMessage,
    ControllerToClient,
    ControllerToWorker,
    Span,
    WorkerToController,
)


class _Fact(msgspec.Struct, frozen=True, gc=False):
    """Base of what is made per message: an eighth of a dataclass's cost, and no work for the collector."""


#: Names one request for as long as the controller knows it: the order of its arrival.
RequestKey = int


class FromClient(_Fact, frozen=True, gc=False):
    """A client's message. `input` is the frame behind it (None: inputs off).

    `waited_ns` is how long it waited before the shell read it, which its deadline does not wait for.
    """

    client: bytes
    message: ClientMessage
    input: Value | None = None
    waited_ns: int = 0


class ClientLost(_Fact, frozen=True, gc=False):
    """A send to the client failed: it is gone."""

    client: bytes


class FromWorker(_Fact, frozen=True, gc=False):
    """A message of the worker `worker_id`. `outputs` are the frames behind it."""

    worker_id: int
    message: WorkerToController
    outputs: tuple[Value, ...] = ()


class SendFailed(_Fact, frozen=True, gc=False):
    """A message to the worker could not be queued: no connection, or too much waits there."""

    worker_id: int
    message: ControllerToWorker


class Joining(_Fact, frozen=True, gc=False):
    """A worker registers. `peer` names its connection, `source` the address that this comes from, if known."""

    peer: bytes
    source: str
    message: Register


class Drain(_Fact, frozen=True, gc=False):
    """SIGTERM: take no new requests, finish those in flight, answer the rest."""


Event = FromClient | ClientLost | FromWorker | SendFailed | Joining | Drain


class ToClient(_Fact, frozen=True, gc=False):
    """Send `message`, and behind an InferReply its `output`."""

    client: bytes
    message: ControllerToClient | MembershipReply  # the latter to a worker that registers
    output: Value | None = None


class ToWorker(_Fact, frozen=True, gc=False):
    """Send `message`. An Infer carries `requests`, and is followed by their `inputs`, in that order.

    None stands for an input that a request has not; all are left out where no request has one. A Call carries
    one request, and its arguments are the one input. A ChildReply is about one, and followed by its result.
    """

    worker_id: int
    message: ControllerToWorker
    requests: tuple[RequestKey, ...] = ()
    inputs: tuple[Value | None, ...] = ()


class ConnectWorker(_Fact, frozen=True, gc=False):
    """Reach the worker `worker_id` at `address` from now on, and no longer where it was; "": nowhere."""

    worker_id: int
    address: str


class StatusAsked(_Fact, frozen=True, gc=False):
    """The client wants a StatusReply under `request_id`: the shell makes it, as a view of the scheduler."""

    client: bytes
    request_id: int
    brief: bool


class Keep(_Fact, frozen=True, gc=False):
    """The request `owner` owns a value that came in this step, until RequestDone (core/values.py)."""

    value_id: int
    owner: RequestKey


class RequestRecord(_Fact, frozen=True, gc=False):
    """Everything telemetry says about one answered request. Times on the controller's clock, ns."""

    key: RequestKey
    request_id: int  # the client's
    user_id: int
    model_id: int
    code: int
    reason: str
    slo_factor: float
    slo_ns: int
    arrival_ns: int
    departure_ns: int
    deadline_met: bool
    arrival_count: int  # GPUs that held the model's weights at arrival
    departure_count: int
    cold: bool
    batch_size: int = 0
    worker_id: int = -1
    gpu_id: int = -1
    attempts: int = 0
    # What was predicted and what happened, from arrival; -1 or 0 where there is nothing to say.
    predicted_start_ns: int = -1
    predicted_exec_ns: int = 0
    start_ns: int = -1
    exec_ns: int = 0


class StageRecord(_Fact, frozen=True, gc=False):
    """One stage of a request that had more than one. Times on the controller's clock, ns.

    `answers` is True of the stage whose output answers the request.
    """

    key: RequestKey
    request_id: int  # the client's
    user_id: int
    stage: int  # from 0
    model_id: int
    program: str
    queued_ns: int  # when it entered the stage's queue
    due_ns: int
    start_ns: int  # of the action's exec, on the controller's clock
    exec_ns: int
    end_ns: int  # when its result was handled
    batch_size: int
    worker_id: int
    gpu_id: int
    answers: bool
    # A cascade has a codes.Verdict, the score and the threshold (-1: no judge was asked), and a name.
    verdict: int = 0
    score: float = -1.0
    threshold: float = -1.0
    cascade: str = ""


class StageDone(_Fact, frozen=True, gc=False):
    record: StageRecord


class PlanRecord(_Fact, frozen=True, gc=False, kw_only=True):
    """One plan of an allocator for a cascade: what it was made for, and what it says. Rates in requests/s.

    `cascade` is its name; a policy of one cascade may leave it out (`Cascades.naming`).
    """

    at_ns: int
    threshold: float
    light_gpus: int
    heavy_gpus: int
    light_batch: int
    heavy_batch: int
    demand: float
    heavy_demand: float
    light_queued: int
    heavy_queued: int
    role_changes: int
    feasible: bool
    cascade: str = ""


class PlanMade(_Fact, frozen=True, gc=False):
    record: PlanRecord


class CallRecord(_Fact, frozen=True, gc=False, kw_only=True):
    """One call of a function, which has ended. Times on the controller's clock, ns.

    A child has the key of its parent's request, its number there, and how long the parent had run when it
    asked for it (`asked_ran_ns`); a client's call has -1, -1 and 0. `start_ns` is -1 of a call that did not
    begin. From then to `end_ns` it ran for `exec_ns`, and was suspended for `suspended_ns`: from the end of a
    part until the begin of the next one, so with the time that it waited for a slot again.
    """

    key: RequestKey
    request_id: int  # the client's; of a child, its root's
    user_id: int
    function: str
    arrival_ns: int
    end_ns: int
    code: int
    parent: RequestKey = -1
    child: int = -1
    asked_ran_ns: int = 0
    model_id: int = -1
    size_class: int = 0
    slo_ns: int = 0
    near: str = ""  # a key
    near_child: int = -1  # of the same parent
    worker_id: int = -1
    gpu_id: int = -1
    start_ns: int = -1
    exec_ns: int = 0
    suspended_ns: int = 0
    predicted_exec_ns: int = 0  # what `exec_ns` was expected to be; 0: nothing was
    in_bytes: int = 0
    out_bytes: int = 0
    children: int = 0  # that it asked for
    cold: bool = False
    attempts: int = 0
    gpu: bool = False  # its function is one for GPUs


class CallDone(_Fact, frozen=True, gc=False):
    """A call ended: it was answered, refused, taken back, or lost with its worker. RequestDone is beside it."""

    record: CallRecord


class CallPart(_Fact, frozen=True, gc=False, kw_only=True):
    """A part of a call's run, which is over: between two suspensions it ran without a pause in one slot.

    Times on the controller's clock, ns. It ends with a suspension until all of `awaits` are answered; the last
    part of a call that returned or raised has none. What a lost worker or an ended process ran has no part.
    """

    key: RequestKey
    part: int  # from 0
    begin_ns: int
    end_ns: int
    awaits: tuple[int, ...] = ()


class CallPartDone(_Fact, frozen=True, gc=False):
    record: CallPart


class RequestDone(_Fact, frozen=True, gc=False):
    """A request was answered. A `child` is in no log of requests: no client asked for it."""

    record: RequestRecord
    child: bool = False


class ActionRecord(_Fact, frozen=True, gc=False):
    """Everything telemetry says about one finished LoadWeights, EvictWeights or Infer.

    Times on the controller's clock, ns. `sent_ns` is when it was decided and sent,
    `result_received_ns` when its result was handled. `batch_size` counts the requests aboard.
    `goodput_ns` is exec time x the share of the batch answered in time (Clockwork, telemetry.md).
    """

    action_id: int
    action_type: int
    code: int
    worker_id: int
    gpu_id: int
    model_id: int
    batch_size: int
    sent_ns: int
    expected_duration_ns: int
    expected_start_ns: int
    expected_complete_ns: int
    result_received_ns: int
    processed_ns: int
    requests_queued: int  # at the model, when the action was made
    copies_loaded: int
    goodput_ns: int = 0
    exec: Span = NO_SPAN  # of a load or evict: its span
    copy_output_end_ns: int = 0
    worker_received_ns: int = 0
    worker_sent_ns: int = 0
    gpu_clock_expected_mhz: int = 0
    gpu_clock_before_mhz: int = 0
    gpu_clock_mhz: int = 0
    segments: tuple[Span, ...] = ()  # of an Infer that was interrupted


class ActionDone(_Fact, frozen=True, gc=False):
    record: ActionRecord


class Note(_Fact, frozen=True, gc=False):
    """A line for the operator: a worker joined or was lost, a model was loaded, ..."""

    level: str  # "info" or "warning"
    text: str


Effect = (
    ToClient
    | ToWorker
    | ConnectWorker
    | StatusAsked
    | Keep
    | StageDone
    | PlanMade
    | CallPartDone
    | CallDone
    | RequestDone
    | ActionDone
    | Note
)

__all__ = [
    "Action",
    "ActionDone",
    "ActionRecord",
    "CallDone",
    "CallPart",
    "CallPartDone",
    "CallRecord",
    "ClientLost",
    "ConnectWorker",
    "Drain",
    "Effect",
    "Event",
    "FromClient",
    "FromWorker",
    "Joining",
    "Keep",
    "Note",
    "PlanMade",
    "PlanRecord",
    "RequestDone",
    "RequestKey",
    "RequestRecord",
    "SendFailed",
    "StageDone",
    "StageRecord",
    "StatusAsked",
    "ToClient",
    "ToWorker",
]
