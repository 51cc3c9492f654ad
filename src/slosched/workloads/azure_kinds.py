"""Clockwork's six azure workloads: their parameters, models and scales."""

from __future__ import annotations

from collections.abc import Sequence

from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.azure import ScaleStep, TraceReplay
from slosched.workloads.azure_source import DIRECTORY_VARIABLE, find_trace
from slosched.workloads.azure_trace import SYNTHETIC_ROWS, TRACES
from slosched.workloads.base import ModelUse
from slosched.workloads.composed import RESNET50
from slosched.workloads.kinds import Kind, Parameter
from slosched.workloads.progression import check_progression, progression
from slosched.workloads.values import read_count, read_flag, read_period, read_positive
from slosched.workloads.zoo import PROFILE, zoo_models

#: Share of the published scale, for each worker (Clockwork, workload/example.h).
LOAD_PER_WORKER = 0.125
_HORIZON_NS = 8 * 3600 * NS_PER_S
_INTERVAL_NS = 60 * NS_PER_S
_MAX_FACTOR = 1e6
#: With a shorter one a function would go through the whole trace for ages before its first request.
_MIN_INTERVAL_NS = NS_PER_MS
#: memory_load_factor -> copies of each zoo model, or of resnet50_v2 alone.
_ZOO_COPIES = {1: 3, 2: 13, 3: 29, 4: 66}
_RESNET_COPIES = {1: 200, 2: 800, 3: 1800, 4: 3600}
_HALF_MODELS = 3100

_WORKERS = Parameter("NUM-WORKERS", "number of GPUs that the load is meant for", "1")
_MEMORY = Parameter("MEMORY-LOAD-FACTOR", "1, 2, 3 or 4: about 200, 800, 1800 or 4000 models", "4")
_TRACE_TEXT = (
    f"The trace is a file of the Azure Functions data set in {DIRECTORY_VARIABLE}; without that, a "
    f"synthetic one of {SYNTHETIC_ROWS} functions of the same form. Models are those of the profile "
    f"{PROFILE}. All requests have the controller's default SLO. Ends after 8 h, or sooner with "
    "--duration."
)


def _zoo(copies: int) -> tuple[ModelUse, ...]:
    return tuple(ModelUse(name, copies) for name in zoo_models())


