"""What the tuner of boundaries needs of an eager model: its boundaries, what one costs, and its kernels.

The same request runs in turn without hooks, with hooks that only look, and with a boundary of the job's kind
behind each piece, for each depth that the kind knows. What the bounded request takes more than the looking one,
over the number of boundaries, is what one costs (Deft's a); what looking costs remains however far apart they
are (Deft's b). Medians of interleaved runs, since clocks and caches drift.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import median

import msgspec
from torch import nn

from slosched import clock
from slosched.daemon.backends.eager.device import Timeline
from slosched.daemon.backends.eager.hooks import SEGMENT_MODULES, Boundaries
from slosched.daemon.backends.eager.profiling import Kernels
from slosched.share_spec import Boundary, BoundaryKind, Pieces
from slosched.units import NS_PER_S

#: Runs of each variant: as many as fit into this time, within these bounds.
_BUDGET_NS = 10 * NS_PER_S
_LEAST_RUNS, _MOST_RUNS = 3, 20
#: Kernels of a request with more boundaries are not counted: the profiler keeps an event for each.
_MOST_PROFILED = 20_000


def measure_pieces(
    boundary: Boundary,
    module: nn.Module,
    timeline: Timeline,
    run: Callable[[Boundaries], None],
    profile: Callable[[], Kernels],
) -> Pieces:
    """Measure the model `module`, whose request `run` is, with boundaries of the kind of `boundary`.

    `run` gets the boundaries that it shall stop at between its steps. The model has no hooks before and after.
    """
    depths = (1, 2) if boundary.kind in (BoundaryKind.EVENT, BoundaryKind.SEGMENT) else (1,)
    looks = Boundaries(Boundary(kind=BoundaryKind.NONE), timeline, None)
    bounded = [
        Boundaries(_closest(boundary, depth), timeline, None)
        for depth in depths
        if boundary.kind not in (BoundaryKind.NONE, BoundaryKind.LAYER)
    ]
    looks.attach(module)
    try:
        number, segments_ns = looks.measured(lambda: run(looks))
    finally:
        looks.detach()
    longest_ns = max(segments_ns, default=0)
    plain = Boundaries(Boundary(kind=BoundaryKind.NONE), timeline, None)
    variants = [plain, looks, *bounded]
    times = _interleaved(variants, module, timeline, run, plain)
    plain_ns, looking_ns = times[0], times[1]
    modules = SEGMENT_MODULES if boundary.kind is BoundaryKind.SEGMENT else 1
    pieces = max(1, -(-number // modules))
    crossed = max(1, number // modules)
    kernels = Kernels(0, 0, 0) if number > _MOST_PROFILED else _profiled(profile)
    return Pieces(
        pieces=pieces,
        exec_ns=max(1, plain_ns),
        longest_ns=min(longest_ns * modules, max(longest_ns, plain_ns)),
        costs_ns={
            depth: max(0, round((ns - looking_ns) / crossed))
            for depth, ns in zip(depths, times[2:], strict=False)
        },
        fixed_ns=max(0, looking_ns - plain_ns),
        kernels=kernels.number,
        kernel_ns=kernels.mean_ns,
        longest_kernel_ns=kernels.longest_ns,
    )


def _closest(boundary: Boundary, depth: int) -> Boundary:
    return msgspec.structs.replace(boundary, every=1, depth=depth, tuned=False)


def _interleaved(
    variants: Sequence[Boundaries],
    module: nn.Module,
    timeline: Timeline,
    run: Callable[[Boundaries], None],
    plain: Boundaries,
) -> list[int]:
    """The median time of a request with each of `variants`, in ns; `plain` is not attached."""
    times: list[list[int]] = [[] for _ in variants]
    began_ns = clock.now_ns()
    for count in range(_MOST_RUNS):
        if count >= _LEAST_RUNS and clock.now_ns() - began_ns > _BUDGET_NS:
            break
        for own, each in zip(times, variants, strict=True):
            if each is not plain:
                each.attach(module)
            try:
                own.append(_timed(each, timeline, run))
            finally:
                each.detach()
    return [round(median(each)) for each in times]


def _timed(each: Boundaries, timeline: Timeline, run: Callable[[Boundaries], None]) -> int:
    timeline.synchronize()
    each.begin()
    began_ns = clock.now_ns()
    run(each)
    timeline.synchronize()
    return clock.now_ns() - began_ns


def _profiled(profile: Callable[[], Kernels]) -> Kernels:
    """The kernels; none where the profiler does not work here."""
    try:
        return profile()
    except Exception:  # another profiler holds the device, or the driver refuses its counters
        return Kernels(0, 0, 0)
