"""What happened between two status reports of one controller: rates, shares and quantiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slosched.codes import REJECTIONS, Code, code_name
from slosched.telemetry.histogram import quantile_ns
from slosched.units import NS_PER_S


def rates_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any] | None:
    """What happened from one report to the next; None if they are not of one life of a controller.

    Rates are per second, shares and utilisations 0 to 1, times in ns. What is unknown is None: a quantile
    without values, or a count that an older controller does not report.
    """
    span_ns = after.get("now_ns", 0) - before.get("now_ns", 0)
    if span_ns <= 0 or before.get("incarnation") != after.get("incarnation"):
        return None
    seconds = span_ns / NS_PER_S
    old, new = before.get("requests", {}), after.get("requests", {})
    was, now = before.get("counted", {}), after.get("counted", {})

    def grown(name: str) -> int | None:
        return now[name] - was[name] if name in now and name in was else None

    def per_s(count: int | None) -> float | None:
        return None if count is None else count / seconds

    answered = new.get("answered", 0) - old.get("answered", 0)
    arrived = new.get("arrived", 0) - old.get("arrived", 0)
    in_time, refused, batches = grown("in_time"), grown("refused_at_arrival"), grown("batches")
    latency = _grown_counts(was, now, "latency_served")
    result: dict[str, Any] = {
        "seconds": seconds,
        "offered_per_s": arrived / seconds,
        "admitted_per_s": per_s(None if refused is None else arrived - refused),
        "answered_per_s": answered / seconds,
        "in_time_per_s": per_s(in_time),
        "satisfaction": None if in_time is None or not answered else in_time / answered,
        "rejected_per_s": _rejections(old, new, seconds),
        "latency_p50_ns": quantile_ns(now.get("latency_bounds_ns", ()), latency, 0.5),
        "latency_p99_ns": quantile_ns(now.get("latency_bounds_ns", ()), latency, 0.99),
        "mean_batch": (sum(latency) - _calls(was, now)) / batches if batches else None,
        "loads_per_s": per_s(grown("loads")),
        "evictions_per_s": per_s(grown("evictions")),
        "failed_actions_per_s": per_s(_failed(was, now)),
        "gpus": _utilisations(before, after, span_ns),
    }
    for name in ("exec_error", "completion_error"):
        counts = _grown_counts(was, now, f"{name}s")
        for share in (1, 50, 99):
            value = quantile_ns(now.get("error_bounds_ns", ()), counts, share / 100)
            result[f"{name}_p{share}_ns"] = value
    return result


def _failed(was: Mapping[str, Any], now: Mapping[str, Any]) -> int | None:
    names = ("loads_failed", "evictions_failed", "infers_failed")
    if any(name not in now or name not in was for name in names):
        return None
    return sum(int(now[name]) - int(was[name]) for name in names)


def _grown_counts(was: Mapping[str, Any], now: Mapping[str, Any], name: str) -> Sequence[int]:
    if name not in was or name not in now:
        return ()
    return [new - old for old, new in zip(was[name], now[name], strict=True)]


def _rejections(old: Mapping[str, Any], new: Mapping[str, Any], seconds: float) -> dict[str, float]:
    """Rate by reason, of those that there were; a report says "8 could not start in time"."""
    before, after = old.get("by_code", {}), new.get("by_code", {})
    rates = {}
    for named, count in after.items():
        number, _, reason = str(named).partition(" ")
        more = count - before.get(named, 0)
        if more > 0 and number.isdigit() and int(number) in REJECTIONS:
            rates[reason] = more / seconds
    return rates


def _calls(was: Mapping[str, Any], now: Mapping[str, Any]) -> int:
    """Calls of functions that were answered with code 0: they are in no batch."""
    before, after = (
        sum(
            each["codes"].get(code_name(Code.OK), 0)
            for each in counted.get("functions", {}).values()
        )
        for counted in (was, now)
    )
    return int(after - before)


def _utilisations(
    before: Mapping[str, Any], after: Mapping[str, Any], span_ns: int
) -> list[dict[str, Any]]:
    """Busy share of each GPU. One that joined anew begins at 0; what it did since then counts.

    An inference counts when it ends, so a short interval's share may pass 1; it is cut there.
    """
    busy = {
        (w["worker_id"], g["gpu_id"]): g.get("busy_ns", 0)
        for w in before.get("workers", ())
        for g in w.get("gpus", ())
    }
    found = []
    for worker in after.get("workers", ()):
        for gpu in worker.get("gpus", ()):
            now_ns = gpu.get("busy_ns", 0)
            then_ns = busy.get((worker["worker_id"], gpu["gpu_id"]), 0)
            used_ns = now_ns - then_ns if now_ns >= then_ns else now_ns
            found.append(
                {
                    "worker_id": worker["worker_id"],
                    "gpu_id": gpu["gpu_id"],
                    "utilisation": min(1.0, used_ns / (span_ns * gpu.get("slots", 1))),
                }
            )
    return found
