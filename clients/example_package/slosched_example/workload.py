"""Waves: many requests at once, and then none until the next wave."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slosched.units import format_duration
from slosched.workloads.base import ModelUse, Step, Stream
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.streams import OpenLoop
from slosched.workloads.values import read_count, read_model, read_period, read_slo


@dataclass(frozen=True)
class Waves:
    """`size` requests to one instance of `model` at once, every `period_ns`."""

    model: str
    size: int
    period_ns: int
    duration_ns: int
    slo_factor: float
    slo_ns: int

    name = "waves"
    groups = ("",)

    def models(self) -> tuple[ModelUse, ...]:
        return (ModelUse(self.model),)

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, self.slo_factor, self.slo_ns),)

    def streams(self, seed: int) -> Sequence[Stream]:
        return (OpenLoop(self._times(), (0,), user_id=0),)  # nothing in it depends on chance

    def _times(self) -> Iterator[int]:
        for start_ns in range(0, self.duration_ns, self.period_ns):
            yield from [start_ns] * self.size

    def describe(self) -> str:
        each, whole = format_duration(self.period_ns), format_duration(self.duration_ns)
        return f"{self.name}: {self.size} requests to {self.model} every {each}, for {whole}"


def _make(texts: Sequence[str]) -> Waves:
    model, size, period, duration, slo = texts
    factor, slo_ns = read_slo("slo", slo)
    return Waves(
        model=read_model("model", model),
        size=read_count("size", size),
        period_ns=read_period("period", period),
        duration_ns=read_period("duration", duration),
        slo_factor=factor,
        slo_ns=slo_ns,
    )


WAVES = Kind(
    name=Waves.name,
    summary="many requests at once, and then none until the next wave: an example",
    parameters=(
        Parameter("MODEL", "a model's name, for example resnet50_v2"),
        Parameter("SIZE", "requests of a wave"),
        Parameter("PERIOD", "from one wave to the next", "100ms"),
        Parameter("DURATION", "how long; a bare number is in seconds", "60s"),
        Parameter("SLO", "a multiple of the batch-1 time, or a duration", "100ms"),
    ),
    make=_make,
    examples=("resnet50_v2 40", "resnet50_v2 40 100ms 10s 50ms"),
    interface=1,
)
