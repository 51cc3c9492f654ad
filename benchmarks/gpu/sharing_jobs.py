"""What sharing.py runs, and sharing_simulated.py in virtual time: jobs and modes of each part."""

from __future__ import annotations

from collections.abc import Sequence

from sharing_page import MODELS

from slosched.share_spec import Arriving, Boundary, BoundaryKind, Clients, Job, Mode, Run
from slosched.units import NS_PER_MS

#: Modes by how models run; the first one's session also runs each model alone.
MODES = {
    "eager": ("tm", "mps", "gate"),
    "graphs": ("tm", "mps", "mps-priority", "streams", "preempt"),
}
#: MPS with client priorities, as HotCarbon did not run it.
_MPS_PRIORITY = "mps-priority"
_EVENT, _SYNC, _LAYER, _NONE = (
    BoundaryKind.EVENT,
    BoundaryKind.SYNC,
    BoundaryKind.LAYER,
    BoundaryKind.NONE,
)
#: Mode and boundary of the low job, by what the page calls it. In flight are `depth` groups of `every` modules.
GATES: dict[str, tuple[Mode, Boundary]] = {
    "time slicing, gate off": (Mode.TM, Boundary(kind=_NONE)),
    "gate, at most 8 modules in flight": (Mode.GATE, Boundary(kind=_EVENT, every=4, depth=2)),
    "gate, at most 16": (Mode.GATE, Boundary(kind=_EVENT, every=8, depth=2)),
    "gate, at most 64": (Mode.GATE, Boundary(kind=_EVENT, every=32, depth=2)),
    "stream priorities": (Mode.STREAMS, Boundary(kind=_NONE)),
    "gate, queue not bounded": (Mode.GATE, Boundary(kind=_NONE)),
    "gate, a wait after each 4": (Mode.GATE, Boundary(kind=_SYNC, every=4)),
    "gate, a wait after each layer": (Mode.GATE, Boundary(kind=_LAYER)),
}
_FEW_GATES = ("time slicing, gate off", "gate, at most 8 modules in flight", "stream priorities")


def mode_of(way: str) -> Mode:
    return Mode.MPS if way == _MPS_PRIORITY else Mode(way)


def mix_jobs(run: Run, way: str, models: Sequence[str]) -> list[Job]:
    """HotCarbon's models back to back. Where a way to share has priorities, the shorter goes first."""
    mode, ranked = mode_of(way), way not in ("tm", "mps")
    return [
        Job(
            name=model,
            model=model,
            run=run,
            priority=len(MODELS) - 1 - MODELS.index(model) if ranked else 0,
            boundary=Boundary(kind=_EVENT, every=8, depth=2)
            if mode is Mode.GATE and model != "bert"
            else Boundary(),
        )
        for model in models
    ]


def demo_jobs() -> tuple[Job, Job]:
    """Deft's two detectors: A of 1440p back to back, B of 720p with the higher priority and pauses."""
    detector = "fasterrcnn_resnet50_fpn"
    low = Job(name="model_A", model=detector, size=(1440, 2560), run=Run.EAGER)
    pauses = Clients(think_ns=250 * NS_PER_MS)
    high = Job(
        name="model_B", model=detector, size=(720, 1280), run=Run.EAGER, priority=1, clients=pauses
    )
    return low, high


def pair_jobs(run: Run) -> tuple[Job, Job]:
    """ViT-L/16 of batch 32 back to back, and a ResNet-50 of batch 1 that arrives at random."""
    low = Job(name="vit_l", model="vit_l_16", batch=32, dtype="float16", run=run)
    arrivals = Clients(arriving=Arriving.POISSON, rate_per_s=25.0)
    high = Job(
        name="resnet50",
        model="resnet50",
        dtype="float16",
        run=run,
        priority=1,
        clients=arrivals,
    )
    return low, high


def pair_ways(run: str) -> dict[str, tuple[Mode, Boundary]]:
    """Mode and boundary of the low job of the pair, by what the page calls it."""
    if run == "graphs":
        return {each: (Mode(each), Boundary()) for each in ("tm", "mps", "streams", "preempt")}
    return {name: GATES[name] for name in _FEW_GATES}
