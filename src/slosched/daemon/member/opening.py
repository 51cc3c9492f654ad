"""Which lanes an Order needs, and one form for all of them.

Eager models and captured ones say a little differently what they hold; a `Held` lane says it per job. Nothing
heavy is imported before a lane is opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from slosched.core.share.interface import Lane
from slosched.daemon.backends.base import preparation_failed
from slosched.errors import InvalidConfig, MissingPackage, OutOfResources
from slosched.share_spec import Job, JobEnded, Mode, Order, Policy, Prepared, Run, Status

#: The lowest number that CUDA knows as a stream's priority: the highest priority.
_HIGHEST_STREAM = -5


class Opened(Lane, Protocol):
    """A lane with its models."""

    def close(self) -> None:
        """Give back what it holds."""


@dataclass(frozen=True)
class Held:
    """A lane of one or more jobs. `failures`: its jobs that could not be prepared, where others could."""

    jobs: tuple[int, ...]
    lane: Opened
    prepare: Callable[[], tuple[Prepared, ...]]
    memory: Callable[[], dict[int, tuple[int, int]]]
    failures: Callable[[], dict[int, tuple[Status, str]]]


@dataclass(frozen=True)
class Plan:
    """A lane to be opened: `open` raises what building its models raises.

    `own_thread`: a start lasts as long as the request, so beside other lanes it needs a thread.
    """

    jobs: tuple[int, ...]
    open: Callable[[], Held]
    own_thread: bool = False


def plans(order: Order) -> tuple[list[Plan], list[JobEnded]]:
    """The lanes of `order`, and the jobs that can have none here."""
    refused: list[JobEnded] = []
    if order.mode is Mode.PREEMPT:
        from slosched.daemon.backends.job_models import can_capture

        fit = {}
        for place, job in order.jobs.items():
            if job.run is Run.EAGER or not can_capture(job):
                refused.append(
                    JobEnded(
                        job=place,
                        status=Status.UNAVAILABLE,
                        reason=f"{job.model} cannot be captured as graphs, which mode preempt needs; "
                        "mode gate preempts eager models",
                    )
                )
            else:
                fit[place] = job
        return ([Plan(tuple(fit), lambda: _graphs(order, fit, None))] if fit else []), refused
    priorities = stream_priorities(order.jobs) if order.mode is Mode.STREAMS else {}
    found = []
    for place, job in order.jobs.items():
        try:
            found.append(_alone(order, place, job, priorities.get(place)))
        except InvalidConfig as error:
            refused.append(JobEnded(job=place, status=Status.UNAVAILABLE, reason=str(error)))
    return found, refused


def stream_priorities(jobs: Mapping[int, Job]) -> dict[int, int]:
    """CUDA's priorities for jobs on streams: 0 for the lowest jobs, and a lower number for each level above."""
    levels = sorted({job.priority for job in jobs.values()})
    return {place: max(_HIGHEST_STREAM, -levels.index(job.priority)) for place, job in jobs.items()}


def why_not(error: BaseException) -> tuple[Status, str]:
    """How a job ended whose lane was not opened or prepared, or raised later."""
    names = {each.__name__ for each in type(error).__mro__}
    _, words = preparation_failed(error)
    if isinstance(error, MemoryError | OutOfResources) or "OutOfMemoryError" in names:
        return Status.OUT_OF_MEMORY, words
    if isinstance(error, MissingPackage):
        return Status.UNAVAILABLE, words
    return Status.FAILED, words


def _alone(order: Order, place: int, job: Job, stream: int | None) -> Plan:
    if order.mode is Mode.GATE:
        if job.run is Run.GRAPHS:
            raise InvalidConfig(
                "run = graphs has no gate: mode gate stops eager models at their modules; take preempt"
            )
        graphs = False
    else:
        graphs = job.run is not Run.EAGER and not order.device.startswith("cpu")
        if graphs and job.run is Run.AUTO:
            from slosched.daemon.backends.job_models import can_capture

            graphs = can_capture(job)
        elif job.run is Run.GRAPHS and not graphs:
            raise InvalidConfig("run = graphs needs a GPU; on the CPU models run eager")
    if graphs:
        return Plan((place,), lambda: _graphs(order, {place: job}, stream))
    return Plan((place,), lambda: _eager(order, place, job, stream), own_thread=True)


def _graphs(order: Order, jobs: Mapping[int, Job], stream: int | None) -> Held:
    from slosched.daemon.backends.graphs.lane import GraphLane

    lane = GraphLane(
        jobs,
        device=order.device,
        seed=order.seed,
        preempt=order.mode is Mode.PREEMPT,
        stream_priority=stream,
        urgent=order.urgent,
        by_deadline=order.policy in (Policy.EDF, Policy.LEAST_SLACK),
    )
    return Held(
        jobs=tuple(jobs),
        lane=lane,
        prepare=lambda: tuple(lane.prepare()),
        memory=lane.memory,
        failures=lambda: {
            place: (
                Status.OUT_OF_MEMORY if failure.out_of_memory else Status.FAILED,
                why_not(failure.error)[1],
            )
            for place, failure in lane.failures.items()
        },
    )


def _eager(order: Order, place: int, job: Job, stream: int | None) -> Held:
    from slosched.daemon.backends.eager.lane import EagerLane

    gate = None
    if order.mode is Mode.GATE:
        from slosched.daemon.member.gate import Gate

        gate = Gate.open(order.gate).member(place, job.priority)
    lane = EagerLane(
        place, job, device=order.device, seed=order.seed, gate=gate, stream_priority=stream
    )

    def prepare() -> tuple[Prepared, ...]:
        prepared = lane.prepare()
        if order.measure:
            prepared = msgspec.structs.replace(prepared, pieces=lane.measure())
        return (prepared,)

    return Held(
        jobs=(place,),
        lane=lane,
        prepare=prepare,
        memory=lambda: {place: lane.memory()},
        failures=dict,
    )
