"""slo-exp-2: slo-exp-1 in the foreground, closed loops in the background (OSDI'20 §6.4, Figure 8)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.base import ModelUse, Step, Stream
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.slo_exp_1 import PARAMETERS, SloExp1, parse_slo_exp_1
from slosched.workloads.streams import ClosedLoop, Slo
from slosched.workloads.values import read_count, read_slo

NAME = "slo-exp-2"
GROUPS = ("foreground", "background")
#: When the background begins (Clockwork: the closed loops' "jitter").
_BACKGROUND_STARTS_NS = 10 * NS_PER_S


@dataclass(frozen=True)
class SloExp2:
    """`foreground` and `copies_bg` copies of its model in closed loops of `concurrency_bg`.

    `slo_bg` is (factor, ns) of every background request; both 0: the controller's default. The
    foreground's instances and user ids come first. Raises InvalidConfig for a background without
    requests.
    """

    foreground: SloExp1
    copies_bg: int
    concurrency_bg: int
    slo_bg: Slo

    def __post_init__(self) -> None:
        if self.copies_bg and not self.concurrency_bg:
            raise InvalidConfig("concurrency-bg must be at least 1 where copies-bg is not 0")

    @property
    def name(self) -> str:
        return NAME

    @property
    def groups(self) -> tuple[str, ...]:
        return GROUPS

    @property
    def duration_ns(self) -> int:
        """The foreground's; the background ends with it."""
        return self.foreground.duration_ns

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse(self.foreground.model, self.foreground.copies + self.copies_bg),)

    def steps(self) -> tuple[Step, ...]:
        """The foreground's; the background's SLO is its own throughout."""
        return self.foreground.steps()

    def streams(self, seed: int) -> tuple[Stream, ...]:
        """The foreground's open loops, then a closed loop for each background copy."""
        first = self.foreground.copies
        background = tuple(
            ClosedLoop(
                self.concurrency_bg,
                (instance,),
                user_id=instance,
                group=1,
                slo=self.slo_bg,
                delay_ns=_BACKGROUND_STARTS_NS,
            )
            for instance in range(first, first + self.copies_bg)
        )
        return (*self.foreground.streams(seed), *background)

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        _, _, foreground = self.foreground.describe().partition(": ")
        factor, slo_ns = self.slo_bg
        slo = format_duration(slo_ns) if slo_ns else f"{factor:g}x" if factor else "default"
        background = "no background"
        if self.copies_bg:
            background = (
                f"{self.copies_bg} copies in closed loops of {self.concurrency_bg} with SLO {slo} "
                f"from {format_duration(_BACKGROUND_STARTS_NS)}"
            )
        return f"{NAME}: {foreground}; background: {background}"


def parse_slo_exp_2(args: Sequence[str]) -> SloExp2:
    """Return the workload of the twelve positional texts. Raises what parse_slo_exp_1 raises."""
    copies, concurrency, slo = args[9:]
    return SloExp2(
        parse_slo_exp_1(args[:9]),
        read_count("copies-bg", copies, low=0),
        read_count("concurrency-bg", concurrency, low=0),
        read_slo("slo-bg", slo),
    )


def _foreground(parameter: Parameter) -> Parameter:
    if parameter.name == "MODEL":
        return parameter
    return Parameter(f"{parameter.name}-FG", parameter.help)


KIND = Kind(
    name=NAME,
    summary="A sweep of SLOs in the foreground beside closed loops (Clockwork, Figure 8).",
    parameters=(
        *(_foreground(parameter) for parameter in PARAMETERS),
        Parameter("COPIES-BG", "number of background instances; 0 for none"),
        Parameter("CONCURRENCY-BG", "outstanding requests of each background instance"),
        Parameter("SLO-BG", "their SLO: a multiple, a duration, or 0 for the controller's default"),
    ),
    make=parse_slo_exp_2,
    text="The foreground is slo-exp-1, and RATE-FG is the rate of all its copies together. The background's "
    "closed loops start 10 s later and end with it; what is refused early is followed at its "
    "deadline. Results are counted for each group.",
    examples=(
        "resnet50_v2 2 poisson 200 2 32 2 mul 7 4 1 100",
        "resnet50_v2 6 poisson 200 1 100 1.5 mul 30 12 16 0",
    ),
)
