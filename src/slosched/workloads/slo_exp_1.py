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
from decimal import Context, Decimal

from slosched.errors import InvalidConfig, UnknownName
from slosched.units import NS_PER_S, format_duration, has_unit, parse_duration_ns
from slosched.workloads.arrivals import Arrivals, FixedRateArrivals, PoissonArrivals
from slosched.workloads.base import Arrival, ModelUse, Step, instance_seed
from slosched.workloads.engine import open_loop_arrivals
from slosched.workloads.streams import OpenLoop

NAME = "slo-exp-1"
#: Name -> what it is.
PARAMETERS = {
    "MODEL": "a model's name, for example resnet50_v2",
    "COPIES": "number of instances of the model, each with its own stream of arrivals",
    "DIST": "poisson or fixed-rate",
    "RATE": "requests/s in total, over all copies",
    "SLO-START": "first SLO: a multiple of the model's batch-1 time (1, 2.9), or a duration (10ms)",
    "SLO-END": "last SLO, included; written as SLO-START is",
    "SLO-FACTOR": "what changes it: a number, or a duration to add to a duration",
    "SLO-OP": "mul or add",
    "PERIOD": "time between changes; a bare number is in seconds",
}
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
OPERATORS = ("mul", "add")
_MAX_STEPS = 10_000
_MAX_COPIES = 100_000
#: Own precision, so that a caller's decimal context cannot move a step.
_DECIMAL = Context(prec=50)
#: An end that is written as a rounded number ("86.497558") still counts as reached.
_END_SLACK = Decimal("1.000000001")


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
        if not 1 <= self.copies <= _MAX_COPIES:
            raise InvalidConfig(f"copies must be within 1..{_MAX_COPIES}, not {self.copies}")
        if self.dist not in DISTRIBUTIONS:
            raise UnknownName("distribution", self.dist, list(DISTRIBUTIONS))
        if self.slo_op not in OPERATORS:
            raise UnknownName("slo-op", self.slo_op, list(OPERATORS))
        for name in ("rate", "slo_start", "slo_end", "slo_factor"):
            value = getattr(self, name)
            if not math.isfinite(value) or value <= 0:
                written = name.replace("_", "-")
                raise InvalidConfig(f"{written} must be a finite number > 0, not {value:g}")
        if self.absolute and self.slo_end >= 2**62:
            raise InvalidConfig("slo-end must be below 146 years")
        if self.slo_end < self.slo_start:
            raise InvalidConfig("slo-end is below slo-start: the sweep would have no step")
        if self.slo_op == "mul" and self.slo_factor <= 1:
            raise InvalidConfig(
                f"slo-factor must be above 1 with slo-op mul, not {self.slo_factor:g}: "
                "the SLO would never pass slo-end"
            )
        if self.period_ns < 1:
            raise InvalidConfig("the period must be above 0")
        self._slos()  # too many steps are found here, not in the middle of a run

    def _slos(self) -> list[Decimal]:
        """Every step's SLO. In Decimal 0.1 + 0.1 + 0.1 reaches 0.3, so an inclusive end holds."""
        slo, end, change = (
            Decimal(str(v)) for v in (self.slo_start, self.slo_end, self.slo_factor)
        )
        limit = _DECIMAL.multiply(end, _END_SLACK)
        apply = _DECIMAL.multiply if self.slo_op == "mul" else _DECIMAL.add
        slos: list[Decimal] = []
        while slo <= limit:
            if len(slos) == _MAX_STEPS:
                raise InvalidConfig(
                    f"the sweep has more than {_MAX_STEPS} steps; take a larger slo-factor"
                )
            slos.append(slo)
            slo = apply(slo, change)
        return slos

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
        copies=_integer("copies", copies),
        dist=dist,
        rate=_number("rate", rate),
        slo_start=_slo("slo-start", slo_start, absolute),
        slo_end=_slo("slo-end", slo_end, absolute),
        slo_factor=_slo("slo-factor", slo_factor, factor_is_time),
        slo_op=slo_op,
        period_ns=_period(period),
        absolute=absolute,
    )


def _slo(name: str, text: str, is_time: bool) -> float:
    # A float is exact here: 2**53 ns are 104 days.
    return float(parse_duration_ns(text, bare_unit="ns")) if is_time else _number(name, text)


def _period(text: str) -> int:
    period_ns = parse_duration_ns(text, bare_unit="s")
    if not 0 < period_ns <= 10**6 * NS_PER_S:
        raise InvalidConfig(f"the period must be above 0 and at most 10^6 s, not {text!r}")
    return period_ns


def _integer(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise InvalidConfig(f"{name} must be a whole number, not {text!r}") from None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise InvalidConfig(f"{name} must be a number, not {text!r}") from None
