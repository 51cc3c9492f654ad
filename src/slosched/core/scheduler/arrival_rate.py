"""How fast requests arrive: counted by the second, smoothed over the last seconds."""

from __future__ import annotations

from slosched.units import NS_PER_S

#: Weight of the last second: pandas' ewm(com=2.1), as in DiffServe's artifact.
ALPHA = 1 / 3.1
#: Seconds without a request after which the rate is taken to be 0 at once.
_FORGOTTEN = 60


class ArrivalRate:
    """An exponentially weighted mean of requests/s. Seconds count from the first arrival."""

    __slots__ = ("_began_ns", "_last_ns", "_mean", "_now", "_weight")

    def __init__(self) -> None:
        self._began_ns = -1  # of the second that is counted now
        self._last_ns = 0  # when the last request came
        self._now = 0
        self._mean = self._weight = 0.0  # of the seconds before: weighted sum, and the weights

    def add(self, now_ns: int) -> None:
        """A request arrives."""
        self._advance(now_ns)
        self._now += 1
        self._last_ns = now_ns

    def _advance(self, now_ns: int) -> None:
        if self._began_ns < 0:
            self._began_ns = now_ns
        passed = (now_ns - self._began_ns) // NS_PER_S
        if passed and now_ns - self._last_ns > _FORGOTTEN * NS_PER_S:
            self._mean, self._weight, self._now = 0.0, 1.0, 0
            self._began_ns += passed * NS_PER_S
            return
        for _ in range(passed):
            self._mean = self._mean * (1 - ALPHA) + self._now
            self._weight = self._weight * (1 - ALPHA) + 1
            self._now = 0
            self._began_ns += NS_PER_S

    def per_s(self, now_ns: int) -> float:
        """The mean of the whole seconds so far; in the first second, of what it has seen."""
        if self._began_ns < 0:
            return 0.0
        self._advance(now_ns)
        if not self._weight:
            return float(self._now)
        return self._mean / self._weight

    def soon_per_s(self, now_ns: int) -> float:
        """The same, or what the present second already shows if that is more: for a demand that jumps."""
        return max(self.per_s(now_ns), float(self._now))
