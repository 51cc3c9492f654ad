"""Everything that is known beforehand about how well any scheduler can do, for each step of a workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any

from slosched.bound.achievable import achievable
from slosched.bound.capacity import capacity_bound
from slosched.bound.exact import is_exactly_solvable, optimum
from slosched.bound.problem import Batch, CellProblem, Problem, Request
from slosched.bound.window import window_bound
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: What is being done, for which step, and the share of it that is done (0..1).
Progress = Callable[[str, CellProblem, float], None]


@dataclass(frozen=True)
class Effort:
    """How much is looked at, and how closely.

    The first `span_ns` of each step count. The linear programme looks at `windows` windows of
    `window_ns` in it, on a grid of `grid_ns`. One that would have more than `largest` coefficients is
    made smaller, and looser; one that takes longer than `time_limit_s` is given up. `width` schedules
    are kept in the search for one.
    Raises InvalidConfig.
    """

    span_ns: int = 2 * NS_PER_S
    windows: int = 3
    window_ns: int = 200 * NS_PER_MS
    grid_ns: int = NS_PER_MS // 10
    width: int = 24
    largest: int = 200_000
    time_limit_s: float = 300.0

    def __post_init__(self) -> None:
        for name, least in (
            ("span_ns", 1),
            ("windows", 0),
            ("window_ns", 1),
            ("grid_ns", 1),
            ("width", 1),
        ):
            value = getattr(self, name)
            if value < least:
                raise InvalidConfig(f"bound: {name} must be at least {least}, not {value}")


@dataclass(frozen=True)
class Window:
    """`requests` arrive within `length_ns` from `start_ns` of the step. At most `upper` of them can be
    served (None: the programme was too large), and the achievable schedule serves `achieved`.
    """

    start_ns: int
    length_ns: int
    requests: int
    upper: int | None
    achieved: int
    size: int
    fluid: int = 0


@dataclass(frozen=True)
class CellBounds:
    """One step. Shares are of the `requests` that are sent in its first `span_ns`.

    `capacity` and `upper` are upper bounds, `achievable` is a found schedule's share. With `exact`
    that schedule is the best there is, and `upper` is its share. `upper` is None where no window could
    be solved. `in_every_window` says that the windows cover the whole span: `upper` is then a strict
    bound, else an estimate of it (achievable, and how far the windows' bounds are above it).
    """

    index: int
    slo: str
    slo_factor: float
    slo_ns: int
    start_ns: int
    duration_ns: int
    span_ns: int
    requests: int
    capacity: float
    upper: float | None
    achievable: float
    exact: bool
    in_every_window: bool
    windows: tuple[Window, ...]
    notes: tuple[str, ...]

    @property
    def best_upper(self) -> float:
        """The least upper bound that is known."""
        return self.capacity if self.upper is None else min(self.capacity, self.upper)

    @property
    def looseness(self) -> float:
        """How far the truth can be above the achievable schedule, as a share of all requests."""
        return max(0.0, self.best_upper - self.achievable)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON. Times in ns, shares within 0..1."""
        return {**asdict(self), "best_upper": self.best_upper, "looseness": self.looseness}


def bound_cell(cell: CellProblem, effort: Effort, progress: Progress | None = None) -> CellBounds:
    """The bounds of one step. Raises InvalidConfig, MissingPackage (scipy)."""
    span_ns = min(effort.span_ns, cell.duration_ns)
    counted = sum(offset_ns < span_ns for offset_ns in cell.offsets_ns)
    if not counted:
        raise InvalidConfig(
            f"step {cell.step.text}: nothing is sent in its first {format_duration(span_ns)}; take a "
            "longer --span"
        )
    _check_grid(cell.problem, effort.grid_ns)
    inside = [offset_ns < span_ns for offset_ns in cell.offsets_ns]
    within = replace(
        cell.problem,
        requests=tuple(r for r, yes in zip(cell.problem.requests, inside, strict=True) if yes),
    )
    exact = is_exactly_solvable(within)

    def on_progress(what: str, share: float) -> None:
        if progress is not None:
            progress(what, cell, share)

    on_progress("capacity", 0.0)
    capacity = capacity_bound(within) / counted
    served = _served_in_span(cell, within, inside, exact, effort, on_progress)
    share = sum(served) / counted
    found: list[Window] = []
    if not exact and share < min(1.0, capacity):
        offsets = [o for o, yes in zip(cell.offsets_ns, inside, strict=True) if yes]
        for start_ns, length_ns in _windows(span_ns, effort):
            on_progress("linear programme", len(found) / effort.windows)
            found.append(_window(within, offsets, served, start_ns, length_ns, effort))
    covers = bool(found) and effort.windows * effort.window_ns >= span_ns
    upper = share if exact or share >= min(1.0, capacity) else _upper(found, share)
    notes = _notes(cell, found)
    return CellBounds(
        index=cell.step.index,
        slo=cell.step.text,
        slo_factor=cell.step.slo_factor,
        slo_ns=cell.slo_ns,
        start_ns=cell.step.start_ns,
        duration_ns=cell.duration_ns,
        span_ns=span_ns,
        requests=counted,
        capacity=min(1.0, capacity),
        upper=upper,
        achievable=share,
        exact=exact,
        in_every_window=covers,
        windows=tuple(found),
        notes=notes,
    )


def _check_grid(problem: Problem, grid_ns: int) -> None:
    shortest_ns = min(ns for kinds in problem.classes for t in kinds for ns in t.values())
    if grid_ns > shortest_ns:
        raise InvalidConfig(
            f"the grid of {format_duration(grid_ns)} is longer than the shortest exec time, "
            f"{format_duration(shortest_ns)}: take a finer one (--grid)"
        )


def _served_in_span(
    cell: CellProblem,
    within: Problem,
    inside: Sequence[bool],
    exact: bool,
    effort: Effort,
    on_progress: Callable[[str, float], None],
) -> list[bool]:
    """For each request of the span, whether the achievable schedule serves it."""
    if exact:
        on_progress("exact optimum", 0.0)
        return _served(optimum(within), len(within.requests))
    # Those that come after the span compete for the GPUs too, as they do for a real scheduler.
    last_ns = max(request.due_ns for request in within.requests)
    keep = [
        yes or request.release_ns < last_ns
        for request, yes in zip(cell.problem.requests, inside, strict=True)
    ]
    requests = [r for r, yes in zip(cell.problem.requests, keep, strict=True) if yes]
    counts = [yes for yes, kept in zip(inside, keep, strict=True) if kept]
    schedule = achievable(
        replace(within, requests=tuple(requests)),
        width=effort.width,
        progress=lambda share: on_progress("schedule", share),
    )
    served = _served(schedule, len(requests))
    return [yes for yes, counted in zip(served, counts, strict=True) if counted]


def _served(schedule: Sequence[Batch], count: int) -> list[bool]:
    served = [False] * count
    for batch in schedule:
        for place in batch.requests:
            served[place] = True
    return served


def _windows(span_ns: int, effort: Effort) -> list[tuple[int, int]]:
    """(start, length) of the windows, evenly over the span; they cover it if they are long enough."""
    count, length_ns = effort.windows, effort.window_ns
    if count * length_ns >= span_ns:
        count = -(-span_ns // length_ns)
        borders = [span_ns * i // count for i in range(count + 1)]
        return [(a, b - a) for a, b in pairwise(borders)]
    return [
        (span_ns * (2 * i + 1) // (2 * count) - length_ns // 2, length_ns) for i in range(count)
    ]


def _window(
    problem: Problem,
    offsets: Sequence[int],
    served: Sequence[bool],
    start_ns: int,
    length_ns: int,
    effort: Effort,
) -> Window:
    inside = [start_ns <= offset_ns < start_ns + length_ns for offset_ns in offsets]
    requests: list[Request] = [r for r, yes in zip(problem.requests, inside, strict=True) if yes]
    achieved = sum(yes and done for yes, done in zip(inside, served, strict=True))
    if achieved == len(requests):  # nothing can be better than all
        return Window(
            start_ns=start_ns,
            length_ns=length_ns,
            requests=len(requests),
            upper=achieved,
            achieved=achieved,
            size=0,
        )
    bound = window_bound(
        problem,
        requests,
        grid_ns=effort.grid_ns,
        largest=effort.largest,
        time_limit_s=effort.time_limit_s,
    )
    return Window(
        start_ns=start_ns,
        length_ns=length_ns,
        requests=len(requests),
        upper=bound.served,
        achieved=achieved,
        size=bound.size,
        fluid=bound.fluid,
    )


def _upper(windows: Sequence[Window], achievable_share: float) -> float | None:
    """What the windows say of the span.

    The requests of the windows are a sample. How many of them *can* be served varies with the sample;
    how far that is above what the schedule serves *of the same requests* varies much less, so the
    latter is what is taken from the sample.
    """
    solved = [window for window in windows if window.upper is not None]
    requests = sum(window.requests for window in solved)
    if not requests:
        return None
    above = sum((window.upper or 0) - window.achieved for window in solved)
    return min(1.0, achievable_share + above / requests)


def _notes(cell: CellProblem, windows: Sequence[Window]) -> tuple[str, ...]:
    notes = []
    unsolved = [window for window in windows if window.upper is None]
    if unsolved:
        size = max(window.size for window in unsolved)
        notes.append(
            f"step {cell.step.text}: the linear programme was not solved for {len(unsolved)} of "
            f"{len(windows)} windows ({size} coefficients); take a shorter --window-length or a "
            "coarser --grid"
        )
    fluid = max((window.fluid for window in windows), default=0)
    if fluid:
        notes.append(
            f"step {cell.step.text}: the linear programme treats the work of up to {fluid} models as fluid "
            "to stay small, which makes it looser"
        )
    if not cell.weights_fit:
        notes.append(
            "the weights of all instances do not fit on each GPU: the bounds ignore loads, so they "
            "are looser than they look"
        )
    return tuple(notes)
