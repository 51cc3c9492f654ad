"""The histogram of everything that is counted by size: bounds, counts, the total."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate


class Histogram:
    """Counts by bucket: `counts[i]` of the values above `bounds[i - 1]` and up to `bounds[i]`.

    The last count is of those beyond every bound. `total` is the sum of the values. On hot paths the two
    lines of `add` are written out.
    """

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0

    def add(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        return sum(self.counts)

    def middles(self, *shares: float) -> tuple[int | None, ...]:
        """For each share (0 to 1) the middle of the bucket in which it is reached; None without values.

        For values of 0 and more in narrow buckets. Values beyond the last bound count to the last bucket.
        """
        reached = list(accumulate(self.counts))
        if not reached[-1]:
            return (None,) * len(shares)
        return tuple(
            self._middle(bisect_left(reached, math.ceil(share * reached[-1]))) for share in shares
        )

    def _middle(self, place: int) -> int:
        place = min(place, len(self.bounds) - 1)
        bottom = self.bounds[place - 1] + 1 if place else 0
        return bottom + (self.bounds[place] + 1 - bottom) // 2


def quantile_ns(bounds: Sequence[int], counts: Sequence[int], share: float) -> float | None:
    """The value below which `share` (0 to 1) of a histogram lies, straight within its bucket.

    None without values. Beyond the last bound it is that bound, and below the first that one.
    """
    wanted = share * sum(counts)
    if not any(counts):
        return None
    passed = 0.0
    for place, count in enumerate(counts):
        if count and passed + count >= wanted:
            if place == len(bounds):
                break
            top = bounds[place]
            bottom = bounds[place - 1] if place else min(0, top)
            return bottom + (top - bottom) * max(0.0, wanted - passed) / count
        passed += count
    return bounds[-1]
