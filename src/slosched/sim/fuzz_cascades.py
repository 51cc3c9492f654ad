"""Fuzzed cases whose clients ask cascades: one alone under a TYPE that serves one, or some beside plain models.

`slosched fuzz --policy CASCADE` has the former, INFER5 the latter. Cluster, faults and clients are those of the
seed (fuzz_case.py); cascades have draws of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from slosched.cascade_spec import (
    BATCHINGS,
    ROUTINGS,
    CascadeOptions,
    CascadeSpec,
    QualityCurve,
    ScoreCurve,
    StageSpec,
)
from slosched.config import GpuProfile, ModelProfile
from slosched.sim.guests import GuestPlan
from slosched.sim.spec import SimSpec
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import ModelUse

_NAME, _LIGHT, _HEAVY = "cascade", "light", "heavy"
_PAGE_BYTES = 2**24
_SHAPE = (8,)
#: SLOs as multiples of both programs' times together, and what is added for the network.
_SLOS, _SLO_EXTRA_NS = (2, 4, 10, 30), 20 * NS_PER_MS
_MOST_PER_S = 100.0
#: The share of the cases under INFER5 that serve cascades beside plain models, and the requests/s of each.
_BESIDE_CASES, _MOST_BESIDE_PER_S = 0.3, 20.0
#: What a second cascade shares with the first one.
_SHARED = ("light", "heavy", "both", "nothing")
#: A program with lengths answers by the last digit of its name, and all of them answer alike.
_LIGHTS, _HEAVIES = ("light0", "faint0"), ("heavy0", "grave0")


def with_cascade(spec: SimSpec, seed: int) -> SimSpec:
    """`spec` with a cascade in place of its models; `seed` draws it."""
    draw = Random(f"{seed}/cascade")
    cascade = _drawn(draw)
    cost_s = (cascade.light.exec_ns[1] + 0.5 * cascade.heavy.exec_ns[1]) / NS_PER_S
    rate = min(draw.choice((0.1, 0.3, 0.6)) * spec.gpus / cost_s, _MOST_PER_S)
    load = spec.workload
    guests: tuple[GuestPlan, ...] = getattr(load, "guests", ())
    given = {
        "uses": (ModelUse(_NAME),),
        "rates_per_s": (rate,),
        "slo_ns": cascade.slo_ns,
        "guests": tuple(replace(guest, model=_NAME, copies=1) for guest in guests),
        "lengths": None,
    }
    options = CascadeOptions(
        plan_every_ns=draw.choice((NS_PER_S, 5 * NS_PER_S)),
        routing=draw.choice(ROUTINGS),
        batching=draw.choice(BATCHINGS),
        queue_term=draw.random() < 0.5,
        drop_at=draw.choice((0.0, 1.0, 1.5)),
        blind_scores=draw.random() < 0.2,
        fixed_threshold=draw.choice((-1.0, -1.0, 0.5)),
    )
    return replace(
        spec,
        workload=replace(load, **given),  # type: ignore[type-var]
        profiles=(_profile(spec.profiles[0], cascade, draw),),
        scheduler=replace(
            spec.scheduler, cascades=(cascade,), cascade=options, max_exec_ns=None, placement="gain"
        ),
    )


def with_cascades_beside(
    spec: SimSpec, seed: int, with_lengths: Callable[[ModelProfile], ModelProfile]
) -> SimSpec:
    """`spec`, in some cases with one or two cascades beside its models, and with guests that ask them.

    `with_lengths` makes a program's length classes where the case has any.
    """
    draw = Random(f"{seed}/cascades beside")
    if draw.random() >= _BESIDE_CASES:
        return spec
    load = spec.workload
    has_lengths = getattr(load, "lengths", None) is not None
    cascades = _drawn_beside(draw, has_lengths)
    programs = {
        name: with_lengths(program) if has_lengths else program
        for cascade in cascades
        for name, program in _programs(cascade).items()
    }
    uses = [ModelUse(cascade.name) for cascade in cascades]
    rates = []
    for each in cascades:
        cost_s = (each.light.exec_ns[1] + 0.5 * each.heavy.exec_ns[1]) / NS_PER_S
        rate = draw.choice((0.05, 0.1, 0.2)) * spec.gpus / cost_s / len(cascades)
        rates.append(min(rate, _MOST_BESIDE_PER_S))
    if draw.random() < 0.3:  # a program is asked alone as well
        uses.append(ModelUse(draw.choice((cascades[0].light, cascades[0].heavy)).model))
        rates.append(1.0)
    guests: tuple[GuestPlan, ...] = getattr(load, "guests", ())
    plain = {use.name for use in load.models()}
    given = {
        "uses": (*load.models(), *uses),
        "rates_per_s": (*getattr(load, "rates_per_s", ()), *rates),
        "guests": tuple(
            # A model that guests alone use may be unloaded by force.
            replace(guest, model=draw.choice(cascades).name, copies=1)
            if guest.model in plain and draw.random() < 0.5
            else guest
            for guest in guests
        ),
    }
    options = CascadeOptions(
        blind_scores=draw.random() < 0.2,
        fixed_threshold=draw.choice((-1.0, 0.5)),
        rejected_answers=draw.random() < 0.7,
    )
    profile = replace(spec.profiles[0], models={**spec.profiles[0].models, **programs})
    return replace(
        spec,
        workload=replace(load, **given),  # type: ignore[type-var]
        profiles=(profile,),
        scheduler=replace(spec.scheduler, cascades=cascades, cascade=options),
    )


def _drawn_beside(draw: Random, has_lengths: bool) -> tuple[CascadeSpec, ...]:
    """One cascade, or two that may share programs. Outputs that go on need fixed shapes."""
    passes_output = draw.random() < 0.2 and not has_lengths
    first = _drawn(draw, "pair", _LIGHTS[0], _HEAVIES[0], passes_output=passes_output)
    if draw.random() < 0.5:
        return (first,)
    shared = draw.choice(_SHARED)
    second = _drawn(draw, "other", _LIGHTS[1], _HEAVIES[1])
    light = first.light if shared in ("light", "both") else second.light
    heavy = first.heavy if shared in ("heavy", "both") else second.heavy
    return first, replace(second, light=light, heavy=heavy, seed=1)


def _drawn(
    draw: Random,
    cascade: str = _NAME,
    light_model: str = _LIGHT,
    heavy_model: str = _HEAVY,
    *,
    passes_output: bool = False,
) -> CascadeSpec:
    light_ms = draw.choice((2, 5, 10))
    heavy_ms = light_ms * draw.choice((2, 5, 10))
    sizes = draw.choice(((1, 2, 4, 8), (1, 2, 4)))
    light, heavy = (
        StageSpec(
            name,
            {batch: ms * NS_PER_MS * (1 + batch) // 2 for batch in sizes},
            weights_ns=4 * NS_PER_MS,
            weights_bytes=draw.randint(1, 4) * _PAGE_BYTES,
        )
        for name, ms in ((light_model, light_ms), (heavy_model, heavy_ms))
    )
    quality = QualityCurve((0.0, 0.5, 1.0), (20.0, 18.0, 25.0)) if draw.random() < 0.7 else None
    return CascadeSpec(
        name=cascade,
        light=light,
        heavy=heavy,
        slo_ns=draw.choice(_SLOS) * (light_ms + heavy_ms) * NS_PER_MS + _SLO_EXTRA_NS,
        scores=ScoreCurve((0.0, 0.5, 1.0), (0.0, 0.3, 1.0)),
        quality=quality,
        threshold=draw.choice((0.2, 0.5, 0.9)),
        passes_output=passes_output,
        static_gpus=4,
        static_plan=(0.5, 1.0, 3.0, 4.0, 2.0),
    )


def _profile(base: GpuProfile, cascade: CascadeSpec, draw: Random) -> GpuProfile:
    """GPUs that hold one program, or both, or more."""
    most = max(cascade.light.weights_bytes, cascade.heavy.weights_bytes)
    return replace(
        base, models=_programs(cascade), weights_cache_bytes=most * draw.choice((1, 1, 2, 8))
    )


def _programs(cascade: CascadeSpec) -> dict[str, ModelProfile]:
    """Both programs by name, with the same shapes."""
    return {
        stage.model: ModelProfile(
            name=stage.model,
            exec_ns=stage.exec_ns,
            weights_ns=stage.weights_ns,
            weights_bytes=stage.weights_bytes,
            input_shape=_SHAPE,
            output_shape=_SHAPE,
        )
        for stage in (cascade.light, cascade.heavy)
    }
