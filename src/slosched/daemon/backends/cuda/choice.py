"""Which cut of a run is taken, and what is wished for it.

A run may be slower than the whole graph by at most `SLOWER`; within that, the length of segments (tau) and the
number in flight are taken that cost the least:

    (1 - S) slower + S waiting / SLO

where S is the part of the GPU time that urgent requests are expected to take (their rate times their exec
time), SLO is theirs (`Aim`), `slower` is the part by which the run is slower, and `waiting` is the mean time
from a random moment of the run until it can be interrupted. So both terms are parts of the GPU time: what the
boundaries take from the long model, and what urgent requests lose as far as waiting uses up their SLOs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slosched.daemon.backends.cuda.program import Cut
from slosched.units import NS_PER_MS, NS_PER_US

#: How much slower a run in segments may be than the whole graph; and where a boundary costs the GPU so much
#: that useful segments would exceed it.
SLOWER, SLOWER_WHERE_COSTLY, COSTLY_NS = 0.02, 0.03, 6 * NS_PER_US
#: The lengths of segments that are tried, shortest first.
TAUS_NS = tuple(us * NS_PER_US for us in (130, 180, 260, 370, 520, 740, 1_050, 1_500, 3_000))
#: Steps that take this long are segments, without a comparison with the whole run, which takes seconds.
LONG_STEP_NS = 3_000 * NS_PER_US
#: A model with a class that takes longer is cut, unless its table says a boundary: then one of four boundaries.
CUT_FROM_NS = 1_000 * NS_PER_US
BOUNDARIES = 4

TOO_SLOW = f"boundaries would slow it down by more than {SLOWER:.0%}"


class Wish(NamedTuple):
    """What the worker's file says of a model; 0: it is chosen by measurement.

    `part_ns`: the parts of a model in steps that take longer are cut too, into pieces of about this length. 0:
    it is cut between its parts alone, as profiles, emulated GPUs and policies of cascades have it.
    """

    boundary_ns: int = 0
    in_flight: int = 0
    urgent: bool = False
    part_ns: int = 0

    @property
    def cut_from_ns(self) -> int:
        """Classes that take longer are cut."""
        return BOUNDARIES * self.boundary_ns or CUT_FROM_NS


@dataclass(frozen=True, slots=True)
class Aim:
    """What is expected of urgent requests: their part of the GPU time (0 to 1), and their SLO."""

    share: float = 0.5
    slo_ns: int = 10 * NS_PER_MS

    def loss(self, slower: float, wait_ns: float) -> float:
        """What boundaries cost; see the head of this file."""
        return (1 - self.share) * slower + self.share * wait_ns / self.slo_ns


class Choice(NamedTuple):
    """A cut, and what its boundaries cost."""

    loss: float
    cut: Cut


def waiting_ns(segment_ns: Sequence[int], in_flight: int) -> float:
    """The mean time from a random moment of a run until those of its segments have ended that are in flight."""
    whole_ns = sum(segment_ns)
    waits = 0.0
    for place, ns in enumerate(segment_ns):
        waits += ns * (ns / 2 + sum(segment_ns[place + 1 : place + in_flight]))
    return waits / whole_ns


def chosen(
    bounds: tuple[int, ...],
    times: Sequence[int],
    bubble_ns: int,
    wish: Wish,
    *,
    whole_ns: int,
    aim: Aim,
) -> Choice | None:
    """How segments that took `times` back to back are best run; None if they are too slow.

    A boundary costs `bubble_ns` more with one in flight. A boundary that was asked for is had in any case.
    """
    behind_ns = (sum(times) - whole_ns) / len(bounds)
    most = SLOWER_WHERE_COSTLY if behind_ns >= COSTLY_NS else SLOWER
    found: list[Choice] = []
    for in_flight, bubble in ((1, bubble_ns), (2, 0)):
        asked = wish.in_flight in (0, in_flight)
        forced = wish.boundary_ns and in_flight == (wish.in_flight or 2)
        slower = (behind_ns + bubble) * len(bounds) / whole_ns
        if asked and (forced or slower <= most):
            cut = Cut(bounds, tuple(times), in_flight, bubble)
            found.append(Choice(aim.loss(slower, waiting_ns(times, in_flight)), cut))
    return min(found, key=lambda choice: choice.loss, default=None)
