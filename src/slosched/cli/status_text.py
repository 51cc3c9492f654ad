"""The controller's status report as text. Whatever a report lacks is left out, not an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from slosched.cli.output import table_text
from slosched.units import NS_PER_S, exact_bytes, format_duration


def status_text(address: str, report: dict[str, Any]) -> str:
    """Return the report as a few short human-readable blocks."""
    workers = [dict(w) for w in report.get("workers", ())]
    blocks = [_head(address, report, workers)]
    if workers:
        blocks.append(_workers(workers))
        gpus = [(w, dict(g)) for w in workers for g in w.get("gpus", ())]
        if gpus:
            blocks.append(_gpus(gpus))
            reporting = [(w, g, dict(g["stats"])) for w, g in gpus if g.get("stats")]
            if reporting:
                blocks.append(_stats(reporting))
        aside = [
            f"worker {w.get('worker_id')} put {name} aside: {reason}"
            for w in workers
            for name, reason in w.get("put_aside", {}).items()
        ]
        aside += [
            f"worker {w.get('worker_id')} leaves {name} of its repository out: {reason}"
            for w in workers
            for name, reason in w.get("left_out", {}).items()
        ]
        if aside:
            blocks.append("\n".join(aside))
    if report.get("models"):
        blocks.append(_models([dict(m) for m in report["models"]]))
    if report.get("functions"):
        blocks.append("\n".join(function_text(dict(f)) for f in report["functions"]))
    if report.get("cascades"):
        blocks.append("\n".join(cascade_text(dict(c)) for c in report["cascades"]))
    clients = report.get("clients", ())
    if clients:
        blocks.append(
            "clients: "
            + ", ".join(
                f"{c.get('name') or '(no name)'} ({c.get('unanswered', 0)} unanswered{_weight(c)})"
                for c in clients
            )
        )
    return "\n\n".join(blocks)


def _head(address: str, report: dict[str, Any], workers: list[dict[str, Any]]) -> str:
    requests = report.get("requests", {})
    options = ", ".join(
        _option(name, value)
        for name, value in report.get("options", {}).items()
        if value is not None
    )
    lines = [
        first_line(address, report, workers),
        f"options: {options}",
        *_rules(report),
        f"requests: {requests.get('arrived', 0)} arrived, {requests.get('answered', 0)} answered"
        + "".join(f"; {code}: {count}" for code, count in requests.get("by_code", {}).items()),
    ]
    return "\n".join(lines)


def first_line(
    address: str, report: Mapping[str, Any], workers: Sequence[Mapping[str, Any]]
) -> str:
    """Which policy serves, of which package if that is not slosched, and how many workers it has."""
    joined = sum(w.get("state") in ("joined", "draining") for w in workers)
    present = sum(w.get("state") != "left" for w in workers)
    state = (
        "draining" if report.get("draining") else "ready" if report.get("ready") else "not ready"
    )
    package = report.get("policy_package")
    return (
        f"{address}: {report.get('policy', '?')} ({report.get('fidelity', '?')}"
        f"{f', from {package}' if package else ''}), {state}, {joined} of {present} workers joined"
    )


def _option(name: str, value: Any) -> str:
    """An option of the scheduler and its value, whose unit its name ends in."""
    if name.endswith("_ns"):
        return f"{name.removesuffix('_ns')} {format_duration(value)}"
    return f"{name} {exact_bytes(value) if name.endswith('_bytes') else value}"


def _weight(client: Mapping[str, Any]) -> str:
    weight = client.get("weight", 1.0)
    return "" if weight == 1.0 else f", weight {weight:g}"


def _rules(report: Mapping[str, Any]) -> list[str]:
    """A line about the operator's weights, if there are any."""
    rules = []
    for rule in report.get("weights", ()):
        whom = rule.get("client") or f"SLO to {format_duration(rule.get('slo_max_ns', 0))}"
        rules.append(f"{whom} {rule.get('weight', 1.0):g}")
    shares = report.get("client_weights", "value") == "shares"
    if not rules and not shares:
        return []
    return [f"weights{' (of clients: shares)' if shares else ''}: {', '.join(rules) or 'no rules'}"]


def _workers(workers: list[dict[str, Any]]) -> str:
    rows = [
        (
            w.get("worker_id"),
            w.get("name") or "-",
            w.get("state"),
            w.get("host") or "-",
            w.get("device") or "-",
            len(w.get("gpus", ())),
            w.get("activity") or "-",
            w.get("times_lost", 0),
            format_duration(w.get("clock_offset_ns", 0)),
            format_duration(w.get("clock_error_ns", 0)),
        )
        for w in workers
    ]
    headings = (
        "worker",
        "name",
        "state",
        "host",
        "device",
        "GPUs",
        "activity",
        "lost",
        "clock offset",
        "+-",
    )
    return table_text(headings, rows)


