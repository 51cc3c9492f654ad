"""What a worker was doing when its process ended: a page of memory that its supervisor can still read.

A process that ends with a segmentation fault says nothing any more. So the child writes beforehand, at each
step that runs foreign code, whose code it is; one item of a shared page, well under a microsecond.

    slot 0  STARTING, READY, or ENDED (in good order: it was told to end)
    slot 1  the model that is being prepared: built, captured, measured
    slot 2  the model whose forward is being launched by plain execution, in this process
    slot 3  the model whose exec runs on the device
    then    `MOST_NAMES` names of at most `NAME_BYTES` - 1 bytes

A slot holds a name's number, from 1; 0: no model is at work there.

The owner of a backend calls `index` once for each model when it is adopted, keeps the number, and then

    blackbox.preparing(name)   before a model's code or kernels run in preparation; preparing("") after it
    blackbox.launching(index)  before a forward runs as Python in this process; launching(0) after it
    blackbox.running(index)    when an exec was launched; the next one's call replaces it
    blackbox.idle()            when nothing runs on the device and nothing is launched

A device's fault is noticed late, so after one nothing may be written: the slots say what ran.
"""

from __future__ import annotations

import itertools
import mmap
import os
from dataclasses import dataclass

MOST_NAMES = 2048
NAME_BYTES = 256
#: The child finds the page by this variable: the number of the file descriptor that it inherited.
VARIABLE = "SLOSCHED_BLACKBOX_FD"

STARTING, READY, ENDED = 0, 1, 2
_STATE, _PREPARING, _LAUNCHING, _RUNNING = range(4)
_HEADER_BYTES = 64
_BYTES = _HEADER_BYTES + MOST_NAMES * NAME_BYTES


@dataclass(frozen=True, slots=True)
class AtWork:
    """What the page said: each a model's name, "" for none. `state` is STARTING, READY or ENDED."""

    state: int = STARTING
    preparing: str = ""
    launching: str = ""
    running: str = ""


class NoBlackbox:
    """The blackbox of a worker without a supervisor: it has no reader, so nothing is written."""

    def index(self, name: str) -> int:
        """The number of `name`, 0 if there is none: it cannot be blamed then."""
        return 0

    def preparing(self, name: str) -> None:
        """From now on `name` is being prepared; "": nothing is."""

    def launching(self, index: int) -> None:
        """From now on the model of that number runs in this process as plain code; 0: none does."""

    def running(self, index: int) -> None:
        """From now on the device runs the model of that number; 0: it runs none."""

    def idle(self) -> None:
        """Nothing is launched and the device runs nothing."""

    def state(self, state: int) -> None:
        """The process is STARTING, READY or ENDED."""


class Blackbox(NoBlackbox):
    """One page over the file `fd`, which stays the caller's. `create` makes one, `inherited` finds it.

    Its writer is one process; of its threads, one prepares and one launches.
    """

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._bytes = mmap.mmap(fd, _BYTES)
        self._slots = memoryview(self._bytes)[:_HEADER_BYTES].cast("I")
        self._numbers: dict[str, int] = {}  # of the names that this process wrote
        self._next = itertools.count(1)

    @classmethod
    def create(cls) -> Blackbox:
        """A new page, for one life of one child. Raises OSError."""
        fd = os.memfd_create("slosched-blackbox", os.MFD_CLOEXEC)
        os.ftruncate(fd, _BYTES)
        return cls(fd)

    @classmethod
    def inherited(cls) -> NoBlackbox:
        """The page that the supervisor gave this process; without one, one that keeps nothing.

        Processes that this one starts do not inherit it: their models are not its own.
        """
        given = os.environ.pop(VARIABLE, "")
        try:
            fd = int(given)
            box = cls(fd)
        except (ValueError, OSError):  # not given, or that of another process
            return NoBlackbox()
        os.set_inheritable(fd, False)
        return box

    def index(self, name: str) -> int:
        number = self._numbers.get(name)
        if number is None:
            encoded = name.encode(errors="replace")
            if len(encoded) >= NAME_BYTES or len(self._numbers) >= MOST_NAMES:
                return 0
            # Without a lock, which a thread that is stopped within its slice could hold: two threads may
            # give one name two numbers, and both are right.
            number = next(self._next)
            if number > MOST_NAMES:
                return 0
            at = _HEADER_BYTES + (number - 1) * NAME_BYTES
            self._bytes[at : at + len(encoded)] = encoded
            self._numbers[name] = number
        return number

    def preparing(self, name: str) -> None:
        self._slots[_PREPARING] = self.index(name) if name else 0

    def launching(self, index: int) -> None:
        self._slots[_LAUNCHING] = index

    def running(self, index: int) -> None:
        self._slots[_RUNNING] = index

    def idle(self) -> None:
        self._slots[_LAUNCHING] = self._slots[_RUNNING] = 0

    def state(self, state: int) -> None:
        self._slots[_STATE] = state

    def read(self) -> AtWork:
        """What was written last, whatever became of the writer: its memory may have been damaged."""
        slots = self._slots
        return AtWork(
            slots[_STATE],
            self._name(slots[_PREPARING]),
            self._name(slots[_LAUNCHING]),
            self._name(slots[_RUNNING]),
        )

    def _name(self, number: int) -> str:
        if not 0 < number <= MOST_NAMES:
            return ""
        at = _HEADER_BYTES + (number - 1) * NAME_BYTES
        return self._bytes[at : at + NAME_BYTES].partition(b"\0")[0].decode(errors="replace")

    def close(self) -> None:
        """Give back the page and the file. Idempotent."""
        if self.fd >= 0:
            self._slots.release()
            self._bytes.close()
            os.close(self.fd)
            self.fd = -1
