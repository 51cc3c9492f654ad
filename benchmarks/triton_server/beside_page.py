"""The tables of benchmarks/triton.md, from the results of beside.py."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from device_model import DOCUMENTED, LATE_NS

FORMAT = 1
BEGIN, END = "<!-- tables: made by triton_server/beside.py -->", "<!-- end of tables -->"

Record = dict[str, Any]
_NONE = "-"
_DOCUMENTED = "|".join(DOCUMENTED)


def page(document: Record, path: Path) -> str:
    """The text of the page at `path` with new tables. Raises ValueError without their place."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise ValueError(f"{path} must have one {BEGIN} and one {END}")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{tables(document)}\n\n{END}{after}"


def tables(document: Record) -> str:
    """All tables, with what they belong to."""
    final = document["final"]
    cells = list(dict.fromkeys(record["cell"] for record in final.values()))
    parts = [
        "### Requests in time: slosched's gateway to Triton, as a ratio",
        _ratios(document, cells),
        "### Requests in time, per cent of all that were sent",
        _shares(document, cells),
        "### Latency of what was answered, p50 / p99 in ms",
        _latencies(document, cells),
        "### CPU time per request sent, us",
        _cpu(document, cells),
        "### How exact Triton's device was",
        _lateness(document),
        _provenance(document),
    ]
    return "\n\n".join(part for part in parts if part)


# ------------------------------------------------------------------------------------- looking up


def in_cell(document: Record, cell: str, kind: str, instances: int = 0) -> list[Record]:
    """The compared runs of a kind of system in a cell."""
    start = f"{kind}|{instances}|"
    found = document["final"].values()
    return [each for each in found if each["cell"] == cell and each["system"].startswith(start)]


def share(record: Record | None) -> float | None:
    return record["in_time"] / record["sent"] if record and record["sent"] else None


def of_triton(document: Record, cell: str, instances: int, which: str) -> Record | None:
    """Triton's run with the setting `which`: documented, one (the best for all cells), best (in this cell)."""
    records = in_cell(document, cell, "triton", instances)
    if which == "best":
        return max(records, key=lambda each: share(each) or 0.0, default=None)
    wanted = _DOCUMENTED if which == "documented" else one_setting(document, instances)
    return next((each for each in records if setting(each) == wanted), None)


def setting(record: Record) -> str:
    return str(record["system"].split("|", 2)[2])


def one_setting(document: Record, instances: int) -> str:
    """The setting that the search found best over all cells. What it left out is as good as the documented."""
    tried = document["search"].values()
    totals: dict[str, float] = {}
    cells = list(dict.fromkeys(record["cell"] for record in tried))
    mine = [each for each in tried if each["system"].startswith(f"triton|{instances}|")]
    by = {(each["cell"], setting(each)): share(each) or 0.0 for each in mine}
    for name in dict.fromkeys(setting(each) for each in mine):
        totals[name] = sum(by.get((c, name), by.get((c, _DOCUMENTED), 0.0)) for c in cells)
    return max(totals, key=lambda name: totals[name]) if totals else _DOCUMENTED


# ------------------------------------------------------------------------------------ the tables

#: Our systems by kind, and their titles.
_OURS = {"gateway": "gateway", "hasty": "gateway, told 1 ms less", "native": "native client"}
_KINDS = [(n, which) for n in (1, 2) for which in ("documented", "one", "best")]


def _titles() -> list[str]:
    names = {"documented": "as documented", "one": "one setting", "best": "best by cell"}
    return [f"{names[which]}, {n} inst." for n, which in _KINDS]


def _names(cell: str) -> list[str]:
    slo, load = cell.split("|")
    return [f"{slo} ms", load]


def _ratios(document: Record, cells: Sequence[str]) -> str:
    rows = []
    for cell in cells:
        ours = share(next(iter(in_cell(document, cell, "gateway")), None))
        theirs = [share(of_triton(document, cell, n, which)) for n, which in _KINDS]
        rows.append([*_names(cell), *(_ratio(ours, each) for each in theirs)])
    return table(["SLO", "load", *_titles()], rows)


def _shares(document: Record, cells: Sequence[str]) -> str:
    rows = []
    for cell in cells:
        ours = [next(iter(in_cell(document, cell, kind)), None) for kind in _OURS]
        theirs = [of_triton(document, cell, n, which) for n, which in _KINDS]
        rows.append([*_names(cell), *(_percent(share(each)) for each in [*ours, *theirs])])
    found = table(["SLO", "load", *_OURS.values(), *_titles()], rows)
    words = [
        f"With {n} instance(s) the one setting is: {_words(one_setting(document, n))}. Best by cell: "
        + "; ".join(_best(document, cells, n))
        + "."
        for n in (1, 2)
    ]
    return "\n\n".join([found, *words])


