"""The messages about calls of functions: the action, and what a call and its children tell one another.

A call is an action (Call) with one result (CallResult, or an ErrorResult). While it runs, it may ask for
children (ChildRequest): requests of their own, whose answers the controller sends to the worker of their parent
(ChildReply). A call that awaits children gives its slot away (CallSuspended) and takes one again when it goes
on (CallResumed).

A call with a host part, of a function for GPUs, runs that first, beside what has the lane (CallPrepared).
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from slosched.message_types import (
    NO_SPAN,
    ActionResult,
    Name,
    Number,
    PerRequest,
    SessionMessage,
    Span,
    Text,
    TimedAction,
)

#: Children of one call that have not ended: a call has at most this number of them.
MOST_CHILDREN = 10_000
#: A GPU has at most this number of calls in host parts, since each holds a process. Both sides plan by it.
HOST_PARTS = 2

ChildNumbers = Annotated[tuple[Number, ...], msgspec.Meta(max_length=MOST_CHILDREN)]

# --------------------------------------------------------------------------- controller -> worker


class Call(TimedAction, frozen=True, kw_only=True):
    """Run one call of the function `model_id`; its arguments are the one frame that follows.

    `call_id` is the controller's number of the request. `deadline_ns` is the call's, which its children
    inherit. `parent_id` is the call that made it (-1: a client did), `size_class` that of its arguments.
    """

    model_id: Number
    gpu_id: Number
    call_id: Number
    expected_duration_ns: Number
    deadline_ns: Number
    input_size: Number
    size_class: Number = 0
    parent_id: Number = -1


class CancelCall(SessionMessage, frozen=True):
    """End the call of the action `action_id` with code 1, also while it runs. One that has ended is fine."""


class ChildReply(SessionMessage, frozen=True, kw_only=True):
    """The one answer to the ChildRequest `child` of the call of `action_id`; with code 0 its result follows.

    The child ran on the worker `worker_id` (-1: it did not run).
    """

    child: Number
    code: Number
    reason: Text = ""
    output_size: Number = 0
    worker_id: Number = -1


# --------------------------------------------------------------------------- worker -> controller


class ChildRequest(SessionMessage, frozen=True, kw_only=True):
    """The call of `action_id` makes its child number `child` (0, 1, ...), whose arguments follow as a frame.

    `slo_ns` counts from its arrival (0: what is left of its parent's), and never ends after its parent's. It
    should run where the parent's child `near_child` ran (-1: none), or where the last call `near` the same key
    did. The parent had run for `ran_ns` by then, its suspensions left out: with this a recorded call can run
    again in the simulator.
    """

    child: Number
    function: Name
    input_size: Number
    slo_ns: Number = 0
    size_class: Number = 0
    near: Name = ""
    near_child: Number = -1
    ran_ns: Number = 0


class ChildCancel(SessionMessage, frozen=True):
    """The call of `action_id` takes its `child` back, which is answered with code 1 unless it has been."""

    child: Number


class CallPrepared(SessionMessage, frozen=True):
    """The host part of the call of `action_id` ran in `part`. It is behind what came before it to the lane."""

    part: Span = NO_SPAN


class CallSuspended(SessionMessage, frozen=True):
    """The call of `action_id` awaits all of `children`, and its slot is free. It has run for `ran_ns` so far.

    `part` is the span of what ran since it began or was last resumed.
    """

    ran_ns: Number
    part: Span = NO_SPAN
    children: ChildNumbers = ()


class CallResumed(SessionMessage, frozen=True):
    """The call of `action_id` runs again, in a slot."""


class CallResult(ActionResult, frozen=True, kw_only=True):
    """The call returned. `output_sizes` has the bytes of its result, which follows as a frame.

    `exec` reaches from its first begin to its end, with the time that it ran as duration; for the rest of it,
    it was suspended or waited for a slot. `children` is the number that it asked for.
    """

    gpu_id: Number
    exec: Span
    output_sizes: PerRequest = ()
    children: Number = 0
