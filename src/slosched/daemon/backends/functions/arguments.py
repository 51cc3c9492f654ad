"""Arguments of calls that have not begun: large ones are written to shared memory while their calls wait.

Else that would be done once a call has its slot, and the slot would wait for it: 1 MB takes some 0.3 ms.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.daemon.backends.base import Frame
from slosched.daemon.backends.functions.parcels import Parcel
from slosched.daemon.backends.functions.wire import INLINE_BYTES

#: Calls whose arguments are written before they begin, since each takes a descriptor.
_EARLY_AT_MOST = 64


class Arguments:
    """By the keys of the calls."""

    def __init__(self) -> None:
        self._frames: dict[int, Sequence[Frame]] = {}
        self._early: dict[int, Parcel] = {}
        self._unwritten: dict[int, Parcel] = {}  # of these, in order

    @property
    def writing(self) -> bool:
        """True while `write` has something to do."""
        return bool(self._unwritten)

    def keep(self, key: int, frames: Sequence[Frame]) -> None:
        self._frames[key] = frames
        if sum(map(len, frames)) > INLINE_BYTES and len(self._early) < _EARLY_AT_MOST:
            try:
                self._early[key] = self._unwritten[key] = Parcel(frames)
            except OSError:
                return  # its call says so, if there is no memory then either

    def write(self) -> None:
        """Write a piece of what is to be written."""
        for key, parcel in self._unwritten.items():
            try:
                parcel.write()
            except OSError:
                self._give_up(key)
            else:
                if parcel.written:
                    del self._unwritten[key]
                    self._frames[key] = ()  # once is enough
            return

    def take(self, key: int) -> tuple[Sequence[Frame], Parcel | None]:
        """The arguments, and the parcel that they are in or are being written to; it is the caller's now."""
        self._unwritten.pop(key, None)
        return self._frames.pop(key, ()), self._early.pop(key, None)

    def drop(self, key: int) -> None:
        self._frames.pop(key, None)
        self._give_up(key)

    def _give_up(self, key: int) -> None:
        self._unwritten.pop(key, None)
        parcel = self._early.pop(key, None)
        if parcel is not None:
            parcel.close()

    def close(self) -> None:
        for key in list(self._early):
            self._give_up(key)
        self._frames.clear()
