"""The distribution of the last scores of a judge, begun with a known one: prompts drift, and f(t) with them."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

from slosched.cascade_spec import ScoreCurve

#: Scores that are kept. The known distribution counts as many as are missing.
KEPT = 1000


class RecentScores:
    """Quantiles over the last `KEPT` scores; until there are as many, the rest are those of `curve`."""

    def __init__(self, curve: ScoreCurve) -> None:
        known = [curve.score_at((place + 0.5) / KEPT) for place in range(KEPT)]
        self._sorted = sorted(known)
        # Spread evenly, so that those that leave first are not the lowest: 617 and 1000 have no common factor.
        self._order: deque[float] = deque(known[place * 617 % KEPT] for place in range(KEPT))

    def add(self, score: float) -> None:
        """A score came; the oldest one is forgotten."""
        oldest = self._order.popleft()
        self._order.append(score)
        del self._sorted[bisect_left(self._sorted, oldest)]
        insort(self._sorted, score)

    def threshold_for(self, share: float) -> float:
        """A threshold that defers `share` of such scores, or less where many are equal; above 1 for all."""
        place = int(share * KEPT)
        return self._sorted[place] if place < KEPT else self._sorted[-1] + 1e-9
