"""What a report says of a run, in numbers: from the files of its directory alone.

The client judges where it kept a log, from the scheduled send of each request; else the controller, from
the arrival there. Everything over time counts by that time: a request that was in time counts in the
window in which it was sent, so that offered and in time can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from slosched.analysis.report_actions import ActionNumbers, Excerpt, measure_actions
from slosched.analysis.report_cascade import CascadeNumbers, measure_cascades
from slosched.analysis.runs import manifests_of, open_run, policy_of, stated
from slosched.analysis.tables import StepSummary, View, summarise_view, views_of
from slosched.analysis.tails import named_quantiles, tail
from slosched.analysis.windows import Windows, nice_width_ns
from slosched.codes import code_name
from slosched.errors import InvalidConfig
from slosched.loadgen.results import issue_delay_bound_ns
from slosched.loadgen.verdict import CONFIDENCE, Verdict, at_most, judge, least_samples
from slosched.telemetry.client_log import NO_ANSWER
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S

_COLUMNS = frozenset(
    {
        "t",
        "latency",
        "deadline",
        "result",
        "deadline_met",
        "is_coldstart",  # request log
        "scheduled_ns",
        "latency_ns",
        "slo_ns",
        "code",
        "in_time",
        "cold",  # client log
        "issue_delay_ns",
        "model_id",
        "slo_factor",
    }
)
_FLAGS = frozenset({"deadline_met", "is_coldstart", "in_time", "cold"})
#: Limit of windows of time in a figure.
_MOST_WINDOWS = 120
#: Reasons that have a line of their own over time; the others share one.
_MOST_REASONS = 5
_MOST_MODELS = 40
#: With more steps than this, the issue delay of the whole run is shown instead of each step's.
_MOST_STEPS = 100

Say = Callable[[str], None]


@dataclass(frozen=True)
class Headline:
    """The run in one line, as its judge saw it. Latencies (ns) are of what was served, in time or late.

    `low` and `high` bound the satisfaction, each with 99 % confidence, if requests were independent.
    """

    judge: str
    requests: int
    in_time: int
    satisfaction: float
    low: float
    high: float
    seconds: float
    offered_rps: float
    goodput_rps: float
    served: int
    latency_ns: dict[str, float]


@dataclass(frozen=True)
class Tail:
    """The latencies of one side, for an axis of nines."""

    view: str
    nines: list[float]
    quantiles_ms: list[float]


@dataclass(frozen=True)
class OverTime:
    """A value for each window of `width_s`, by the time of the send; times in s after the start."""

    width_s: float
    middle_s: list[float]
    offered_rps: list[float]
    in_time_rps: list[float]
    p50_ms: list[float]
    p99_ms: list[float]
    lost_rps: dict[str, list[float]]
    cold_rps: list[float]


@dataclass(frozen=True)
class Reason:
    """Requests that were not in time for one reason. `code` None: served, but late."""

    code: int | None
    name: str
    count: int


@dataclass(frozen=True)
class ModelRow:
    """One model instance: its requests and their outcomes."""

    model_id: int
    requests: int
    in_time: int
    p50_ns: float
    p99_ns: float
    cold: int


@dataclass(frozen=True)
class RunReport:
    """Everything that a report says of one run."""

    path: Path
    label: str
    policy: str
    workload: str
    start_ns: int
    headline: Headline
    #: None for a step whose requests were sent late.
    verdicts: list[tuple[StepSummary, Verdict | None]]
    steps: list[StepSummary]
    tails: list[Tail]
    slos_ms: list[float]
    over_time: OverTime | None
    reasons: list[Reason]
    models: list[ModelRow]
    of_models: int
    actions: ActionNumbers | None
    excerpt: Excerpt | None
    manifests: list[tuple[str, Mapping[str, Any]]]
    cascades: list[CascadeNumbers] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    #: What the report calls it: the directory's name, or more of its path beside another of that name.
    name: str = ""

    @property
    def is_sweep(self) -> bool:
        """True if there are several SLOs to draw a curve of, and few enough for it to be readable."""
        return (
            1 < len({(s.slo_factor, s.slo_ns if not s.slo_factor else 0) for s in self.steps}) <= 60
        )


def read_report(
    path: Path, *, window: tuple[int, int] | None = None, say: Say | None = None
) -> RunReport:
    """Read a run directory. `window`, (start, length) in ns, is what the timeline shows; None: the busiest.

    `say` is called with what is being done. Raises InvalidConfig if the directory holds no run or no request,
    or if nothing happened in the window; MalformedLog if a log is damaged.
    """
    say = say or (lambda text: None)
    say(f"reading the requests of {path}")
    # One side after the other: the columns of ten million requests are there once.
    client = _read_side(path, "client", judges=True)
    controller = _read_side(path, "controller", judges=not client.rows)
    judge_ = client if client.rows else controller
    if not judge_.rows:
        raise InvalidConfig(f"nothing to report: the logs in {path} hold no requests yet")
    notices = _notices(path, controller, client)
    start_ns = judge_.judged["start_ns"]
    actions, excerpt = measure_actions(path, start_ns, window, notices, say)
    return RunReport(
        path=path,
        label=judge_.label,
        policy=policy_of(path),
        workload=_workload(path),
        steps=controller.steps + client.steps,
        tails=client.tails + controller.tails,
        actions=actions,
        excerpt=excerpt,
        cascades=measure_cascades(path, start_ns),
        notices=notices,
        manifests=[(place.name, document) for place, document in manifests_of(path)],
        **judge_.judged,
    )


@dataclass(frozen=True)
class _Side:
    """What one side's log says; `judged` holds fields of the report if this side judges."""

    rows: int
    there: bool
    truncated: bool
    label: str
    steps: list[StepSummary]
    tails: list[Tail]
    judged: dict[str, Any]


