"""The results of a run of load: counts and percentiles for each step. The same live and simulated.

Two judges, and every figure says which: the *client* counts a request as in time when its answer
came within the SLO of the scheduled send; the *controller* counts from the request's arrival there
until its answer departs, as Clockwork's telemetry does.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from slosched.codes import code_name
from slosched.errors import SloschedError
from slosched.loadgen.verdict import Outcome, Verdict, judge, least_samples, rank_of_bound, sentence
from slosched.telemetry.client_log import NO_ANSWER
from slosched.units import NS_PER_MS, NS_PER_S, format_duration
from slosched.workloads.base import Step, Workload
from slosched.workloads.engine import Engine

#: The smallest bound on the issue delay (see `issue_delay_bound_ns`).
ISSUE_DELAY_BOUND_NS = 2 * NS_PER_MS
#: The bound is this part of the SLO where that is more.
_BOUND_PARTS_OF_SLO = 100


def issue_delay_bound_ns(slo_ns: int) -> int:
    """How late (p99) requests with an SLO of `slo_ns` may be sent: a hundredth of the SLO, and at least 2 ms.

    A run whose sends were later measured its own client, and is invalid. A delay that is much beside an SLO of
    20 ms is nothing beside one of 15 s.
    """
    return max(ISSUE_DELAY_BOUND_NS, slo_ns // _BOUND_PARTS_OF_SLO)


_OK = code_name(0)
#: The label of a step in a sweep of the rate.
_RATE = re.compile(r"([0-9.e+]+)/s")


class StepTally:
    """What is counted while the requests of one step (and group) are sent and answered."""

    __slots__ = ("codes", "in_time", "issue_delays", "latencies", "met", "sent", "slo_ns")

    def __init__(self) -> None:
        self.sent = 0
        self.in_time = 0  # client: code 0 within the SLO of the scheduled send
        self.met = 0  # controller: within the SLO of the arrival there
        self.slo_ns = 0
        self.codes: dict[int, int] = {}
        self.latencies = array("q")  # of code 0, from the scheduled send
        self.issue_delays = array("q")

    @property
    def answered(self) -> int:
        """Requests that have ended, with an answer or without."""
        return sum(self.codes.values())


@dataclass(frozen=True)
class RunProgress:
    """Where a run stands. `step` counts from 1; `satisfaction` is the client's, so far.

    `rate_per_s` is what was sent in about the last second; `total_s` is infinite for a run that ends
    only when it is stopped.
    """

    step: int
    steps: int
    elapsed_s: float
    total_s: float
    label: str
    rate_per_s: float
    satisfaction: float
    sent: int = 0


@dataclass(frozen=True)
class StepResult:
    """One step, or one group of streams in it. Latencies are of successes, from the scheduled send,
    in ns (0: there were none).

    `in_time` is the client's count, `met` the controller's; `codes` counts every request that was
    sent by its outcome in words. `duration_ns` is how long the step sent; `slo` is it in words.
    `latency_p99_bound_ns` is what p99 does not exceed, with 99 % confidence (0: too few successes).
    """

    index: int
    slo: str
    group: str
    slo_factor: float
    slo_ns: int
    duration_ns: int
    sent: int
    in_time: int
    met: int
    codes: dict[str, int]
    latency_p50_ns: int
    latency_p99_ns: int
    issue_delay_p50_ns: int
    issue_delay_p99_ns: int
    latency_p99_bound_ns: int = 0

    @property
    def succeeded(self) -> int:
        """How many requests the latencies are of."""
        return self.codes.get(_OK, 0)

    @property
    def claimed_p99_ns(self) -> int | None:
        """The p99 that may be reported; None where there are too few successes for one."""
        return self.latency_p99_ns if self.succeeded >= least_samples() else None

    @property
    def sent_late(self) -> bool:
        """Whether the client sent later than the step's SLO lets it: the step says nothing then."""
        return self.issue_delay_p99_ns > issue_delay_bound_ns(self.slo_ns)

    @property
    def holds(self) -> Verdict | None:
        """Whether 99 % would be in time for the client; None where its requests were sent late."""
        return pooled_verdict([self])

    @property
    def satisfaction(self) -> float:
        """Client, from the scheduled send: in time / sent."""
        return self.in_time / self.sent if self.sent else 0.0

    @property
    def controller_satisfaction(self) -> float:
        """Controller, from the arrival there: deadline met / sent."""
        return self.met / self.sent if self.sent else 0.0

    @property
    def goodput_rps(self) -> float:
        """Requests in time for the client, per second of the step."""
        return self.in_time * NS_PER_S / self.duration_ns if self.duration_ns else 0.0

    @property
    def controller_goodput_rps(self) -> float:
        """Requests in time for the controller, per second of the step."""
        return self.met * NS_PER_S / self.duration_ns if self.duration_ns else 0.0


