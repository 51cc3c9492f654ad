"""`slosched status --watch` as text: a few lines that stay readable with one GPU and with 300."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slosched.cli.status_text import cascade_text, first_line
from slosched.codes import Code, code_name
from slosched.units import format_duration, format_share

_CELL = 26
_BAR = 10
#: Without a terminal, GPUs that are shown one by one.
_GPUS_AT_MOST = 16


def watch_text(
    address: str,
    report: Mapping[str, Any],
    rates: Mapping[str, Any] | None,
    *,
    width: int = 100,
    height: int | None = None,
    blocks: bool = True,
    silent: str = "",
) -> str:
    """Return the block of one look. `rates` is None at the first, and after a restart.

    `height` are the lines there are (None: no terminal); `blocks` says that bars may be drawn with block
    characters; `silent` is since when the controller has not answered.
    """
    workers = [dict(w) for w in report.get("workers", ())]
    lines = [_head(address, report, workers)]
    if silent:
        lines.append(f"{silent}; below is what was said last")
    lines += ["", *_traffic(report, rates), "", *_wait(report, workers)]
    lines += [cascade_text(each) for each in report.get("cascades", ())]
    lines += _slots(report, workers, rates)
    lines += _missing(workers)
    room = None if height is None else max(1, height - len(lines) - 3)
    lines += ["", *_gpus(workers, rates, width=width, room=room, blocks=blocks)]
    return "\n".join(line[:width] if height is not None else line for line in lines)


def _head(address: str, report: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> str:
    return f"{first_line(address, report, workers)}, {len(report.get('clients', ()))} clients"


def _traffic(report: Mapping[str, Any], rates: Mapping[str, Any] | None) -> list[str]:
    requests = report.get("requests", {})
    total = (
        f"in all {requests.get('arrived', 0):,} offered, {requests.get('answered', 0):,} answered"
    )
    if rates is None:
        return [f"requests   {total}; rates come with the next look"]
    r = rates
    rejected = ", ".join(f"{n:,.1f}/s {reason}" for reason, n in r["rejected_per_s"].items())
    lines = [
        f"requests   offered {_rate(r['offered_per_s'])}   in time {_rate(r['in_time_per_s'])}   "
        f"satisfaction {_fine(r['satisfaction'])}   (last {r['seconds']:.1f} s; {total})",
        f"rejected   {rejected or 'none'}",
        f"latency    p50 {_time(r['latency_p50_ns'])}   p99 {_time(r['latency_p99_ns'])}   "
        f"(served, from arrival at the controller)",
    ]
    for title, name in (("exec", "exec_error"), ("end", "completion_error")):
        spread = "   ".join(f"p{share} {_time(r[f'{name}_p{share}_ns'])}" for share in (1, 50, 99))
        lines.append(f"{title + ' error':11}{spread}   (actual less predicted)")
    batch = "-" if r["mean_batch"] is None else f"{r['mean_batch']:.1f}"
    lines.append(
        f"work       mean batch {batch}   loads {_rate(r['loads_per_s'])}   "
        f"evictions {_rate(r['evictions_per_s'])}   failed actions {_rate(r['failed_actions_per_s'])}"
    )
    return lines


def _wait(report: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]) -> list[str]:
    requests = report.get("requests", {})
    gpus = [g for w in workers for g in w.get("gpus", ())]
    pages, free = (sum(g.get(name, 0) for g in gpus) for name in ("pages", "free_pages"))
    resident = sum(g.get("resident", 0) for g in gpus)
    return [
        f"queue      {requests.get('queued', 0):,} wait, {requests.get('in_flight', 0):,} in flight, "
        f"oldest {_time(requests.get('oldest_unanswered_ns') or None)}",
        f"models     {report.get('model_instances', 0):,} instances, {resident:,} on GPUs; "
        f"{pages - free:,} of {pages:,} pages used",
    ]


def _slots(
    report: Mapping[str, Any],
    workers: Sequence[Mapping[str, Any]],
    rates: Mapping[str, Any] | None,
) -> list[str]:
    """A line about the hosts that run calls of functions, if there are any."""
    hosts = [(w, g) for w in workers for g in w.get("gpus", ()) if g.get("host")]
    if not hosts:
        return []
    slots, running, suspended = (
        sum(g.get(name, 0) for _, g in hosts) for name in ("slots", "running", "suspended")
    )
    busy = "-"
    if rates is not None:
        used = _used(rates)
        ran = sum(
            used.get((w.get("worker_id"), g.get("gpu_id")), 0.0) * g.get("slots", 1)
            for w, g in hosts
        )
        busy = _percent(ran / max(1, slots))
    functions = report.get("counted", {}).get("functions", {}).values()
    calls = sum(f["calls"] for f in functions)
    failed = calls - sum(f["codes"].get(code_name(Code.OK), 0) for f in functions)
    return [
        f"slots      {running:,} of {slots:,} have a call, {suspended:,} calls suspended, busy {busy}; in all "
        f"{calls:,} calls, {failed:,} failed"
    ]


def _missing(workers: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each worker that needs attention, the first few."""
    lines = [
        f"worker {w.get('worker_id')}   {w.get('state')}"
        + (f", lost {w['times_lost']} time(s)" if w.get("times_lost") else "")
        + (f", {w['activity']}" if w.get("activity") else "")
        for w in workers
        if w.get("state") != "joined" or w.get("times_lost") or w.get("activity")
    ]
    more = [f"and {len(lines) - 5} more workers lost or busy"] if len(lines) > 5 else []
    return lines[:5] + more


