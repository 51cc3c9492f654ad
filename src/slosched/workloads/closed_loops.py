"""Clockwork's workloads of closed loops on copies of one model (client, workload/example.h)."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from slosched.units import NS_PER_S
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import RESNET50, ClosedPart, Composed
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.streams import Slo
from slosched.workloads.values import read_count, read_model

_MAX_REQUESTS = 10**12
_NEVER_ENDS = "It never ends by itself: say how long it runs (--duration 60s)."
_REFUSED = "A request that is refused early is followed by the next one when its deadline has come."


def _loops(
    name: str, args: Sequence[str], model: str, copies: int, concurrency: int, *, one_user: bool
) -> Composed:
    return Composed(
        name,
        tuple(args),
        f"{copies} x {model}, closed loops of {concurrency} each",
        (ModelUse(model, copies),),
        tuple(ClosedPart(concurrency, (i,), 0 if one_user else i) for i in range(copies)),
    )


def _spam(args: Sequence[str]) -> Composed:
    (model,) = args
    return _loops("spam", args, read_model("MODEL", model), 100, 100, one_user=True)


def _single_spam(args: Sequence[str]) -> Composed:
    return _loops("single-spam", args, RESNET50, 100, 1000, one_user=True)


def _simple(args: Sequence[str]) -> Composed:
    return _loops("simple", args, RESNET50, 2, 1, one_user=True)


def _comparison_experiment_2(args: Sequence[str]) -> Composed:
    models, concurrency = (
        read_count(name, text)
        for name, text in zip(("num-models", "concurrency"), args, strict=True)
    )
    return _loops("comparison_experiment2", args, RESNET50, models, concurrency, one_user=False)


def _simple_parametric(args: Sequence[str]) -> Composed:
    models = read_count("models", args[0])
    clients = read_count("clients", args[1])
    concurrency = read_count("concurrency", args[2])
    requests = read_count("requests", args[3], high=_MAX_REQUESTS)
    share = ceil(models / clients)
    parts = [
        ClosedPart(
            concurrency,
            tuple(range(client * share, min(models, (client + 1) * share))),
            client,
            requests=requests,
        )
        for client in range(clients)
        if client * share < models
    ]
    return Composed(
        "simple-parametric",
        tuple(args),
        f"{models} x {RESNET50} over {len(parts)} clients, closed loops of {concurrency}, "
        f"{requests} requests each",
        (ModelUse(RESNET50, models),),
        tuple(parts),
    )


# ------------------------------------------------------------------------------ simple-slo-factor

_SLO_PERIOD_NS = 10 * NS_PER_S
#: The factor that is multiplied passes a million then: no SLO is that long.
_SLO_STEPS = 56
_SLO_GROUPS = ("multiplied", "added", "back and forth")


def _simple_slo_factor(args: Sequence[str]) -> Composed:
    factors = (
        [4.0 * 1.25**step for step in range(_SLO_STEPS)],
        [4.0 + step for step in range(_SLO_STEPS)],
        [1.0 if step % 2 else 10.0 for step in range(_SLO_STEPS)],
    )
    slos: list[tuple[Slo, ...]] = [tuple((factor, 0) for factor in row) for row in factors]
    steps = tuple(
        Step(
            step,
            step * _SLO_PERIOD_NS,
            label=" / ".join(f"{row[step]:.4g}x" for row in factors),
        )
        for step in range(_SLO_STEPS)
    )
    return Composed(
        name="simple-slo-factor",
        args=tuple(args),
        sent=f"3 x {RESNET50}, closed loops of 1, SLO from 4x times 1.25, from 4x plus 1, and 10x or 1x",
        uses=(ModelUse(RESNET50, 3),),
        parts=tuple(ClosedPart(1, (i,), 0, group=i, slos=slos[i]) for i in range(3)),
        groups=_SLO_GROUPS,
        all_steps=steps,
    )


SPAM = Kind(
    name="spam",
    summary="100 copies of a model, each in a closed loop of 100.",
    parameters=(Parameter("MODEL", "a model's name", RESNET50),),
    make=_spam,
    text="All requests have the controller's default SLO. " + _NEVER_ENDS + _REFUSED,
    examples=("", "resnet50_v2"),
)
SINGLE_SPAM = Kind(
    name="single-spam",
    summary="100 copies of resnet50_v2, each in a closed loop of 1000.",
    parameters=(),
    make=_single_spam,
    text="Clockwork's help speaks of one copy; its code loads 100, and so does this. "
    + _NEVER_ENDS
    + _REFUSED,
    examples=("",),
)
SIMPLE = Kind(
    name="simple",
    summary="2 copies of resnet50_v2, each in a closed loop of 1.",
    parameters=(),
    make=_simple,
    text=_NEVER_ENDS + _REFUSED,
    examples=("",),
)
SIMPLE_SLO_FACTOR = Kind(
    name="simple-slo-factor",
    summary="3 copies in closed loops of 1, whose SLO factors change every 10 s.",
    parameters=(),
    make=_simple_slo_factor,
    text="One copy's factor starts at 4 and is multiplied by 1.25, one's starts at 4 and grows by 1, one's "
    "goes back and forth between 10 and 1 (the published code meant that, but stays at 1 after "
    "the first change). After 56 steps they stay. Results are counted for each copy. "
    + _NEVER_ENDS,
    examples=("",),
)
SIMPLE_PARAMETRIC = Kind(
    name="simple-parametric",
    summary="Copies of resnet50_v2 divided among closed-loop clients.",
    parameters=(
        Parameter("MODELS", "number of copies"),
        Parameter("CLIENTS", "number of clients that share them; each takes its own in turn"),
        Parameter("CONCURRENCY", "outstanding requests of each client"),
        Parameter("REQUESTS", "requests of each client, after which it stops"),
    ),
    make=_simple_parametric,
    text="Each client gets the same number of copies, rounded up; clients left without any are not "
    "started. The run ends soon after every client has stopped. " + _REFUSED,
    examples=("12 4 8 1000",),
)
COMPARISON_EXPERIMENT_2 = Kind(
    name="comparison_experiment2",
    summary="Copies of resnet50_v2, each in a closed loop (Clockwork, Figure 5).",
    parameters=(
        Parameter("NUM-MODELS", "number of copies", "15"),
        Parameter("CONCURRENCY", "outstanding requests of each copy", "16"),
    ),
    make=_comparison_experiment_2,
    text="All requests have the controller's default SLO, which is what the figure varies. "
    + _NEVER_ENDS
    + _REFUSED,
    examples=("", "15 16"),
)