@dataclass(frozen=True)
class RunResult:
    """A finished run, or the part of it that ran.

    `complete` is False if it was stopped or the controller went away: `problem` says which.
    `valid` is False if p99 of the issue delay is above the bound of the smallest SLO: the client, or the
    machine it runs on, was too slow for the figures to mean anything. `run_dir` is None where nothing was
    written.
    """

    workload: str
    steps: tuple[StepResult, ...]
    complete: bool
    problem: str
    issue_delay_p50_ns: int
    issue_delay_p99_ns: int
    inputs: bool
    random_weights: bool
    elapsed_ns: int
    run_dir: Path | None = None
    warnings: tuple[str, ...] = field(default=())

    @property
    def sent(self) -> int:
        return sum(step.sent for step in self.steps)

    @property
    def satisfaction(self) -> float:
        """Client, from the scheduled send, over all steps."""
        return sum(s.in_time for s in self.steps) / self.sent if self.sent else 0.0

    @property
    def controller_satisfaction(self) -> float:
        """Controller, from the arrival there, over all steps."""
        return sum(s.met for s in self.steps) / self.sent if self.sent else 0.0

    @property
    def issue_delay_bound_ns(self) -> int:
        """The bound of the smallest SLO of the steps."""
        return issue_delay_bound_ns(min((step.slo_ns for step in self.steps), default=0))

    @property
    def valid(self) -> bool:
        return self.issue_delay_p99_ns <= self.issue_delay_bound_ns

    @property
    def verdict(self) -> str:
        """Whether the run counts, in words."""
        if not self.sent:
            return "nothing was sent" + ("" if self.complete else f" ({self.problem})")
        measured = format_duration(self.issue_delay_p99_ns)
        bound = format_duration(self.issue_delay_bound_ns)
        if not self.valid:
            return (
                f"INVALID: issue delay p99 {measured} is above its bound of {bound}; the client "
                "sent late, so take a lower rate, --no-inputs or a quieter machine"
            )
        partial = "" if self.complete else f" part of a run ({self.problem})"
        return f"valid{partial}: issue delay p99 {measured}, bound {bound}"

    @property
    def slo_verdict(self) -> str:
        """At which steps the SLO holds with 99 % confidence, in words; "" if nothing was sent."""
        slos = {step.slo_ns for step in self.steps}
        labelled = not any(step.slo in _slo_words(step) for step in self.steps)
        subject = f"SLO {format_duration(min(slos))}" if len(slos) == 1 and labelled else ""
        named = [(f"{step.slo} {step.group}".rstrip(), step.holds) for step in self.steps]
        return sentence(subject, named) + _highest_rate(self.steps)

    def as_dict(self) -> dict[str, Any]:
        """Plain dicts and lists, for JSON and for the manifest. Times in ns."""
        return {
            "workload": self.workload,
            "complete": self.complete,
            "problem": self.problem,
            "valid": self.valid,
            "verdict": self.verdict,
            "slo_verdict": self.slo_verdict,
            "sent": self.sent,
            "satisfaction_client_from_scheduled_send": self.satisfaction,
            "satisfaction_controller_from_arrival": self.controller_satisfaction,
            "issue_delay_p50_ns": self.issue_delay_p50_ns,
            "issue_delay_p99_ns": self.issue_delay_p99_ns,
            "issue_delay_bound_ns": self.issue_delay_bound_ns,
            "inputs": self.inputs,
            "random_weights": self.random_weights,
            "elapsed_ns": self.elapsed_ns,
            "run_dir": str(self.run_dir) if self.run_dir is not None else None,
            "warnings": list(self.warnings),
            "steps": [
                {
                    **asdict(step),
                    "satisfaction_client_from_scheduled_send": step.satisfaction,
                    "satisfaction_controller_from_arrival": step.controller_satisfaction,
                    "goodput_client_rps": step.goodput_rps,
                    "goodput_controller_rps": step.controller_goodput_rps,
                    "latency_p99_claimed_ns": step.claimed_p99_ns,
                    "holds": None if step.holds is None else step.holds.as_dict(),
                }
                for step in self.steps
            ],
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> RunResult:
        """The result that `as_dict` gave, read back. Raises MalformedResult if it is something else."""
        try:
            run_dir = document["run_dir"]
            values = _own_fields(cls, document) | {
                "steps": tuple(StepResult(**_own_fields(StepResult, s)) for s in document["steps"]),
                "run_dir": None if run_dir is None else Path(run_dir),
                "warnings": tuple(document["warnings"]),
            }
            return cls(**values)
        except (KeyError, TypeError) as error:
            raise MalformedResult(f"this is not the result of a run: {error}") from None


class MalformedResult(SloschedError):
    """A document is not a run's result, or was written by another version."""


def _own_fields(cls: type[Any], document: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: document[field.name] for field in fields(cls)}


def pooled_verdict(steps: Sequence[StepResult]) -> Verdict | None:
    """Whether 99 % would be in time, from several runs of one step; None if any was sent late."""
    if any(step.sent_late for step in steps):
        return None
    sent = sum(step.sent for step in steps)
    return judge(sent, sent - sum(step.in_time for step in steps))


def run_result(
    workload: Workload,
    engine: Engine,
    tallies: Sequence[StepTally],
    *,
    problem: str = "",
    inputs: bool = False,
    random_weights: bool = False,
    elapsed_ns: int,
    sent_until_ns: int | None = None,
    run_dir: Path | None = None,
    warnings: tuple[str, ...] = (),
) -> RunResult:
    """Sum up what a load driver counted. `problem` says why the run ended early ("": it did not).

    `sent_until_ns` is when the sending ended, after the start; None: at the workload's own end.
    """
    end_ns = engine.end_ns if sent_until_ns is None else min(engine.end_ns, sent_until_ns)
    delays = array("q")
    for tally in tallies:
        delays.extend(tally.issue_delays)
    # A step that was never reached says nothing.
    results = tuple(
        _step_result(engine, step, group, tally, end_ns)
        for tally, (step, group) in zip(tallies, _places(engine), strict=True)
        if tally.sent
    )
    return RunResult(
        workload=workload.describe(),
        steps=results,
        complete=not problem,
        problem=problem,
        issue_delay_p50_ns=_percentile(delays, 50),
        issue_delay_p99_ns=_percentile(delays, 99),
        inputs=inputs,
        random_weights=random_weights,
        elapsed_ns=elapsed_ns,
        run_dir=run_dir,
        warnings=warnings,
    )


def _highest_rate(steps: Sequence[StepResult]) -> str:
    """The highest rate that holds, in words, for a sweep whose steps are named by their rates."""
    rates = {step.index: _rate(step.slo) for step in steps}
    known = [(rate, index) for index, rate in rates.items() if rate is not None]
    if len(known) < 2 or len(known) < len(rates) or any(step.group for step in steps):
        return ""
    held = {s.index for s in steps if s.holds is not None and s.holds.outcome is Outcome.HOLDS}
    good = [rate for rate, index in known if index in held]
    return (
        f". The highest rate that holds: {max(good):.6g}/s"
        if good
        else ". No rate is known to hold"
    )


def _rate(text: str) -> float | None:
    match = _RATE.fullmatch(text)
    return None if match is None else float(match[1])


def _slo_words(step: StepResult) -> tuple[str, ...]:
    """What a step is called that has no label of its own."""
    factor = f"{step.slo_factor:.4g}x" if step.slo_factor else "default SLO"
    return factor, format_duration(step.slo_ns)


def _places(engine: Engine) -> list[tuple[Step, str]]:
    """The order of a driver's tallies."""
    return [(step, group) for step in engine.steps for group in engine.groups]


def _step_result(
    engine: Engine, step: Step, group: str, tally: StepTally, end_ns: int
) -> StepResult:
    following = step.index + 1
    ends_ns = engine.steps[following].start_ns if following < len(engine.steps) else end_ns
    return StepResult(
        index=step.index,
        slo=step.text,
        group=group,
        slo_factor=step.slo_factor,
        slo_ns=tally.slo_ns,
        duration_ns=max(0, min(ends_ns, end_ns) - step.start_ns),
        sent=tally.sent,
        in_time=tally.in_time,
        met=tally.met,
        codes={
            "no answer" if code == NO_ANSWER else code_name(code): count
            for code, count in sorted(tally.codes.items())
        },
        latency_p50_ns=_percentile(tally.latencies, 50),
        latency_p99_ns=_percentile(tally.latencies, 99),
        issue_delay_p50_ns=_percentile(tally.issue_delays, 50),
        issue_delay_p99_ns=_percentile(tally.issue_delays, 99),
        latency_p99_bound_ns=_p99_bound(tally.latencies),
    )


def _p99_bound(latencies: array[int]) -> int:
    rank = rank_of_bound(len(latencies))
    if rank is None:
        return 0
    return int(np.partition(np.frombuffer(latencies, dtype=np.int64), rank)[rank])


def _percentile(values: array[int], percent: float) -> int:
    if not values:
        return 0
    return round(float(np.percentile(np.frombuffer(values, dtype=np.int64), percent)))
