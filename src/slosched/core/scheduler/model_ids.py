"""The numbers of instances: which come next, and which were given up.

With the cluster's id they name an instance, also over restarts of the controller. So numbers go on beyond
every one that was seen. A worker that was away may return with an instance that was unloaded meanwhile: the
numbers of those are remembered, the latest of them.
"""

from __future__ import annotations

#: Numbers that are remembered. What is forgotten and returns is adopted again, and goes when it is not used.
_RETIRED_KEPT = 100_000


class ModelIds:
    """Gives numbers out; each `take` is a run of consecutive ones."""

    def __init__(self) -> None:
        self._next = 0
        self._retired: dict[int, None] = {}  # in the order of their ends

    def take(self, count: int) -> int:
        """The first of `count` numbers that were never used."""
        first = self._next
        self._next += count
        return first

    def saw(self, model_id: int) -> None:
        """A worker holds an instance of this number."""
        self._next = max(self._next, model_id + 1)

    def retire(self, model_id: int) -> None:
        """The instance is gone."""
        self._retired[model_id] = None
        if len(self._retired) > _RETIRED_KEPT:
            del self._retired[next(iter(self._retired))]

    def is_retired(self, model_id: int) -> bool:
        return model_id in self._retired