def _zoo_shared(models: int) -> tuple[ModelUse, ...]:
    """`models` instances over the zoo, as evenly as whole copies go; the later ones get more."""
    names = zoo_models()
    uses = []
    for left, name in zip(range(len(names), 0, -1), names, strict=True):
        uses.append(ModelUse(name, models // left))
        models -= models // left
    return tuple(uses)


def _lasting(scale: float) -> tuple[ScaleStep, ...]:
    return (ScaleStep(0, _HORIZON_NS, scale),)


def _memory_factor(text: str) -> int:
    return read_count("memory-load-factor", text, low=min(_ZOO_COPIES), high=max(_ZOO_COPIES))


def _azure(args: Sequence[str]) -> TraceReplay:
    workers, all_models, load, memory, interval, trace, randomise = args
    scale = read_positive("load-factor", load, high=_MAX_FACTOR) * LOAD_PER_WORKER
    factor = _memory_factor(memory)
    uses = (
        _zoo(_ZOO_COPIES[factor])
        if read_flag("use-all-models", all_models)
        else (ModelUse(RESNET50, _RESNET_COPIES[factor]),)
    )
    return TraceReplay(
        name="azure",
        args=tuple(args),
        source=find_trace(read_count("trace", trace, high=TRACES)),
        uses=uses,
        interval_ns=read_period("interval", interval, low_ns=_MIN_INTERVAL_NS),
        scales=_lasting(scale * read_count("num-workers", workers)),
        random_start=read_flag("randomise", randomise),
    )


def _azure_scalability_exp(args: Sequence[str]) -> TraceReplay:
    workers, low, high, change, period, memory = args
    names = ("load-factor-min", "load-factor-max", "load-factor-inc", "operator")
    start, end, by = (
        read_positive(name, text, high=_MAX_FACTOR)
        for name, text in zip(names[:3], (low, high, change), strict=True)
    )
    check_progression(start, end, by, "mul", names=names)
    period_ns = read_period("load-factor-period", period)
    unit = LOAD_PER_WORKER * read_count("num-workers", workers)
    factors = [float(factor) for factor in progression(start, end, by, "mul")]
    return TraceReplay(
        name="azure_scalability_exp",
        args=tuple(args),
        source=find_trace(1),
        uses=_zoo(_ZOO_COPIES[_memory_factor(memory)]),
        interval_ns=_INTERVAL_NS,
        scales=tuple(
            ScaleStep(i * period_ns, (i + 1) * period_ns, factor * unit, f"load {factor:.4g}")
            for i, factor in enumerate(factors)
        ),
    )


def _azure_half(args: Sequence[str]) -> TraceReplay:
    return TraceReplay(
        name="azure_half",
        args=(),
        source=find_trace(1),
        uses=_zoo_shared(_HALF_MODELS),
        interval_ns=_INTERVAL_NS,
        scales=_lasting(1.0),
    )


def _azure_small(args: Sequence[str]) -> TraceReplay:
    return TraceReplay(
        name="azure_small",
        args=(),
        source=find_trace(1),
        uses=_zoo(3),
        interval_ns=_INTERVAL_NS,
        scales=_lasting(1.0),
        striped=True,
    )


def _azure_single(args: Sequence[str]) -> TraceReplay:
    one = (ModelUse(RESNET50),)
    return TraceReplay(
        name="azure_single",
        args=(),
        source=find_trace(1),
        uses=one,
        interval_ns=NS_PER_S,
        scales=_lasting(1.0),
        functions=1,
    )


def _azure_fast(args: Sequence[str]) -> TraceReplay:
    return TraceReplay(
        name="azure_fast",
        args=(),
        source=find_trace(1),
        uses=_zoo(3),
        interval_ns=NS_PER_S,
        scales=_lasting(1.0),
        random_start=True,
        striped=True,
    )


KINDS = (
    Kind(
        name="azure",
        summary="Replay a trace of function invocations on thousands of models (Clockwork, Figure 9).",
        parameters=(
            _WORKERS,
            Parameter("USE-ALL-MODELS", "1 for the whole zoo, 0 for resnet50_v2 alone", "1"),
            Parameter("LOAD-FACTOR", "1 is about what the workers can bear", "1.0"),
            _MEMORY,
            Parameter("INTERVAL", "how long a minute of the trace takes; a number is in s", "60"),
            Parameter("TRACE", f"which trace file, 1 to {TRACES}", "1"),
            Parameter("RANDOMISE", "1: each function starts somewhere else in the trace", "0"),
        ),
        make=_azure,
        text="Counts are multiplied by LOAD-FACTOR x 0.125 x NUM-WORKERS. The most invoked functions share "
        "the first models, in alphabetical order. " + _TRACE_TEXT,
        examples=("8", "6 1 1.0 2 60 1 0"),
    ),
    Kind(
        name="azure_scalability_exp",
        summary="The azure trace with a load that grows step by step (Clockwork, Figure 11).",
        parameters=(
            Parameter(_WORKERS.name, _WORKERS.help),
            Parameter("LOAD-FACTOR-MIN", "first load factor"),
            Parameter("LOAD-FACTOR-MAX", "last load factor, included"),
            Parameter("LOAD-FACTOR-INC", "what multiplies it"),
            Parameter("LOAD-FACTOR-PERIOD", "time between changes; a bare number is in seconds"),
            Parameter(_MEMORY.name, _MEMORY.help),
        ),
        make=_azure_scalability_exp,
        text="All six values must be given (Clockwork's help promises defaults that its code lacks). The "
        "client ends when the load would pass LOAD-FACTOR-MAX. " + _TRACE_TEXT,
        examples=("40 0.1 4 1.5 60 4",),
    ),
    Kind(
        name="azure_half",
        summary="The azure trace at scale 1 on 3100 models of the zoo.",
        parameters=(),
        make=_azure_half,
        text=_TRACE_TEXT,
        examples=("",),
    ),
    Kind(
        name="azure_small",
        summary="The azure trace at scale 1 on 3 copies of each model of the zoo.",
        parameters=(),
        make=_azure_small,
        text="Functions are dealt to models in turn. " + _TRACE_TEXT,
        examples=("",),
    ),
    Kind(
        name="azure_single",
        summary="The most invoked function of the azure trace on one resnet50_v2, a second for each minute.",
        parameters=(),
        make=_azure_single,
        text="Its rate is that of the trace; only its changes are 60 times as fast. " + _TRACE_TEXT,
        examples=("",),
    ),
    Kind(
        name="azure_fast",
        summary="azure_small with a second for each minute, each function starting somewhere else.",
        parameters=(),
        make=_azure_fast,
        text="Rates are those of the trace; only their changes are 60 times as fast. "
        + _TRACE_TEXT,
        examples=("",),
    ),
)
