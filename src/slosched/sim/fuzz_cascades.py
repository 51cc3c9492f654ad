"""A fuzzed case whose clients ask a cascade: `slosched fuzz --policy CASCADE`, or another TYPE for one cascade.

Cluster, faults and clients are those of the seed (fuzz_case.py); the cascade has draws of its own.
"""

from __future__ import annotations

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


def _drawn(draw: Random) -> CascadeSpec:
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
        for name, ms in ((_LIGHT, light_ms), (_HEAVY, heavy_ms))
    )
    quality = QualityCurve((0.0, 0.5, 1.0), (20.0, 18.0, 25.0)) if draw.random() < 0.7 else None
    return CascadeSpec(
        name=_NAME,
        light=light,
        heavy=heavy,
        slo_ns=draw.choice(_SLOS) * (light_ms + heavy_ms) * NS_PER_MS + _SLO_EXTRA_NS,
        scores=ScoreCurve((0.0, 0.5, 1.0), (0.0, 0.3, 1.0)),
        quality=quality,
        threshold=draw.choice((0.2, 0.5, 0.9)),
        static_gpus=4,
        static_plan=(0.5, 1.0, 3.0, 4.0, 2.0),
    )


def _profile(base: GpuProfile, cascade: CascadeSpec, draw: Random) -> GpuProfile:
    """GPUs that hold one program, or both, or more."""
    stages = (cascade.light, cascade.heavy)
    models = {
        stage.model: ModelProfile(
            name=stage.model,
            exec_ns=stage.exec_ns,
            weights_ns=stage.weights_ns,
            weights_bytes=stage.weights_bytes,
            input_shape=_SHAPE,
            output_shape=_SHAPE,
        )
        for stage in stages
    }
    most = max(stage.weights_bytes for stage in stages)
    return replace(base, models=models, weights_cache_bytes=most * draw.choice((1, 1, 2, 8)))
