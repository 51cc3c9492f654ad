"""The numbers of an SLO sweep, step by step, from a run's TSV files alone.

Two sides judge a request, and every satisfaction says which did: the controller from arrival (as
published), the client from the scheduled send (so that a late generator is charged for it).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.runs import Run, open_run
from slosched.codes import code_name
from slosched.loadgen.verdict import judge, least_samples
from slosched.telemetry.client_log import NO_ANSWER
from slosched.units import NS_PER_S, format_duration, format_share

if TYPE_CHECKING:
    pass

CONTROLLER_VIEW = "controller, from arrival"
CLIENT_VIEW = "client, from the scheduled send"

#: A step that comes again after a pause of this length belongs to another sweep on the same controller.
_NEW_SWEEP_AFTER_NS = 5 * NS_PER_S

Times = NDArray[np.int64]


@dataclass(frozen=True)
class StepSummary:
    """One SLO step as one side saw it. Rates are per second, latencies in ns.

    `slo_factor` is 0 where the SLO was absolute; `slo_ns` is the step's median deadline. Satisfaction
    is satisfied / requests, refusals and failures included; latencies are those of code 0 and NaN
    where there was none. `by_code` counts the others. `sweep` is 0, or n for the n-th repetition.
    """

    view: str
    step: int
    sweep: int
    slo_factor: float
    slo_ns: int
    start_ns: int
    duration_ns: int
    requests: int
    offered_rps: float
    satisfied: int
    satisfaction: float
    goodput_rps: float
    p50_ns: float
    p99_ns: float
    by_code: dict[int, int]

    @property
    def slo_text(self) -> str:
        """The step as the sweep wrote it: "2.25x" or "10ms"."""
        if self.slo_factor > 0:
            return f"{self.slo_factor:.4g}x"
        return format_duration(self.slo_ns)


@dataclass(frozen=True)
class View:
    """What both logs have in common, one entry per request. `at_ns` is the arrival, or the scheduled send."""

    name: str
    at_ns: Times
    latency_ns: Times
    slo_factor: NDArray[np.float64]
    slo_ns: Times
    code: Times
    satisfied: Times


def summarise_steps(run_dir: Path) -> list[StepSummary]:
    """Return the steps of a run in time order: the controller's first, then the client's.

    A side whose log is not there is left out. Raises InvalidConfig if neither is, MalformedLog if a
    log is damaged.
    """
    return summarise_run(open_run(run_dir))


def summarise_run(run: Run) -> list[StepSummary]:
    """`summarise_steps` for a run that is open already."""
    return [step for view in views_of(run) for step in summarise_view(view)]


def views_of(run: Run) -> list[View]:
    """Return the run's requests as each side saw them: the controller's first, then the client's."""
    views: list[View] = []
    if run.requests is not None:
        t = run.requests
        views.append(
            View(
                name=CONTROLLER_VIEW,
                at_ns=t["t"] - t["latency"],
                latency_ns=t["latency"],
                slo_factor=t["slo_factor"],
                slo_ns=t["deadline"],
                code=t["result"],
                satisfied=t["deadline_met"],
            )
        )
    if run.client is not None:
        t = run.client
        views.append(
            View(
                name=CLIENT_VIEW,
                at_ns=t["scheduled_ns"],
                latency_ns=t["latency_ns"],
                slo_factor=t["slo_factor"],
                slo_ns=t["slo_ns"],
                code=t["code"],
                satisfied=t["in_time"],
            )
        )
    return views


def summarise_view(view: View) -> list[StepSummary]:
    """Return the steps of one side in time order."""
    groups = [
        (key, sweep, rows)
        for key, rows_of_key in _by_slo(view)
        for sweep, rows in enumerate(_sweeps(view.at_ns, rows_of_key))
    ]
    groups.sort(key=lambda group: int(view.at_ns[group[2][0]]))
    return [
        _summary(view, step, sweep, factor, rows)
        for step, ((factor, _), sweep, rows) in enumerate(groups)
    ]


