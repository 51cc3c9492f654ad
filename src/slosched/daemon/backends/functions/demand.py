"""How many processes the calls of one function have wanted lately: its pool follows that, within bounds."""

from __future__ import annotations

from slosched.units import NS_PER_S

#: Processes that wait for calls of a function, beyond those that wait while it is not called.
MOST_MORE = 16
#: All functions together have this number at the most; where they would have more, each has one per slot.
_MOST_SPARES = 512


def spares_of(slots: int, *, restores: bool, others: int) -> int:
    """The processes that wait for calls of a function while it is not called, on a host with `slots`.

    A call may ask for children of its own function, and awaits them: it keeps its process, and they run in all
    slots. Where each call takes a new process (`restores`), twice as many children as slots find one.
    `others` is the number of functions on the host.
    """
    wanted = (2 if restores else 1) * slots + 1
    return wanted if wanted * others <= _MOST_SPARES else slots


class Demand:
    """The most of the last one to two seconds: of calls that had a process at once, or that took one."""

    def __init__(self, *, restores: bool) -> None:
        self._restores = restores
        self._second = 0
        self._most = self._before = 0

    def took(self, now_ns: int, in_use: int) -> None:
        """A call took a process; `in_use` have one now."""
        self._roll(now_ns)
        self._most = self._most + 1 if self._restores else max(self._most, in_use)

    def spares(self, now_ns: int, least: int, in_use: int) -> int:
        """The processes that should wait for calls while `in_use` have one: `least`, and some more at most."""
        self._roll(now_ns)
        most = max(self._most, self._before)
        wanted = most if self._restores else most - in_use
        return min(max(least, wanted), least + MOST_MORE)

    def _roll(self, now_ns: int) -> None:
        second = now_ns // NS_PER_S
        if second != self._second:
            self._before = self._most if second == self._second + 1 else 0
            self._second, self._most = second, 0
