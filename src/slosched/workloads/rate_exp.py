"""rate-exp and rate-list: a sweep of the rate at a fixed SLO. Not Clockwork's; slo-exp-1 turned round.

`copies` instances of one model share a total rate, each with its own stream of arrivals; each step has a
rate of its own. With scalability-exp-1 the model, the arrivals and the SLO cannot be chosen.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.errors import InvalidConfig, UnknownName
from slosched.units import format_duration
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import EvenPieces, Pieces, Process
from slosched.workloads.progression import check_progression, progression
from slosched.workloads.slo_exp_1 import DISTRIBUTIONS
from slosched.workloads.streams import Slo
from slosched.workloads.values import read_count, read_model, read_period, read_rate, read_slo

#: What each step sends: requests/s over all copies, and how long (ns).
Stage = tuple[float, int]
_NAMES = ("rate-start", "rate-end", "rate-change", "rate-op")
_MAX_RATES = 10_000


def rate_sweep(
    name: str,
    args: Sequence[str],
    *,
    model: str,
    copies: int,
    dist: str,
    slo: Slo,
    stages: Sequence[Stage],
) -> Composed:
    """The workload `name` whose steps are `stages`; `args` are its parameters as texts.

    Raises UnknownName for an unknown distribution.
    """
    if dist not in DISTRIBUTIONS:
        raise UnknownName("distribution", dist, list(DISTRIBUTIONS))
    factor, slo_ns = slo
    pieces, steps, start_ns = [], [], 0
    for index, (rate, length_ns) in enumerate(stages):
        pieces.append((start_ns, start_ns + length_ns, rate / copies))
        steps.append(Step(index, start_ns, factor, slo_ns, f"{rate:.6g}/s"))
        start_ns += length_ns
    process: Process = (Pieces if dist == "poisson" else EvenPieces)(tuple(pieces))
    text = Step(0, 0, factor, slo_ns).text
    slo_words = text if text.endswith("SLO") else f"SLO {text}"
    return Composed(
        name=name,
        args=tuple(args),
        sent=f"{copies} x {model}, {dist} {_rates_text(stages)}, {slo_words}",
        uses=(ModelUse(model, copies),),
        parts=tuple(OpenPart(process, copy, copy) for copy in range(copies)),
        duration_ns=start_ns,
        all_steps=tuple(steps),
    )


def _rates_text(stages: Sequence[Stage]) -> str:
    rates = [f"{rate:.6g}" for rate, _ in stages]
    lengths = dict.fromkeys(format_duration(length_ns) for _, length_ns in stages)
    if len(rates) <= 8:
        *others, last = rates
        shown = f"{', '.join(others)} and {last}/s" if others else f"{last}/s"
    else:
        shown = f"{rates[0]}/s to {rates[-1]}/s"
    steps = f"{len(rates)} steps" if len(rates) > 1 else "one step"
    return f"{shown} in total, in {steps} of {' and '.join(lengths)}"


def _rate_exp(args: Sequence[str]) -> Composed:
    model, copies, dist, slo, *rates, operator, period = args
    low, high, change = (read_rate(n, t) for n, t in zip(_NAMES[:3], rates, strict=True))
    check_progression(low, high, change, operator, names=_NAMES)
    period_ns = read_period("period", period)
    return rate_sweep(
        "rate-exp",
        args,
        model=read_model("MODEL", model),
        copies=read_count("copies", copies),
        dist=dist,
        slo=read_slo("slo", slo),
        stages=[(float(rate), period_ns) for rate in progression(low, high, change, operator)],
    )


def _rate_list(args: Sequence[str]) -> Composed:
    model, copies, dist, slo, listed, period = args
    rates = [read_rate("rates", text.strip()) for text in listed.split(",")]
    if len(rates) > _MAX_RATES:
        raise InvalidConfig(f"rates must be at most {_MAX_RATES}, not {len(rates)}")
    period_ns = read_period("period", period)
    return rate_sweep(
        "rate-list",
        args,
        model=read_model("MODEL", model),
        copies=read_count("copies", copies),
        dist=dist,
        slo=read_slo("slo", slo),
        stages=[(rate, period_ns) for rate in rates],
    )


_FIRST = (
    Parameter("MODEL", "a model's name, for example resnet50_v2"),
    Parameter("COPIES", "number of instances of the model, each with its own stream of arrivals"),
    Parameter("DIST", "poisson or fixed-rate"),
    Parameter(
        "SLO", "a multiple of the batch-1 time (2.9), a duration (25ms), or 0: the default SLO"
    ),
)
_PERIOD = Parameter("PERIOD", "length of a step; a bare number is in seconds")
_TEXT = (
    "Requests go out when they are due, whatever became of earlier ones. The table and the sentence "
    "below it say at which rates 99 % are in time, with 99 % confidence (docs/verdicts.md): a step "
    "needs some thousand requests for that. `slosched client max-rate` looks for the highest such rate."
)

KINDS = (
    Kind(
        name="rate-exp",
        summary="Sweep the rate over copies of one model at a fixed SLO, with an open loop.",
        parameters=(
            *_FIRST,
            Parameter("RATE-START", "first rate: requests/s in total, over all copies"),
            Parameter("RATE-END", "last rate, included"),
            Parameter("RATE-CHANGE", "what changes it: a factor, or requests/s"),
            Parameter("RATE-OP", "mul or add"),
            _PERIOD,
        ),
        make=_rate_exp,
        text=f"Every PERIOD the rate is multiplied by RATE-CHANGE, or grows by it, until it would pass "
        f"RATE-END. {_TEXT}",
        examples=(
            "resnet50_v2 1 poisson 25ms 400 1000 50 add 10",
            "resnet50_v2 12 poisson 5.1 100 3200 2 mul 30s",
        ),
    ),
    Kind(
        name="rate-list",
        summary="The rates of a list over copies of one model at a fixed SLO, with an open loop.",
        parameters=(
            *_FIRST,
            Parameter(
                "RATES", "requests/s in total, over all copies; a step for each: 300,600,790"
            ),
            _PERIOD,
        ),
        make=_rate_list,
        text=_TEXT,
        examples=("resnet50_v2 1 poisson 25ms 300,600,790,820,850 10",),
    ),
)
