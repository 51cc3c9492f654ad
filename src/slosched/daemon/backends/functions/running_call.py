"""One unfinished call: what it takes, what is on its way to its process, and whether it is over a limit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from slosched.clock import Clock
from slosched.core.worker.interface import Op
from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.broods import packets
from slosched.daemon.backends.functions import wire
from slosched.daemon.backends.functions.guard import descendants, own_bytes, shared_bytes
from slosched.daemon.backends.functions.loaded import CallChild, LoadedFunction
from slosched.daemon.backends.functions.parcels import Parcel
from slosched.messages import Span
from slosched.units import NS_PER_MS, NS_PER_S, exact_bytes, format_duration

#: A call may have started that many processes that still live.
MOST_PROCESSES = 64
#: How often it is looked at what calls have started, running and suspended.
_LOOK_NS = 50 * NS_PER_MS
_LOOK_SUSPENDED_NS = NS_PER_S
#: The same for calls that have started some: they may start more at any time.
_LOOK_OFTEN_NS = 10 * NS_PER_MS
#: What the loop does between two looks at one call takes at least this number of times as long as a look.
_LOOK_SHARE = 50
NEVER_NS = 2**63 - 1
#: How often it is looked at what shared memory a call holds.
_LOOK_SHARED_NS = 200 * NS_PER_MS

#: Makes a message of its payload, once that is written.
MakeMessage = Callable[[Parcel], wire.ToCall]


@dataclass(slots=True, eq=False)
class RunningCall:
    """`op` is the op that runs; None: the call is suspended. `child` None: it waits for a process."""

    key: int
    function: LoadedFunction
    op: Op | None
    begin_ns: int  # of the op
    frames: Sequence[Frame] = ()  # its arguments, until it begins
    parcel: Parcel | None = None  # the same, if they are in one already
    child: CallChild | None = None
    begun: bool = False  # its process has it, or is about to
    ran_ns: int = 0  # in ops that are over
    held_bytes: int = 0  # results of its children that it has not taken yet
    look_ns: int = NEVER_NS  # when it is looked at next
    shared_bytes: int = 0  # when that was looked at last
    _shared_ns: int = 0  # when that is looked at next
    _outgoing: deque[tuple[MakeMessage, Parcel]] = field(default_factory=deque)

    # ------------------------------------------------------------------------------- times

    def begins(self, op: Op, now_ns: int) -> None:
        """It has a slot from now on, and a process."""
        self.op, self.begin_ns, self.held_bytes = op, now_ns, 0
        self.look_ns = now_ns + _LOOK_NS

    def suspended(self, now_ns: int, ran_ns: int) -> None:
        self.op = None
        self.ran_ns += ran_ns
        self.look_ns = now_ns + _LOOK_SUSPENDED_NS

    def span(self, end_ns: int, now_ns: int) -> Span:
        """From the launch on, since the slot was taken from then on. A process may say what it likes."""
        end_ns = min(max(end_ns, self.begin_ns), now_ns)
        return Span(self.begin_ns, end_ns, end_ns - self.begin_ns)

    @property
    def due_ns(self) -> int:
        """When `over_limit` has something to look at."""
        return min(self._time_out_ns, self.look_ns)

    @property
    def _time_out_ns(self) -> int:
        limit_ns = self.function.listed.info.limit_ns
        if self.op is None or self.child is None or not limit_ns:
            return NEVER_NS
        return self.begin_ns + limit_ns - self.ran_ns

    # ---------------------------------------------------------------------------- messages

    def put(self, message: MakeMessage, parcel: Parcel) -> None:
        """Send a message to its process, behind those before it, when its payload is written."""
        self._outgoing.append((message, parcel))
        self._send()

    @property
    def writing(self) -> bool:
        """True while `write` has something to do."""
        return bool(self._outgoing)

    def write(self) -> None:
        """Write a piece of the payload that is due. Raises OSError without memory for it."""
        if self._outgoing:
            self._outgoing[0][1].write()
            self._send()

    def _send(self) -> None:
        child = self.child
        assert child is not None
        while self._outgoing and self._outgoing[0][1].written:
            message, parcel = self._outgoing.popleft()
            child.send(packets.encode(message(parcel)), parcel.fds)
            parcel.close()

    def stop_writing(self) -> None:
        if self.parcel is not None:
            self.parcel.close()
            self.parcel = None
        while self._outgoing:
            self._outgoing.popleft()[1].close()

    # ------------------------------------------------------------------------------ limits

    def over_limit(self, now_ns: int, clock: Clock) -> str:
        """The limit that it is over, in words; empty if there is none."""
        child = self.child
        if child is None:
            return ""
        if now_ns >= self._time_out_ns:
            limit_ns = self.function.listed.info.limit_ns
            return f"the time of a call, {format_duration(limit_ns)} (limit of its function)"
        if now_ns < self.look_ns:
            return ""
        pids = descendants(child.pid, MOST_PROCESSES + 1)
        limit_bytes = self.function.memory_bytes
        if now_ns >= self._shared_ns:
            self._look_at_shared(now_ns, clock, (child.pid, *pids))
            if 0 < limit_bytes < self.shared_bytes:
                limit = exact_bytes(limit_bytes)
                return (
                    f"the shared memory of a call, {limit}: memfd, /dev/shm and results of children"
                )
        if not pids:  # its process alone, which RLIMIT_DATA bounds
            self.look_ns = now_ns + (_LOOK_NS if self.op is not None else _LOOK_SUSPENDED_NS)
            return ""
        took_ns = clock() - now_ns  # some 40 us for each process
        self.look_ns = now_ns + max(_LOOK_OFTEN_NS, _LOOK_SHARE * took_ns)
        if len(pids) > MOST_PROCESSES:
            return f"the processes that a call may have started, {MOST_PROCESSES}"
        taken = sum(max(0, own_bytes(pid) - child.own_bytes) for pid in (child.pid, *pids))
        if limit_bytes and taken > limit_bytes:
            limit = exact_bytes(limit_bytes)
            return f"the memory of a call, {limit}, with the processes it started"
        return ""

    def _look_at_shared(self, now_ns: int, clock: Clock, pids: Sequence[int]) -> None:
        """What its processes hold; the arrays of one payload count in each that holds them."""
        began_ns = clock()
        base_bytes = self.function.shared_bytes
        shared = sum(max(0, shared_bytes(pid) - base_bytes) for pid in pids)
        self.shared_bytes = self.held_bytes + shared
        self._shared_ns = now_ns + max(_LOOK_SHARED_NS, _LOOK_SHARE * (clock() - began_ns))
