"""What goes into the worker's brain and what comes out of it, and the device it drives.

The brain decides what each GPU does with the actions it holds; a `Device` does it. Times here are
on the **worker's** clock: the brain converts what comes from and goes to the controller.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from itertools import pairwise
from typing import Protocol

import msgspec

from slosched.codes import Code
from slosched.config import ModelProfile
from slosched.messages import ControllerToWorker, FunctionInfo, Span, WorkerToController
from slosched.units import format_duration


class _Fact(msgspec.Struct, frozen=True, gc=False):
    """Base of what is made per action: cheaper than a dataclass, and no work for the collector."""


class OpKind(IntEnum):
    """What a device does."""

    LOAD_WEIGHTS = 0
    COPY_INPUT = 1
    EXEC = 2
    COPY_OUTPUT = 3
    CALL = 4  # a call of a function begins
    RESUME = 5  # the call of `action_id` goes on, with what it awaited
    PREPARE = 6  # the host part of a call begins, which goes on with a RESUME


class Op(_Fact, frozen=True, gc=False):
    """One piece of device work. `action_id` names the batch's buffers from COPY_INPUT to COPY_OUTPUT.

    Here and in the effects, `action_id` is the key that `WorkerBrain.handle` returned for the action:
    unique as long as the worker lives, while two controllers may use the same number on the wire.
    """

    op_id: int
    kind: OpKind
    gpu_id: int
    model_id: int
    action_id: int
    batch_size: int = 0  # the class that runs; `request_count` of it are real
    request_count: int = 0
    input_sizes: tuple[int, ...] = ()
    model_name: str = ""  # what the backend knows the model by; its copies share one
    earliest_ns: int = 0  # the window, for an EXEC on a device that arms
    latest_ns: int = 0
    length: int = 0  # the length class that runs; 0: the model has none
    lengths: tuple[int, ...] = ()  # of each request, where there are length classes
    priority: int = 0  # of an EXEC: in a preemptive lane a higher one goes first at a boundary
    linger_ns: int = 0  # of an EXEC in a lane with a LingeringOrder, as the next one
    patient: bool = False
    call_id: int = 0  # of a CALL, as the next ones: the controller's number of the request
    deadline_ns: int = 0  # on the worker's clock
    size_class: int = 0


# ------------------------------------------------------------------------------------- events


class FromController(_Fact, frozen=True, gc=False):
    """A message of the controller `peer`; `input_sizes` are the bytes of the frames behind it."""

    peer: bytes
    message: ControllerToWorker
    input_sizes: tuple[int, ...] = ()


class OpDone(_Fact, frozen=True, gc=False):
    """The device finished `op_id`. `code` other than 0 says that it failed, `reason` why.

    `span` is on the worker's clock, with the duration that the device measured; clocks are the GPU's, in MHz.
    `output_sizes` comes with COPY_OUTPUT: bytes for each request (empty: no outputs travel). So do the `scores`
    of a model with a judge: one for each request, NaN for one without an input (empty: there is no judge).

    An EXEC that ran in several segments reports each in `segments`, and its `span` reaches from the first begin
    to the last end with the sum of their durations (`joined`). `pause_ns` is the time between the segments,
    which other work had, so it is part of no estimate.
    """

    op_id: int
    span: Span
    code: int = 0
    reason: str = ""
    clock_before_mhz: int = 0
    clock_mhz: int = 0
    output_sizes: tuple[int, ...] = ()
    pause_ns: int = 0
    segments: tuple[Span, ...] = ()  # empty: `span` is the only one
    scores: tuple[float, ...] = ()


def joined(segments: Sequence[Span]) -> tuple[Span, int]:
    """The span of a run that was measured in `segments` (one or more, in order), and its pause in ns."""
    begin_ns, end_ns = segments[0].begin_ns, segments[-1].end_ns
    pause_ns = sum(after.begin_ns - before.end_ns for before, after in pairwise(segments))
    return Span(begin_ns, end_ns, sum(each.duration_ns for each in segments)), pause_ns


def op_failed(op: Op, code: int, reason: str, now_ns: int) -> OpDone:
    """The end of an `op` that failed at `now_ns`, and that was not measured."""
    return OpDone(op.op_id, Span(now_ns, now_ns, 0), code, reason)


def too_late(op: Op, now_ns: int) -> OpDone:
    """An armed EXEC, whose window is over, is given up by its device."""
    return op_failed(op, Code.EXEC_TOO_LATE, late_reason(now_ns - op.latest_ns), now_ns)


def late_reason(late_ns: int) -> str:
    return f"it could only start {format_duration(late_ns)} after latest"


class WeightsLost(_Fact, frozen=True, gc=False):
    """The device no longer has the weights of these instances: the process that held them ended."""

    gpu_id: int
    model_ids: tuple[int, ...]


class ModelPrepared(_Fact, frozen=True, gc=False):
    """The answer to PrepareModel: the model is in host memory and was profiled, or it failed."""

    action_id: int
    profile: ModelProfile | None
    span: Span
    code: int = 0
    reason: str = ""
    random_weights: bool = True
    labels: tuple[str, ...] = ()
    #: By length class (0: it has none) and batch size, the longest time until a run can be interrupted; empty:
    #: none can be.
    boundaries_ns: dict[int, dict[int, int]] = {}
    urgent_ns: int = 0  # a run of a class that takes no longer may interrupt others; 0: none may
    function: FunctionInfo | None = None  # None: it is a model
    digest: str = ""  # of the files of a repository's version


class CallAwaits(_Fact, frozen=True, gc=False):
    """The call of the CALL or RESUME `op_id` awaits all of `children`: the op is over, and its slot is free.

    `span` is that of this op. The call goes on with a RESUME.
    """

    op_id: int
    span: Span
    children: tuple[int, ...]


class CallChained(_Fact, frozen=True, gc=False):
    """A running call asks for its child number `child`, with arguments of `size` bytes (CallPort.payload).

    The other fields are those of ChildRequest; the call had run for `ran_ns` by then, all its ops together.
    """

    action_id: int
    child: int
    function: str
    size: int
    slo_ns: int = 0
    size_class: int = 0
    near: str = ""
    near_child: int = -1
    ran_ns: int = 0


class ChildTakenBack(_Fact, frozen=True, gc=False):
    """A running call takes a child back, whose answer still comes."""

    action_id: int
    child: int


class CallLost(_Fact, frozen=True, gc=False):
    """The process of a suspended call has ended, or was ended: it has no op that could report that."""

    action_id: int
    code: int
    reason: str


#: What a device reports. A call that ends is an OpDone, with the size of its result as `output_sizes`.
DeviceEvent = OpDone | WeightsLost | CallAwaits | CallChained | ChildTakenBack | CallLost

Event = FromController | DeviceEvent | ModelPrepared

# ------------------------------------------------------------------------------------ effects


class ToController(_Fact, frozen=True, gc=False):
    """Send `message`. A result with output sizes is followed by the outputs of `output_of`, a ChildRequest by
    the arguments of that child of `output_of`.
    """

    peer: bytes
    message: WorkerToController
    output_of: int | None = None  # action id


class Launch(_Fact, frozen=True, gc=False):
    """Give `op` to its GPU's device now."""

    op: Op


