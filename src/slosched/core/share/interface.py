"""What goes between the brain of a sharing experiment and the lane that runs its requests.

A lane is a serving lane of graphs (daemon/backends/graphs), an eager model (daemon/backends/eager) or one in
virtual time (share/virtual.py). Times are of the process's monotonic clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from slosched.share_spec import Interruption


class Start(msgspec.Struct, frozen=True, gc=False):
    """Start request `number` of `job`, or arm it where something runs. A higher `priority` goes first.

    When it has ended, a preemptive lane waits up to `linger_ns` before it starts anything `patient`, or resumes
    what was interrupted.
    """

    job: int
    number: int
    priority: int = 0
    due_ns: int = 0
    linger_ns: int = 0
    patient: bool = False


class Withdraw(msgspec.Struct, frozen=True, gc=False):
    """Take a request back from the lane, unless it has begun."""

    job: int
    number: int


class Ended(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A request ended. `reason` is not empty if it failed; `fatal`: its job can run no further request."""

    job: int
    number: int
    started_ns: int
    ended_ns: int
    device_ns: int = 0
    paused_ns: int = 0
    pauses: tuple[Interruption, ...] = ()
    reason: str = ""
    fatal: bool = False
    out_of_memory: bool = False
    differs: bool = False  # the answer is not, byte for byte, that of the job's first request
    beside_lower: bool = False  # a lower job did not stop at the gate in time


class Lane(Protocol):
    """Runs requests of one job or of several. Errors are reported through Ended, never raised."""

    @property
    def takes(self) -> int:
        """Requests it holds at a time: 1, or 2 if one may be armed behind the one that runs.

        Those that were interrupted count too: a preemptive lane takes two more than it has jobs, or a job of
        a third level waits until the second one has ended.
        """

    @property
    def preemptive(self) -> bool:
        """True if armed work of a higher priority interrupts what runs."""

    def start(self, start: Start, *, now_ns: int) -> None:
        """Begin or arm a request. An eager model runs it to its end before it returns."""

    def withdraw(self, withdraw: Withdraw) -> bool:
        """True if the request had not begun: it will not run."""

    def poll(self, *, now_ns: int) -> Sequence[Ended]:
        """What ended since the last call, in order."""

    def next_event_ns(self) -> int | None:
        """When `poll` will have something. None: nothing runs. A real lane answers 0 while something runs."""

    def pass_time(self, until_ns: int | None) -> bool:
        """Use the time until `until_ns` without sleeping (spin, 0.4 ms at most). False: the loop may sleep."""
