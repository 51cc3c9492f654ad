"""Windows of time: equal ones, counted from a start, and the published ones that close themselves."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

Times = NDArray[np.int64]
Mask = NDArray[np.bool_]

#: Rows that are looked at together while a window is open.
_ROWS = 1 << 15
_MOST_WINDOWS = 50_000


class Windows:
    """The rows of a log, put into equal windows that begin at `start_ns`; only whole windows count.

    `at_ns` are the rows' times, and no window lasts longer than until `end_ns`, but for a thirtieth: the
    last request of a minute comes a little before it is over. Raises InvalidConfig if there is no window,
    or more than a reader could use.
    """

    def __init__(self, at_ns: Times, width_ns: int, start_ns: int, end_ns: int) -> None:
        if width_ns <= 0:
            raise InvalidConfig("a window must be longer than 0")
        self.width_ns = width_ns
        self.count = (max(0, end_ns - start_ns) + width_ns // 30) // width_ns
        if self.count < 1:
            raise InvalidConfig(
                f"what is left of the run, {format_duration(max(0, end_ns - start_ns))}, is shorter "
                f"than one window of {format_duration(width_ns)}; give a shorter --window"
            )
        if self.count > _MOST_WINDOWS:
            raise InvalidConfig(
                f"{self.count} windows of {format_duration(width_ns)} are too many to draw; "
                "give a longer --window"
            )
        places = (at_ns - start_ns) // width_ns
        inside = (places >= 0) & (places < self.count)
        # 16 bits are sorted by counting, in one pass over the rows.
        self._places = np.where(inside, places, self.count).astype(np.uint16)
        self._order: NDArray[np.intp] | None = None

    @property
    def width_s(self) -> float:
        return self.width_ns / NS_PER_S

    def starts_s(self) -> list[float]:
        """When each window begins, in s after the first one's start."""
        return [index * self.width_s for index in range(self.count)]

    def counts(self, mask: Mask | None = None) -> NDArray[np.int64]:
        """Return for each window the rows in it, or those of them that `mask` selects."""
        places = self._places if mask is None else self._places[mask]
        return np.bincount(places, minlength=self.count + 1)[: self.count].astype(np.int64)

    def rates(self, mask: Mask | None = None) -> list[float]:
        """Rows per second."""
        per_s: list[float] = (self.counts(mask) / self.width_s).tolist()
        return per_s

    def sums(self, values: NDArray[np.int64], mask: Mask | None = None) -> NDArray[np.float64]:
        """Return for each window the sum of `values`."""
        places = self._places if mask is None else self._places[mask]
        chosen = values if mask is None else values[mask]
        totals = np.bincount(places, chosen, minlength=self.count + 1)[: self.count]
        return totals.astype(np.float64)

    def quantiles(
        self, values: NDArray[np.int64], shares: list[float], mask: Mask
    ) -> list[list[float]]:
        """Return for each share the quantile in each window; NaN where a window has no such row."""
        found: list[list[float]] = [[] for _ in shares]
        for rows in self._rows():
            chosen = values[rows[mask[rows]]]
            numbers = np.quantile(chosen, shares) if len(chosen) else [float("nan")] * len(shares)
            for series, number in zip(found, numbers, strict=True):
                series.append(float(number))
        return found

    def distinct(self, ids: NDArray[np.int64], mask: Mask) -> list[int]:
        """Return for each window how many different `ids` its rows have."""
        return [len(np.unique(ids[rows[mask[rows]]])) for rows in self._rows()]

    def _rows(self) -> Iterator[NDArray[np.intp]]:
        """The rows of each window in turn."""
        if self._order is None:
            self._order = np.argsort(self._places, kind="stable")
        stop = 0
        for rows in self.counts().tolist():
            start, stop = stop, stop + rows
            yield self._order[start:stop]


def nice_width_ns(span_ns: float, most: int) -> int:
    """The least of 1, 2, 5, 10, ... ms of which no more than `most` cover the span."""
    scale = NS_PER_MS
    while True:
        for digit in (1, 2, 5):
            if digit * scale * most >= span_ns:
                return digit * scale
        scale *= 10


def closing_rows(times: Times, width_ns: int) -> list[int]:
    """Return the last row of each window, windowed as the published plotters do it.

    Rows come in file order. A window closes with the first row that makes its times span more than
    `width_ns`, and the next row opens the next; what follows the last closing row is not a window.
    """
    closing: list[int] = []
    first = 0
    while first < len(times):
        low = high = times[first]
        for at in range(first, len(times), _ROWS):
            part = times[at : at + _ROWS]
            lows = np.minimum(np.minimum.accumulate(part), low)
            highs = np.maximum(np.maximum.accumulate(part), high)
            too_long = np.flatnonzero(highs - lows > width_ns)
            if len(too_long):
                closing.append(at + int(too_long[0]))
                break
            low, high = lows[-1], highs[-1]
        else:
            return closing
        first = closing[-1] + 1
    return closing
