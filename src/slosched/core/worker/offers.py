"""What a worker can prepare, and whether its controller knows it.

A Welcome tells it. Later changes go out as an Offer with a number, which the controller's acks repeat; what it
did not hear is said again.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from slosched.messages import Offer
from slosched.units import NS_PER_S

#: Between two Offers of the same number; an ack comes within some milliseconds.
_AGAIN_NS = NS_PER_S


class Offers:
    """`loadable` has canonical names, those in `put_aside` (name, reason) left out; `functions` are of them.

    `left_out` has (name, reason) of what a repository holds and cannot be offered.
    """

    def __init__(
        self,
        loadable: Collection[str],
        put_aside: Sequence[tuple[str, str]] = (),
        functions: Collection[str] = (),
    ) -> None:
        self._aside = {name for name, _ in put_aside}
        self.put_aside = tuple(put_aside)
        self.loadable = self._names(loadable)
        self.functions = tuple(name for name in self.loadable if name in functions)
        self.left_out: tuple[tuple[str, str], ...] = ()
        self.number = 0
        self._said_ns = 0

    def _names(self, loadable: Collection[str]) -> tuple[str, ...]:
        return tuple(sorted(set(loadable) - self._aside))

    def change(
        self, loadable: Collection[str], left_out: Sequence[tuple[str, str]], *, now_ns: int
    ) -> bool:
        """From now on these can be prepared, and the functions as before. False if nothing has changed."""
        names = self._names([*loadable, *self.functions])
        if (names, tuple(left_out)) == (self.loadable, self.left_out):
            return False
        self.loadable, self.left_out = names, tuple(left_out)
        self.number += 1
        self._said_ns = now_ns
        return True

    def unheard(self, number: int, *, now_ns: int) -> bool:
        """Whether an ack with `number` says that the last Offer was lost, and it is time to say it again."""
        if number >= self.number or now_ns - self._said_ns < _AGAIN_NS:
            return False
        self._said_ns = now_ns
        return True

    def message(self, session: int) -> Offer:
        return Offer(
            session=session, number=self.number, loadable=self.loadable, left_out=self.left_out
        )