def _smaller(log: LogTable | None) -> LogTable | None:
    """The log with each flag in one byte: for ten million rows that saves 70 MB per flag."""
    if log is None:
        return None
    columns = {
        name: (column != 0).astype(np.int8) if name in _FLAGS else column
        for name, column in log.columns.items()
    }
    return LogTable(log.path, columns, log.truncated)


def _read_side(path: Path, side: str, *, judges: bool) -> _Side:
    run = open_run(path, only=_COLUMNS, sides=(side,))
    run = replace(run, requests=_smaller(run.requests), client=_smaller(run.client))
    log = run.client if side == "client" else run.requests
    if log is None or not len(log):
        return _Side(
            rows=0,
            there=log is not None,
            truncated=log is not None and bool(log.truncated),
            label="",
            steps=[],
            tails=[],
            judged={},
        )
    (view,) = views_of(run)
    steps = summarise_view(view)
    judged: dict[str, Any] = {}
    if judges:
        cold = log["cold" if side == "client" else "is_coldstart"] == 1
        judged = {
            "start_ns": int(view.at_ns.min()),
            "headline": _headline(view),
            "verdicts": _verdicts(steps, view, log),
            "slos_ms": _slos(view),
            "over_time": _over_time(view, cold),
            "reasons": _reasons(view),
            "models": _models(view, log["model_id"], cold),
            "of_models": len(np.unique(log["model_id"])),
        }
    return _Side(
        rows=len(log),
        there=True,
        truncated=bool(log.truncated),
        label=run.label,
        steps=steps,
        tails=_tails(view),
        judged=judged,
    )


def _workload(path: Path) -> str:
    """The workload in words, where a manifest has them."""
    for key in ("workload", "text"):
        stated_value = stated(path, key)
        if isinstance(stated_value, str):
            return stated_value
        if isinstance(stated_value, Mapping) and isinstance(stated_value.get("text"), str):
            return str(stated_value["text"])
    return ""


def _notices(path: Path, controller: _Side, client: _Side) -> list[str]:
    """What a reader has to know before believing the numbers."""
    found: list[str] = []
    manifests = manifests_of(path)
    for place, document in manifests:
        if not document:
            found.append(
                f"{place.name} is empty or damaged, so the report cannot say what was run; the numbers "
                "are from the logs"
            )
        elif document.get("ended_at") is None:
            found.append(
                f"the run had not ended when {place.name} was last written: this is a part of it"
            )
        elif not document.get("complete", True):
            problem = (document.get("outcome") or {}).get("problem") or "see its outcome"
            found.append(f"the run is not complete by its {place.name} ({problem})")
    if not manifests:
        found.append("there is no manifest, so the report cannot say what was run")
    for side, name in ((controller, "request log"), (client, "client log")):
        if side.truncated:
            found.append(f"the {name} ends within a line, which was left out")
    if not client.rows:
        what = "an empty client log" if client.there else "no client log"
        found.append(f"there is {what}: the controller judges, from the arrival of a request there")
    elif not controller.rows:
        found.append("there is no request log of the controller: the client judges alone")
    for _, document in manifests:
        outcome = document.get("outcome") or {}
        if isinstance(outcome, Mapping):
            verdict = outcome.get("verdict")
            if isinstance(verdict, str) and verdict.startswith("INVALID"):
                found.append(verdict)
            found += [str(warning) for warning in outcome.get("warnings") or []][:10]
    return found


# ----------------------------------------------------------------------------------- numbers


def _headline(view: View) -> Headline:
    count, good = len(view.at_ns), int(np.count_nonzero(view.satisfied))
    span_ns = int(view.at_ns.max() - view.at_ns.min())
    # count requests fence count - 1 gaps.
    seconds = span_ns * count / (count - 1) / NS_PER_S if count > 1 else 0.0
    served = view.latency_ns[view.code == 0]
    low, high = bounds(count, count - good)
    return Headline(
        judge=view.name,
        requests=count,
        in_time=good,
        satisfaction=good / count,
        low=low,
        high=high,
        seconds=seconds,
        offered_rps=count / seconds if seconds else float("nan"),
        goodput_rps=good / seconds if seconds else float("nan"),
        served=len(served),
        latency_ns=named_quantiles(served),
    )


