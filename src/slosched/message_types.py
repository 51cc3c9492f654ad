"""What messages consist of: bounded values, structs that stand in more than one message, and their bases."""

from __future__ import annotations

from typing import Annotated

import msgspec

from slosched.signature import Tensors

# A value from outside is bounded where it is decoded, before any code computes with it or shows it.
#: A number, or a time in ns: within 146 years.
Number = Annotated[int, msgspec.Meta(ge=-(2**62), le=2**62)]
#: A name of a model, a dtype, a host, a device.
Name = Annotated[str, msgspec.Meta(max_length=256)]
#: A human-readable text. A sender cuts its texts at MAX_TEXT characters; a receiver takes twice that.
MAX_TEXT = 4000
Text = Annotated[str, msgspec.Meta(max_length=2 * MAX_TEXT)]
Shape = Annotated[tuple[Number, ...], msgspec.Meta(max_length=16)]
#: One number for each request of a batch, or for each batch class.
PerRequest = Annotated[tuple[Number, ...], msgspec.Meta(max_length=1024)]
Labels = Annotated[tuple[Name, ...], msgspec.Meta(max_length=64)]
Names = Annotated[tuple[Name, ...], msgspec.Meta(max_length=10_000)]


class FunctionInfo(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """What a function's registration says, as far as a controller decides by it.

    A call that names no SLO has `slo_ns` (0: the controller's default). One that ran for longer than
    `limit_ns`, its suspensions left out, is ended. `size_classes` is the number of exec tables that it has. An
    `idempotent` call may run again after its process ended. Arguments and results have at most
    `max_payload_bytes`. With a `prepare_ns` above 0, each call has a *host part*, which runs before it asks for
    the lane; it is forecast so until some have been measured.
    """

    gpu: bool = False  # it runs on a GPU's exec lane, and not in a slot of the host
    slo_ns: Number = 0
    limit_ns: Number = 0
    max_payload_bytes: Number = 0
    size_classes: Number = 1
    idempotent: bool = False
    prepare_ns: Number = 0


class ModelInfo(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """One model instance, as the controller shows it.

    `b1_ns` is the unit of SLO factors: the fastest GPU's profiled batch-1 exec time (of the longest length
    class), frozen when the model is loaded. Shapes are those of one request, without the batch dimension.
    `inputs` and `outputs` are the signature; `input_*` and `output_*` repeat its first tensors, at the greatest
    length. `lengths` are the length classes, ascending; empty if no dimension varies.
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
    random_weights: bool
    gpus_resident: int
    clients: int
    labels: tuple[str, ...]
    inputs: Tensors = ()
    outputs: Tensors = ()
    lengths: tuple[int, ...] = ()
    function: FunctionInfo | None = None  # None: it is a model


class StageReply(msgspec.Struct, frozen=True, array_like=True):
    """One stage of a cascade's request. Times in ns after the request's arrival; -1 where there is none.

    `score` and `threshold` are the judge's (-1: none), `verdict` is a codes.Verdict. The stage ran on the GPU
    `gpu_id` of the worker `worker_id`; one that waited in vain has an `exec_ns` of 0, and -1 for both.
    """

    model: str
    queued_ns: int
    start_ns: int
    exec_ns: int
    end_ns: int
    batch_size: int
    score: float
    threshold: float
    verdict: int
    worker_id: int = -1
    gpu_id: int = -1


class LengthClass(msgspec.Struct, frozen=True, array_like=True):
    """The batch sizes of one length class, with the times that LoadModelResult has of the longest."""

    length: Number
    batch_sizes: PerRequest
    exec_ns: PerRequest
    boundaries_ns: PerRequest = ()


class GpuInfo(msgspec.Struct, frozen=True, array_like=True):
    """A GPU of a worker, or the slots of its host, with the weights that it holds."""

    gpu_id: Number
    name: Name
    pages: Number
    page_bytes: Number
    resident: Annotated[tuple[Number, ...], msgspec.Meta(max_length=100_000)] = ()  # model ids
    slots: Number = 1  # execs at a time
    host: bool = False  # not a GPU: the host's slots, for calls of functions


class GpuStats(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """The driver's last report about a GPU. -1: the card does not report this value."""

    gpu_id: Number = 0
    name: Name = ""
    uuid: Name = ""
    driver: Name = ""
    sm_percent: Number = -1  # of the last second or less: kernels ran
    memory_percent: Number = -1  # likewise: the memory was read or written
    memory_used_bytes: Number = -1
    memory_total_bytes: Number = -1
    power_mw: Number = -1
    energy_mj: Number = -1  # since the driver was loaded
    temperature_c: Number = -1
    sm_clock_mhz: Number = -1
    memory_clock_mhz: Number = -1
    throttle_reasons: Number = -1  # a bit mask of NVML's: why the clocks are below their maximum


class Span(msgspec.Struct, frozen=True, array_like=True):
    """When something ran. `duration_ns` is the device's own measure, not `end_ns - begin_ns`."""

    begin_ns: Number
    end_ns: Number
    duration_ns: Number


NO_SPAN = Span(0, 0, 0)


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Base of everything on the wire."""


class SessionMessage(Message, frozen=True):
    """Base of actions and results. `session` is what the worker's Welcome gave; another's are dropped."""

    session: Number
    action_id: Number


class TimedAction(SessionMessage, frozen=True, kw_only=True):
    """Base of actions that begin neither before `earliest_ns` nor after `latest_ns`."""

    earliest_ns: Number
    latest_ns: Number


class ActionResult(SessionMessage, frozen=True, kw_only=True):
    """Base of results: when the action was received and when this result was sent."""

    received_ns: Number
    sent_ns: Number
