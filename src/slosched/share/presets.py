"""Sweeps that are ready to run: those of both originals, and the baselines that they stand beside.

The names of baselines say what they do. Deft's scripts call three of them PipeSwitch, REEF and Shepherd; they
are not those systems: each only bounds what a job has in flight.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import msgspec

from slosched.core.share.tuner import DEFT_CANDIDATES
from slosched.errors import InvalidConfig, UnknownName
from slosched.share.axes import Point, folder_name, points_of
from slosched.share.hotcarbon import model_jobs
from slosched.share.spec_check import check_spec
from slosched.share_spec import (
    DEFT_SLO,
    Boundary,
    BoundaryKind,
    Clients,
    Job,
    Mode,
    Run,
    ShareSpec,
)
from slosched.units import NS_PER_MS, NS_PER_S

#: The key that the sweep varies.
SYNC_KEY = "jobs.model_A.boundary.every"
#: HotCarbon's models, in the order of its mixes.
HOTCARBON_MODELS = ("bert", "whisper", "gpt", "diffusion")
#: Where jobs share; HotCarbon itself ran the first two.
HOTCARBON_MODES = (Mode.TM, Mode.MPS, Mode.STREAMS, Mode.PREEMPT)
DETECTOR = "fasterrcnn_resnet50_fpn"
#: What stands for the models in tiny sweeps, which a CPU runs in seconds.
TINY_MODEL = "tiny"
_TINY_NS = 300 * NS_PER_MS
_TINY_SYNCS = (1, 4)


class Preset(msgspec.Struct, frozen=True, kw_only=True):
    """A sweep that is ready to run."""

    name: str
    about: str
    points: tuple[Point, ...]


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """What a caller may choose of a preset. `tiny` replaces models and durations by what a CPU runs in seconds.

    `models` and `batches` are of `pairs`; 0 and () are the preset's own. `run` is how HotCarbon's models and
    those of `pairs` run; Deft's are eager.
    """

    device: str = "cuda:0"
    label: str = "gpu"
    duration_ns: int = 0
    repeats: int = 1
    seed: int = 0
    models: tuple[str, ...] = ()
    batches: tuple[int, ...] = ()
    run: Run = Run.AUTO
    tiny: bool = False


def preset(name: str, wanted: Wanted | None = None) -> Preset:
    """The preset `name` as `wanted`. Raises UnknownName, InvalidConfig."""
    found = PRESETS.get(name)
    if found is None:
        raise UnknownName("preset", name, list(PRESETS))
    about, make = found
    chosen = wanted or Wanted()
    if name != "pairs" and (chosen.models or chosen.batches):
        raise InvalidConfig(f"models and batches are chosen for the preset pairs, not for {name}")
    return Preset(name=name, about=about, points=make(chosen))


# ------------------------------------------------------------------------------------------- Deft's


def demo_jobs(
    boundary: Boundary, *, high_boundary: Boundary | None = None, tiny: bool = False
) -> tuple[Job, Job]:
    """The two jobs of Deft's demo: A has the low priority and no think time, B the high one and 1 s.

    Deft's think times of B are 1 or 2 s. `boundary` is A's; B has none unless `high_boundary` says one.
    """
    model = TINY_MODEL if tiny else DETECTOR
    low = Job(
        name="model_A",
        model=model,
        size=(0, 0) if tiny else (1440, 2560),
        run=Run.EAGER,
        clients=Clients(),
        warmups=1,
        slo_times_solo=DEFT_SLO,
        boundary=boundary,
    )
    high = msgspec.structs.replace(
        low,
        name="model_B",
        size=(0, 0) if tiny else (720, 1280),
        priority=1,
        clients=Clients(think_ns=(20 * NS_PER_MS) if tiny else NS_PER_S),
        boundary=high_boundary or Boundary(kind=BoundaryKind.NONE),
    )
    return low, high


def _sweep_sync(wanted: Wanted) -> tuple[Point, ...]:
    jobs = demo_jobs(Boundary(kind=BoundaryKind.SYNC), tiny=wanted.tiny)
    spec = _spec(wanted, jobs, (Mode.GATE,), 90 * NS_PER_S)
    return points_of(spec, {SYNC_KEY: _TINY_SYNCS if wanted.tiny else DEFT_CANDIDATES})


#: Methods of the demo: mode, what bounds A, and what bounds B.
DEMO_METHODS: dict[str, tuple[Mode, Boundary, Boundary | None]] = {
    "gate-off": (Mode.TM, Boundary(kind=BoundaryKind.NONE), None),
    "gate-unbounded": (Mode.GATE, Boundary(kind=BoundaryKind.NONE), None),
    "gate-sync-20": (Mode.GATE, Boundary(kind=BoundaryKind.SYNC, every=20), None),
    "gate-tuned": (Mode.GATE, Boundary(kind=BoundaryKind.SYNC, tuned=True), None),
    "gate-event-2": (Mode.GATE, Boundary(kind=BoundaryKind.EVENT, every=2), None),
    "layer-sync": (Mode.TM, Boundary(kind=BoundaryKind.LAYER), None),
    **{
        f"bounded-queue-{every}": (Mode.TM, Boundary(kind=BoundaryKind.SYNC, every=every), None)
        for every in (4, 8, 16, 64)
    },
    "bounded-queues-4-4": (
        Mode.TM,
        Boundary(kind=BoundaryKind.SYNC, every=4),
        Boundary(kind=BoundaryKind.SYNC, every=4),
    ),
}
#: A tiny demo has the first and this one.
_TINY_METHODS = ("gate-off", "gate-sync-20")


def _deft_demo(wanted: Wanted) -> tuple[Point, ...]:
    methods = _TINY_METHODS if wanted.tiny else tuple(DEMO_METHODS)
    made = []
    for name in methods:
        mode, boundary, high = DEMO_METHODS[name]
        jobs = demo_jobs(boundary, high_boundary=high, tiny=wanted.tiny)
        spec = _spec(wanted, jobs, (mode,), 60 * NS_PER_S)
        made.append(Point(folder=name, spec=spec, settings={"method": name}))
    return tuple(made)


# -------------------------------------------------------------------------------------- HotCarbon's


def hotcarbon_mixes(models: Sequence[str] = HOTCARBON_MODELS) -> tuple[tuple[str, ...], ...]:
    """Each model alone, all pairs and all triples: fourteen mixes of four models."""
    return tuple(mix for count in (1, 2, 3) for mix in itertools.combinations(models, count))


def _hotcarbon(wanted: Wanted) -> tuple[Point, ...]:
    made = []
    for mix in hotcarbon_mixes():
        models = [TINY_MODEL] * len(mix) if wanted.tiny else list(mix)
        jobs = tuple(
            # The shorter a model is, the higher its priority where a mode has priorities.
            msgspec.structs.replace(
                job,
                name=name,
                priority=len(HOTCARBON_MODELS) - 1 - HOTCARBON_MODELS.index(name),
                run=wanted.run,
            )
            for name, job in zip(mix, model_jobs([f"{model}-1" for model in models]), strict=True)
        )
        modes = (Mode.EXCLUSIVE,) if len(mix) == 1 else HOTCARBON_MODES
        if wanted.tiny and len(mix) > 1:
            modes = (Mode.TM,)
        spec = _spec(wanted, jobs, modes, 120 * NS_PER_S)
        name = "+".join(mix)
        # Tiny mixes are all of one model, so their paths do not differ.
        made.append(Point(folder=name, spec=spec, settings={"mix": name}, together=not wanted.tiny))
    return tuple(made)


def _pairs(wanted: Wanted) -> tuple[Point, ...]:
    """Each unordered pair of (model, batch), a model beside itself included."""
    models = (TINY_MODEL,) if wanted.tiny else wanted.models or HOTCARBON_MODELS
    parties = [f"{model}-{batch}" for model in models for batch in wanted.batches or (1,)]
    made = []
    for first, second in itertools.combinations_with_replacement(parties, 2):
        jobs = tuple(
            msgspec.structs.replace(job, run=wanted.run) for job in model_jobs([first, second])
        )
        modes = (Mode.TM,) if wanted.tiny else (Mode.TM, Mode.MPS)
        spec = _spec(wanted, jobs, modes, 60 * NS_PER_S)
        name = f"{first}+{second}"
        made.append(
            Point(folder=folder_name(name), spec=spec, settings={"pair": name}, together=True)
        )
    return tuple(made)


def _spec(
    wanted: Wanted, jobs: tuple[Job, ...], modes: tuple[Mode, ...], duration_ns: int
) -> ShareSpec:
    tiny = wanted.tiny
    return check_spec(
        ShareSpec(
            jobs=jobs,
            modes=modes,
            duration_ns=wanted.duration_ns or (_TINY_NS if tiny else duration_ns),
            device=wanted.device,
            label=wanted.label,
            repeats=wanted.repeats,
            seed=wanted.seed,
            idle_ns=0 if tiny else 3 * NS_PER_S,
            cool_down_ns=0 if tiny else 2 * NS_PER_S,
        )
    )


#: What each is, and what makes its points.
PRESETS: dict[str, tuple[str, Callable[[Wanted], tuple[Point, ...]]]] = {
    "sweep-sync": (
        "Deft's demo with the low model waiting for the device after each of 13 numbers of modules",
        _sweep_sync,
    ),
    "pairs": ("all pairs of some models and batches, under tm and mps", _pairs),
    "hotcarbon": (
        "HotCarbon's 14 mixes of bert, whisper, gpt and diffusion, under tm, mps, streams and preempt",
        _hotcarbon,
    ),
    "deft-demo": (
        "Deft's demo: two detectors at 1440p and 720p without a gate, with one, and with bounded queues",
        _deft_demo,
    ),
}