def bounds(sent: int, late: int, *, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Bounds of the share in time, each with that confidence: where the rule of `judge` would change.

    The lower one is the largest percentile that holds, the upper one the smallest that fails.
    """
    doubt = 1 - confidence

    def where(is_above: Callable[[float], bool]) -> float:
        low, high = 1e-12, 1 - 1e-12
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (low, middle) if is_above(middle) else (middle, high)
        return 1 - (low + high) / 2

    lower = 0.0 if late == sent else where(lambda share: at_most(late, sent, share) <= doubt)
    upper = 1.0 if late == 0 else where(lambda share: 1 - at_most(late - 1, sent, share) > doubt)
    return lower, upper


def _verdicts(
    steps: Sequence[StepSummary], view: View, log: LogTable
) -> list[tuple[StepSummary, Verdict | None]]:
    """Whether each step's SLO holds; None where the client sent late, by the bound of a live run."""
    delays = log.columns.get("issue_delay_ns")

    def sent_late(step: StepSummary) -> bool:
        if delays is None:
            return False  # the controller judges
        counted = np.ones(len(delays), bool)
        if len(steps) <= _MOST_STEPS:
            end_ns = step.start_ns + step.duration_ns
            counted = (view.at_ns >= step.start_ns) & (view.at_ns <= end_ns)
            counted &= view.slo_factor == step.slo_factor
        late_ns = float(np.quantile(delays[counted], 0.99))
        return late_ns > issue_delay_bound_ns(step.slo_ns)

    return [
        (step, None if sent_late(step) else judge(step.requests, step.requests - step.satisfied))
        for step in steps
    ]


def _tails(view: View) -> list[Tail]:
    served = view.latency_ns[view.code == 0]
    return [Tail(view.name, *tail(served / NS_PER_MS))] if len(served) else []


def _slos(view: View) -> list[float]:
    """The different SLOs in ms."""
    slos: list[float] = (np.unique(view.slo_ns[view.slo_ns > 0]) / NS_PER_MS).tolist()
    return slos


def _over_time(view: View, cold: NDArray[np.bool_]) -> OverTime | None:
    start_ns, end_ns = int(view.at_ns.min()), int(view.at_ns.max())
    width_ns = nice_width_ns(end_ns - start_ns, _MOST_WINDOWS)
    if end_ns - start_ns < 2 * width_ns:
        return None
    windows = Windows(view.at_ns, width_ns, start_ns, end_ns)
    served = view.code == 0
    p50, p99 = windows.quantiles(view.latency_ns, [0.5, 0.99], served)
    good = view.satisfied == 1
    return OverTime(
        width_s=windows.width_s,
        middle_s=[start + windows.width_s / 2 for start in windows.starts_s()],
        offered_rps=windows.rates(),
        in_time_rps=windows.rates(good),
        p50_ms=[value / NS_PER_MS for value in p50],
        p99_ms=[value / NS_PER_MS for value in p99],
        lost_rps=_lost(view, windows, served & ~good),
        cold_rps=windows.rates(cold),
    )


def _lost(view: View, windows: Windows, late: NDArray[np.bool_]) -> dict[str, list[float]]:
    """Requests that were not in time in each window, by reason; the commonest reasons first."""
    reasons = _reasons(view)
    series = {
        r.name: windows.rates(late if r.code is None else view.code == r.code)
        for r in reasons[:_MOST_REASONS]
    }
    if len(reasons) > _MOST_REASONS:
        rest = [r.code for r in reasons[_MOST_REASONS:]]
        others = np.isin(view.code, [code for code in rest if code is not None])
        series["others"] = windows.rates(others | late if None in rest else others)
    return series


def _reasons(view: View) -> list[Reason]:
    codes, counts = np.unique(view.code[view.code != 0], return_counts=True)
    found = [
        Reason(code, "no answer" if code == NO_ANSWER else code_name(code), count)
        for code, count in zip(codes.tolist(), counts.tolist(), strict=True)
    ]
    late = int(np.count_nonzero((view.code == 0) & (view.satisfied == 0)))
    if late:
        found.append(Reason(None, "served late", late))
    return sorted(found, key=lambda reason: -reason.count)


def _models(view: View, ids: NDArray[np.int64], cold: NDArray[np.bool_]) -> list[ModelRow]:
    """The models with the most requests."""
    distinct, counts = np.unique(ids, return_counts=True)
    chosen = distinct[np.lexsort((distinct, -counts))][:_MOST_MODELS]
    rows = []
    for model_id in chosen.tolist():
        own = ids == model_id
        served = view.latency_ns[own & (view.code == 0)]
        p50, p99 = np.quantile(served, (0.5, 0.99)) if len(served) else (np.nan, np.nan)
        if len(served) < least_samples():
            p99 = np.nan  # too few for a p99
        good = int(np.count_nonzero(view.satisfied[own]))
        rows.append(
            ModelRow(
                model_id=model_id,
                requests=int(np.count_nonzero(own)),
                in_time=good,
                p50_ns=float(p50),
                p99_ns=float(p99),
                cold=int(np.count_nonzero(cold[own])),
            )
        )
    return rows
