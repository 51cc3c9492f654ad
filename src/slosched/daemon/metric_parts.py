"""Families of Prometheus metrics in parts that are small enough to be made between two requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from slosched.codes import code_name
from slosched.core.scheduler.state import Gpu
from slosched.telemetry.histogram import Histogram
from slosched.telemetry.tally import Lane

#: Samples rendered in one slice.
PART_SAMPLES = 16
#: Models or requests scanned in one slice.
PART_STEPS = 100

#: A part of a family of metrics, or None where a walk stops to let others run.
Part = Metric | None
Row = tuple[Sequence[str], float]
Thing = TypeVar("Thing")
#: Families by name, text, and what the value of a thing is.
Table = tuple[tuple[str, str, Callable[[Thing], float]], ...]
#: Families by name, text, kind of action, and what a lane counted of that kind.
LaneTable = tuple[tuple[str, str, int, Callable[[Lane], float]], ...]
#: The labels of a GPU, and of a host's slots.
OF_GPU = ("worker", "gpu")


def text_of(part: Metric, *, first: bool) -> bytes:
    """A part in Prometheus' text format; its name and help only with the family's first."""
    text = generate_latest(_Only(part))
    return text if first else text.split(b"\n", 2)[2]


class _Only(Collector):
    """A registry of one part, for prometheus_client's writer."""

    def __init__(self, part: Metric) -> None:
        self._part = part

    def collect(self) -> Iterable[Metric]:
        return (self._part,)


def counter(name: str, text: str, value: float) -> Metric:
    """A counter without labels; `_total` is added to its name."""
    return CounterMetricFamily(f"slosched_{name}", text, value=value)


def gauge(name: str, text: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(f"slosched_{name}", text, value=float(value))


def family(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    name: str,
    text: str,
    labels: Sequence[str],
    rows: Iterable[Row],
) -> Iterator[Part]:
    """One family in parts; without rows, its name and text alone."""
    part = kind(f"slosched_{name}", text, labels=labels)
    began = False
    for values, value in rows:
        part.add_metric(values, float(value))
        if len(part.samples) >= PART_SAMPLES:
            yield part
            began = True
            part = kind(f"slosched_{name}", text, labels=labels)
    if part.samples or not began:
        yield part


def table_families(
    kind: type[CounterMetricFamily | GaugeMetricFamily],
    labels: Sequence[str],
    table: Table[Thing],
    things: Sequence[tuple[Sequence[str], Thing]],
) -> Iterator[Part]:
    """A family for each row of `table`, with a sample for each of `things`: (values of its labels, thing)."""
    for name, text, value in table:
        yield from family(
            kind, name, text, labels, ((values, value(thing)) for values, thing in things)
        )


def lane_families(
    table: LaneTable, lanes: Mapping[tuple[int, int, int], Lane], names: Sequence[tuple[int, int]]
) -> Iterator[Part]:
    """What lanes of GPUs or hosts counted. `names` are (worker, device); `lanes` go by these and kind."""
    idle = Lane()
    for name, text, kind, counted in table:
        yield from family(
            CounterMetricFamily,
            name,
            text,
            OF_GPU,
            (((str(w), str(g)), counted(lanes.get((w, g, kind), idle))) for w, g in names),
        )


class SteadyCounts:
    """Counts that workers keep, made to go on when a worker's process begins again at 0."""

    def __init__(self) -> None:
        self._grown: dict[tuple[str, ...], tuple[float, float]] = {}

    def grown(self, key: tuple[str, ...], value: float) -> float:
        """What `key` counted in all, now that its process says `value`."""
        base, last = self._grown.get(key, (0.0, 0.0))
        if value < last:
            base += last
        self._grown[key] = base, value
        return base + value


def cut(whole: Metric) -> Iterator[Part]:
    """A family that was made as one, in parts."""
    for begin in range(0, len(whole.samples), PART_SAMPLES):
        part = Metric(whole.name, whole.documentation, whole.type)
        part.samples = whole.samples[begin : begin + PART_SAMPLES]
        yield part


def buckets(histogram: Histogram, unit: int) -> tuple[list[tuple[str, float]], float]:
    """Cumulative counts by upper bound, and the sum. Values of `unit` are written as 1."""
    cumulative: list[tuple[str, float]] = []
    passed = 0
    for bound, count in zip(histogram.bounds, histogram.counts, strict=False):
        passed += count
        cumulative.append((f"{bound / unit:g}", float(passed)))
    cumulative.append(("+Inf", float(passed + histogram.counts[-1])))
    return cumulative, histogram.total / unit


def gpu_labels(gpu: Gpu) -> tuple[str, str]:
    """The values of `OF_GPU`."""
    return str(gpu.worker.worker_id), str(gpu.gpu_id)


def label(code: int) -> str:
    """A code as a label: "timed_out"."""
    return code_name(code).replace(" ", "_")