def _best(document: Record, cells: Sequence[str], instances: int) -> list[str]:
    """The best settings, each with its cells."""
    by: dict[str, list[str]] = {}
    for cell in cells:
        record = of_triton(document, cell, instances, "best")
        if record is not None:
            by.setdefault(_words(setting(record)), []).append(" at ".join(_names(cell)))
    return [f"{words} ({', '.join(where)})" for words, where in by.items()]


def _words(name: str) -> str:
    batcher, rule = name.split("|")
    return f"batcher {batcher}, timeout {rule}"


def _latencies(document: Record, cells: Sequence[str]) -> str:
    rows = []
    for cell in cells:
        records = [next(iter(in_cell(document, cell, kind)), None) for kind in _OURS]
        records += [of_triton(document, cell, n, "best") for n in (1, 2)]
        rows.append([*_names(cell), *(_latency(each) for each in records)])
    titles = [*_OURS.values(), "Triton, best, 1 inst.", "Triton, best, 2 inst."]
    return table(["SLO", "load", *titles], rows)


def _cpu(document: Record, cells: Sequence[str]) -> str:
    """By load, over all SLOs; Triton with its one setting."""
    loads = list(dict.fromkeys(cell.split("|")[1] for cell in cells))
    rows = []
    for load in loads:
        of_load = [cell for cell in cells if cell.split("|")[1] == load]
        for title, kind, instances in (
            ("gateway", "gateway", 0),
            ("native client", "native", 0),
            ("Triton, 1 inst.", "triton", 1),
            ("Triton, 2 inst.", "triton", 2),
        ):
            records = [each for c in of_load for each in in_cell(document, c, kind, instances)]
            if kind == "triton":
                wanted = one_setting(document, instances)
                records = [each for each in records if setting(each) == wanted]
            rows.append([load, title, *_cpu_words(records)])
    return table(["load", "system", "all but the client", "by process", "client"], rows)


def _cpu_words(records: Sequence[Record]) -> list[str]:
    sent = sum(each["all_sent"] for each in records)
    if not sent:
        return [_NONE] * 3
    totals: dict[str, float] = {}
    for each in records:
        for part, seconds in each["cpu_s"].items():
            totals[part] = totals.get(part, 0.0) + seconds
    us = {part: seconds / sent * 1e6 for part, seconds in totals.items()}
    client = us.pop("client", 0.0)
    parts = ", ".join(f"{part} {value:.0f}" for part, value in us.items())
    return [f"{sum(us.values()):.0f}", parts, f"{client:.0f}"]


def _lateness(document: Record) -> str:
    """Batches of the compared runs: the share that ended within each bound."""
    rows = []
    for n in (1, 2):
        counts = [0] * (len(LATE_NS) + 1)
        for record in document["final"].values():
            if record["system"].startswith(f"triton|{n}|"):
                counts = [a + b for a, b in zip(counts, record["device_late"], strict=True)]
        total = sum(counts)
        if total:
            within = [sum(counts[: i + 1]) / total for i in range(len(LATE_NS))]
            rows.append([str(n), f"{total:,}", *(_percent(each) for each in within)])
    bounds = [f"within {ns / 1000:g} us" for ns in LATE_NS]
    return table(["instances", "batches", *bounds], rows) if rows else ""


def _provenance(document: Record) -> str:
    records = document["final"].values()
    voids = sum(bool(reasons) for each in records for reasons in each["voids"])
    kept = sum(bool(each["void"]) for each in records)
    late = max((each["issue_delay_p99_ns"] for each in records), default=0)
    lengths = document["lengths"]
    return (
        f"*slosched {document['slosched']} ({document['commit'] or 'no checkout'}), tritonserver "
        f"{document['triton']}; {document['machine']}. Capacity {document['capacity']:.0f}/s; "
        f"{lengths['final_s']:g} s a run, {lengths['search_s']:g} s in the search; {len(records)} runs, "
        f"{voids} disturbed by the machine, of which {kept} stand in the tables for want of an undisturbed "
        f"repetition. The client sent at worst with a p99 delay of {late / 1e6:.2f} ms. "
        f"{document['seconds'] / 60:.0f} minutes in all.*"
    )


# ------------------------------------------------------------------------------------- writing


def _ratio(ours: float | None, theirs: float | None) -> str:
    if ours is None or theirs is None:
        return _NONE
    return f"{ours / theirs:.2f}" if theirs >= 0.005 else "> 100" if ours > 0.5 else _NONE


def _percent(value: float | None) -> str:
    return _NONE if value is None else f"{100 * value:.1f}"


def _latency(record: Record | None) -> str:
    if record is None or record["p50_ns"] < 0:
        return _NONE
    return f"{record['p50_ns'] / 1e6:.1f} / {record['p99_ns'] / 1e6:.1f}"


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [headings, [":--", *["--:"] * (len(headings) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
