"""A cascade of models that really run: its spec from measurements, and the demand that fits the GPUs.

What such a run measures is time: how long programs, queues and answers take on these GPUs. Its images come from
random weights, so what the judge says of them means nothing. Scores and quality are the base cascade's: scores
are replayed by prompt, and FID is its table's. `note` says so wherever results stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from slosched.cascade.cascade_file import cascade_text
from slosched.cascade_spec import CascadeSpec, StageSpec
from slosched.core.scheduler.policies.published.diffserve.allocator import Problem, allocate
from slosched.errors import InvalidConfig
from slosched.gpu_profile import ModelProfile
from slosched.units import NS_PER_MS, NS_PER_US, format_duration
from slosched.workloads.cascade_trace import Day, rates_named

#: Worker's names of the programs of each published cascade.
PROGRAMS = {
    "sdturbo": ("diffusion/sd-turbo+judge", "diffusion/sd15"),
    "sdxs": ("diffusion/sdxs+judge", "diffusion/sd15"),
    "sdxlltn": ("diffusion/sdxl-lightning+judge", "diffusion/sdxl"),
}
#: Small ones of the same kinds, for machines without a GPU.
TINY = ("diffusion/tiny+judge", "diffusion/tiny-guided")
#: A trace whose rates are chosen: its lowest rate as a part of its highest (4to32's), and its length.
_LOW, SECONDS = 1 / 8, 90
#: The highest rate of such a trace, as a part of what the published plan is feasible for.
PEAK = 0.9
_CLOSE = 1e-3


def note(spec: CascadeSpec, *, own: bool = False) -> str:
    """What is real in a run of `spec`, and what is not, in a clause. `own`: the models are an operator's."""
    weights = "" if own else "random weights, "
    scores = "the judge's own scores" if spec.live_scores else "replayed scores"
    images = "" if own else ", images mean nothing"
    return f"{weights}made-up prompts, {scores}, tabulated FID: times are measured{images}"


@dataclass(frozen=True)
class Programs:
    """The light and the heavy model, by the names that workers offer. Raises InvalidConfig if they are one."""

    light: str
    heavy: str

    def __post_init__(self) -> None:
        if self.light == self.heavy:
            raise InvalidConfig(f"--light and --heavy are both {self.light!r}; a cascade needs two")

    def both(self) -> tuple[str, str]:
        return self.light, self.heavy


def programs_of(
    cascade: str, *, light: str | None = None, heavy: str | None = None, cpu: bool = False
) -> Programs:
    """The programs of a published cascade, or those that are given; on a CPU the small ones.

    Raises InvalidConfig where a cascade of another name has none.
    """
    known = TINY if cpu else PROGRAMS.get(cascade)
    if known is None and not (light and heavy):
        raise InvalidConfig(
            f"no real models are known for the cascade {cascade!r} (they are for {', '.join(PROGRAMS)}): "
            "name both with --light and --heavy, as a worker offers them"
        )
    own_light, own_heavy = known or ("", "")
    return Programs(light or own_light, heavy or own_heavy)


# ------------------------------------------------------------------------------------- the spec


def measured_cascade(
    base: CascadeSpec, light: ModelProfile, heavy: ModelProfile, *, slo_ns: int | None = None
) -> CascadeSpec:
    """`base` with the programs and times that were measured; the judge's time is in the light program's.

    The SLO is the base's, scaled as the heavy program's batch of 1 takes longer or shorter than there, or
    `slo_ns`. Scores, quality and threshold are the base's. Its fixed plan is left out where its batch sizes
    were not measured. Raises InvalidConfig if the two do not fit together.
    """
    _check_together(base, light, heavy)
    scaled_ns = base.slo_ns * heavy.exec_ns[1] // base.heavy.exec_ns[1]
    spec = replace(
        base,
        light=_stage(light),
        heavy=_stage(heavy),
        slo_ns=slo_ns or max(1, scaled_ns),
        judge_ns=0,
    )
    batches = [int(each) for each in base.static_plan[3:]]
    if not set(batches) <= light.exec_ns.keys() & heavy.exec_ns.keys():
        spec = replace(spec, static_gpus=0, static_plan=())
    return spec


def _check_together(base: CascadeSpec, light: ModelProfile, heavy: ModelProfile) -> None:
    same = (
        ("outputs", light.answers, heavy.answers),
        ("inputs", light.takes, heavy.takes),
    )
    for what, ours, theirs in same[: 1 if base.passes_output else 2]:
        if ours != theirs:
            raise InvalidConfig(
                f"{light.name} and {heavy.name} have other {what} ({_words(ours)}; {_words(theirs)}), so a "
                "request cannot go from one to the other"
            )


def _words(tensors: Sequence[object]) -> str:
    return ", ".join(map(str, tensors))


