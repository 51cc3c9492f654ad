"""Arrivals of other shapes on copies of one model: gamma, ramp, on-off, zipf. Not Clockwork's."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from slosched.errors import InvalidConfig
from slosched.units import NS_PER_US, format_duration
from slosched.workloads.base import ModelUse, Step
from slosched.workloads.composed import Composed, OpenPart
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.processes import Gamma, OnOff, Poisson, Process, Ramp
from slosched.workloads.values import (
    read_count,
    read_model,
    read_number,
    read_period,
    read_positive,
    read_rate,
    read_slo,
)

_MODEL = Parameter("MODEL", "a model's name, for example resnet50_v2")
_COPIES = Parameter("COPIES", "number of instances of the model, each with its own arrivals")
_RATE = Parameter("RATE", "requests/s in total, over all copies")
_DURATION = Parameter("DURATION", "how long; a bare number is in seconds", "60s")
_SLO = Parameter("SLO", "a multiple of the batch-1 time, a duration, or 0: the default SLO", "0")
_RAMP_STEPS = 10
_MAX_EXPONENT = 10.0
#: With shorter ones a stream would go through ages of empty bursts before its first request.
_MIN_BURST_NS = NS_PER_US


def _composed(
    name: str,
    args: Sequence[str],
    sent: str,
    process: Callable[[int], Process],
    labels: Sequence[str] = ("",),
) -> Composed:
    """All four begin with MODEL COPIES and end with DURATION SLO. `labels` are of equal steps."""
    model, copies = read_model("MODEL", args[0]), read_count("copies", args[1])
    duration_ns, (factor, slo_ns) = read_period("duration", args[-2]), read_slo("slo", args[-1])
    return Composed(
        name=name,
        args=tuple(args),
        sent=f"{copies} x {model}, {sent}",
        uses=(ModelUse(model, copies),),
        parts=tuple(OpenPart(process(i), i, i) for i in range(copies)),
        duration_ns=duration_ns,
        all_steps=tuple(
            Step(i, duration_ns * i // len(labels), factor, slo_ns, label)
            for i, label in enumerate(labels)
        ),
    )


def _gamma(args: Sequence[str]) -> Composed:
    rate, cv = read_rate("rate", args[2]), read_positive("cv", args[3])
    each = Gamma(rate / read_count("copies", args[1]), cv)
    sent = f"gamma {rate:g}/s in total with cv {cv:g}"
    return _composed("gamma", args, sent, lambda i: each)


def _ramp(args: Sequence[str]) -> Composed:
    copies = read_count("copies", args[1])
    start, end = (
        read_rate(name, text, zero=True)
        for name, text in zip(("rate-start", "rate-end"), args[2:4], strict=True)
    )
    if start == end == 0:
        raise InvalidConfig("rate-start and rate-end are both 0: nothing would be sent")
    each = Ramp(start / copies, end / copies, read_period("duration", args[4]))
    borders = [start + (end - start) * i / _RAMP_STEPS for i in range(_RAMP_STEPS + 1)]
    labels = [f"{borders[i]:.4g}/s to {borders[i + 1]:.4g}/s" for i in range(_RAMP_STEPS)]
    sent = f"poisson from {start:g}/s to {end:g}/s in total"
    return _composed("ramp", args, sent, lambda i: each, labels)


def _on_off(args: Sequence[str]) -> Composed:
    rate = read_rate("rate", args[2])
    on_ns, off_ns = (
        read_period(name, text, low_ns=_MIN_BURST_NS)
        for name, text in zip(("on", "off"), args[3:5], strict=True)
    )
    each = OnOff(rate / read_count("copies", args[1]), on_ns, off_ns)
    sent = (
        f"poisson {rate:g}/s in total when all are on, on for {format_duration(on_ns)} and off for "
        f"{format_duration(off_ns)} on average"
    )
    return _composed("on-off", args, sent, lambda i: each)


def _zipf(args: Sequence[str]) -> Composed:
    copies, rate = read_count("copies", args[1]), read_rate("rate", args[2])
    exponent = read_number("exponent", args[3])
    if not 0 <= exponent <= _MAX_EXPONENT:
        raise InvalidConfig(f"exponent must be within 0..{_MAX_EXPONENT:g}, not {args[3]}")
    weights = [(rank + 1) ** -exponent for rank in range(copies)]
    total = sum(weights)
    rates = [rate * weight / total for weight in weights]
    if rates[-1] < 1e-9:
        raise InvalidConfig(
            f"with exponent {exponent:g} the last of {copies} copies would get {rates[-1]:.1e} "
            "requests/s, which is nothing; take fewer copies or a smaller exponent"
        )
    sent = f"poisson {rate:g}/s in total, copy i with a share of 1/i^{exponent:g}"
    return _composed("zipf", args, sent, lambda i: Poisson(rates[i]))


KINDS = (
    Kind(
        name="gamma",
        summary="Copies of one model with Gamma-distributed gaps: regular or bursty, by their CV.",
        parameters=(
            _MODEL,
            _COPIES,
            _RATE,
            Parameter("CV", "coefficient of variation of the gaps; 1 is Poisson, 4 is bursty"),
            _DURATION,
            _SLO,
        ),
        make=_gamma,
        text="CV is that of each copy's own gaps; the copies together are less bursty than one.",
        examples=("resnet50_v2 12 600 4", "resnet50_v2 1 200 0.5 30s 25ms"),
    ),
    Kind(
        name="ramp",
        summary="Copies of one model with a Poisson rate that goes linearly from one value to another.",
        parameters=(
            _MODEL,
            _COPIES,
            Parameter("RATE-START", "requests/s in total at the start; may be 0"),
            Parameter("RATE-END", "requests/s in total at the end; may be 0"),
            _DURATION,
            _SLO,
        ),
        make=_ramp,
        text="Results are counted for each tenth of the way.",
        examples=("resnet50_v2 12 100 3000 120s 25ms",),
    ),
    Kind(
        name="on-off",
        summary="Copies of one model that are on and off at random, Poisson while on.",
        parameters=(
            _MODEL,
            _COPIES,
            Parameter("RATE", "requests/s in total, when all copies are on"),
            Parameter("ON", "mean time on; exponential; a bare number is in seconds"),
            Parameter("OFF", "mean time off; exponential; a bare number is in seconds"),
            _DURATION,
            _SLO,
        ),
        make=_on_off,
        text="The mean rate is RATE x ON / (ON + OFF). Copies are on and off independently.",
        examples=("resnet50_v2 12 2400 2s 4s", "resnet50_v2 48 4800 500ms 2s 120s 5"),
    ),
    Kind(
        name="zipf",
        summary="Copies of one model whose popularity is skewed, each with Poisson arrivals.",
        parameters=(
            _MODEL,
            _COPIES,
            _RATE,
            Parameter("EXPONENT", "copy i gets a share of 1 / i^EXPONENT; 0 is even"),
            _DURATION,
            _SLO,
        ),
        make=_zipf,
        text="Copies are numbered by popularity: instance 0 has the most.",
        examples=("resnet50_v2 400 1200 1.1", "resnet50_v2 4000 600 0.9 120s 100ms"),
    ),
)
