"""The structs that cross a process, and nothing else; those of join_messages.py are apart.

On the wire a message is one MessagePack array whose first element is the struct's name, so any
language can speak it. Tensors travel as further frames behind it and never enter the core. Shells send
messages without frames in bundles (transport/bundles.py).

Rules for change: a field is appended with a default, never moved or removed; the golden bytes in
`tests/golden/wire.json` guard this. `PROTOCOL_VERSION` changes when an old peer could misread a new
one, and peers of different versions refuse each other. Structs of more than five fields are
built by keyword. Times are integer nanoseconds, between controller and worker on the
**controller's** clock (the worker converts, Clockwork §5); a field on another clock says so.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from slosched.call_messages import HOST_PARTS as HOST_PARTS
from slosched.call_messages import Call as Call
from slosched.call_messages import CallPrepared as CallPrepared
from slosched.call_messages import CallResult as CallResult
from slosched.call_messages import CallResumed as CallResumed
from slosched.call_messages import CallSuspended as CallSuspended
from slosched.call_messages import CancelCall as CancelCall
from slosched.call_messages import ChildCancel as ChildCancel
from slosched.call_messages import ChildReply as ChildReply
from slosched.call_messages import ChildRequest as ChildRequest
from slosched.message_types import MAX_TEXT as MAX_TEXT
from slosched.message_types import NO_SPAN as NO_SPAN
from slosched.message_types import ActionResult as ActionResult
from slosched.message_types import FunctionInfo as FunctionInfo
from slosched.message_types import GpuInfo as GpuInfo
from slosched.message_types import GpuStats as GpuStats
from slosched.message_types import Labels, Names, PerRequest, Shape
from slosched.message_types import LengthClass as LengthClass
from slosched.message_types import Message as Message
from slosched.message_types import ModelInfo as ModelInfo
from slosched.message_types import Name as Name
from slosched.message_types import Number as Number
from slosched.message_types import SessionMessage as SessionMessage
from slosched.message_types import Span as Span
from slosched.message_types import StageReply as StageReply
from slosched.message_types import Text as Text
from slosched.message_types import TimedAction as TimedAction
from slosched.signature import MOST_LENGTHS, Tensors

PROTOCOL_VERSION = 5


# --------------------------------------------------------------------------- client -> controller


class ClientHello(Message, frozen=True):
    """The first message of a client. `incarnation` is random, one per process start.

    `weight` is what its requests are worth beside those of weight 1; the controller's operator may cap
    it or set another (docs/fairness.md). With `slo_from_send` an SLO counts from the client's send to its
    receipt, else from arrival at the controller, as Clockwork's do.
    """

    protocol: Number
    incarnation: Number
    name: Name = ""
    weight: float = 1.0
    slo_from_send: bool = False


class ClientHeartbeat(Message, frozen=True):
    """Sent each second; a client silent for five is gone and its copies are freed."""

    sent_ns: Number  # client's clock


class Goodbye(Message, frozen=True):
    """The client leaves in good order."""


class LoadModelRequest(Message, frozen=True):
    """Ask for at least `copies` instances of the model `name` (a name of the workers' zoo)."""

    request_id: Number
    name: Name
    copies: Number = 1


class UnloadModelRequest(Message, frozen=True):
    """Give up the use of the model `name`: instances that no other client uses leave the workers' memory.

    With `force` other clients lose theirs too, and their queued requests are answered with code 1; only the
    clients that the controller's option `operators` names may do that.
    """

    request_id: Number
    name: Name
    force: bool = False


class ListModelsRequest(Message, frozen=True):
    request_id: Number


class InferRequest(Message, frozen=True, kw_only=True):
    """One inference. Its inputs, if any, are the one frame that follows (signature.py).

    The deadline is `slo_ns` after arrival at the controller (after the client's send, if its hello said so)
    if that is > 0, else `slo_factor` x b1 if that is > 0, else the controller's default SLO. `shape` and
    `dtype` describe the input of a model with one input of a fixed shape, and are empty when inputs are off.
    Inputs of another model come with `signature`, the digest of those that the client knows
    (signature.digest), and where a dimension varies with `length`. A length without inputs is that of the
    input which the worker makes up (0: the longest). `sent_ns` is the client's clock; only differences of it
    are used, to measure how long the request waited in queues. 0: not measured, or a RequestBundle carries
    it. `round_trip_ns` is what the client saw of an earlier request, from its send to the receipt of its
    answer, less the answer's `latency_ns`: both network latencies together (0: nothing new). It comes from
    clients with `slo_from_send`. A call of a function has its arguments as the frame and its size class as
    `length`, and should run where the last call `near` the same key did.
    """

    request_id: Number
    model_id: Number
    slo_ns: Number = 0
    slo_factor: float = 0.0
    user_id: Number = 0
    sent_ns: Number = 0
    shape: Shape = ()
    dtype: Name = ""
    length: Number = 0
    signature: Number = 0
    round_trip_ns: Number = 0
    near: Name = ""


class CancelRequest(Message, frozen=True):
    """Give up an inference. It is answered with code 1 unless its answer is already on the way."""

    request_id: Number  # that of the InferRequest


class StatusRequest(Message, frozen=True):
    request_id: Number
    brief: bool = False  # without the list of models, which may be 10,000 long


class DrainWorkerRequest(Message, frozen=True):
    """Take `worker` (its name, number or address) out of use once what it holds has ended, or back with `undo`.

    Only the clients that the controller's option `operators` names may do that.
    """

    request_id: Number
    worker: Name
    undo: bool = False


ClientMessage = (
    ClientHello
    | ClientHeartbeat
    | Goodbye
    | LoadModelRequest
    | UnloadModelRequest
    | ListModelsRequest
    | InferRequest
    | CancelRequest
    | StatusRequest
    | DrainWorkerRequest
)

# --------------------------------------------------------------------------- controller -> client


class Welcome(Message, frozen=True):
    """The answer to a ClientHello. `default_slo_ns` holds for an InferRequest without an SLO."""

    protocol: int
    incarnation: int
    version: str
    policy: str
    default_slo_ns: int


class Refused(Message, frozen=True):
    """A message could not be taken: wrong protocol, malformed, oversized, or sent before Hello.

    `request_id` is -1 where no request could be read.
    """

    request_id: int
    code: int
    reason: str


class LoadModelReply(Message, frozen=True):
    """`code` 0 and the instances, or the code and the reason in words."""

    request_id: int
    code: int
    reason: str = ""
    models: tuple[ModelInfo, ...] = ()


class UnloadModelReply(Message, frozen=True):
    """`code` 0 and the number of instances that are unloaded and kept, or the code and the reason in words."""

    request_id: int
    code: int
    reason: str = ""
    unloaded: int = 0
    kept: int = 0  # other clients use them


class ListModelsReply(Message, frozen=True):
    """The instances that are loaded, and the `loadable` names the workers offer; some are `functions`.

    `left_out` has (name, reason) of what workers find in their repositories and none offers.
    """

    request_id: int
    models: tuple[ModelInfo, ...]
    loadable: tuple[str, ...]
    functions: tuple[str, ...] = ()
    left_out: LeftOut = ()


class InferReply(Message, frozen=True):
    """The one answer to an InferRequest; its output, if any, is the frame that follows.

    Starts are relative to the request's arrival at the controller. `predicted_*` are what the
    controller expected when it decided (for a refusal: the best plan that it found), `start_ns` and
    `exec_ns` what the worker reported. -1 or 0 stands where there was none. `slo_ns - latency_ns` is
    the time left until the deadline, so a caller refused early need not spin.
    """

    request_id: int
    code: int
    reason: str
    model_id: int
    slo_ns: int
    latency_ns: int  # departure - arrival, both at the controller
    deadline_met: bool
    batch_size: int = 0  # requests that shared the action
    worker_id: int = -1
    gpu_id: int = -1
    cold: bool = False
    predicted_start_ns: int = -1
    predicted_exec_ns: int = 0
    start_ns: int = -1
    exec_ns: int = 0
    attempts: int = 0  # actions that carried it; > 1 after a replan
    stages: tuple[StageReply, ...] = ()  # of a cascade, in order


class StatusReply(Message, frozen=True):
    """Everything an operator asks first. `report` is JSON-able MessagePack (dicts and lists)."""

    request_id: int
    report: dict[str, object]


class DrainWorkerReply(Message, frozen=True):
    """`code` 0, the worker's number and its state from now on, or the code and the reason in words."""

    request_id: int
    code: int
    reason: str = ""
    worker_id: int = -1
    state: str = ""


ControllerToClient = (
    Welcome
    | Refused
    | LoadModelReply
    | UnloadModelReply
    | ListModelsReply
    | InferReply
    | StatusReply
    | DrainWorkerReply
)

# --------------------------------------------------------------------------- controller -> worker


class ControllerHello(Message, frozen=True):
    """Opens (or renews) a session. The worker answers WorkerWelcome or WorkerRefused.

    `incarnation` is random and known to workers alone. `times_lost` is how often this controller has lost
    the worker: a hello with the count of the open session is a repetition and changes nothing.

    A worker that holds models of the same `cluster` keeps them and tells its inventory; with `keeps_weights`
    the weights on its GPUs stay as well. Empty: it begins empty, or with what this controller had it prepare.
    """

    protocol: Number
    incarnation: Number
    times_lost: Number
    cluster: Name = ""
    keeps_weights: bool = False


class HeartbeatAck(Message, frozen=True):
    """Closes one clock exchange: `heartbeat_sent_ns` is on the worker's clock, the rest on ours.

    `offer` is the number of the worker's last Offer that arrived, or that of its Welcome.
    """

    heartbeat_sent_ns: Number
    received_ns: Number
    sent_ns: Number
    offer: Number = 0


class LoadModel(TimedAction, frozen=True, kw_only=True):
    """Prepare `copies` instances of `name`, ids `model_id`.., on every GPU of the worker (host memory).

    Batch sizes above `max_batch`, or that take longer than `max_exec_ns`, are left out; 1 never is.
    """

    name: Name
    model_id: Number
    copies: Number
    max_batch: Number
    max_exec_ns: Number


class UnloadModel(SessionMessage, frozen=True):
    model_id: Number


class LoadWeights(TimedAction, frozen=True, kw_only=True):
    model_id: Number
    gpu_id: Number
    expected_duration_ns: Number


class EvictWeights(TimedAction, frozen=True, kw_only=True):
    model_id: Number
    gpu_id: Number


class Infer(TimedAction, frozen=True, kw_only=True):
    """Run `request_count` inputs as one batch of the class `batch_size` (padded when smaller).

    `input_sizes` lists the bytes of the frames that follow, one per request; a size of 0 carries no
    frame and the worker generates that input. `length` is the length class that runs, and `lengths` has the
    length of each request; 0 and empty for a model without length classes. In a preemptive exec lane the
    Infer goes first at the next boundary of a running one with a lower `priority`.
    """

    model_id: Number
    gpu_id: Number
    expected_duration_ns: Number
    batch_size: Number
    request_count: Number
    input_sizes: PerRequest = ()
    length: Number = 0
    lengths: PerRequest = ()
    priority: Number = 0


class ClearCache(SessionMessage, frozen=True):
    pass


class GetWorkerState(SessionMessage, frozen=True):
    pass


Action = (
    LoadModel
    | UnloadModel
    | LoadWeights
    | EvictWeights
    | Infer
    | Call
    | ClearCache
    | GetWorkerState
)
ControllerToWorker = ControllerHello | HeartbeatAck | Action | CancelCall | ChildReply

# --------------------------------------------------------------------------- worker -> controller


class Prepared(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Instances of `name` that a worker holds in host memory: runs of ids, each (first id, count), ascending.

    `result` is what it answered to the last LoadModel of the name, which had `max_batch` and `max_exec_ns`.
    """

    name: Name
    runs: Annotated[tuple[tuple[Number, Number], ...], msgspec.Meta(max_length=100_000)]
    max_batch: Number
    max_exec_ns: Number
    result: LoadModelResult


#: (name, reason) of what a worker finds in its repository and cannot offer.
LeftOut = Annotated[tuple[tuple[Text, Text], ...], msgspec.Meta(max_length=1024)]


class WorkerWelcome(Message, frozen=True, kw_only=True):
    """The worker's side of a session. Actions must carry its number, `session`."""

    protocol: Number
    session: Number
    version: Name
    host: Name
    pid: Number
    device: Name
    gpus: Annotated[tuple[GpuInfo, ...], msgspec.Meta(max_length=1024)]
    loadable: Names
    #: (name, reason) of models that it does not offer, because they ended its process too often.
    put_aside: Annotated[tuple[tuple[Text, Text], ...], msgspec.Meta(max_length=1024)] = ()
    #: What it holds of the hello's cluster; the weights on its GPUs are of these instances.
    inventory: Annotated[tuple[Prepared, ...], msgspec.Meta(max_length=10_000)] = ()
    #: Those of the hello that it answers; 0 and -1: it does not say.
    incarnation: Number = 0
    times_lost: Number = -1
    functions: Names = ()  # those of `loadable` that are functions
    offer: Number = 0
    left_out: LeftOut = ()


class Offer(Message, frozen=True, kw_only=True):
    """What a worker can prepare has changed since its Welcome. It says so until an ack has its `number`."""

    session: Number
    number: Number
    loadable: Names
    left_out: LeftOut = ()


class WorkerRefused(Message, frozen=True):
    code: Number
    reason: Text


#: Calls that a heartbeat tells of.
MOST_BEAT_CALLS = 10_000


class Heartbeat(Message, frozen=True, kw_only=True):
    """Sent every 200 ms, also while models are being prepared (`activity` then says which)."""

    session: Number
    sent_ns: Number  # worker's clock
    clock_offset_ns: Number  # add it to a controller time to get a worker time
    clock_error_ns: Number  # bound of that offset: half the least round trip seen
    preparing: Number  # LoadModels taken and not answered
    activity: Text = ""
    pending: Number = 0  # actions taken and not answered
    errors: Number = 0
    dropped: Number = 0  # stale, malformed or oversized messages
    #: Empty unless the driver was asked since the last heartbeat.
    gpus: Annotated[tuple[GpuStats, ...], msgspec.Meta(max_length=1024)] = ()
    #: The action ids of the calls among `pending`, the first of them if there are very many.
    calls: Annotated[tuple[Number, ...], msgspec.Meta(max_length=MOST_BEAT_CALLS)] = ()


#: Before the first one: of no session.
NO_BEAT = Heartbeat(session=-1, sent_ns=0, clock_offset_ns=0, clock_error_ns=0, preparing=0)


class WorkerGoodbye(Message, frozen=True):
    """The worker ends in good order: it takes nothing new, and hands back what it has not begun."""

    session: Number


class ErrorResult(ActionResult, frozen=True, kw_only=True):
    """The action failed. `part` is the span of what a call ran last, if it had begun."""

    action_type: Number
    code: Number
    reason: Text
    part: Span = NO_SPAN


class LoadModelResult(ActionResult, frozen=True, kw_only=True):
    """`exec_ns[i]` is the profiled exec time of `batch_sizes[i]`, in the longest of the `length_classes` if
    there are any; these ascend. `inputs` and `outputs` are the signature, `input_*` and `output_*` its first
    tensors at the greatest length. `boundaries_ns[i]` is the longest time until a run of `batch_sizes[i]` can
    be interrupted; empty: none can be. An Infer of a class whose profiled exec time is at most `urgent_ns` may
    interrupt others; 0: none may.
    """

    span: Span
    copies: Number
    batch_sizes: PerRequest
    exec_ns: PerRequest
    weights_ns: Number
    weights_bytes: Number
    pages: Number
    input_shape: Shape
    input_dtype: Name
    output_shape: Shape
    output_dtype: Name
    random_weights: bool
    labels: Labels = ()
    inputs: Tensors = ()
    outputs: Tensors = ()
    length_classes: Annotated[tuple[LengthClass, ...], msgspec.Meta(max_length=MOST_LENGTHS)] = ()
    boundaries_ns: PerRequest = ()
    urgent_ns: Number = 0
    function: FunctionInfo | None = None  # None: it is a model
    digest: Name = (
        ""  # of the files of a repository's version, the same on each worker that has these
    )


class UnloadModelResult(ActionResult, frozen=True, kw_only=True):
    pass


class LoadWeightsResult(ActionResult, frozen=True, kw_only=True):
    span: Span


class EvictWeightsResult(ActionResult, frozen=True, kw_only=True):
    span: Span


class InferResult(ActionResult, frozen=True, kw_only=True):
    """`output_sizes` lists the bytes of the frames that follow, one per request (none: inputs off).

    `pause_ns` is how long an interrupted Infer stood still, within its `exec` span; `segments` are the parts
    that it ran in, and empty where it was not interrupted. `scores` are those of a model with a judge.
    """

    gpu_id: Number
    copy_input: Span
    exec: Span
    copy_output: Span
    gpu_clock_before_mhz: Number
    gpu_clock_mhz: Number
    output_sizes: PerRequest = ()
    pause_ns: Number = 0
    segments: Annotated[tuple[Span, ...], msgspec.Meta(max_length=1024)] = ()
    scores: Annotated[tuple[float, ...], msgspec.Meta(max_length=1024)] = ()  # one per request


class ClearCacheResult(ActionResult, frozen=True, kw_only=True):
    pass


class WorkerStateResult(ActionResult, frozen=True, kw_only=True):
    gpus: tuple[GpuInfo, ...]
    models: tuple[tuple[Number, Name], ...]


Result = (
    ErrorResult
    | LoadModelResult
    | UnloadModelResult
    | LoadWeightsResult
    | EvictWeightsResult
    | InferResult
    | CallResult
    | ClearCacheResult
    | WorkerStateResult
)
#: What a call tells while it runs; they go with results, in bundles too.
CallNews = CallPrepared | CallSuspended | CallResumed | ChildRequest | ChildCancel
WorkerToController = (
    WorkerWelcome | Offer | WorkerRefused | WorkerGoodbye | Heartbeat | Result | CallNews
)