def _gpus(gpus: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    rows = [
        (
            f"{w.get('worker_id')}/{g.get('gpu_id')}{' (host)' if g.get('host') else ''}",
            f"{g.get('pages', 0) - g.get('free_pages', 0)}/{g.get('pages', 0)}",
            g.get("resident", 0),
            g.get("loading", 0),
            _outstanding(g),
            f"{g.get('busy_ns', 0) / NS_PER_S:.1f} s",
        )
        for w, g in gpus
    ]
    return table_text(("GPU", "pages used", "resident", "loading", "in flight", "busy"), rows)


def _outstanding(gpu: Mapping[str, Any]) -> str:
    """What is in flight; of a device that runs calls, with its slots and the calls that hold none."""
    text = str(gpu.get("outstanding", 0))
    if gpu.get("host"):
        text += f" ({gpu.get('running', 0)} of {gpu.get('slots', 0)} slots)"
    return text + (f" + {gpu['suspended']} suspended" if gpu.get("suspended") else "")


def _stats(gpus: list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]) -> str:
    """What the drivers say; the energy is what was used since the worker joined."""
    rows = [
        (
            f"{w.get('worker_id')}/{g.get('gpu_id')}",
            _reading(s, "sm_percent", "{:.0f} %"),
            _reading(s, "memory_percent", "{:.0f} %"),
            _memory(s),
            _reading(s, "power_mw", "{:.0f} W", 1e3),
            _reading(s, "energy_mj", "{:.3f} kJ", 1e6),
            _reading(s, "temperature_c", "{:.0f} C"),
            _reading(s, "sm_clock_mhz", "{:.0f} MHz"),
            s.get("name") or "-",
        )
        for w, g, s in gpus
    ]
    headings = (
        "GPU",
        "busy",
        "memory busy",
        "memory used",
        "power",
        "energy",
        "heat",
        "SM clock",
        "card",
    )
    return table_text(headings, rows)


def _reading(stats: Mapping[str, Any], name: str, form: str, scale: float = 1.0) -> str:
    value = stats.get(name)
    return "-" if value is None else form.format(value / scale)


def _memory(stats: Mapping[str, Any]) -> str:
    used = _reading(stats, "memory_used_bytes", "{:.1f}", 2**30)
    total = _reading(stats, "memory_total_bytes", "{:.1f} GiB", 2**30)
    return "-" if used == total == "-" else f"{used}/{total}"


def _models(models: list[dict[str, Any]]) -> str:
    """One line for each name: a sweep over thousands of copies must stay readable."""
    lines = []
    for name in dict.fromkeys(str(m.get("name")) for m in models):
        copies = [m for m in models if str(m.get("name")) == name]
        states = Counter(str(m.get("state")) for m in copies)
        lines.append(
            f"model {name}: {len(copies)} copies ({', '.join(f'{n} {s}' for s, n in states.items())}), "
            f"b1 {format_duration(copies[0].get('b1_ns', 0))}, "
            f"{sum(m.get('queued', 0) for m in copies)} queued, "
            f"{sum(m.get('gpus_resident', 0) > 0 for m in copies)} on GPUs"
        )
    return "\n".join(lines)


def function_text(function: Mapping[str, Any]) -> str:
    """A function in a line: where it runs, what waits, and what became of its calls."""
    kind = "GPU" if function.get("gpu") else "host"
    parts = [
        f"function {function.get('name')} ({kind}): {function.get('state')}, "
        f"ready on {function.get('ready_on', 0)}, {function.get('queued', 0)} queued, "
        f"expected {format_duration(function.get('expected_ns', 0))}"
    ]
    codes = ", ".join(f"{n:,} {code}" for code, n in function.get("codes", {}).items())
    parts.append(f"{function.get('calls', 0):,} calls" + (f" ({codes})" if codes else ""))
    began = function.get("began", 0)
    if began:
        means = (
            f"{what} {format_duration(function.get(key, 0) // began)}"
            for what, key in (
                ("waited", "waited_ns"),
                ("ran", "ran_ns"),
                ("suspended", "suspended_ns"),
            )
        )
        parts.append(f"{function.get('cold', 0):,} cold; on average {', '.join(means)}")
    return "; ".join(parts)


def cascade_text(cascade: Mapping[str, Any]) -> str:
    """A cascade in a line: its threshold, its stages, and how they ended."""
    parts = [f"cascade {cascade.get('name')}: threshold {cascade.get('threshold', 0):.3g}"]
    for stage in cascade.get("stages", ()):
        gpus = stage.get("gpus")
        planned = "" if gpus is None else f", {gpus} {'GPU' if gpus == 1 else 'GPUs'}"
        parts.append(
            f"{stage.get('stage')} {stage.get('model')}: {stage.get('queued', 0)} queued{planned}"
        )
    given = [f"{n:,} {verdict}" for verdict, n in cascade.get("verdicts", {}).items() if n]
    parts.append(", ".join(given) or "no verdict yet")
    return "; ".join(parts) + ("" if cascade.get("ready", True) else " (not ready)")
