"""What a worker's brain keeps about its unfinished calls of functions.

    queued --a slot is free--> running --it returns, raises or dies--> ended
       |                         |  ^
       v     it awaits children  v  |  a slot is free
    preparing                suspended --all of them are answered--> ready
       +--its host part is over-----------------------------------------^

A slot is the right to run: a suspended call has none, and keeps its process. One that prepares has none yet. A
call that has begun is unfinished until it ends, in whatever state, and a worker has a limit of those.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto
from itertools import islice

#: Unfinished calls that a worker has at most, unless its operator says otherwise.
MOST_CALLS = 256


class CallPhase(Enum):
    QUEUED = auto()  # it has not begun
    PREPARING = auto()  # its host part runs
    RUNNING = auto()
    SUSPENDED = auto()
    READY = auto()  # it waits for a slot to go on


@dataclass(slots=True, eq=False)
class CallState:
    """One call. `action_id` is the controller's number of its action; times are on the worker's clock."""

    key: int
    action_id: int
    phase: CallPhase = CallPhase.QUEUED
    op_id: int = -1  # what the device was given last
    asked: int = 0  # children that it asked for, in all
    open: set[int] = field(default_factory=set)  # those without an answer
    awaited: set[int] = field(default_factory=set)  # of these, what it is suspended for
    prepared: bool = False  # it has its host part behind it
    first_ns: int = -1  # its first begin in a slot
    ran_ns: int = 0
    #: Its process is being ended, and the call is answered with this code and reason.
    ending: tuple[int, str] | None = None


class Calls:
    """The unfinished calls of one worker, at most `most` of them begun."""

    def __init__(self, most: int = MOST_CALLS) -> None:
        self.most = most
        self._by_action: dict[int, CallState] = {}
        #: By key, in the order in which they began.
        self.begun: dict[int, CallState] = {}

    @property
    def full(self) -> bool:
        """True if no other call may begin."""
        return len(self.begun) >= self.most

    @property
    def suspended(self) -> int:
        """Calls that have begun and hold no slot."""
        return sum(state.phase is not CallPhase.RUNNING for state in self.begun.values())

    def find(self, action_id: int) -> CallState | None:
        """The call of the controller's action, unless it has ended."""
        return self._by_action.get(action_id)

    def numbers(self, most: int) -> tuple[int, ...]:
        """The controller's numbers of their actions, the first `most` of them."""
        return tuple(islice(self._by_action, most))

    def add(self, key: int, action_id: int) -> CallState:
        state = self._by_action[action_id] = CallState(key, action_id)
        return state

    def begin(self, state: CallState, phase: CallPhase) -> None:
        state.phase = phase
        self.begun[state.key] = state

    def end(self, state: CallState) -> None:
        del self._by_action[state.action_id]
        self.begun.pop(state.key, None)
