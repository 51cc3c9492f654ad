"""What a clairvoyant scheduler is asked: every request with its times, and GPUs that take exact times.

A request counts if its answer is at the client within its SLO of its scheduled send. The scheduler pays the
latencies from client to controller to worker before the exec (`lead`), and those of the answer after it
(`tail`); nothing else is sure. So an exec may begin at arrival + lead at the earliest and must end by
arrival + SLO - tail. The bounds leave out everything that a scheduler *may* have to pay besides: copies,
jitter, stalls, clocks that differ, loads of weights, and not knowing the future.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from slosched.config import GpuProfile, canonical_model
from slosched.errors import InvalidConfig, UnknownName
from slosched.workloads.base import Step, Workload
from slosched.workloads.engine import Engine
from slosched.workloads.streams import BurstyClosedLoop, ClosedLoop

#: Batch class -> exec time in ns.
Classes = Mapping[int, int]


class Request(NamedTuple):
    """An exec of `model` (an instance, by number) within `release_ns`..`due_ns` serves it."""

    model: int
    release_ns: int
    due_ns: int


class Batch(NamedTuple):
    """One exec: `requests` are places in `Problem.requests`, `gpu` counts over all kinds in order."""

    gpu: int
    model: int
    batch_class: int
    start_ns: int
    end_ns: int
    requests: tuple[int, ...]


@dataclass(frozen=True)
class GpuKind:
    """`count` equal GPUs."""

    name: str
    count: int


@dataclass(frozen=True)
class Problem:
    """`classes[model][kind]` are the batch classes there ({}: that kind cannot run the model).

    Requests are ordered by release, then due. A batch of k requests of one model runs as a class of at
    least k, on one GPU, without a pause unless the model is in `interruptible`; a GPU runs one batch at a
    time. All weights are everywhere.
    """

    kinds: tuple[GpuKind, ...]
    classes: tuple[tuple[Classes, ...], ...]
    requests: tuple[Request, ...]
    interruptible: frozenset[int] = frozenset()

    @property
    def gpus(self) -> int:
        return sum(kind.count for kind in self.kinds)

    def kind_of(self, gpu: int) -> int:
        """The place of the kind that the GPU is of."""
        for place, kind in enumerate(self.kinds):
            if gpu < kind.count:
                return place
            gpu -= kind.count
        raise IndexError("no such GPU")

    def fitting(self, request: Request, kind: int) -> dict[int, int]:
        """The classes of `kind` in which `request` can be in time when it starts at once."""
        most_ns = request.due_ns - request.release_ns
        table = self.classes[request.model][kind]
        return {batch: ns for batch, ns in table.items() if ns <= most_ns}


@dataclass(frozen=True)
class Cluster:
    """The cluster of the bound: GPUs, and the network latencies of every request, in ns.

    `profiles` has one entry for each GPU. `default_slo_ns` is that of requests which name none. Classes
    above `max_batch`, and those above 1 that take longer than `max_exec_ns`, are not used. With `preempt` the
    runs of models that are longer than their profile's `boundary_ns` can be interrupted.
    """

    profiles: tuple[GpuProfile, ...]
    lead_ns: int
    tail_ns: int
    default_slo_ns: int
    max_batch: int | None = None
    max_exec_ns: int | None = None
    preempt: bool = False

    def kinds(self) -> tuple[tuple[GpuProfile, int], ...]:
        """The distinct profiles, in order of their first GPU, and how many GPUs have each."""
        found: list[tuple[GpuProfile, int]] = []
        for profile in self.profiles:
            for place, (other, count) in enumerate(found):
                if other == profile:
                    found[place] = (other, count + 1)
                    break
            else:
                found.append((profile, 1))
        return tuple(found)


@dataclass(frozen=True)
class CellProblem:
    """One step of a workload: its requests, and whether the weights of all instances fit one GPU.

    `offsets_ns` are the scheduled sends from the step's start, in the order of the requests.
    """

    step: Step
    duration_ns: int
    slo_ns: int
    problem: Problem
    offsets_ns: tuple[int, ...]
    weights_fit: bool

    @property
    def requests(self) -> int:
        return len(self.problem.requests)


def check_open(workload: Workload, seed: int) -> None:
    """Raises InvalidConfig for a workload with closed loops, whose arrivals are not known beforehand."""
    for stream in workload.streams(seed):
        if isinstance(stream, ClosedLoop | BurstyClosedLoop):
            raise InvalidConfig(
                f"{workload.name} has closed loops: when their requests come depends on the answers, so "
                "they cannot be known beforehand; bounds are for open loops"
            )


def cells_of(
    workload: Workload, cluster: Cluster, *, seed: int = 0, duration_ns: int | None = None
) -> list[CellProblem]:
    """A problem for each step, with the requests that the client sends with that seed.

    Raises InvalidConfig for closed loops, workloads without an end and models with length classes,
    UnknownName for models that no GPU's profile has.
    """
    check_open(workload, seed)
    engine = Engine(workload, seed=seed, duration_ns=duration_ns)
    names = [use.name for use in workload.models() for _ in range(use.copies)]
    kinds = cluster.kinds()
    tables = {name: tuple(_classes(p, name, cluster) for p, _ in kinds) for name in names}
    base_ns = {name: _base_ns(name, tables[name], kinds) for name in tables}
    sent: list[list[tuple[Request, int]]] = [[] for _ in engine.steps]
    slos: list[int] = [0] * len(engine.steps)
    while engine.next_ns() is not None:
        arrival = engine.take()
        b1_ns = base_ns[names[arrival.instance]]
        slo_ns = arrival.slo_ns or round(arrival.slo_factor * b1_ns) or cluster.default_slo_ns
        slos[arrival.step] = slos[arrival.step] or slo_ns
        due_ns = arrival.at_ns + slo_ns - cluster.tail_ns
        request = Request(arrival.instance, arrival.at_ns + cluster.lead_ns, due_ns)
        sent[arrival.step].append((request, arrival.at_ns))
    gpus = tuple(GpuKind(profile.name, count) for profile, count in kinds)
    classes = tuple(tables[name] for name in names)
    fit = _weights_fit(names, kinds)
    found = []
    for step, slo_ns, pairs in zip(engine.steps, slos, sent, strict=True):
        pairs.sort(key=lambda pair: (pair[0].release_ns, pair[0].due_ns, pair[0].model))
        following = step.index + 1
        last = following >= len(engine.steps)
        ends_ns = engine.end_ns if last else min(engine.end_ns, engine.steps[following].start_ns)
        if pairs:
            asked = tuple(request for request, _ in pairs)
            problem = Problem(gpus, classes, asked, _interruptible(names, cluster))
            offsets = tuple(at_ns - step.start_ns for _, at_ns in pairs)
            length_ns = ends_ns - step.start_ns
            found.append(
                CellProblem(
                    step=step,
                    duration_ns=length_ns,
                    slo_ns=slo_ns,
                    problem=problem,
                    offsets_ns=offsets,
                    weights_fit=fit,
                )
            )
    return found


def _interruptible(names: Sequence[str], cluster: Cluster) -> frozenset[int]:
    """The places of the models that some GPU can interrupt."""
    if not cluster.preempt:
        return frozenset()
    able = {
        name
        for profile, _ in cluster.kinds()
        for name, model in profile.models.items()
        if profile.boundary_ns and max(model.exec_ns.values()) > profile.boundary_ns
    }
    return frozenset(place for place, name in enumerate(names) if canonical_model(name) in able)


def _classes(profile: GpuProfile, name: str, cluster: Cluster) -> dict[int, int]:
    try:
        model = profile.model(name)
    except UnknownName:
        return {}
    if model.lengths:
        raise InvalidConfig(
            f"model {name!r} has length classes, and requests of several may share a batch: bounds know one "
            "program for each model"
        )
    table = model.exec_ns
    return {
        batch: exec_ns
        for batch, exec_ns in sorted(table.items())
        if (cluster.max_batch is None or batch <= cluster.max_batch)
        and (batch == 1 or cluster.max_exec_ns is None or exec_ns <= cluster.max_exec_ns)
    }


def _base_ns(name: str, tables: Sequence[Classes], kinds: Sequence[tuple[GpuProfile, int]]) -> int:
    """b1, the unit of SLO factors: the fastest GPU's batch-1 time."""
    singles = [table[1] for table in tables if table]
    if not singles:
        known = list(dict.fromkeys(model for profile, _ in kinds for model in profile.models))
        raise UnknownName("model", name, known)
    return min(singles)


def _weights_fit(names: Sequence[str], kinds: Sequence[tuple[GpuProfile, int]]) -> bool:
    """True if every GPU can hold the weights of every instance that it can run."""
    for profile, _ in kinds:
        pages = 0
        for name in names:
            try:
                pages += profile.model(name).pages(profile.page_bytes)
            except UnknownName:
                continue
        if pages > profile.pages:
            return False
    return True
