"""Where the time of a chain of nodes lies: groups of nodes are timed, and segments put together from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from slosched.daemon.backends.cuda.driver import Driver, Graph
from slosched.daemon.backends.cuda.program import Copies
from slosched.daemon.backends.cuda.steps import Launch
from slosched.daemon.backends.cuda.timing import MOST_TIMED, Stopwatch

_GROUPS, _ROUNDS = 48, 3


class Ends(NamedTuple):
    """How many nodes at the head and at the tail of a chain stay together."""

    head: int = 0
    tail: int = 0


#: `started` and the copy of the weights belong to a whole graph's first segment, the copy of the output and
#: `ended` to its last.
WHOLE = Ends(2, 2)


@dataclass(frozen=True, slots=True)
class Group:
    """Nodes from `begin` to `end` of a chain, and what they take."""

    begin: int
    end: int
    ns: int


def bounds_of(groups: Sequence[Group], tau_ns: int, *, least_ns: int = 0) -> tuple[int, ...]:
    """The nodes before which to cut, so that no segment of several groups takes longer than `tau_ns`.

    A segment of less than `least_ns` is not worth a boundary: it belongs to the one before, which may then be
    that much longer.
    """
    segments: list[tuple[int, int]] = []  # begin, ns
    length_ns = 0
    for group in groups:
        if not segments or (length_ns and length_ns + group.ns > tau_ns):
            segments.append((group.begin, 0))
            length_ns = 0
        length_ns += group.ns
        segments[-1] = segments[-1][0], length_ns
    return tuple(begin for begin, ns in segments[1:] if ns >= least_ns)


def halved(
    groups: Sequence[Group], longest_ns: int, ends: Ends = WHOLE, *, most: int = MOST_TIMED
) -> list[tuple[int, int]]:
    """The places (begin, end) of `groups`, those halved that take longer than `longest_ns` and can be.

    There are at most `most` in the end, so it may be the longest alone that are halved.
    """
    last = groups[-1].end - ends.tail
    middles = [min(max((each.begin + each.end) // 2, ends.head), last) for each in groups]
    long = [
        place
        for place, group in enumerate(groups)
        if group.ns > longest_ns and group.begin < middles[place] < group.end
    ]
    room = max(0, most - len(groups))
    chosen = set(sorted(long, key=lambda place: -groups[place].ns)[:room])
    places: list[tuple[int, int]] = []
    for place, group in enumerate(groups):
        if place in chosen:
            places += [(group.begin, middles[place]), (middles[place], group.end)]
        else:
            places.append((group.begin, group.end))
    return places


def aimed_segment(
    driver: Driver, captured: Any, chain: Sequence[Any], begin: int, end: int, copies: Copies
) -> Graph:
    """A graph of some nodes that copies the first of `copies` if it has the first node; without any, none.

    The bytes that a graph was captured to copy are not the model's weights. With them in the place of its
    buffers, a model that indexes by a buffer could lose the device.
    """
    graph = driver.segment(captured, chain, begin, end, copies[0][0] if copies else None)
    if copies and not begin:
        graph.aim(*copies[0])
    return graph


def timed_groups(
    watch: Stopwatch,
    segment: Callable[[int, int], Graph],
    nodes: int,
    whole_ns: int,
    *,
    longest_ns: int,
    ends: Ends = WHOLE,
    count: int = _GROUPS,
    before: Sequence[Launch] = (),
) -> list[Group]:
    """Groups of a chain of `nodes` with their times: `count`, those halved that take over `longest_ns`.

    There are at most as many as can be timed at once; then the longest are halved.

    `segment` makes a graph of the nodes from one place to another; all of them take `whole_ns` as one graph.
    What is launched `before` them leaves memory as they expect it. Raises what `segment` raises.
    """
    most = MOST_TIMED - len(before)
    size = max(1, -(-nodes // min(most, count)))
    last = nodes - max(size, ends.tail)
    places = list(pairwise((0, *range(max(size, ends.head), last + 1, size), nodes)))
    made: dict[tuple[int, int], Graph] = {}
    try:
        for turn in range(_ROUNDS):
            for place in places:
                if place not in made:
                    made[place] = segment(*place)
            launches = [*before, *(made[place].launch for place in places)]
            times = watch.each(launches, whole_ns)[len(before) :]
            boundary_ns = max(0, sum(times) - whole_ns) // len(places)
            groups = [
                Group(*place, max(1, ns - boundary_ns))
                for place, ns in zip(places, times, strict=True)
            ]
            # Some room is left for halves that still take long.
            room = (most - len(groups)) // (1 if turn else 2)
            finer = halved(groups, longest_ns, ends, most=len(groups) + room)
            if finer == places or turn == _ROUNDS - 1:
                break
            places = finer
        return groups
    finally:
        for graph in made.values():
            graph.close()
