"""`RolePlacement`: each GPU holds the weights that its role needs. For policies that give GPUs roles.

Where the weights of every role fit, all of them are copied to every GPU before the first request, and a change
of role costs nothing. Where they do not, a new role costs its load, over what no role of the GPU needs.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.placement.base import Placement
from slosched.core.scheduler.state import ActionState, Gpu, Instance, Request


class RolePlacement(Placement):
    """See the head of this file. `allow` says what a GPU is for; without that it takes what fits."""

    def __init__(self, cluster: Cluster, *, heeds_deadlines: bool = True) -> None:
        super().__init__(cluster, heeds_deadlines=heeds_deadlines)
        self._allowed: dict[int, tuple[Instance, ...]] = {}  # by GPU index
        self._missing: dict[int, Gpu] = {}  # by index: it may lack something

    def allow(self, gpu: Gpu, models: Sequence[Instance]) -> None:
        """`gpu` is for `models` alone from now on; they must fit together.

        Said again, it has what was lost meanwhile loaded again.
        """
        wanted, index = tuple(models), gpu.index
        if self._allowed.get(index) != wanted or any(index not in m.resident_on for m in wanted):
            self._allowed[index] = wanted
            self._missing[index] = gpu

    def allowed(self, gpu: Gpu) -> tuple[Instance, ...]:
        """What `gpu` is for; empty: anything."""
        return self._allowed.get(gpu.index, ())

    def asked_for(self, request: Request, *, now_ns: int) -> None:
        """Roles decide, and not single requests."""

    def _load_done(self, action: ActionState, *, ok: bool, end_ns: int, duration_ns: int) -> None:
        self._missing[action.gpu.index] = action.gpu

    def _gpu_removed(self, gpu: Gpu) -> None:
        self._allowed.pop(gpu.index, None)
        self._missing.pop(gpu.index, None)

    def _plan_loads(self, now_ns: int) -> None:
        able = self._loaders.able(now_ns)
        for index in sorted(self._missing.keys() & able.keys()):
            gpu, wanted = able[index], self._allowed.get(index, ())
            lacking = [each for each in wanted if index not in each.resident_on]
            if not lacking:
                del self._missing[index]
            elif gpu.can_load(lacking[0], now_ns) and index not in lacking[0].loading_on:
                self._make_room(gpu, lacking[0], wanted, now_ns)

    def _make_room(
        self, gpu: Gpu, model: Instance, wanted: tuple[Instance, ...], now_ns: int
    ) -> None:
        """Load `model` over what the role does not need, unless that still runs."""
        victims: list[Instance] = []
        free = gpu.free_pages
        for other in list(gpu.resident.values()):
            if free >= model.pages:
                break
            if other not in wanted and not self._cluster.in_use(gpu, other):
                victims.append(other)
                free += other.pages
        if free >= model.pages:
            self._swap(gpu, victims, model, now_ns)

    def next_wakeup_ns(self) -> int | None:
        return self._loaders.next_ns(self._now_ns) if self._missing else None
