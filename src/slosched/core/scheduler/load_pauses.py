"""Loads that failed on a GPU are tried again after a pause, which doubles with each failure in a row."""

from __future__ import annotations

from slosched.units import NS_PER_MS, NS_PER_S

_FIRST_NS = 100 * NS_PER_MS
_LONGEST_NS = 10 * NS_PER_S


class LoadPauses:
    """The pauses of one GPU, by model id. Only the end of a LoadWeights and an unload change them."""

    __slots__ = ("_pauses",)

    def __init__(self) -> None:
        self._pauses: dict[int, tuple[int, int]] = {}  # model id -> (not before, pause)

    def __bool__(self) -> bool:
        return bool(self._pauses)

    def failed(self, model_id: int, *, now_ns: int) -> None:
        """Wait before the next try, twice as long each time."""
        _, pause_ns = self._pauses.get(model_id, (0, _FIRST_NS // 2))
        pause_ns = min(2 * pause_ns, _LONGEST_NS)
        self._pauses[model_id] = (now_ns + pause_ns, pause_ns)

    def clear(self, model_id: int) -> None:
        """A load went well, or the instance is unloaded."""
        self._pauses.pop(model_id, None)

    def until_ns(self, model_id: int) -> int:
        """When a load that failed may be tried again; 0: none failed."""
        return self._pauses.get(model_id, (0, 0))[0]
