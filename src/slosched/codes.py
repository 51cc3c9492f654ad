"""Action types and status codes, as numbers on the wire and in the telemetry.

The numbers are Clockwork's (worker_api.h and the controller's client-facing statuses), so that the
published plotters read our files unchanged.
"""

from __future__ import annotations

from enum import IntEnum


class ActionType(IntEnum):
    """What a controller can ask of a worker."""

    LOAD_MODEL = 0
    LOAD_WEIGHTS = 1
    INFER = 2
    EVICT_WEIGHTS = 3
    CLEAR_CACHE = 4
    GET_WORKER_STATE = 5
    UNLOAD_MODEL = 6  # ours: Clockwork never gives a model back
    CALL = 7  # ours: a call of a function


class Verdict(IntEnum):
    """How a stage of a cascade ended for one request: what was decided, and whether by the judge's score."""

    NONE = 0
    ACCEPTED = 1  # the score is at or above the threshold: the light answer
    DEFERRED = 2  # below it: the heavy program is next
    FORCED = 3  # below it, but the heavy program could not be in time: the light answer
    INSTEAD = (
        4  # it was deferred, and gets the light answer because the heavy program no longer fits
    )
    HEAVY = 5  # the heavy program's answer
    BLIND_LIGHT = 6  # a policy that asks no judge chose the light program
    BLIND_HEAVY = 7  # the same, the heavy one
    #: It was deferred, and gets the light answer: all that went to the heavy program before it scored lower.
    OUTRANKED = 8
    #: It was deferred, and gets no answer: it was refused or dropped, it failed, or its client took it back.
    UNANSWERED = 9


class Code(IntEnum):
    """The outcome of an action, or of a request."""

    OK = 0
    CANCELLED = 1  # action cancelled; request: its worker was lost, or its client cancelled it
    RUNTIME_ERROR = 2
    SHUTTING_DOWN = 3
    # What a client sees of the controller's own decisions
    TIMED_OUT = 4  # waited in the queue until its deadline could not be met any more
    INITIALIZING = 5
    INVALID_REQUEST = 6
    SKIPPED = 7  # given up in favour of a better batch
    COULD_NOT_START_IN_TIME = 8  # refused at arrival: no plan could meet the deadline
    # Worker codes
    UNKNOWN_MODEL = 10
    LOAD_MODEL_TOO_LATE = 11
    INVALID_ACTION = 12
    INVALID_GPU = 13
    WEIGHTS_NOT_PRESENT = 20
    WEIGHTS_ALREADY_LOADED = 21
    WEIGHTS_IN_USE = 22
    WEIGHTS_CHANGED = 23
    INVALID_INPUT = 30
    INVALID_BATCH_SIZE = 31
    INVALID_MODEL_ID = 40
    INVALID_MODEL_PATH = 41
    NETWORK_SEND_TOO_LATE = 45
    LOAD_WEIGHTS_TOO_EARLY = 50
    LOAD_WEIGHTS_TOO_LATE = 51
    LOAD_WEIGHTS_UNKNOWN_MODEL = 52
    LOAD_WEIGHTS_INSUFFICIENT_CACHE = 53
    LOAD_WEIGHTS_CONCURRENT_MODIFICATION = 54
    EVICT_WEIGHTS_TOO_EARLY = 60
    EVICT_WEIGHTS_TOO_LATE = 61
    EVICT_WEIGHTS_UNKNOWN_MODEL = 62
    EVICT_WEIGHTS_NOT_IN_CACHE = 63
    COPY_INPUT_TOO_EARLY = 70
    COPY_INPUT_TOO_LATE = 71
    COPY_INPUT_UNKNOWN_MODEL = 72
    COPY_INPUT_INVALID_BATCH_SIZE = 73
    COPY_INPUT_HOST_ALLOC = 74
    COPY_INPUT_INVALID_INPUT = 75
    COPY_INPUT_IO_POOL_EXHAUSTED = 76
    COPY_INPUT_BAD_SIZES = 77
    COPY_INPUT_BAD_DECOMPRESS = 78
    EXEC_TOO_EARLY = 80
    EXEC_TOO_LATE = 81
    EXEC_WEIGHTS_MISSING = 82
    EXEC_WORKSPACE_EXHAUSTED = 83
    EXEC_CONCURRENT_WEIGHTS_MODIFICATION = 84
    COPY_OUTPUT_TOO_EARLY = 90
    COPY_OUTPUT_TOO_LATE = 91
    COPY_OUTPUT_HOST_ALLOC = 92
    # Ours
    PROCESS_ENDED = 100  # the process that ran the model ended (a crash, an exit), or was ended
    MODEL_PROCESS_ENDED = 101  # likewise, and it was the model's own: its worker goes on
    LIMIT_REACHED = 102  # one of the controller's, which the reason names (scheduler/limits.py)
    CONTROLLER_OVERLOADED = 103  # requests come faster than its core takes them (scheduler/door.py)
    CALL_RAISED = 104  # the function raised; the reason has its traceback
    CALL_OVER_LIMIT = 105  # the call was ended at a limit of its function, which the reason names
    TOO_MANY_CALLS = 106  # its worker has as many unfinished calls as it may have


#: The process that ran the action ended.
ENDED = (Code.PROCESS_ENDED, Code.MODEL_PROCESS_ENDED)

#: The controller's own decisions not to serve a request that was valid; other codes tell of what failed.
REJECTIONS = (
    Code.SHUTTING_DOWN,
    Code.TIMED_OUT,
    Code.SKIPPED,
    Code.COULD_NOT_START_IN_TIME,
    Code.CONTROLLER_OVERLOADED,
)


def code_name(code: int) -> str:
    """Return the code in words ("exec too late"), or "code N" for an unknown number."""
    try:
        return Code(code).name.lower().replace("_", " ")
    except ValueError:
        return f"code {code}"
