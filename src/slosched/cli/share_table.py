"""What runs that share a GPU came to, as tables: a row for each job, and a line for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slosched.cli.output import table_text
from slosched.core.scheduler.foreign_text import printable
from slosched.share_spec import Mode, Status

if TYPE_CHECKING:
    from slosched.share.figures import JobMetrics, RunMetrics
    from slosched.share.simulate import Off

_HEADINGS = (
    "mode",
    "job",
    "n",
    "req/s",
    "p50 ms",
    "p99 ms",
    "vs solo",
    "slower",
    "SLO misses",
    "J/request",
)
_WRONG = "wrong answers"
_LONGEST_REASON = 300
_EXPLAINED = (
    "p99: the maximum (max) below 100 requests; vs solo: throughput / throughput alone; slower: mean latency / "
    "latency alone; *: without an SLO, over 1.6 x the latency alone (Deft's rule); J/request: idle included"
)
_WRONG_EXPLAINED = "; wrong answers: not that of the job's first request"


def runs_table(runs: Sequence[RunMetrics]) -> str:
    """A row for each job of each run, and what the headings mean. Empty without a run that took place.

    There is a column of wrong answers only where a job has some.
    """
    shown = [(run, job) for run in runs if not run.unavailable for job in run.jobs]
    if not shown:
        return ""
    headings, explained = list(_HEADINGS), _EXPLAINED
    rows = [_row(_run_name(run, runs).removesuffix(f" {job.name}"), job) for run, job in shown]
    if any(job.wrong_answers for _, job in shown):
        headings.append(_WRONG)
        explained += _WRONG_EXPLAINED
        rows = [[*row, str(job.wrong_answers)] for row, (_, job) in zip(rows, shown, strict=True)]
    return f"{table_text(headings, rows)}\n{explained}"


def tuned_lines(runs: Sequence[RunMetrics]) -> list[str]:
    """A line for each boundary that the tuner chose: how far apart, why, and what Deft's closed form gives."""
    from slosched.share.tuning import tuning_line

    return [
        f"{_run_name(run, runs)}: tuned: {tuning_line(job.name, job.tuning)}"
        for run in runs
        for job in run.jobs
        if job.tuning is not None
    ]


def run_line(run: RunMetrics, runs: Sequence[RunMetrics] = ()) -> str:
    """One line for a run: STP, ANTT, power and energy against the same work alone, or why it has none."""
    from slosched.share.energy import COMPUTED

    name = _run_name(run, runs)
    if run.unavailable:
        return f"{name}: unavailable: {_shown(run.unavailable.removeprefix(f'{run.mode}: '))}"
    parts = []
    if run.stopped:
        parts.append(f"stopped after {_digits(run.window_s, 3)} s")
    if run.short:
        seconds = f"{_digits(run.window_s, 3)} s of {_digits(run.planned_s, 3)} s"
        parts.append(f"all jobs were there for {seconds} alone, which the figures are of")
    alone = run.mode is Mode.EXCLUSIVE
    for label, value in (("STP", run.stp), ("ANTT", run.antt), ("Jain", run.jain)):
        if value is not None and not alone:
            parts.append(f"{label} {_digits(value, 3)}")
    energy = run.energy
    if energy.joules is not None:
        watts = f" ({energy.mean_watts:.0f} W)" if energy.mean_watts is not None else ""
        how = "computed" if energy.source == COMPUTED else f"by {energy.source}"
        parts.append(f"{energy.joules:.0f} J{watts} {how}")
        if energy.difference is not None:
            parts.append(f"integrated power {100 * energy.difference:+.1f} % from the counter")
    else:
        parts.append(f"energy unknown: {energy.problem or 'no samples'}")
    if run.energy_ratio is not None and not alone:
        ratio = f"energy {run.energy_ratio:.3f} x that of the same requests alone"
        if run.energy_ratio_with_idle is not None:
            ratio += f" ({run.energy_ratio_with_idle:.3f} x with the idle time of their GPUs)"
        parts.append(ratio)
    if run.pauses.n:
        parts.append(f"{run.pauses.n} interruptions")
    failed = [
        f"{job.name}: {job.status}: {_shown(job.reason)}"
        for job in run.jobs
        if job.status is not Status.OK
    ]
    return f"{name}: {'; '.join([*parts, *failed])}"


def _shown(reason: str) -> str:
    """A model's own words, for a terminal: one line, cut where it is long."""
    return printable(reason, _LONGEST_REASON)


def off_table(off: Sequence[Off]) -> str:
    """Each figure predicted and measured, and the difference."""
    rows = [
        (
            str(each.mode),
            each.job or "all",
            each.figure,
            _digits(each.predicted),
            _digits(each.measured),
            f"{100 * each.error:+.1f} %",
        )
        for each in off
    ]
    return table_text(("mode", "job", "figure", "predicted", "measured", "off by"), rows)


def _run_name(run: RunMetrics, runs: Sequence[RunMetrics]) -> str:
    repeated = any(each.mode is run.mode and each.repeat != run.repeat for each in runs)
    name = f"{run.mode} r{run.repeat}" if repeated else str(run.mode)
    return f"{name} {run.jobs[0].name}" if run.mode is Mode.EXCLUSIVE and run.jobs else name


def _row(mode: str, job: JobMetrics) -> list[str]:
    latency = job.latency
    misses = job.misses
    missed = "-"
    if misses.share is not None:
        missed = f"{misses.missed} ({100 * misses.share:.3g} %)"
    elif misses.deft_share is not None:
        missed = f"{misses.deft_missed} ({100 * misses.deft_share:.3g} %)*"
    p99 = "-"
    if latency is not None:
        p99 = _digits(latency.p99_ms) + (" max" if latency.p99_is_maximum else "")
    return [
        mode,
        job.name if job.status is Status.OK else f"{job.name} ({job.status})",
        str(job.n),
        _digits(job.throughput_per_s),
        _digits(latency.p50_ms) if latency is not None else "-",
        p99,
        _number(job.normalized),
        _number(job.slowdown),
        missed,
        _digits(job.joules_per_request, 3) if job.joules_per_request is not None else "-",
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _digits(value: float, digits: int = 4) -> str:
    """`value` with that number of digits, or as a whole number where it has more: never as 1.2e+04."""
    return f"{value:.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
