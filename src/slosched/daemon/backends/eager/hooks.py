"""Boundaries of an eager model: behind each of its leaf modules, and between its steps.

There the model looks at the gate, and the work that it has launched is bounded: a high job waits only for what
is in flight. Deft (NSDI'23) does the same at each kernel's launch with a preloaded library, which sees neither
CUDA graphs nor the launches of newer libraries; modules are coarser, and always seen.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from torch import nn

from slosched.daemon.backends.eager.device import Timeline
from slosched.daemon.member.gate import GateMember
from slosched.share_spec import Boundary, BoundaryKind, Interruption

#: Marks that are kept of one measured request; other boundaries are counted, and not timed. SDXL has 75,000.
_MOST_MARKS = 200_000
#: The modules of one segment.
SEGMENT_MODULES = 8
#: Modules that do nothing outside training.
_IDLE = (nn.Dropout, nn.Dropout2d, nn.Identity)


class Boundaries:
    """What happens at the boundaries of one model.

    The kind `segment` is that of graphs, which are cut by measured time. Here it is the kind `event` with 8
    modules in a segment: on a fast GPU one or two kernels would be over before the host launched the next.
    """

    def __init__(self, boundary: Boundary, timeline: Timeline, gate: GateMember | None) -> None:
        every, self._depth = max(1, boundary.every), max(1, boundary.depth)
        if boundary.kind is BoundaryKind.LAYER:
            every = 1
        elif boundary.kind is BoundaryKind.SEGMENT:
            every *= SEGMENT_MODULES
        self._every = every
        self._timeline, self._gate = timeline, gate
        self._pending: deque[Any] = deque()
        self._free: list[
            Any
        ] = []  # marks that are passed: making one takes longer than using it again
        self._hooks: list[Any] = []
        self._marks: list[Any] | None = None
        self.attached = False
        self.number = 0  # of the boundary, within the request
        self.paused_ns = 0
        self.pauses: list[Interruption] = []
        self._bound = {
            BoundaryKind.SYNC: self._timeline.synchronize,
            BoundaryKind.LAYER: self._timeline.synchronize,
            BoundaryKind.EVENT: self._group,
            BoundaryKind.SEGMENT: self._group,
        }.get(boundary.kind)

    def attach(self, module: nn.Module) -> None:
        """Hook the leaf modules of `module`, each once, but for those that launch nothing.

        Boundaries between steps count from now on, too.
        """
        self.attached = True
        leaves = [
            each
            for each in module.modules()
            if next(each.children(), None) is None and not isinstance(each, _IDLE)
        ]
        self._hooks = [leaf.register_forward_hook(self._behind) for leaf in leaves]

    def detach(self) -> None:
        """Remove the hooks: the model runs as if there had been none."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self.attached = [], False

    def begin(self) -> None:
        """A request begins."""
        self.number, self.paused_ns = 0, 0
        self.pauses.clear()
        self._free.extend(self._pending)  # of the last request, which ended
        self._pending.clear()

    def measured(self, run: Callable[[], None]) -> tuple[int, list[int]]:
        """The number of boundaries of what `run` does, and the device's times between them, in ns."""
        self.begin()
        self._marks = [self._timeline.mark()]
        try:
            run()
            marks = self._marks
            if self.number < _MOST_MARKS:
                marks.append(self._timeline.mark())
        finally:
            self._marks = None
        self._timeline.synchronize()
        between = self._timeline.between_ns
        return self.number, [between(first, last) for first, last in pairwise(marks)]

    def between(self) -> None:
        """A boundary between two steps: called by the model, also where it has no hooks."""
        if self.attached:
            self._boundary()

    def _behind(self, module: nn.Module, args: Any, output: Any) -> None:
        self._boundary()

    def _boundary(self) -> None:
        self.number += 1
        if self._marks is not None:
            if self.number < _MOST_MARKS:
                self._marks.append(self._timeline.mark())
            return
        gate = self._gate
        if gate is not None:
            gate.count()
            if gate.must_wait():
                self._pause(gate)
                return
        if self._bound is not None and self.number % self._every == 0:
            self._bound()

    def _pause(self, gate: GateMember) -> None:
        pause = gate.pause(self._timeline.synchronize, boundary=self.number)
        self._free.extend(self._pending)  # all work is done
        self._pending.clear()
        self.paused_ns += pause.resumed_ns - pause.began_ns
        self.pauses.extend(pause.parts)

    def _group(self) -> None:
        # The next group is the one of `depth` in flight, so that of `depth` groups back is waited for.
        pending = self._pending
        pending.append(self._timeline.fence(self._free.pop() if self._free else None))
        if len(pending) >= self._depth:
            passed = pending.popleft()
            self._timeline.wait(passed)
            self._free.append(passed)
