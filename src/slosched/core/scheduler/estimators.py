"""How long will it take? Sliding windows over what was measured, started from a profile.

Clockwork keeps one window of ten per model, lets the first sample wipe out the profile, and plans
with the window's p99, so that one outlier holds the plan for ten samples (OSDI'20 §5.3; reference
code `SlidingWindow`). Here each window holds more, starts from the profile with the weight of a few
samples, and answers two questions: the median, which is what an action is expected to take, and a
high percentile, which is the margin a promise must leave.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque


class WindowEstimator:
    """Order statistics over the last `window` samples, in ns.

    `seed_ns` counts as `seed_weight` samples until newer ones push them out. Cost per sample: one
    binary search and two short moves in a sorted list.
    """

    __slots__ = (
        "_capacity",
        "_middle",
        "_percentile",
        "_rank",
        "_samples",
        "_sorted",
        "expected_ns",
        "margin_ns",
    )

    def __init__(
        self, seed_ns: int, *, window: int = 100, percentile: float = 0.97, seed_weight: int = 4
    ) -> None:
        self._capacity = window
        self._percentile = percentile
        self._samples: deque[int] = deque([seed_ns] * seed_weight)
        self._sorted: list[int] = [seed_ns] * seed_weight
        self._middle = self._rank = 0  # where median and percentile stand in `_sorted`
        #: The median: what the next one is expected to take.
        self.expected_ns = seed_ns
        #: The percentile: what a promise should allow for. Never below the median.
        self.margin_ns = seed_ns
        self._resize()

    def _resize(self) -> None:
        count = len(self._sorted)
        self._middle = count >> 1
        self._rank = min(count - 1, int(self._percentile * count))

    def add(self, sample_ns: int) -> bool:
        """Take one sample. True if it moved the median or the percentile."""
        samples, ordered = self._samples, self._sorted
        samples.append(sample_ns)
        if len(samples) > self._capacity:
            oldest = samples.popleft()
            if oldest == sample_ns:
                return False
            del ordered[bisect_left(ordered, oldest)]
            insort(ordered, sample_ns)
        else:
            insort(ordered, sample_ns)
            self._resize()
        expected_ns, margin_ns = ordered[self._middle], ordered[self._rank]
        if expected_ns == self.expected_ns and margin_ns == self.margin_ns:
            return False
        self.expected_ns, self.margin_ns = expected_ns, margin_ns
        return True

    def __len__(self) -> int:
        return len(self._samples)


class ExecTable:
    """Exec times of one model on one GPU, by batch class; ascending. Seeded from the profile."""

    __slots__ = (
        "batches",
        "boundaries_ns",
        "classes",
        "estimators",
        "host_part",
        "profiled_ns",
        "single",
    )

    def __init__(
        self, seeds_ns: dict[int, int], boundaries_ns: dict[int, int] | None = None
    ) -> None:
        """`boundaries_ns`: the longest time until a run of a class can be interrupted; None: none can be."""
        self.batches = tuple(sorted(seeds_ns))
        self.profiled_ns = seeds_ns
        self.boundaries_ns = boundaries_ns or {}
        self.estimators = {b: WindowEstimator(seeds_ns[b]) for b in self.batches}
        #: The same estimators as (class, estimator) pairs, for the planner's inner loop.
        self.classes = tuple((b, self.estimators[b]) for b in self.batches)
        #: Batch 1: every model has it.
        self.single = self.estimators[self.batches[0]]
        #: How long host parts of a function's calls take; None: they have none.
        self.host_part: WindowEstimator | None = None

    def add(self, batch: int, sample_ns: int) -> None:
        """Take one sample of the class `batch`."""
        self.estimators[batch].add(sample_ns)

    def class_for(self, count: int) -> int:
        """The smallest class that holds `count` requests, or the largest there is."""
        for batch in self.batches:
            if batch >= count:
                return batch
        return self.batches[-1]
