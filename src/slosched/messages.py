"""Every struct that crosses a process, and nothing else.

On the wire a message is one MessagePack array whose first element is the struct's name, so any
language can speak it. Tensors travel as further frames behind it and never enter the core. To a peer whose
hello says so, a shell sends what has no frames in bundles (transport/bundles.py).

Rules for change: a field is appended with a default, never moved or removed; the golden bytes in
`tests/golden/wire.json` guard this. `PROTOCOL_VERSION` changes when an old peer could misread a
new one. Times are integer nanoseconds, between controller and worker on the **controller's** clock
(the worker converts, Clockwork §5); a field on another clock says so.
"""

from __future__ import annotations

import msgspec

PROTOCOL_VERSION = 1


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of everything on the wire."""


class ModelInfo(msgspec.Struct, frozen=True, array_like=True):
    """One model instance, as the controller shows it.

    `b1_ns` is the unit of SLO factors: the fastest GPU's profiled batch-1 exec time, frozen when the
    model is loaded. Shapes are those of one request, without the batch dimension.
    """

    model_id: int
    name: str
    copy: int
    batch_sizes: tuple[int, ...]
    b1_ns: int
    weights_ns: int
    weights_bytes: int
    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...]
    output_dtype: str
    random_weights: bool = True
    gpus_resident: int = 0
    clients: int = 0
    labels: tuple[str, ...] = ()


# --------------------------------------------------------------------------- client -> controller


class ClientHello(Message, frozen=True):
    """The first message of a client. `incarnation` is random, one per process start.

    `weight` is what its requests are worth beside those of weight 1; the controller's operator may cap
    it or set another (docs/fairness.md).
    """

    protocol: int
    incarnation: int
    name: str = ""
    weight: float = 1.0
    bundles: bool = False  # it takes bundles


class ClientHeartbeat(Message, frozen=True):
    """Sent each second; a client silent for five is gone and its copies are freed."""

    sent_ns: int  # client's clock


class Goodbye(Message, frozen=True):
    """The client leaves in good order."""


class LoadModelRequest(Message, frozen=True):
    """Ask for at least `copies` instances of the model `name` (a name of the workers' zoo)."""

    request_id: int
    name: str
    copies: int = 1


class ListModelsRequest(Message, frozen=True):
    request_id: int


class InferRequest(Message, frozen=True):
    """One inference. Its input, if any, is the one frame that follows, C order.

    The deadline is `slo_ns` after arrival at the controller if that is > 0, else `slo_factor` x b1 if
    that is > 0, else the controller's default SLO. `shape` and `dtype` describe the input frame and
    are empty when inputs are off.
    """

    request_id: int
    model_id: int
    slo_factor: float = 0.0
    slo_ns: int = 0
    user_id: int = 0
    shape: tuple[int, ...] = ()
    dtype: str = ""


class CancelRequest(Message, frozen=True):
    """Give up an inference. It is answered with code 1 unless its answer is already on the way."""

    request_id: int  # that of the InferRequest


class StatusRequest(Message, frozen=True):
    request_id: int
    brief: bool = False  # without the list of models, which may be 10,000 long


ClientMessage = (
    ClientHello
    | ClientHeartbeat
    | Goodbye
    | LoadModelRequest
    | ListModelsRequest
    | InferRequest
    | CancelRequest
    | StatusRequest
)

# --------------------------------------------------------------------------- controller -> client


class Welcome(Message, frozen=True):
    """The answer to a ClientHello. `default_slo_ns` 0: a controller that does not tell its own."""

    protocol: int
    version: str
    incarnation: int
    policy: str
    default_slo_ns: int = 0  # holds for an InferRequest without an SLO
    bundles: bool = False  # it takes bundles


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


class ListModelsReply(Message, frozen=True):
    """The instances that are loaded, and the `loadable` names the workers offer."""

    request_id: int
    models: tuple[ModelInfo, ...]
    loadable: tuple[str, ...] = ()


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


class StatusReply(Message, frozen=True):
    """Everything an operator asks first. `report` is JSON-able MessagePack (dicts and lists)."""

    request_id: int
    report: dict[str, object]


ControllerToClient = Welcome | Refused | LoadModelReply | ListModelsReply | InferReply | StatusReply

# --------------------------------------------------------------------------- controller -> worker


class ControllerHello(Message, frozen=True):
    """Opens (or renews) a session. The worker answers WorkerWelcome or WorkerRefused."""

    protocol: int
    incarnation: int
    name: str = ""
    bundles: bool = False  # it takes bundles


class HeartbeatAck(Message, frozen=True):
    """Closes one clock exchange: `heartbeat_sent_ns` is on the worker's clock, the rest on ours."""

    heartbeat_sent_ns: int
    received_ns: int
    sent_ns: int


class SessionMessage(Message, frozen=True):
    """Base of actions and results. `session` is what the worker's Welcome gave; another's are dropped."""

    session: int
    action_id: int


class LoadModel(SessionMessage, frozen=True):
    """Prepare `copies` instances of `name`, ids `model_id`.., on every GPU of the worker (host memory).

    Batch sizes above `max_batch`, or that take longer than `max_exec_ns`, are left out; 1 never is.
    """

    name: str
    model_id: int
    copies: int
    max_batch: int
    max_exec_ns: int
    earliest_ns: int
    latest_ns: int


class UnloadModel(SessionMessage, frozen=True):
    model_id: int


class LoadWeights(SessionMessage, frozen=True):
    model_id: int
    gpu_id: int
    earliest_ns: int
    latest_ns: int
    expected_duration_ns: int


class EvictWeights(SessionMessage, frozen=True):
    model_id: int
    gpu_id: int
    earliest_ns: int
    latest_ns: int


class Infer(SessionMessage, frozen=True):
    """Run `request_count` inputs as one batch of the class `batch_size` (padded when smaller).

    `input_sizes` lists the bytes of the frames that follow, one per request; a size of 0 carries no
    frame and the worker generates that input.
    """

    model_id: int
    gpu_id: int
    earliest_ns: int
    latest_ns: int
    expected_duration_ns: int
    batch_size: int
    request_count: int
    input_sizes: tuple[int, ...] = ()


class ClearCache(SessionMessage, frozen=True):
    pass


class GetWorkerState(SessionMessage, frozen=True):
    pass


Action = LoadModel | UnloadModel | LoadWeights | EvictWeights | Infer | ClearCache | GetWorkerState
ControllerToWorker = ControllerHello | HeartbeatAck | Action

# --------------------------------------------------------------------------- worker -> controller


class Span(msgspec.Struct, frozen=True, array_like=True):
    """When something ran. `duration_ns` is the device's own measure, not `end_ns - begin_ns`."""

    begin_ns: int
    end_ns: int
    duration_ns: int


NO_SPAN = Span(0, 0, 0)


class GpuInfo(msgspec.Struct, frozen=True, array_like=True):
    gpu_id: int
    name: str
    pages: int
    page_bytes: int
    resident: tuple[int, ...] = ()  # model ids


class WorkerWelcome(Message, frozen=True):
    """The worker's side of a session. `incarnation` is the session that actions must carry."""

    protocol: int
    incarnation: int
    version: str
    host: str
    pid: int
    device: str
    gpus: tuple[GpuInfo, ...]
    loadable: tuple[str, ...]
    bundles: bool = False  # it takes bundles
    #: (name, reason) of models that it does not offer, because they ended its process too often;
    #: codec.py leaves an empty one out.
    put_aside: tuple[tuple[str, str], ...] = ()


class WorkerRefused(Message, frozen=True):
    code: int
    reason: str


class GpuStats(msgspec.Struct, frozen=True, array_like=True):
    """What the driver said of a GPU when it was last asked. -1: the card does not answer that."""

    gpu_id: int = 0
    name: str = ""
    uuid: str = ""
    driver: str = ""
    sm_percent: int = -1  # of the last second or less: kernels ran
    memory_percent: int = -1  # likewise: the memory was read or written
    memory_used_bytes: int = -1
    memory_total_bytes: int = -1
    power_mw: int = -1
    energy_mj: int = -1  # since the driver was loaded
    temperature_c: int = -1
    sm_clock_mhz: int = -1
    memory_clock_mhz: int = -1
    throttle_reasons: int = -1  # a bit mask of NVML's: why the clocks are below their most


class Heartbeat(Message, frozen=True):
    """Sent every 200 ms, also while models are being prepared (`activity` then says which)."""

    session: int
    sent_ns: int  # worker's clock
    clock_offset_ns: int  # add it to a controller time to get a worker time
    clock_error_ns: int  # bound of that offset: half the least round trip seen
    activity: str = ""
    pending: int = 0
    errors: int = 0
    dropped: int = 0  # stale, malformed or oversized messages
    preparing: int = -1  # LoadModels taken and not answered; -1: it does not say
    gpus: tuple[GpuStats, ...] = ()  # only when they are new; codec.py leaves an empty one out


class ErrorResult(SessionMessage, frozen=True):
    action_type: int
    code: int
    reason: str
    received_ns: int = 0
    sent_ns: int = 0


class LoadModelResult(SessionMessage, frozen=True):
    """`exec_ns[i]` is the profiled exec time of `batch_sizes[i]`."""

    span: Span
    copies: int
    batch_sizes: tuple[int, ...]
    exec_ns: tuple[int, ...]
    weights_ns: int
    weights_bytes: int
    pages: int
    input_shape: tuple[int, ...]
    input_dtype: str
    output_shape: tuple[int, ...]
    output_dtype: str
    random_weights: bool
    received_ns: int
    sent_ns: int
    labels: tuple[str, ...] = ()


class UnloadModelResult(SessionMessage, frozen=True):
    received_ns: int
    sent_ns: int


class LoadWeightsResult(SessionMessage, frozen=True):
    span: Span
    received_ns: int
    sent_ns: int


class EvictWeightsResult(SessionMessage, frozen=True):
    span: Span
    received_ns: int
    sent_ns: int


class InferResult(SessionMessage, frozen=True):
    """`output_sizes` lists the bytes of the frames that follow, one per request (none: inputs off)."""

    copy_input: Span
    exec: Span
    copy_output: Span
    gpu_id: int
    gpu_clock_before_mhz: int
    gpu_clock_mhz: int
    received_ns: int
    sent_ns: int
    output_sizes: tuple[int, ...] = ()


class ClearCacheResult(SessionMessage, frozen=True):
    received_ns: int
    sent_ns: int


class WorkerStateResult(SessionMessage, frozen=True):
    gpus: tuple[GpuInfo, ...]
    models: tuple[tuple[int, str], ...]
    received_ns: int
    sent_ns: int


Result = (
    ErrorResult
    | LoadModelResult
    | UnloadModelResult
    | LoadWeightsResult
    | EvictWeightsResult
    | InferResult
    | ClearCacheResult
    | WorkerStateResult
)
WorkerToController = WorkerWelcome | WorkerRefused | Heartbeat | Result
