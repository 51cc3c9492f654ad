"""A workload put together from parts: each part is one stream, as plain data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from slosched.errors import InvalidConfig
from slosched.units import format_duration
from slosched.workloads.base import ClientUse, ModelUse, Step, Stream, Workload, instance_seed
from slosched.workloads.lengths import Lengths
from slosched.workloads.processes import Process
from slosched.workloads.streams import BurstyClosedLoop, ClosedLoop, OpenLoop, Slo

#: The model of Clockwork's experiments.
RESNET50 = "resnet50_v2"
DEFAULT_SLO: Slo = (0.0, 0)
ONE_STEP = (Step(0, 0),)


@dataclass(frozen=True, slots=True)
class OpenPart:
    """An open loop on one instance."""

    process: Process
    instance: int
    user_id: int
    group: int = 0
    slo: Slo | None = None
    lengths: Lengths | None = None

    def stream(self, seed: int) -> Stream:
        """A new stream for one run."""
        return OpenLoop(
            self.process.arrivals(seed),
            (self.instance,),
            user_id=self.user_id,
            group=self.group,
            slo=self.slo,
            lengths=None if self.lengths is None else self.lengths.draws(seed),
        )


@dataclass(frozen=True, slots=True)
class ClosedPart:
    """A closed loop on one or more instances in turn. `slos` are by step; empty: each step's own."""

    concurrency: int
    instances: tuple[int, ...]
    user_id: int
    group: int = 0
    slo: Slo | None = None
    slos: tuple[Slo, ...] = ()
    requests: int = 0
    delay_ns: int = 0

    def stream(self, seed: int) -> Stream:
        """A new stream for one run; nothing in it depends on the seed."""
        return ClosedLoop(
            self.concurrency,
            self.instances,
            user_id=self.user_id,
            group=self.group,
            slo=self.slo,
            slos=self.slos,
            requests=self.requests,
            delay_ns=self.delay_ns,
        )


@dataclass(frozen=True, slots=True)
class BurstyClosedPart:
    """A closed loop on one instance, on and off."""

    concurrency: int
    instance: int
    user_id: int
    burst_ns: int

    def stream(self, seed: int) -> Stream:
        """A new stream for one run."""
        return BurstyClosedLoop(
            self.concurrency,
            (self.instance,),
            burst_ns=self.burst_ns,
            seed=seed,
            user_id=self.user_id,
        )


Part = OpenPart | ClosedPart | BurstyClosedPart


@dataclass(frozen=True)
class Composed:
    """A workload whose streams are `parts`, in order; stream i has the seed of its number.

    `args` are all its parameters as texts, so that name and args say everything; `sent` says in
    words what is sent.
    """

    name: str
    args: tuple[str, ...]
    sent: str
    uses: tuple[ModelUse, ...] = field(repr=False)
    parts: tuple[Part, ...] = field(repr=False)
    duration_ns: int | None = None
    groups: tuple[str, ...] = ("",)
    all_steps: tuple[Step, ...] = field(default=ONE_STEP, repr=False)
    #: Who sends each group; empty: the one client.
    senders: tuple[ClientUse, ...] = ()

    def models(self) -> tuple[ModelUse, ...]:
        return self.uses

    def steps(self) -> tuple[Step, ...]:
        return self.all_steps

    def streams(self, seed: int) -> Sequence[Stream]:
        """New streams for one run."""
        return tuple(
            part.stream(instance_seed(seed, index)) for index, part in enumerate(self.parts)
        )

    def describe(self) -> str:
        """The workload in one line: what is sent, how fast and how long."""
        ends = "until it is stopped"
        if self.duration_ns is not None:
            ends = f"{format_duration(self.duration_ns)} in all"
        return f"{self.name}: {self.sent}, {ends}"


@dataclass(frozen=True)
class Bounded:
    """`workload`, ended after `limit_ns`. Raises InvalidConfig for a limit that is not above 0."""

    workload: Workload
    limit_ns: int

    def __post_init__(self) -> None:
        if self.limit_ns <= 0:
            raise InvalidConfig("duration must be above 0")

    @property
    def name(self) -> str:
        return self.workload.name

    @property
    def groups(self) -> tuple[str, ...]:
        return self.workload.groups

    @property
    def duration_ns(self) -> int:
        """The limit, or the workload's own duration if that is shorter."""
        own_ns = self.workload.duration_ns
        return self.limit_ns if own_ns is None else min(own_ns, self.limit_ns)

    def models(self) -> tuple[ModelUse, ...]:
        return self.workload.models()

    def steps(self) -> tuple[Step, ...]:
        """The steps that begin before the end."""
        return tuple(s for s in self.workload.steps() if s.start_ns < self.duration_ns)

    def streams(self, seed: int) -> Sequence[Stream]:
        """New streams for one run."""
        return self.workload.streams(seed)

    def describe(self) -> str:
        """The workload in one line, and when it ends."""
        return f"{self.workload.describe()}; ended after {format_duration(self.duration_ns)}"


def senders_of(workload: Workload) -> tuple[ClientUse, ...]:
    """Who sends each of the workload's groups; empty where one client sends them all."""
    if isinstance(workload, Bounded):
        return senders_of(workload.workload)
    return workload.senders if isinstance(workload, Composed) else ()
