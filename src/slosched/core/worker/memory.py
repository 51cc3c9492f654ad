"""The weights cache of one GPU: which instance holds how many pages, exactly.

    absent --load--> LOADING --loaded--> RESIDENT --evict--> absent
                        \\-- evicted or failed --> absent

Pages are taken when a load starts and given back on eviction or failure. The numbers of the pages do not matter
here, so only counts are kept (Clockwork keeps lists of non-contiguous 16 MiB pages, with evictions disabled: a
shortage is an error in the controller's bookkeeping, code 53). Each load of an instance's weights gets a new
version, which reveals work that ran across a change (codes 54 and 84).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class _Held:
    pages: int
    version: int
    loading: bool


class WeightsCache:
    """Page accounting of one GPU. `free_pages` + pages held = `pages`, always."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.free_pages = pages
        self._held: dict[int, _Held] = {}  # by model id, in the order of their loads
        self._version = 0

    def holds(self, model_id: int) -> bool:
        """True if the instance has pages: its weights are resident or loading."""
        return model_id in self._held

    def resident(self, model_id: int) -> bool:
        held = self._held.get(model_id)
        return held is not None and not held.loading

    def version(self, model_id: int) -> int:
        """The version of the resident weights; -1 if there are none."""
        held = self._held.get(model_id)
        return -1 if held is None or held.loading else held.version

    def model_ids(self) -> tuple[int, ...]:
        """The instances that hold pages, oldest load first."""
        return tuple(self._held)

    def begin_load(self, model_id: int, pages: int) -> int | None:
        """Take `pages` for a load; returns the load's version, or None if too few are free.

        Weights that are there already are given up first (a reload), even if the load then fails.
        """
        self.evict(model_id)
        if pages > self.free_pages:
            return None
        self.free_pages -= pages
        self._version += 1
        self._held[model_id] = _Held(pages, self._version, loading=True)
        return self._version

    def finish_load(self, model_id: int, version: int) -> bool:
        """The copy is complete. False if its pages were given up meanwhile."""
        held = self._held.get(model_id)
        if held is None or held.version != version:
            return False
        held.loading = False
        return True

    def fail_load(self, model_id: int, version: int) -> None:
        """The copy failed: its pages are free again, unless they are already."""
        held = self._held.get(model_id)
        if held is not None and held.version == version:
            self.evict(model_id)

    def evict(self, model_id: int) -> bool:
        """Give the instance's pages back. False if it holds none."""
        held = self._held.pop(model_id, None)
        if held is None:
            return False
        self.free_pages += held.pages
        return True
