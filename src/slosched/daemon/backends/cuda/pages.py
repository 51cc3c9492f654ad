"""Which pages of a weights cache hold whose weights.

The brain counts pages (core/worker/memory.py) and decides; here each load gets its place. A place is one
run of pages if there is one that fits, the smallest such, so that weights are copied in one piece; else
several runs. Whenever the brain's count says that there is room, there is.
"""

from __future__ import annotations

from bisect import insort
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Run:
    """`count` pages from page `first` on."""

    first: int
    count: int

    @property
    def end(self) -> int:
        return self.first + self.count


class PageMap:
    """The free runs of a cache of `pages` pages, in order; neighbours are always joined."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._free: list[Run] = [Run(0, pages)] if pages else []

    def take(self, count: int) -> list[Run]:
        """`count` (at least 1) pages in as few runs as may be, in order.

        Raises ValueError if fewer are free.
        """
        if not 1 <= count <= self.free_pages:
            raise ValueError(f"{count} page(s) of {self.free_pages} free ones")
        self.free_pages -= count
        fitting = [run for run in self._free if run.count >= count]
        if fitting:
            return [self._cut(min(fitting, key=lambda run: (run.count, run.first)), count)]
        taken: list[Run] = []
        for run in sorted(self._free, key=lambda run: (-run.count, run.first)):
            taken.append(self._cut(run, min(count, run.count)))
            count -= taken[-1].count
            if not count:
                break
        return sorted(taken)

    def _cut(self, run: Run, count: int) -> Run:
        self._free.remove(run)
        if run.count > count:
            insort(self._free, Run(run.first + count, run.count - count))
        return Run(run.first, count)

    def give(self, runs: list[Run]) -> None:
        """Take pages back. Raises ValueError for pages that are free already or do not exist here."""
        for run in runs:
            self._check(run)
            insort(self._free, run)
            self.free_pages += run.count
        joined: list[Run] = []
        for run in self._free:
            if joined and joined[-1].end == run.first:
                joined[-1] = Run(joined[-1].first, joined[-1].count + run.count)
            else:
                joined.append(run)
        self._free = joined

    def _check(self, run: Run) -> None:
        if run.first < 0 or run.count < 1 or run.end > self.pages:
            raise ValueError(f"{run} lies outside the cache's {self.pages} pages")
        if any(run.first < free.end and free.first < run.end for free in self._free):
            raise ValueError(f"{run} is free already")
