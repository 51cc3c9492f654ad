"""slo-exp-1: a sweep of SLOs over several copies of one model (Clockwork's client; OSDI'20 §6.3).

`copies` instances of one model share a total rate, each with its own stream of arrivals. All start
at `slo_start`; each period the SLO is multiplied by, or grows by, `slo_factor`, until it would
exceed `slo_end`. The seed of Figure 7, `1 100 1.5 mul 30`, is twelve steps and 360 s.

SLOs are multiples of the model's batch-1 exec time (`1`, `2.9`), or durations (`10ms`) when
`slo_start` and `slo_end` both are written so. Clockwork reads integers there and cuts "2.9" to 2;
decimals are taken as written here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal

from slosched.errors import InvalidConfig, UnknownName
from slosched.units import format_duration, has_unit, parse_duration_ns
from slosched.workloads.arrivals import Arrivals, FixedRateArrivals, PoissonArrivals
from slosched.workloads.base import Arrival, ModelUse, Step, instance_seed
from slosched.workloads.engine import open_loop_arrivals
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.progression import OPERATORS, check_progression, progression
from slosched.workloads.streams import OpenLoop
from slosched.workloads.values import (
    MAX_COUNT,
    MAX_SLO_FACTOR,
    read_integer,
    read_number,
    read_period,
)

NAME = "slo-exp-1"
PARAMETERS = (
    Parameter("MODEL", "a model's name, for example resnet50_v2"),
    Parameter("COPIES", "number of instances of the model, each with its own stream of arrivals"),
    Parameter("DIST", "poisson or fixed-rate"),
    Parameter("RATE", "requests/s in total, over all copies"),
    Parameter(
        "SLO-START",
        "first SLO: a multiple of the model's batch-1 time (1, 2.9), or a duration (10ms)",
    ),
    Parameter("SLO-END", "last SLO, included; written as SLO-START is"),
    Parameter("SLO-FACTOR", "what changes it: a number, or a duration to add to a duration"),
    Parameter("SLO-OP", "mul or add"),
    Parameter("PERIOD", "time between changes; a bare number is in seconds"),
)
TEXT = (
    "Requests go out when they are due, whatever became of earlier ones. All start with SLO-START; "
    "every PERIOD the SLO is multiplied by SLO-FACTOR, or grows by it, until it would pass SLO-END. "
    "The client then ends by itself."
)
EXAMPLES = (
    "resnet50_v2 12 poisson 600 1 100 1.5 mul 30",
    "resnet50_v2 4 poisson 100 2 32 2 mul 7",
    "resnet50_v2 4 poisson 100 10ms 100ms 10ms add 3s",
)
DISTRIBUTIONS = ("poisson", "fixed-rate")
_SLO_NAMES = ("slo-start", "slo-end", "slo-factor", "slo-op")


@dataclass(frozen=True)
class SloExp1:
    """The parameters of slo-exp-1. `rate` is the total, in requests/s.

    With `absolute` set, `slo_start` and `slo_end` are in ns, and so is `slo_factor` for "add".
    Raises InvalidConfig (UnknownName for a distribution or operator) when made with values that
    mean nothing or would never end.
    """

    model: str
    copies: int
    dist: str
    rate: float
    slo_start: float
    slo_end: float
    slo_factor: float
    slo_op: str
    period_ns: int
    absolute: bool = False

    def __post_init__(self) -> None:
        if not self.model:
            raise InvalidConfig("the model's name is empty")
        if not 1 <= self.copies <= MAX_COUNT:
            raise InvalidConfig(f"copies must be within 1..{MAX_COUNT}, not {self.copies}")
        if self.dist not in DISTRIBUTIONS:
            raise UnknownName("distribution", self.dist, list(DISTRIBUTIONS))
        if not math.isfinite(self.rate) or self.rate <= 0:
            raise InvalidConfig(f"rate must be a finite number > 0, not {self.rate:g}")
        # Too many steps are found here, not in the middle of a run.
        check_progression(
            self.slo_start, self.slo_end, self.slo_factor, self.slo_op, names=_SLO_NAMES
        )
        if not self.absolute and self.slo_end > MAX_SLO_FACTOR:
            raise InvalidConfig(
                f"slo-end must be at most {MAX_SLO_FACTOR:g} times the exec time, not {self.slo_end:g}"
            )
        if self.absolute and self.slo_end >= 2**62:
            raise InvalidConfig("slo-end must be below 146 years")
        if self.period_ns < 1:
            raise InvalidConfig("the period must be above 0")

    def _slos(self) -> tuple[Decimal, ...]:
        return progression(self.slo_start, self.slo_end, self.slo_factor, self.slo_op)

    @property
    def name(self) -> str:
        return NAME

    @property
    def groups(self) -> tuple[str, ...]:
        return ("",)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse(self.model, self.copies),)

    def steps(self) -> tuple[Step, ...]:
        """The steps in order; the last one's SLO is at most `slo_end`."""
        return tuple(
            Step(index, index * self.period_ns, slo_ns=max(1, round(slo)))
            if self.absolute
            else Step(index, index * self.period_ns, slo_factor=float(slo))
            for index, slo in enumerate(self._slos())
        )

    @property
    def duration_ns(self) -> int:
        """How long requests are sent; nothing arrives at or after it."""
        return len(self._slos()) * self.period_ns

    def streams(self, seed: int) -> tuple[OpenLoop, ...]:
        """One open loop for each copy; `user_id` is its number."""
        return tuple(
            OpenLoop(self._stream(seed, copy), (copy,), user_id=copy) for copy in range(self.copies)
        )

    def arrivals(self, seed: int = 0) -> Iterator[Arrival]:
        """Every request of the sweep in time order, and by instance where times are equal.

        The SLO is that of the step in which the request is due. The same seed gives the same
        requests, live or simulated.
        """
        return open_loop_arrivals(self, seed=seed)

    def _stream(self, seed: int, instance: int) -> Arrivals:
        rate = self.rate / self.copies
        if self.dist == "poisson":
            return PoissonArrivals(rate, instance_seed(seed, instance))
        return FixedRateArrivals(rate)

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        slos = self.steps()
        return (
            f"{NAME}: {self.copies} x {self.model}, {self.dist} {self.rate:g}/s in total, SLO "
            f"{slos[0].text} to {slos[-1].text} in {len(slos)} steps of "
            f"{format_duration(self.period_ns)}, {format_duration(self.duration_ns)} in all"
        )


