"""The zoo, for workloads that use every model, and `example`, the simplest of them.

Clockwork's artifact loads every model of its own zoo; the profile zoo61 stands for it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import resources

from slosched.units import NS_PER_S
from slosched.workloads.base import ModelUse
from slosched.workloads.composed import BurstyClosedPart, ClosedPart, Composed, OpenPart, Part
from slosched.workloads.kinds import Kind
from slosched.workloads.processes import FixedRate, OnOff, Poisson

PROFILE = "zoo61"
_BURST_NS = 10 * NS_PER_S
_IDLE_NS = 20 * NS_PER_S


@cache
def zoo_models() -> tuple[str, ...]:
    """Names of the models of the profile zoo61, in alphabetical order, as the artifact takes its own."""
    profile = resources.files("slosched").joinpath("profiles", f"{PROFILE}.toml")
    return tuple(sorted(tomllib.loads(profile.read_text(encoding="utf-8"))["models"]))


def profile_hint(name: str) -> str:
    """What to add to an error about an unknown model that the profile zoo61 knows; else ""."""
    if name not in zoo_models():
        return ""
    return f". Emulated and simulated GPUs of the profile {PROFILE} have it: --profile {PROFILE}"


def _example(args: Sequence[str]) -> Composed:
    names = zoo_models()
    parts: list[Part] = []
    for i in range(len(names)):
        parts += [
            OpenPart(FixedRate(5.0), i, i),
            OpenPart(Poisson(10.0), i, i),
            OpenPart(OnOff(10.0, _BURST_NS, _IDLE_NS, published=True), i, i),
            ClosedPart(1, (i,), i),
            BurstyClosedPart(1, i, i, _BURST_NS),
        ]
    return Composed(
        "example",
        tuple(args),
        f"{len(names)} models of {PROFILE}, each with fixed-rate 5/s, poisson 10/s, bursts of 10/s, a "
        "closed loop of 1 and bursts of one",
        tuple(ModelUse(name) for name in names),
        tuple(parts),
    )


EXAMPLE = Kind(
    name="example",
    summary="Every model of the zoo, each with five kinds of arrivals.",
    parameters=(),
    make=_example,
    text="Each of zoo61's 61 models gets a fixed rate of 5/s, Poisson arrivals of 10/s, Poisson bursts of "
    "10/s (10 s on, 20 s off on average), a closed loop of 1, and a closed loop of 1 in bursts (10 s on "
    "and, as in the published code, 10 s off on average). Run it where all these models are: with the "
    "profile zoo61. It never ends by itself: say how long it runs (--duration 60s).",
    examples=("",),
)
