"""bursty_experiment: thousands of models on one GPU (Clockwork's client; OSDI'20 §6.2, Figure 6).

One minor instance has a steady rate. After a lead-in the major ones join it, one more each second,
and share a fixed total: the more of them are active, the rarer and colder each is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slosched.units import NS_PER_S, format_duration
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import RESNET50, Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import Piece, Poisson, poisson_pieces
from slosched.workloads.values import read_count, read_wait

NAME = "bursty_experiment"
GROUPS = ("major", "minor")
_JOIN_NS = NS_PER_S
_MAJOR_RATE = 1000.0
_MINOR_RATE = 200.0


@dataclass(frozen=True, slots=True)
class _Joining:
    """The share of major instance `index` of `count`: from when it joins until the end."""

    index: int
    count: int
    lead_in_ns: int

    def arrivals(self, seed: int) -> Iterator[int]:
        return poisson_pieces(self._pieces(), seed)

    def _pieces(self) -> Iterator[Piece]:
        at_ns = self.lead_in_ns + self.index * _JOIN_NS
        for active in range(self.index + 1, self.count + 1):
            yield at_ns, at_ns + _JOIN_NS, _MAJOR_RATE / active
            at_ns += _JOIN_NS


def parse_bursty_experiment(args: Sequence[str]) -> Composed:
    """Return the workload of (number of major models, lead-in). Raises InvalidConfig."""
    count = read_count("num-models", args[0])
    lead_in_ns = read_wait("lead-in", args[1])
    major = [OpenPart(_Joining(i, count, lead_in_ns), i, i) for i in range(count)]
    minor = OpenPart(Poisson(_MINOR_RATE), count, count, group=1)
    joining = f"{_MAJOR_RATE:g}/s over 1 to {count} models"
    steps = [Step(0, 0, label="lead-in"), Step(1, lead_in_ns, label=joining)]
    if not lead_in_ns:
        steps = [Step(0, 0, label=joining)]
    return Composed(
        name=NAME,
        args=tuple(args),
        sent=f"{count} + 1 x {RESNET50}, minor poisson {_MINOR_RATE:g}/s, from "
        f"{format_duration(lead_in_ns)} on major poisson {_MAJOR_RATE:g}/s in total, one more model "
        f"each {format_duration(_JOIN_NS)}",
        uses=(ModelUse(RESNET50, count + 1),),
        parts=(*major, minor),
        duration_ns=lead_in_ns + count * _JOIN_NS,
        groups=GROUPS,
        all_steps=tuple(steps),
    )


KIND = Kind(
    name=NAME,
    summary="Thousands of models that become active one by one (Clockwork, Figure 6).",
    parameters=(
        Parameter("NUM-MODELS", "number of major models, all copies of resnet50_v2", "3600"),
        Parameter("LEAD-IN", "time before the first of them; a bare number is in seconds", "300"),
    ),
    make=parse_bursty_experiment,
    text="A minor model gets 200 requests/s throughout. After LEAD-IN one more major model becomes active "
    "each second; all active ones share 1000 requests/s. The client ends when the last has been "
    "active for a second (the published code begins anew). LEAD-IN is 300 s as in the published "
    "code, whose notes say 15 minutes. Results are counted for each group. All requests have the "
    "controller's default SLO.",
    examples=("", "3600", "400 10s"),
)