def _by_slo(view: View) -> list[tuple[tuple[float, int], NDArray[np.intp]]]:
    """Rows of each SLO, in order of their times. Absolute SLOs (factor 0) differ by their deadline."""
    order = np.argsort(view.at_ns, kind="stable")
    absolute = np.where(view.slo_factor > 0, 0, view.slo_ns)[order]
    factors, of_factor = np.unique(view.slo_factor[order], return_inverse=True)
    slos, of_slo = np.unique(absolute, return_inverse=True)
    keys = of_factor * len(slos) + of_slo
    by_key = np.argsort(keys, kind="stable")
    distinct, firsts = np.unique(keys[by_key], return_index=True)
    return [
        ((float(factors[key // len(slos)]), int(slos[key % len(slos)])), order[rows])
        for key, rows in zip(distinct, np.split(by_key, firsts)[1:], strict=True)
    ]


def _sweeps(at_ns: Times, rows: NDArray[np.intp]) -> list[NDArray[np.intp]]:
    """Cut the rows of one SLO where a later sweep begins: after a long pause in which others came."""
    times = at_ns[rows]
    gaps = np.diff(times)
    if len(gaps) == 0:
        return [rows]
    long = max(_NEW_SWEEP_AFTER_NS, 20 * float(np.median(gaps)))
    cuts = [
        int(i) + 1
        for i in np.flatnonzero(gaps > long)
        if bool(np.any((at_ns > times[i]) & (at_ns < times[i + 1])))
    ]
    return np.split(rows, cuts)


def _summary(
    view: View, step: int, sweep: int, factor: float, rows: NDArray[np.intp]
) -> StepSummary:
    times, codes = view.at_ns[rows], view.code[rows]
    count = len(rows)
    # The first and last request fence count - 1 gaps; a step is as long as count of them.
    # Python's integers: an hour in ns times ten million is beyond 64 bits.
    span_ns = int(times[-1]) - int(times[0])
    duration_ns = int(span_ns * count / (count - 1)) if count > 1 else 0
    satisfied = int(np.count_nonzero(view.satisfied[rows]))
    successes = view.latency_ns[rows][codes == 0]
    p50, p99 = np.quantile(successes, (0.5, 0.99)) if len(successes) else (math.nan, math.nan)
    other, counts = np.unique(codes[codes != 0], return_counts=True)
    return StepSummary(
        view=view.name,
        step=step,
        sweep=sweep,
        slo_factor=factor,
        slo_ns=int(np.median(view.slo_ns[rows])),
        start_ns=int(times[0]),
        duration_ns=duration_ns,
        requests=count,
        offered_rps=_rate(count, duration_ns),
        satisfied=satisfied,
        satisfaction=satisfied / count,
        goodput_rps=_rate(satisfied, duration_ns),
        p50_ns=float(p50),
        p99_ns=float(p99),
        by_code={int(c): int(n) for c, n in zip(other, counts, strict=True)},
    )


def _rate(count: int, duration_ns: int) -> float:
    return count * NS_PER_S / duration_ns if duration_ns > 0 else math.nan


# ------------------------------------------------------------------------------------ rendering

_HEADINGS = (
    "SLO",
    "deadline",
    "requests",
    "offered r/s",
    "satisfaction",
    "holds",
    "goodput r/s",
    "p50",
    "p99",
    "other codes",
)


def _cells(s: StepSummary) -> tuple[str, ...]:
    return (
        s.slo_text,
        format_duration(s.slo_ns),
        str(s.requests),
        _number(s.offered_rps),
        _share(s),
        judge(s.requests, s.requests - s.satisfied).word,
        _number(s.goodput_rps),
        format_duration(s.p50_ns),
        _p99(s),
        "  ".join(f"{code}: {count}" for code, count in s.by_code.items()),
    )


def _p99(s: StepSummary) -> str:
    enough = s.requests - sum(s.by_code.values()) >= least_samples()
    return format_duration(s.p99_ns) if enough or math.isnan(s.p99_ns) else f"n<{least_samples()}"


def _share(s: StepSummary) -> str:
    return format_share(s.satisfied / s.requests)


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.1f}"


def _views(summaries: Sequence[StepSummary]) -> list[str]:
    return list(dict.fromkeys(s.view for s in summaries))


def _code_key(summaries: Sequence[StepSummary]) -> str:
    """ "4 timed out, 8 could not start in time": the codes that occur, in words."""
    codes = sorted({code for s in summaries for code in s.by_code})
    return ", ".join(f"{c} {'no answer' if c == NO_ANSWER else code_name(c)}" for c in codes)


def _title(view: str) -> str:
    return f"Satisfaction as judged by the {view}"


def render_text(summaries: Sequence[StepSummary]) -> str:
    """Return a table for each side that judged, as plain text."""
    blocks = []
    for view in _views(summaries):
        chosen = [s for s in summaries if s.view == view]
        rows = [_HEADINGS, *(_cells(s) for s in chosen)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS) - 1)]
        lines = [_title(view)]
        for row in rows:
            aligned = [cell.rjust(width) for cell, width in zip(row, widths, strict=False)]
            lines.append("  ".join([*aligned, row[-1]]).rstrip())
        key = _code_key(chosen)
        if key:
            lines.append(f"codes: {key}")
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def as_json(summaries: Sequence[StepSummary]) -> list[dict[str, Any]]:
    """Return the summaries as JSON-able dicts: NaN becomes None, codes become text keys."""
    documents = []
    for summary in summaries:
        document = asdict(summary)
        for key, value in document.items():
            if isinstance(value, float) and math.isnan(value):
                document[key] = None
        verdict = judge(summary.requests, summary.requests - summary.satisfied)
        document["holds"] = verdict.as_dict()
        document["by_code"] = {str(code): count for code, count in summary.by_code.items()}
        documents.append(document)
    return documents
