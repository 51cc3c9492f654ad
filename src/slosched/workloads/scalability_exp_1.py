"""scalability-exp-1: a sweep of the rate over copies of one model (Clockwork's client)."""

from __future__ import annotations

from collections.abc import Sequence

from slosched.units import format_duration
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import RESNET50, Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import Pieces
from slosched.workloads.progression import check_progression, progression
from slosched.workloads.values import read_count, read_period, read_rate

NAME = "scalability-exp-1"
_NAMES = ("rate-min", "rate-max", "rate-factor", "rate-op")


def parse_scalability_exp_1(args: Sequence[str]) -> Composed:
    """Return the workload of the six positional texts. Raises InvalidConfig, UnknownName."""
    models, *rates, operator, period = args
    copies = read_count("num-models", models)
    low, high, change = (read_rate(n, t) for n, t in zip(_NAMES[:3], rates, strict=True))
    check_progression(low, high, change, operator, names=_NAMES)
    period_ns = read_period("period", period)
    totals = [float(total) for total in progression(low, high, change, operator)]
    pieces = tuple(
        (index * period_ns, (index + 1) * period_ns, total / copies)
        for index, total in enumerate(totals)
    )
    return Composed(
        name=NAME,
        args=tuple(args),
        sent=f"{copies} x {RESNET50}, poisson {totals[0]:.4g}/s to {totals[-1]:.4g}/s in total, in "
        f"{len(totals)} steps of {format_duration(period_ns)}",
        uses=(ModelUse(RESNET50, copies),),
        parts=tuple(OpenPart(Pieces(pieces), i, i) for i in range(copies)),
        duration_ns=len(totals) * period_ns,
        all_steps=tuple(
            Step(index, index * period_ns, label=f"{total:.4g}/s")
            for index, total in enumerate(totals)
        ),
    )


KIND = Kind(
    name=NAME,
    summary="Sweep the rate over copies of resnet50_v2, with an open loop.",
    parameters=(
        Parameter("NUM-MODELS", "number of copies, each with its own stream of arrivals"),
        Parameter("RATE-MIN", "first rate: requests/s in total, over all copies"),
        Parameter("RATE-MAX", "last rate, included"),
        Parameter("RATE-FACTOR", "what changes it"),
        Parameter("RATE-OP", "add or mul"),
        Parameter("PERIOD", "time between changes; a bare number is in seconds"),
    ),
    make=parse_scalability_exp_1,
    text="Arrivals are Poisson; every PERIOD the total rate is multiplied by RATE-FACTOR, or grows by it, "
    "until it would pass RATE-MAX. The client then ends by itself. A gap that spans a change is "
    "rescaled at it, so that each step has its exact rate. All requests have the controller's "
    "default SLO.",
    examples=("12 100 3200 2 mul 30", "12 500 5000 500 add 10s"),
)
