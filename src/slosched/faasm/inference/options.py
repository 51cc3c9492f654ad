"""What `slosched exp inference-latency` and `inference-throughput` take. Nothing heavy is imported."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Self

from msgspec import Meta

from slosched.errors import InvalidConfig, UnknownName
from slosched.faasm.inference.choices import RUNGS, SYSTEMS
from slosched.faasm.inference.cold import NEVER, cold_rule
from slosched.faasm.inference.network_options import Device, Network, Size
from slosched.field_types import AtLeast0, check_types
from slosched.options import Option
from slosched.units import NS_PER_MS, NS_PER_S, exact_duration, parse_duration_ns

#: The original's ladder of think times (experiments.tf-tpt), and how long it runs each.
LADDER_NS = {
    think_ms * NS_PER_MS: seconds * NS_PER_S
    for think_ms, seconds in (
        *((30_000, 180), (20_000, 160), (10_000, 140), (5_000, 120), (3_000, 100), (2_000, 100)),
        *((1_000, 100), (800, 80), (600, 80), (400, 60), (200, 60), (100, 60), (50, 60), (25, 60)),
    )
}
#: The original's runs at low load (experiments.tf-lat), by the interval of cold starts.
LATENCY_NS = {5: 480 * NS_PER_S, 50: 300 * NS_PER_S, 500: 200 * NS_PER_S}
_QUICK_NS = 2 * NS_PER_S
_FRACTIONS = tuple(each / 10 for each in range(1, 13))


@dataclass(frozen=True, kw_only=True)
class InferenceOptions:
    """What both take. Raises InvalidConfig when it is made with what cannot be."""

    systems: Annotated[
        tuple[str, ...],
        Option(help=f"Systems to compare, of {', '.join(SYSTEMS)}. Default all."),
    ] = ()
    size: Size = "full"
    network: Network = "auto"
    device: Device = "cpu"
    cold: Annotated[
        tuple[str, ...],
        Option(
            metavar="RULE,RULE",
            help="Which requests are cold: none; every:5 (or 5), each fifth of each instance and its first; "
            "20%, that share, drawn from the seed; user, the first of each user.",
        ),
    ] = ()
    rungs: Annotated[
        tuple[str, ...],
        Option(
            help="What a cold start is: L1 (weights are copied from host memory), L3 (a live process builds "
            "the network and reads its weights), L4 (a new process)."
        ),
    ] = ()
    workers: Annotated[
        int,
        Meta(ge=0, le=64),
        Option(
            help="Instances of each system: slots, or processes. Default 1 for latency, 2 for throughput."
        ),
    ] = 0
    delay_ns: Annotated[
        AtLeast0,
        Option(
            help="Mean of the EMULATED start of a container; the deviation is half of it.",
            may_be_0=True,
        ),
    ] = 800 * NS_PER_MS
    duration_ns: Annotated[
        AtLeast0, Option(help="Length of each run. Default by the scale: seconds, or as published.")
    ] = 0
    timeout_ns: Annotated[
        int,
        Meta(ge=NS_PER_MS, le=600 * NS_PER_S),
        Option(help="A request that is not answered by then is given up, and counted."),
    ] = 5 * NS_PER_S
    slo_ns: Annotated[
        AtLeast0,
        Option(
            help="SLO of slosched's requests. Default of throughput: the time-out; of latency: 500ms, in a run "
            "of its own, which shows what is refused."
        ),
    ] = 0
    seed: Annotated[
        int,
        Meta(ge=0, le=2**32 - 1),
        Option(help="Seed of weights, pictures, arrivals and cold requests."),
    ] = 7

    def __post_init__(self) -> None:
        check_types(self)
        for text in self.cold:
            cold_rule(text, instances=1, seed=0)
        for rung in self.rungs:
            if rung not in RUNGS:
                raise UnknownName("rung", rung, list(RUNGS))
        for name in self.systems:
            if name not in SYSTEMS:
                raise UnknownName("system", name, list(SYSTEMS))

    @property
    def rules(self) -> tuple[str, ...]:
        """The names of the rules in `cold`, each once."""
        return tuple(dict.fromkeys(cold_rule(each, instances=1, seed=0).name for each in self.cold))

    def run_ns(self, rung: str, published_ns: int) -> int:
        """How long a cell lasts: as given, as published, or else seconds; more at L4, to have cold starts."""
        quick_ns = 3 * _QUICK_NS if rung == "L4" else _QUICK_NS
        return self.duration_ns or published_ns or quick_ns


@dataclass(frozen=True, kw_only=True)
class LatencyOptions(InferenceOptions):
    """Low load: one connection, which thinks for U[0, think_ns] before each request."""

    think_ns: Annotated[
        AtLeast0,
        Option(help="The longest think time; each is drawn evenly from 0 to it.", may_be_0=True),
    ] = 5 * NS_PER_MS

    def at_scale(self, scale: str) -> Self:
        """With what the scale says in place of what was not given."""
        quick = scale == "quick"
        return dataclasses.replace(
            self,
            cold=self.cold or ((NEVER, "5") if quick else (NEVER, "5", "50", "500")),
            rungs=tuple(dict.fromkeys(self.rungs)) or RUNGS,
            workers=self.workers or 1,
            slo_ns=self.slo_ns or 500 * NS_PER_MS,
        )

    def lasts_ns(self, scale: str, rule: str, rung: str) -> int:
        """The length of a run."""
        interval = cold_rule(rule, instances=1, seed=0).interval
        return self.run_ns(
            rung, 0 if scale == "quick" else LATENCY_NS.get(interval, 200 * NS_PER_S)
        )


@dataclass(frozen=True, kw_only=True)
class ThroughputOptions(InferenceOptions):
    """Growing load: an open loop at `fractions` of each system's capacity, a closed one with `thinks`."""

    connections: Annotated[
        int, Meta(ge=1, le=1000), Option(help="Connections of the closed loop.")
    ] = 100
    fractions: Annotated[
        tuple[float, ...],
        Option(
            help="Rates of the open loop as parts of the system's capacity, which is measured first. Default "
            "at scale quick 0.3,0.7,1.1; at published 0.1 to 1.2."
        ),
    ] = ()
    thinks: Annotated[
        tuple[str, ...],
        Option(
            metavar="DURATION,DURATION",
            help="The longest think times of the closed loop. Default at scale quick 3s; at published the "
            "original's, 30s to 25ms.",
        ),
    ] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        for fraction in self.fractions:
            if not 0 < fraction <= 10:
                raise InvalidConfig(
                    f"a fraction of the capacity is above 0 and at most 10, not {fraction:g}"
                )
        for think_ns in self.thinks_ns:
            if think_ns < NS_PER_MS:
                raise InvalidConfig("a think time is at least 1ms")

    @property
    def thinks_ns(self) -> tuple[int, ...]:
        """The think times. Raises InvalidDuration."""
        return tuple(parse_duration_ns(each, bare_unit="s") for each in self.thinks)

    def at_scale(self, scale: str) -> Self:
        """With what the scale says in place of what was not given."""
        quick = scale == "quick"
        return dataclasses.replace(
            self,
            cold=self.cold
            or ((NEVER, "20%") if quick else (NEVER, "5", "10", "20", "40", "80", "500")),
            rungs=tuple(dict.fromkeys(self.rungs)) or ("L3",),
            workers=self.workers or 2,
            fractions=tuple(dict.fromkeys(self.fractions))
            or ((0.3, 0.7, 1.1) if quick else _FRACTIONS),
            thinks=tuple(map(exact_duration, dict.fromkeys(self.thinks_ns)))
            or (("3s",) if quick else tuple(map(exact_duration, LADDER_NS))),
            slo_ns=self.slo_ns or self.timeout_ns,
        )

    def lasts_ns(self, scale: str, rung: str, think_ns: int = 0) -> int:
        """The length of a run."""
        published_ns = LADDER_NS.get(think_ns, 60 * NS_PER_S) if think_ns else 30 * NS_PER_S
        return self.run_ns(rung, 0 if scale == "quick" else published_ns)
