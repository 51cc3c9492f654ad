"""What a report says in words: its headline, captions that are true of this run, and its tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

from slosched.analysis import report_figures as draw
from slosched.analysis import report_timeline as made
from slosched.analysis.fig10 import EXACT
from slosched.analysis.report_actions import ActionNumbers, ActionRow, Excerpt
from slosched.analysis.report_cascade_words import cascade_figure, cascade_keys, cascade_tables
from slosched.analysis.report_data import RunReport
from slosched.analysis.report_figures import Figure
from slosched.analysis.report_page import Content, Titled, time
from slosched.analysis.tables import CLIENT_VIEW
from slosched.codes import Code
from slosched.loadgen.verdict import least_samples, sentence
from slosched.telemetry.client_log import NO_ANSWER
from slosched.units import NS_PER_MS, NS_PER_S, format_share

#: Why a request was not in time, in a sentence.
_MEANINGS: dict[int | None, str] = {
    None: "It was served, and the answer came after its deadline.",
    NO_ANSWER: "No answer came to the client before the run ended.",
    Code.CANCELLED: "Its client took it back, or its worker was lost and no other could be in time.",
    Code.RUNTIME_ERROR: "Executing it failed on the worker.",
    Code.SHUTTING_DOWN: "The controller ended.",
    Code.TIMED_OUT: "It waited until its deadline could not be met any more, and was given up.",
    Code.INVALID_REQUEST: "The request itself was wrong: its model, its input or its SLO.",
    Code.SKIPPED: "It was given up in favour of a better batch of the same model.",
    Code.COULD_NOT_START_IN_TIME: "It was refused at arrival: no plan could meet its deadline.",
    Code.PROCESS_ENDED: "The process that ran it ended, and again when it was tried alone.",
    Code.MODEL_PROCESS_ENDED: "The model's own process ended, and again when it was tried alone.",
    Code.LIMIT_REACHED: "It was beyond a limit of the controller, which its reason names.",
    Code.CONTROLLER_OVERLOADED: "Requests came faster than the controller's core could take them.",
    Code.CALL_RAISED: "The function raised.",
    Code.CALL_OVER_LIMIT: "The call was ended at a limit of its function.",
    Code.TOO_MANY_CALLS: "Its worker had as many unfinished calls as it may have.",
}
#: The least number of served requests for which a quantile is shown.
_LEAST = {"p50": 1, "p99": least_samples(), "p99.9": least_samples(0.999)}


def share(good: int, count: int) -> str:
    """In per cent, as every other output has it."""
    return format_share(good / count) if count else "-"


def _upper(value: float) -> str:
    """An upper bound in per cent, rounded up."""
    return f"{math.ceil(value * 10_000 - 1e-9) / 100:.2f} %"


def _rate(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:,.0f}/s" if value >= 100 else f"{value:.3g}/s"


# -------------------------------------------------------------------------------------- headline


def about(report: RunReport) -> list[str]:
    """What ran, on what, and when."""
    documents = [document for _, document in report.manifests if document]
    # A controller's manifest says more of where the run was than a client's.
    documents.sort(key=lambda document: document.get("kind") != "controller")
    first: Mapping[str, Any] = documents[0] if documents else {}
    kind, host = first.get("kind"), first.get("host") or {}
    if kind == "simulation":
        where = "simulated"
    else:
        where = (
            f"live, {kind} on {host.get('cpu_usable')} cores of {host.get('cpu_model')}"
            if host
            else ""
        )
    gpus = "" if report.actions is None else f"{report.actions.utilisation.of_gpus} GPUs"
    return [
        report.workload or report.label,
        report.policy and f"scheduler {report.policy}",
        gpus.removesuffix("s") if gpus == "1 GPUs" else gpus,
        where,
        str(first.get("started_at", ""))[:19].replace("T", " ") + " UTC"
        if first.get("started_at")
        else "",
        f"slosched {first['slosched']}" if first.get("slosched") else "",
    ]


def headline(report: RunReport) -> list[tuple[str, str]]:
    """The numbers that stand in large letters."""
    h = report.headline
    pairs = [
        (share(h.in_time, h.requests), f"in time; {_bounds(report)}"),
        (f"{h.requests:,}", f"requests offered, {_rate(h.offered_rps)} for {h.seconds:.3g} s"),
        (_rate(h.goodput_rps), f"goodput: {h.in_time:,} were in time"),
    ]
    for name in ("p50", "p99", "p99.9"):
        if name in h.latency_ns and h.served >= _LEAST[name]:
            pairs.append((time(h.latency_ns[name]), f"latency {name} of what was served"))
        elif h.served and name != "p50":
            pairs.append(("-", f"latency {name}: too few were served to say"))
    return pairs


def _bounds(report: RunReport) -> str:
    h = report.headline
    return f"{format_share(h.low)} to {_upper(h.high)}, each bound with 99 % confidence"


def judged(report: RunReport) -> str:
    """Whether client or controller judges, and at which SLOs it holds."""
    side = report.headline.judge
    judge = f"Judged by the {side}"
    judge += (
        ": a request that its generator sent late is charged for it."
        if side == CLIENT_VIEW
        else "."
    )
    verdict = sentence("", [(step.slo_text, holds) for step, holds in report.verdicts][:60])
    if side != CLIENT_VIEW:
        verdict = verdict.replace("(client)", "(controller)")
    return (
        f"{judge} {verdict}. Bounds and verdicts follow MLPerf's early-stopping rule, which takes requests "
        "for independent of each other."
    )


def runs_table(reports: Sequence[RunReport]) -> Content:
    """A row for each run."""
    headings = (
        "run",
        "scheduler",
        "requests",
        "offered",
        "in time",
        "bounds (99 %)",
        "goodput",
        "p50",
        "p99",
        "judge",
    )
    rows = [
        [
            r.name,
            r.policy or "-",
            f"{h.requests:,}",
            _rate(h.offered_rps),
            share(h.in_time, h.requests),
            f"{format_share(h.low)} to {_upper(h.high)}",
            _rate(h.goodput_rps),
            time(h.latency_ns.get("p50", math.nan)),
            time(h.latency_ns["p99"]) if h.served >= _LEAST["p99"] else "-",
            h.judge.partition(",")[0],
        ]
        for r, h in ((report, report.headline) for report in reports)
    ]
    return headings, rows, (0, 1, 9)


def compared_figure(reports: Sequence[RunReport]) -> Figure:
    """The sweeps of several runs in one figure, each as its own judge saw it."""
    runs = [(r.name, [s for s in r.steps if s.view == r.headline.judge]) for r in reports]
    caption = "Where one curve is above another, that run kept more deadlines at the same SLO."
    label = "Satisfaction, goodput and latency of the runs by SLO"
    return Figure("compared", "Sweeps compared", caption, draw.sweep(runs, "compared", label))


# --------------------------------------------------------------------------------------- figures


def figures(report: RunReport, prefix: str) -> Iterator[Figure]:
    """Every figure for which there is data."""
    if report.is_sweep:
        yield _sweep(report, f"{prefix}sweep")
    if report.over_time is not None:
        key = f"{prefix}over-time"
        label = "Requests offered and in time per second, and latency, over time"
        caption = _over_time_caption(report)
        yield Figure(key, "Over time", caption, draw.over_time(report.over_time, key, label))
    if report.over_time is not None and report.over_time.lost_rps:
        key, label = (
            f"{prefix}lost",
            "Requests that were not in time per second, by reason, over time",
        )
        first = report.reasons[0]
        caption = (
            f"{sum(r.count for r in report.reasons):,} requests were not in time; the commonest reason: "
            f"{escape(first.name)} ({first.count:,})."
        )
        yield Figure(
            key, "Not in time, by reason", caption, draw.lost(report.over_time, key, label)
        )
    if report.tails:
        key, label = f"{prefix}latency", "Distribution of latencies down to the last request"
        caption = (
            "How many of those that were served (in time or late) had at most this latency; each step up the "
            "axis is ten times rarer, so that p99.9 can be read."
        )
        yield Figure(
            key, "Latency", caption, draw.latency(report.tails, report.slos_ms, key, label)
        )
    for key, cascade in zip(cascade_keys(report.cascades), report.cascades, strict=True):
        shown = cascade_figure(cascade, f"{prefix}{key}")
        if shown is not None:
            yield shown
    if report.actions is not None:
        yield from _action_figures(report.actions, prefix)
    if report.excerpt is not None:
        yield _timeline(report.excerpt, f"{prefix}timeline")


def _sweep(report: RunReport, key: str) -> Figure:
    held = [step for step, verdict in report.verdicts if verdict and verdict.outcome == "holds"]
    best = min(held, key=lambda s: (s.slo_factor, s.slo_ns), default=None)
    caption = (
        "No step says whether its SLO holds: the client sent too late."
        if not any(verdict for _, verdict in report.verdicts)
        else "At no SLO is it certain that 99 % are in time."
        if best is None
        else f"The tightest SLO at which 99 % are in time with 99 % confidence is {best.slo_text} "
        f"({time(best.slo_ns)})."
    )
    label = "Satisfaction, goodput and latency by SLO"
    return Figure(key, "By SLO", caption, draw.sweep([(report.label, report.steps)], key, label))


def _over_time_caption(report: RunReport) -> str:
    numbers = report.over_time
    assert numbers is not None
    gaps = [a - b for a, b in zip(numbers.offered_rps, numbers.in_time_rps, strict=True)]
    worst = max(range(len(gaps)), key=gaps.__getitem__)
    width = time(numbers.width_s * NS_PER_S)
    where = f"in windows of {width}, by when requests were sent"
    if gaps[worst] <= 0:
        return f"All that was offered was in time ({where})."
    begin = numbers.middle_s[worst] - numbers.width_s / 2
    return (
        f"The gap between the two upper lines is what was not in time ({where}); it is widest at "
        f"{begin:.4g} s, with {gaps[worst]:,.0f} requests/s."
    )


def _action_figures(numbers: ActionNumbers, prefix: str) -> Iterator[Figure]:
    if any(side.side != EXACT for side in numbers.errors):
        key, label = f"{prefix}errors", "Errors of predicted durations and completions, by side"
        caption = (
            "How far predictions were off, of those that took longer than predicted and of those that were "
            "sooner; the legends say how many were on each side."
        )
        yield Figure(key, "Prediction error", caption, draw.errors(numbers.errors, key, label))
    infers = [c for c in numbers.classes if c.name.startswith("batch ")]
    if infers:
        key, label = f"{prefix}batches", "Share of requests served in batches of each size"
        mean = sum(c.requests for c in infers) / sum(c.actions for c in infers)
        caption = (
            f"An inference served {mean:.2f} requests on average; a bar is the share of all that were "
            "served."
        )
        yield Figure(key, "Batch sizes", caption, draw.batches(numbers.classes, key, label))
    used = numbers.utilisation
    key = f"{prefix}utilisation"
    mean = sum(used.exec_share) / len(used.exec_share)
    caption = (
        "The deeper the blue, the busier the GPU; over the whole run they executed "
        f"{100 * mean:.1f} % of the time"
    )
    if max(used.load_share) > 0:
        caption += " (orange, below: copies of weights)"
    if used.of_gpus > len(used.gpus):
        caption += f". The first {len(used.gpus)} of {used.of_gpus} GPUs are shown"
    yield Figure(key, "Utilisation of the GPUs", f"{caption}.", made.utilisation_svg(used))


def _timeline(excerpt: Excerpt, key: str) -> Figure:
    how = "the window that was asked for" if excerpt.chosen else "when executors were busiest"
    caption = (
        f"From {time(excerpt.start_ns)} to {time(excerpt.end_ns)}, {how}: the pale box above is what was "
        "predicted when the action was sent, the box below what the worker measured; the mouse over one "
        "shows its numbers."
    )
    if excerpt.of_gpus > len(excerpt.gpus):
        caption += f" The first {len(excerpt.gpus)} of {excerpt.of_gpus} GPUs are shown."
    if excerpt.shortened:
        caption += " The window is cut where there were too many actions to show."
    models = made.coloured_models(excerpt)
    parts = [f'<span><i class="k{n}"></i>model {model}</span>' for n, model in enumerate(models)]
    if len(models) == made.COLOURS:
        parts.append('<span><i class="kx"></i>other models</span>')
    parts.append('<span><i class="p"></i>predicted</span><span><i class="a"></i>actual</span>')
    parts.append('<span><i class="l"></i>not in time</span><span><b>✕</b>failed or refused</span>')
    key_line = f'<p class="key">{"".join(parts)}</p>'
    return Figure(
        key, "Timeline: predicted and actual", caption, key_line + made.timeline_svg(excerpt)
    )


# ---------------------------------------------------------------------------------------- tables


def tables(report: RunReport) -> dict[str, list[Titled]]:
    """The tables, by the figure that they stand below: (heading, note, content)."""
    found: dict[str, list[Titled]] = {}
    if len(report.verdicts) > 1:
        found["sweep"] = [("" if report.is_sweep else "By SLO", "", _steps(report))]
    if report.reasons:
        found["lost"] = [("Reasons", "", _reasons(report))]
    for key, cascade in zip(cascade_keys(report.cascades), report.cascades, strict=True):
        found[key] = cascade_tables(cascade)
    numbers = report.actions
    if numbers is not None:
        if numbers.classes:
            found["errors"] = [("Predictions by batch size", _CLASSES_NOTE, _classes(numbers))]
        found["timeline"] = [
            (
                "Furthest from the prediction",
                "By the end of the action.",
                _actions(numbers.mispredicted),
            ),
            ("Slowest actions", "By what the worker measured.", _actions(numbers.slowest)),
        ]
        if numbers.failed:
            note = "Actions that a worker refused or that failed; their requests were planned anew or lost."
            rows = [[name, f"{count:,}"] for name, count in numbers.failed]
            found["failed"] = [("Failed actions", note, (("reason", "actions"), rows, (0,)))]
    shown = (
        f", the {len(report.models)} most wanted" if report.of_models > len(report.models) else ""
    )
    heading = f"Models ({report.of_models:,}{shown})"
    found["models"] = [
        (heading, "By the number that the logs give to an instance.", _models(report))
    ]
    return found


_CLASSES_NOTE = (
    "Medians of what was predicted and what it took, and sizes of the errors, longer or shorter: half of the "
    "actions were off by less than p50, one in a hundred by more than p99."
)


def _steps(report: RunReport) -> Content:
    headings = (
        "SLO",
        "deadline",
        "requests",
        "offered",
        "in time",
        "99 % hold",
        "goodput",
        "p50",
        "p99",
    )
    rows = [
        [
            s.slo_text,
            time(s.slo_ns),
            f"{s.requests:,}",
            _rate(s.offered_rps),
            share(s.satisfied, s.requests),
            verdict.short if verdict else "sent late",
            _rate(s.goodput_rps),
            time(s.p50_ns),
            time(s.p99_ns) if s.requests - sum(s.by_code.values()) >= least_samples() else "-",
        ]
        for s, verdict in report.verdicts[:200]
    ]
    return headings, rows, ()


def _reasons(report: RunReport) -> Content:
    total = report.headline.requests
    rows = [
        [r.name, f"{r.count:,}", f"{100 * r.count / total:.3g} %", _meaning(r.code)]
        for r in report.reasons
    ]
    return ("reason", "requests", "of all", "what it means"), rows, (0, 3)


def _meaning(code: int | None) -> str:
    return _MEANINGS.get(code, "The worker refused its action or could not finish it.")


def _classes(numbers: ActionNumbers) -> Content:
    headings = (
        "action",
        "count",
        "predicted",
        "took",
        "duration off p50",
        "p99",
        "completion off p50",
        "p99",
    )
    rows = [
        [
            c.name,
            f"{c.actions:,}",
            time(c.predicted_ns),
            time(c.took_ns),
            time(c.duration_p50_ns),
            time(c.duration_p99_ns),
            time(c.completion_p50_ns),
            time(c.completion_p99_ns),
        ]
        for c in numbers.classes
    ]
    return headings, rows, (0,)


def _actions(actions: Sequence[ActionRow]) -> Content:
    headings = (
        "action",
        "what",
        "GPU",
        "ended at",
        "predicted",
        "took",
        "end after its prediction",
    )
    rows = [
        [
            str(a.action_id),
            a.what,
            str(a.gpu),
            f"{a.at_ns / NS_PER_S:.3f} s",
            time(a.predicted_ns),
            time(a.took_ns),
            f"{a.behind_ns / NS_PER_MS:+.3f} ms",
        ]
        for a in actions
    ]
    return headings, rows, (1, 2)


def _models(report: RunReport) -> Content:
    headings = ("model", "requests", "in time", "p50", "p99", "cold starts")
    rows = [
        [
            str(m.model_id),
            f"{m.requests:,}",
            share(m.in_time, m.requests),
            time(m.p50_ns),
            time(m.p99_ns),
            f"{m.cold:,}",
        ]
        for m in report.models
    ]
    return headings, rows, ()
