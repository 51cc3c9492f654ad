"""When one GPU ran what: segments that never overlap.

An Infer without segments is one segment. Both the checker of reports (invariants.py) and the simulator's own
observer (sim/truth.py) keep a timeline for each GPU.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field

#: Segments kept, so that late reports find their place among them.
_KEPT = 32


@dataclass(slots=True)
class Timeline:
    """The last segments of one GPU, (begin, end) in ns, ascending."""

    segments: list[tuple[int, int]] = field(default_factory=list)

    def add(self, begin_ns: int, end_ns: int, *, slack_ns: int = 0) -> str:
        """Put a segment in its place, whatever the order of the calls.

        Returns a clause that says how it overlaps another one by more than `slack_ns`; "" if it does not.
        """
        segments = self.segments
        place = bisect_left(segments, (begin_ns, end_ns))
        if place > 0 and begin_ns < segments[place - 1][1] - slack_ns:
            return f"before the one ahead of it ended at {segments[place - 1][1]}"
        if place < len(segments) and segments[place][0] < end_ns - slack_ns:
            return f"and ended at {end_ns}, after the one behind it began at {segments[place][0]}"
        segments.insert(place, (begin_ns, end_ns))
        if len(segments) > _KEPT:
            del segments[0]
        return ""
