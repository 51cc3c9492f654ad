"""What a workload is: the models it needs, its steps, and streams of requests. Pure data and protocols.

A workload says *which* requests are due *when*. `engine.Engine` merges its streams in time order, and
a load driver (`slosched.loadgen`) sends what the engine says, live or in virtual time. Whatever depends
on chance comes from a seed, so both send the same requests.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from slosched.units import format_duration


class ModelUse(NamedTuple):
    """`copies` instances of the model `name`. A workload's instances are numbered in this order."""

    name: str
    copies: int = 1


class ClientUse(NamedTuple):
    """A client that sends a part of a workload: what the controller knows it by, and its weight.

    The name "" is the client that runs the workload.
    """

    name: str = ""
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Step:
    """One period of a workload, from `start_ns` after its start until the next one's.

    `slo_factor` or `slo_ns` is the SLO of what the step is about; with both 0 it is the controller's
    default. `label` says what else changes ("1200/s"); "" where the SLO says it all.
    """

    index: int
    start_ns: int
    slo_factor: float = 0.0
    slo_ns: int = 0
    label: str = ""

    @property
    def text(self) -> str:
        """The step, human-readable: its label, else its SLO ("2.25x", "10ms", "default SLO")."""
        if self.label:
            return self.label
        if self.slo_ns:
            return format_duration(self.slo_ns)
        return f"{self.slo_factor:.4g}x" if self.slo_factor else "default SLO"


class Arrival(msgspec.Struct, frozen=True, gc=False):
    """One request, due `at_ns` after the start, for the workload's model `instance`.

    `user_id` is what telemetry says (Clockwork's user_id); `stream` is where it came from. A struct,
    since one is made for every request: a named tuple takes three times as long.
    """

    at_ns: int
    seq: int
    user_id: int
    instance: int
    slo_factor: float
    slo_ns: int
    step: int
    stream: int
    length: int = 0  # of its inputs, where a dimension of the model's varies


class Stream(Protocol):
    """One source of requests. All times in ns after the start of the run."""

    #: What telemetry calls the sender, and the group whose results are counted together.
    user_id: int
    group: int
    #: Draws the length of each request; None where the model's inputs have a fixed shape.
    lengths: Iterator[int] | None

    def first(self) -> Sequence[int]:
        """When the requests are due that wait for nothing but the start; ascending."""

    def after_send(self, at_ns: int) -> int | None:
        """The request that was due at `at_ns` is sent: when is the next one due? None: not by itself."""

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        """A request is answered at `at_ns`: when is the one due that waited for it? None: none did."""

    def instance(self) -> int:
        """The model instance that the request being sent is for."""

    def slo(self, step: Step) -> tuple[float, int]:
        """(slo_factor, slo_ns) of a request due in `step`; both 0: the controller's default."""


class Workload(Protocol):
    """A named set of streams. Implementations are frozen dataclasses that check themselves."""

    @property
    def name(self) -> str: ...

    @property
    def duration_ns(self) -> int | None:
        """How long requests are sent; nothing is sent at or after it. None: until it is stopped."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups, by `Stream.group`. ("",) where there is one."""

    def models(self) -> tuple[ModelUse, ...]:
        """What must be loaded, in the order in which instances are numbered."""

    def steps(self) -> tuple[Step, ...]:
        """The steps in order; the first starts at 0."""

    def streams(self, seed: int) -> Sequence[Stream]:
        """New streams for one run."""

    def describe(self) -> str:
        """The workload in one line: "NAME: what is sent, how fast and how long"."""


def instance_seed(seed: int, stream: int) -> int:
    """The seed of one stream. With seed 0 it is the stream's number, as in Clockwork.

    Other seeds are far apart: with seed + stream, runs of seeds 0 and 1 would share all streams but
    one, and a mean over seeds would be worth little more than one run.
    """
    return (seed << 32) + stream
