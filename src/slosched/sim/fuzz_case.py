"""A small cluster, load and fault plan drawn from one seed, for fuzz.py."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from slosched.config import (
    PLACEMENTS,
    EmulationNoise,
    GpuProfile,
    ModelProfile,
    SchedulerConfig,
    WeightRule,
)
from slosched.core.scheduler.policies import about, type_and_fidelity
from slosched.signature import Tensor
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.fuzz_cascades import with_cascade, with_cascades_beside
from slosched.sim.guests import AGAIN, BREAKS, DEAF, GOODBYE, SILENT, GuestPlan
from slosched.sim.network import Network
from slosched.sim.spec import SimSpec, WorkerClocks
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US, format_duration
from slosched.workloads.arrivals import PoissonArrivals
from slosched.workloads.base import ModelUse, Step, Stream, instance_seed
from slosched.workloads.lengths import Lengths
from slosched.workloads.streams import ClosedLoop, OpenLoop

#: Faults begin at any time from the start on, and are over by then.
FAULTS_END_NS = 3 * NS_PER_S
#: One case in this many silences a worker or the client for longer than every timeout.
_LONG_CASES = 8
_LONG_NS = (5_500 * NS_PER_MS, 7 * NS_PER_S)
#: Time after the last fault by which the cluster must serve as if no fault had occurred.
RECOVERY_NS = 8 * NS_PER_S
#: The share of the cases with guests in which these unload their models.
_UNLOADING_CASES = 0.5
#: A scheduler that sends nothing where it expects a long latency learns of a short one at five
#: heartbeats a second, and its 90th percentile of up to 100 must turn over.
SLOW_RECOVERY_NS = 30 * NS_PER_S
#: What is sent in this time after the recovery is held against a run without faults.
TAIL_NS = 2 * NS_PER_S

#: TYPEs that serve clients, and how often they are drawn. SMART is slow: it plans all anew each ms.
TYPES = {
    "INFER5": 16,
    "INFER5:paper": 4,
    "FIFO": 4,
    "EDF": 4,
    "REJECT": 4,
    "AIMD": 4,
    "INFER4": 4,
    "SMART": 1,
    "DIRECT": 2,
    "ECHO": 1,
}

_PAGE_BYTES = 2**24
_INPUT_BYTES = 32
_WEIGHTS = (WeightRule(5.0, client="guest 0"), WeightRule(0.5, slo_max_ns=200 * NS_PER_MS))
_PACE_NS = 50 * NS_PER_MS
#: The share of the cases whose models have length classes, and the lengths of their requests.
_LENGTH_CASES, _LENGTHS = 0.25, Lengths(median=3, sigma=0.7, least=1, most=8)
#: The share of the cases in which urgent requests may interrupt long ones.
_PREEMPTING_CASES = 0.4
#: A model that guests alone use.
_GUESTS_MODEL = "guests9"


class _PacedLoop(ClosedLoop):
    """A closed loop with a pause after each answer."""

    def after_answer(self, at_ns: int, ok: bool, deadline_ns: int) -> int | None:
        due_ns = super().after_answer(at_ns, ok, deadline_ns)
        return None if due_ns is None else due_ns + _PACE_NS


@dataclass(frozen=True)
class SmallLoad:
    """Poisson arrivals at `rates_per_s` by instance, and a closed loop of `loops` over all instances.

    Every request has the SLO `slo_ns`. The Poisson arrivals come `bunch` at a time. `guests` are further
    clients (fuzz.py has them come). `lengths` are those of all requests, where the models have length classes.
    """

    uses: tuple[ModelUse, ...]
    rates_per_s: tuple[float, ...]
    loops: int
    slo_ns: int
    name: str = "fuzz"
    duration_ns: int | None = None
    groups: tuple[str, ...] = ("",)
    bunch: int = 1
    guests: tuple[GuestPlan, ...] = ()
    lengths: Lengths | None = None

    def models(self) -> tuple[ModelUse, ...]:
        return self.uses

    def steps(self) -> tuple[Step, ...]:
        return (Step(0, 0, slo_ns=self.slo_ns),)

    def streams(self, seed: int) -> Sequence[Stream]:
        streams: list[Stream] = [
            OpenLoop(self._times(rate, instance_seed(seed, index)), [index], user_id=index)
            for index, rate in enumerate(self.rates_per_s)
        ]
        if self.loops:
            instances = range(len(self.rates_per_s))
            streams.append(_PacedLoop(self.loops, instances, user_id=len(streams)))
        if self.lengths is not None:
            for index, stream in enumerate(streams):
                stream.lengths = self.lengths.draws(instance_seed(seed, index))
        return streams

    def _times(self, rate: float, seed: int) -> Iterator[int]:
        for at_ns in PoissonArrivals(rate / self.bunch, seed):
            yield from (at_ns,) * self.bunch

    def describe(self) -> str:
        loops = f", {self.loops} closed loops" if self.loops else ""
        return (
            f"{self.name}: {len(self.rates_per_s)} instances, {sum(self.rates_per_s):.0f}/s"
            f"{loops}, SLO {format_duration(self.slo_ns)}, {self.bunch} at a time, "
            f"{len(self.guests)} further clients"
        )


def drawn_spec(seed: int, *, policy: str | None = None) -> SimSpec:
    """The spec of `seed`, with checks and faults; `policy` takes the place of the TYPE drawn."""
    draw = Random(f"{seed}/fuzz")
    (drawn_type,) = Random(f"{seed}/type").choices(list(TYPES), list(TYPES.values()))
    type_, fidelity = type_and_fidelity(policy or drawn_type)
    gpus_per_worker = draw.randint(1, 3)
    workers = draw.randint(1, 4)
    gpus = max(1, gpus_per_worker * workers - draw.randrange(gpus_per_worker))
    models = tuple(_model(draw, f"net{index}") for index in range(draw.randint(1, 3)))
    uses = tuple(ModelUse(model.name, draw.randint(1, 4)) for model in models)
    profile = GpuProfile(
        "small",
        {model.name: model for model in models},
        weights_cache_bytes=draw.choice((2, 4, 8, 32)) * _PAGE_BYTES * 2,
    )
    more = Random(f"{seed}/clients")
    inputs, without_input = more.random() < 0.7, more.choice((0, 2, 3, 5))
    options = Random(f"{seed}/options")
    config = SchedulerConfig(
        generate_inputs=inputs and more.random() < 0.2,
        policy=type_,
        fidelity=fidelity or "best",
        schedule_ahead_ns=draw.choice((None, 5 * NS_PER_MS)),
        max_exec_ns=NS_PER_S,
        placement=_placement(options, type_, fidelity),
        weights=options.choice(((), (), _WEIGHTS)),
        max_client_weight=options.choice((1.0, 10.0)),
        client_weights=options.choice(("value", "shares")),
        max_client_requests=options.choice((100_000, 100_000, 40)),
        max_bytes=options.choice((2**33, 2**33, 100 * _INPUT_BYTES)),
        operators=("guest 0",),
        preempt=Random(f"{seed}/preempt").random() < _PREEMPTING_CASES,
    )
    load = _with_clients(more, _load(draw, models, uses, gpus), models, gpus)
    if Random(f"{seed}/lengths").random() < _LENGTH_CASES:
        load = replace(load, lengths=_LENGTHS)
        profile.models.update({name: _with_lengths(each) for name, each in profile.models.items()})
    unloads = Random(f"{seed}/unloads")
    # In the other cases guests that go leave more behind: requests, and batches that are lost with a worker.
    if load.guests and unloads.random() < _UNLOADING_CASES:
        if unloads.random() < 0.4:
            model = _model(unloads, _GUESTS_MODEL)
            profile.models[_GUESTS_MODEL] = model if load.lengths is None else _with_lengths(model)
        load = _with_unloads(unloads, load, _GUESTS_MODEL in profile.models)
    spec = SimSpec(
        workload=load,
        inputs=inputs,
        without_input=without_input,
        scheduler=config,
        profiles=(profile,),
        gpus=gpus,
        gpus_per_worker=gpus_per_worker,
        network=Network(jitter_ns=draw.choice((0, 50 * NS_PER_US, 300 * NS_PER_US))),
        noise=EmulationNoise(exec_sigma=draw.choice((0.0, 0.01, 0.05))),
        clocks=WorkerClocks(
            draw.choice((0, 0, NS_PER_MS, NS_PER_S)), draw.choice((0.0, 0.0, 50.0))
        ),
        seed=seed,
        duration_ns=60 * NS_PER_S,
        check=True,
        cluster_id=Random(f"{seed}/cluster").choice(("", "fuzz", "fuzz")),
    )
    spec = _with_cascades(spec, seed)
    counts = [len(each) for each in spec.worker_profiles()]
    plan = FaultPlan.random(seed, counts, until_ns=FAULTS_END_NS)
    if options.randrange(_LONG_CASES) == 0:
        plan = FaultPlan((*plan.faults, _long(options, len(counts))), seed)
    return with_plan(spec, plan)


def _with_cascades(spec: SimSpec, seed: int) -> SimSpec:
    """`spec` with a cascade alone where its TYPE serves one, or in some cases beside the models."""
    config = spec.scheduler
    if about(config.policy, config.fidelity).one_cascade:
        return with_cascade(spec, seed)
    if (config.policy, config.fidelity) == ("INFER5", "best"):
        return with_cascades_beside(spec, seed, _with_lengths)
    return spec


def _placement(draw: Random, type_: str, fidelity: str) -> str:
    """A rule of placement, where the TYPE has none of its own."""
    rule = draw.choice((PLACEMENTS[0], *PLACEMENTS))
    return rule if about(type_).takes_placement and not fidelity else PLACEMENTS[0]


def _long(draw: Random, workers: int) -> Fault:
    """A fault after which a client is found lost as well."""
    kind = draw.choice(("pause", "partition"))
    target = draw.choice(("client", "client", f"worker {draw.randrange(workers)}"))
    return Fault(kind, target, draw.randrange(NS_PER_S), draw.randrange(*_LONG_NS))


def with_plan(spec: SimSpec, plan: FaultPlan) -> SimSpec:
    """The same spec with other faults."""
    return replace(spec, faults=plan)


def _model(draw: Random, name: str) -> ModelProfile:
    single_ns = draw.choice((2, 5, 10, 20)) * NS_PER_MS
    exec_ns = {batch: single_ns * (1 + batch) // 2 for batch in (1, 2, 4, 8)}
    pages = draw.randint(1, 4)
    return ModelProfile(
        name=name,
        exec_ns=exec_ns,
        weights_ns=draw.choice((1, 4, 8)) * NS_PER_MS,
        weights_bytes=pages * _PAGE_BYTES,
        input_shape=(8,),
        output_shape=(8 + 4 * int(name[-1]),),  # outputs tell which model ran
    )


def _with_lengths(model: ModelProfile) -> ModelProfile:
    """The same model with two inputs, an output and a time that depend on the length."""
    at = {
        length: {batch: max(1, ns * (1 + length) // 9) for batch, ns in model.exec_ns.items()}
        for length in (2, 4, 8)
    }
    outputs = (Tensor("numbers", "float32", (-1, 8 + int(model.name[-1]))),)
    inputs = (Tensor("ids", "int64", (-1,)), Tensor("mask", "float32", (-1, 2)))
    return replace(model, inputs=inputs, outputs=outputs, exec_ns_at=at)


def _load(
    draw: Random, models: Sequence[ModelProfile], uses: Sequence[ModelUse], gpus: int
) -> SmallLoad:
    """Up to half of what the GPUs can do one request at a time, and 100/s at most: a case takes long enough."""
    share = draw.choice((0.05, 0.2, 0.5))
    weights = [draw.choice((1, 1, 4)) for use in uses for _ in range(use.copies)]
    singles = [m.exec_ns[1] for m, use in zip(models, uses, strict=True) for _ in range(use.copies)]
    mean_ns = sum(w * e for w, e in zip(weights, singles, strict=True)) / sum(weights)
    rate = min(share * gpus * NS_PER_S / mean_ns, 100.0)
    return SmallLoad(
        uses=tuple(uses),
        rates_per_s=tuple(rate * weight / sum(weights) for weight in weights),
        loops=draw.choice((0, 0, 1, 2)),
        slo_ns=round(draw.choice((2.5, 5, 10, 40)) * max(singles)) + 10 * NS_PER_MS,
    )


def _with_clients(
    draw: Random, load: SmallLoad, models: Sequence[ModelProfile], gpus: int
) -> SmallLoad:
    """Requests in bunches where the SLO leaves time for a batch, and up to two further clients."""
    patient = load.slo_ns > 5 * max(model.exec_ns[1] for model in models)
    bunch = draw.choice((1, 2, 4, 8)) if patient else 1
    count = draw.choice((0, 1, 1, 2))
    guests = tuple(_guest(draw, f"guest {index}", models, gpus) for index in range(count))
    # Half the rate, as what comes in bunches waits for longer: near overload no two runs are alike.
    rates_per_s = tuple(rate / 2 for rate in load.rates_per_s) if bunch > 1 else load.rates_per_s
    return replace(load, rates_per_s=rates_per_s, bunch=bunch, guests=guests)


def _with_unloads(draw: Random, load: SmallLoad, guests_model: bool) -> SmallLoad:
    """Guests load several copies and unload them again: those of the client that stays, or of their own model.

    Only the latter are ever unloaded with the operator's right: the client that stays does not load again.
    """
    guests = []
    for plan in load.guests:
        model = _GUESTS_MODEL if guests_model and draw.random() < 0.8 else plan.model
        unloads_ns = draw.randrange(plan.comes_ns, max(plan.goes_ns, plan.comes_ns + 1))
        operates = plan.name == "guest 0" and model != _GUESTS_MODEL
        guests.append(
            replace(
                plan,
                model=model,
                copies=draw.choice((1, 1, 2, 5)),
                unloads_ns=unloads_ns if draw.random() < 0.6 else -1,
                force=draw.random() < 0.5 and not operates,
                loads_again=draw.random() < 0.5,
            )
        )
    return replace(load, guests=tuple(guests))


def _guest(draw: Random, name: str, models: Sequence[ModelProfile], gpus: int) -> GuestPlan:
    """It goes while its last burst can still be served.

    What falls silent is given up five seconds later only, so it leaves more work than that on few GPUs.
    """
    model = draw.choice(models)
    way = draw.choice((GOODBYE, BREAKS, AGAIN, DEAF, SILENT)[: 5 if gpus <= 3 else 4])
    goes_ns = draw.randrange(NS_PER_S, FAULTS_END_NS)
    burst, every_ns = draw.choice((4, 8, 20)), draw.choice((50, 100, 300)) * NS_PER_MS
    # The longer leaves time for a second try after a worker was found lost.
    slo_ns = draw.choice((1, 3, 3)) * NS_PER_S
    comes_ns = draw.randrange(NS_PER_S)
    if way == SILENT:
        largest = max(model.exec_ns)
        burst = min(1500, gpus * 7 * NS_PER_S * largest // model.exec_ns[largest])
        every_ns, slo_ns = 60 * NS_PER_S, 15 * NS_PER_S
    weight = draw.choice((1.0, 0.2, 10.0))
    return GuestPlan(
        name=name,
        model=model.name,
        comes_ns=comes_ns,
        goes_ns=goes_ns,
        every_ns=every_ns,
        burst=burst,
        slo_ns=slo_ns,
        way=way,
        weight=weight,
    )