# ------------------------------------------------------------------------------------- parsing


def parse_slo_exp_1(args: Sequence[str]) -> SloExp1:
    """Return the workload that the nine positional texts of the seed's command describe.

    A bare PERIOD is in seconds. Raises InvalidConfig, InvalidDuration or UnknownName, naming the
    parameter and what it takes.
    """
    model, copies, dist, rate, slo_start, slo_end, slo_factor, slo_op, period = args
    if slo_op not in OPERATORS:
        raise UnknownName("slo-op", slo_op, list(OPERATORS))
    absolute = has_unit(slo_start)
    if absolute != has_unit(slo_end):
        raise InvalidConfig(
            f"slo-start {slo_start!r} and slo-end {slo_end!r} must both be multiples of the exec "
            "time (1, 2.9) or both durations (10ms)"
        )
    if slo_op == "add" and absolute != has_unit(slo_factor):
        wanted = "a duration (5ms)" if absolute else "a bare number (10)"
        raise InvalidConfig(f"slo-factor {slo_factor!r} must be {wanted}, as slo-start is")
    factor_is_time = absolute and slo_op == "add"
    return SloExp1(
        model=model,
        copies=read_integer("copies", copies),
        dist=dist,
        rate=read_number("rate", rate),
        slo_start=_slo("slo-start", slo_start, absolute),
        slo_end=_slo("slo-end", slo_end, absolute),
        slo_factor=_slo("slo-factor", slo_factor, factor_is_time),
        slo_op=slo_op,
        period_ns=read_period("the period", period),
        absolute=absolute,
    )


def _slo(name: str, text: str, is_time: bool) -> float:
    # A float is exact here: 2**53 ns are 104 days.
    return float(parse_duration_ns(text, bare_unit="s")) if is_time else read_number(name, text)


KIND = Kind(
    name=NAME,
    summary="Sweep the SLO over copies of one model, with an open loop (Clockwork, Figure 7).",
    parameters=PARAMETERS,
    make=parse_slo_exp_1,
    text=TEXT,
    examples=EXAMPLES,
)