def _gpus(
    workers: Sequence[Mapping[str, Any]],
    rates: Mapping[str, Any] | None,
    *,
    width: int,
    room: int | None,
    blocks: bool,
) -> list[str]:
    gpus = [(w, g) for w in workers for g in w.get("gpus", ()) if not g.get("host")]
    if not gpus:
        return ["no GPU"]
    if rates is None:
        return [f"{len(gpus)} GPUs"]
    used = _used(rates)
    shares = [used.get((w.get("worker_id"), g.get("gpu_id")), 0.0) for w, g in gpus]
    across = max(1, width // _CELL)
    at_most = _GPUS_AT_MOST if room is None else across * room
    cells = [
        f"{_name(w, g):>7} {_bar(share, blocks)} {_percent(share):>5}"
        for (w, g), share in list(zip(gpus, shares, strict=True))[:at_most]
    ]
    lines = [
        f"GPUs busy  mean {_percent(sum(shares) / len(shares))}, least {_percent(min(shares))}, most "
        f"{_percent(max(shares))} of {len(gpus)}"
    ]
    lines += [
        "".join(cell.ljust(_CELL) for cell in cells[i : i + across]).rstrip()
        for i in range(0, len(cells), across)
    ]
    if len(gpus) > len(cells):
        lines.append(f"and {len(gpus) - len(cells)} more GPUs")
    return lines


def _used(rates: Mapping[str, Any]) -> dict[tuple[Any, Any], float]:
    """Busy share, by worker and GPU."""
    return {(g["worker_id"], g["gpu_id"]): float(g["utilisation"]) for g in rates["gpus"]}


def _name(worker: Mapping[str, Any], gpu: Mapping[str, Any]) -> str:
    return f"{worker.get('worker_id')}/{gpu.get('gpu_id')}"


def _bar(share: float, blocks: bool) -> str:
    full, empty = ("█", "░") if blocks else ("#", ".")
    filled = round(share * _BAR)
    return full * filled + empty * (_BAR - filled)


def _rate(value: float | None) -> str:
    return "-" if value is None else f"{value:,.1f}/s"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _fine(share: float | None) -> str:
    return "-" if share is None else format_share(share, 1)


def _time(value_ns: float | None) -> str:
    if value_ns is None:
        return "-"
    return format_duration(round(value_ns))