class PrepareModel(_Fact, frozen=True, gc=False):
    """Make `copies` instances of the model, outside the exact-time loop; report ModelPrepared."""

    action_id: int
    name: str
    model_id: int
    copies: int
    max_batch: int
    max_exec_ns: int


class ReleaseModel(_Fact, frozen=True, gc=False):
    """The instance is gone. `last`: no other of its name is left, so host memory can be freed."""

    model_id: int
    name: str = ""
    last: bool = False


class EvictPages(_Fact, frozen=True, gc=False):
    """The instance's weights on the GPU may be overwritten from now on."""

    gpu_id: int
    model_id: int


class Withdraw(_Fact, frozen=True, gc=False):
    """Take an armed EXEC back from its device, unless it has begun."""

    op_id: int
    gpu_id: int


class DropInputs(_Fact, frozen=True, gc=False):
    """The action ended without running: its input frames can go."""

    action_id: int


class EndCall(_Fact, frozen=True, gc=False):
    """End the process of the call `action_id`, running or suspended; an op of it that runs is reported."""

    action_id: int
    reason: str


class Note(_Fact, frozen=True, gc=False):
    level: str
    text: str


Effect = (
    ToController
    | Launch
    | Withdraw
    | PrepareModel
    | ReleaseModel
    | EvictPages
    | DropInputs
    | EndCall
    | Note
)


class Device(Protocol):
    """One GPU, real or emulated. Errors are reported through OpDone, never raised.

    The emulated device (core/worker/emulated.py) is pure, so that live emulation and the simulator
    share it; torch's and cupy's live under daemon/backends/.
    """

    @property
    def steady(self) -> bool:
        """True if `next_event_ns` changes with `launch` and `poll` alone, and not by itself."""

    @property
    def free_copies(self) -> bool:
        """True if it generates inputs and keeps outputs in no time and without failing.

        The brain then asks for no copies of an Infer that brings no inputs.
        """

    @property
    def arm_ahead_ns(self) -> int:
        """How long before its `earliest` an EXEC is launched. 0: at `earliest`, when nothing runs.

        A device that arms gets one EXEC more than it runs at a time. It starts each by itself, in the order
        of lane_order.py: at `earliest`, or when the one before it has ended, whichever is later. One that
        could only start after `latest` is reported with code EXEC_TOO_LATE.
        """

    def launch(self, op: Op, *, now_ns: int) -> OpDone | None:
        """Start `op`. One that took no time may be reported at once; None: `poll` will report it.

        A device without streams may run it to its end before returning.
        """

    def withdraw(self, op_id: int) -> OpDone | None:
        """Give an armed EXEC up (code CANCELLED). None: it has begun, or is not here."""

    def poll(self, *, now_ns: int) -> Sequence[DeviceEvent]:
        """Everything that has finished by now, in the order in which it finished."""

    def next_event_ns(self) -> int | None:
        """When `poll` will next have something. None: nothing runs. A real GPU cannot know, and
        answers "now" while something runs, which makes the loop spin."""