def _stage(measured: ModelProfile) -> StageSpec:
    return StageSpec(
        model=measured.name,
        exec_ns=dict(measured.exec_ns),
        weights_ns=max(measured.weights_ns, NS_PER_US),  # a file takes no shorter one
        weights_bytes=measured.weights_bytes,
        steps=measured.steps,
        step_ns=dict(measured.step_ns),
    )


def measured_text(
    spec: CascadeSpec, base: CascadeSpec, *, device: str, dtype: str, own: bool = False
) -> str:
    """The file of a measured cascade, which says what was measured where and what was taken over."""
    head = [
        f"Measured on {device} in {dtype}: times, steps and weights of {spec.light.model} (with its judge) and "
        f"{spec.heavy.model}.",
        f"Taken over from {base.name}: scores, quality, threshold. So: {note(spec, own=own)}.",
        f"The SLO there is {format_duration(base.slo_ns)}, where the heavy program's batch of 1 takes "
        f"{base.heavy.exec_ns[1] / NS_PER_MS:g} ms; here it takes {spec.heavy.exec_ns[1] / NS_PER_MS:.1f} ms.",
        "Serve it: slosched cascade run FILE --real (on such a GPU), or slosched cascade run FILE --workers N "
        "(emulated).",
    ]
    return "".join(f"# {line}\n" for line in head) + cascade_text(spec)


# -------------------------------------------------------------------------------------- demand


def highest_demand(spec: CascadeSpec, gpus: int) -> float:
    """The highest demand, requests/s, for which the published plan is feasible on `gpus` GPUs of this profile.

    0 where none is.
    """

    def feasible(demand: float) -> bool:
        problem = Problem(
            gpus=gpus,
            demand=demand,
            light_ns=spec.light_ns,
            heavy_ns=spec.heavy.exec_ns,
            scores=spec.scores,
            slo_ns=spec.slo_ns,
        )
        return allocate(problem).feasible

    low, high = 0.0, 1.0
    while feasible(high):
        low, high = high, 2 * high
    while high - low > _CLOSE * high:
        middle = (low + high) / 2
        low, high = (middle, high) if feasible(middle) else (low, middle)
        if high < _CLOSE:
            return 0.0
    return low


def trace_for(
    spec: CascadeSpec,
    gpus: int,
    *,
    peak: float | None = None,
    seconds: int = SECONDS,
    low: float = _LOW,
) -> str:
    """The name of a day's curve within `seconds` from `low` x `peak` to `peak` requests/s.

    `peak` None: 0.9 of the highest that the published plan can serve. Raises InvalidConfig where that is none.
    """
    if peak is None:
        peak = PEAK * highest_demand(spec, gpus)
        if peak <= 0:
            raise InvalidConfig(
                f"even a light batch takes longer than the SLO, {format_duration(spec.slo_ns)}; give a longer "
                "one (--slo), or the rate (--peak)"
            )
    return f"curve:{_rate(peak * low)}-{_rate(peak)}qps:{seconds}"


def scaled_trace(
    trace: str, spec: CascadeSpec, gpus: int, *, peak: float | None = None, seconds: int = SECONDS
) -> str | None:
    """`trace`, LOtoHI, with both rates scaled so that the highest is `peak`, in `seconds`; see `trace_for`.

    None for any other trace, whose rates are as they are. Raises as `rates_named` and `trace_for` do.
    """
    rates = rates_named(trace) if "/" not in trace and not trace.startswith("curve:") else None
    if not isinstance(rates, Day):
        return None
    low = rates.low_per_s / rates.high_per_s
    return trace_for(spec, gpus, peak=peak, seconds=seconds, low=low)


def _rate(per_s: float) -> str:
    """Three digits that count, and no exponent."""
    digits = 4
    return f"{max(per_s, 10.0**-digits):.{digits}f}".rstrip("0").rstrip(".")


# ------------------------------------------------------------------------------------- workers


def worker_text(programs: Programs, *, dtype: str) -> str:
    """A worker's file with both models; with --preempt the light one may interrupt, whatever it takes."""
    return "\n".join(
        [
            f'[models."{programs.light}"]',
            f'dtype = "{dtype}"',
            "urgent = true",
            "",
            f'[models."{programs.heavy}"]',
            f'dtype = "{dtype}"',
            "",
        ]
    )


def largest_batch(spec: CascadeSpec) -> int:
    """The largest batch size of either stage, which workers need to prepare."""
    return max(*spec.light.exec_ns, *spec.heavy.exec_ns)


def with_notes(
    document: Mapping[str, object], spec: CascadeSpec, *, device: str, own: bool = False
) -> dict[str, object]:
    """A run's summary that says what was real in it."""
    quality = f"FID by the published table, from the share of light answers; {note(spec, own=own)}"
    return {**document, "device": device, "real": note(spec, own=own), "quality": quality}
