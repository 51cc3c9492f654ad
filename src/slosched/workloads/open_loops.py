"""Clockwork's workloads of Poisson open loops on copies of one model (client, workload/example.h)."""

from __future__ import annotations

from collections.abc import Sequence

from slosched.workloads.base import ModelUse
from slosched.workloads.composed import RESNET50, Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import Poisson
from slosched.workloads.values import read_count, read_rate

_NEVER_ENDS = "It never ends by itself: say how long it runs (--duration 60s)."
_COPIES = Parameter("NUM-MODELS", "number of copies, each with its own stream of arrivals")


def _poisson(name: str, args: Sequence[str], sent: str, rates: Sequence[float]) -> Composed:
    """Instance i gets `rates[i]` requests/s and the user id i."""
    return Composed(
        name,
        tuple(args),
        sent,
        (ModelUse(RESNET50, len(rates)),),
        tuple(OpenPart(Poisson(rate), i, i) for i, rate in enumerate(rates)),
    )


def _shared(name: str, args: Sequence[str], rate_name: str) -> Composed:
    copies = read_count("num-models", args[0])
    rate = read_rate(rate_name, args[1])
    sent = f"{copies} x {RESNET50}, poisson {rate:g}/s in total"
    return _poisson(name, args, sent, [rate / copies] * copies)


def _poisson_open_loop(args: Sequence[str]) -> Composed:
    return _shared("poisson-open-loop", args, "rate")


def _comparison_experiment(args: Sequence[str]) -> Composed:
    return _shared("comparison_experiment", args, "total-requests")


def _fill_memory(args: Sequence[str]) -> Composed:
    sent = f"411 x {RESNET50}, poisson: one at 1000/s, ten at 10/s each, 400 at 1/s each"
    return _poisson("fill_memory", args, sent, [1000.0] + [10.0] * 10 + [1.0] * 400)


POISSON_OPEN_LOOP = Kind(
    name="poisson-open-loop",
    summary="Copies of resnet50_v2, each with Poisson arrivals.",
    parameters=(_COPIES, Parameter("RATE", "requests/s in total, over all copies")),
    make=_poisson_open_loop,
    text="All requests have the controller's default SLO. " + _NEVER_ENDS,
    examples=("12 600",),
)
COMPARISON_EXPERIMENT = Kind(
    name="comparison_experiment",
    summary="Copies of resnet50_v2 that share a Poisson rate.",
    parameters=(
        Parameter(_COPIES.name, _COPIES.help, "15"),
        Parameter("TOTAL-REQUESTS", "requests/s in total, over all copies", "1000"),
    ),
    make=_comparison_experiment,
    text="All requests have the controller's default SLO. " + _NEVER_ENDS,
    examples=("", "15 1000"),
)
FILL_MEMORY = Kind(
    name="fill_memory",
    summary="411 copies of resnet50_v2, more than fit in the memory of one GPU.",
    parameters=(),
    make=_fill_memory,
    text="One copy gets 1000/s, ten get 10/s each and 400 get 1/s each, all Poisson (Clockwork's help "
    "speaks of 500 copies and closed loops; this is its code). " + _NEVER_ENDS,
    examples=("",),
)
