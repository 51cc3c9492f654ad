"""Which request of which job starts when, on one lane: the same class live and in virtual time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec

from slosched.core.share.interface import Ended, Start, Withdraw
from slosched.share_spec import Clients, Interruption, Policy, Request, Stop


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one job asks of the lane. Times are in ns.

    `arrivals`: times after the job's start for an open loop (workloads.job_arrivals.arrivals_of); it is read
    lazily and may be endless. `slo_ns` 0: the requests have no deadline. `count` 0: until the duration is
    over. `expected_ns`: how long a request runs; `boundary_ns`: the longest time between two boundaries.
    """

    job: int
    clients: Clients = Clients()
    arrivals: Iterable[int] = ()
    priority: int = 0
    slo_ns: int = 0
    count: int = 0
    start_after_ns: int = 0
    expected_ns: int = 0
    boundary_ns: int = 0


class Tally(msgspec.Struct, frozen=True, kw_only=True):
    """Where a job stands. `reason` is of its last failure, or why it is over; `left`: arrived, never started."""

    job: int
    over: bool
    ended: int
    failed: int
    left: int
    reason: str = ""
    fatal: bool = False
    out_of_memory: bool = False


class ShareBrain:
    """Gives one lane requests of one job or of several. Pure: it reads no clock.

    The shell: `begin`, then in a loop `ended` for all that `lane.poll` returns, and `schedule` until it
    returns nothing; a Start goes to `lane.start`, a Withdraw to `lane.withdraw`, whose answer goes to
    `withdrawn`. core/share/driving.py has this loop.
    """

    def __init__(
        self,
        loads: Sequence[Load],
        *,
        policy: Policy = Policy.FCFS,
        takes: int = 1,
        preemptive: bool = False,
        seed: int = 0,
        stop: Stop = Stop.FINISH,
        least_jobs: int = 0,
    ) -> None:
        raise NotImplementedError

    def begin(self, at_ns: int, until_ns: int) -> None:
        """Requests arrive from `at_ns` until `until_ns`. Called once."""
        raise NotImplementedError

    def end(self, now_ns: int) -> None:
        """No more requests start, also where `least_jobs` is not reached; what the lane holds ends."""
        raise NotImplementedError

    def end_job(self, job: int, reason: str) -> None:
        """No more requests of `job` start: its model cannot run. The other jobs go on."""
        raise NotImplementedError

    def ended(self, ended: Ended, *, now_ns: int) -> None:
        """A request that the lane held ended."""
        raise NotImplementedError

    def withdrawn(self, withdraw: Withdraw, taken_back: bool, *, now_ns: int) -> None:
        """The lane's answer to a Withdraw: True if the request had not begun. It is then queued again."""
        raise NotImplementedError

    def schedule(self, *, now_ns: int) -> list[Start | Withdraw]:
        """What the lane is to do now, in order; call again after carrying it out, until nothing is left."""
        raise NotImplementedError

    def next_wakeup_ns(self) -> int | None:
        """When `schedule` may have something without any end before. None: never."""
        raise NotImplementedError

    def rows(self) -> list[Request | Interruption]:
        """What ended since the last call, in the order of the ends; pauses stand before their request."""
        raise NotImplementedError

    def tally(self, job: int) -> Tally:
        """Where `job` stands."""
        raise NotImplementedError

    @property
    def done(self) -> bool:
        """True if every job is over and the lane holds nothing of them."""
        raise NotImplementedError
