"""What faasm.md begins with: ratios of faasm.py's results, and what both pages' parts read. Needs no GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median
from typing import Any

Record = Mapping[str, Any]
Records = Sequence[Record]
Parts = Mapping[str, Mapping[str, Any]]
Row = tuple[str, str, str]


def records_of(parts: Parts, name: str) -> Records:
    found: Records = parts.get(name, {}).get("records", ())
    return found


def number(value: float | None, form: str = "") -> str:
    """A number in three digits, or in `form`; - for none."""
    if value is None:
        return "-"
    if form or isinstance(value, int):
        return format(value, form or ",")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def times(above: float | None, below: float | None) -> str:
    return f"{number(above / below)} x" if above and below else "-"


def ratios(parts: Parts) -> list[Row]:
    rows = [*_start_ratios(records_of(parts, "coldstart"))]
    for name in MATRICES:
        rows += _matrix_ratios(name, records_of(parts, name))
    rows += _load_ratios(records_of(parts, "throughput"))
    rows += _tail_ratios([*records_of(parts, "latency"), *records_of(parts, "throughput")])
    rows += _sgd_ratios(records_of(parts, "sgd"))
    rows += _truth([*records_of(parts, "latency"), *records_of(parts, "throughput")])
    return [row for row in rows if not row[1].startswith("-")]


def _start_ratios(records: Records) -> Iterable[Row]:
    ms = {
        (each["what"], each["rung"], str(each["start"]).partition(",")[0]): float(each["ms"])
        for each in records
        if each.get("kind") != "fill"
    }

    def at(rung: str) -> float | None:
        return next(
            (
                value
                for (what, at, start), value in ms.items()
                if (what, at) == ("MobileNet", rung) and start != "call"
            ),
            None,
        )

    new = at("L4")
    yield (
        "a new process (L4) to a live one that loads all (L3)",
        times(new, at("L3")),
        f"{number(new)} ms",
    )
    yield (
        "L3 to weights from pinned memory (L1)",
        times(at("L3"), at("L1")),
        f"{number(at('L3'))} ms",
    )
    calls = {rung: ms.get(("MobileNet", rung, "call")) for rung in ("L4", "L0")}
    yield (
        "a call with a new process to a warm call",
        times(calls["L4"], calls["L0"]),
        f"{number(calls['L4'])} ms",
    )
    for each in records:
        if each.get("kind") == "fill" and each["what"] == "MobileNet":
            found = f"{each['right']} of {each['held']} right"
            yield (
                f"instances with the network at a time, {each['start']}",
                found,
                f"stopped by {each['stopped_by']}",
            )


MATRICES = ("matrices-torch", "matrices-torch-8000", "matrices-16384", "matrices-cupy")


def products_of(records: Records) -> dict[tuple[str, int, int], list[Record]]:
    found: dict[tuple[str, int, int], list[Record]] = {}
    for each in records:
        if each.get("kind") == "product":
            found.setdefault((each["system"], each["size"], each["splits"]), []).append(each)
    return found


def milliseconds(records: Records | None) -> float | None:
    return median(each["took_ns"] for each in records) / 1e6 if records else None


def _matrix_ratios(name: str, records: Records) -> Iterable[Row]:
    found = products_of(records)
    for size in sorted({size for _, size, _ in found}):
        graph, whole = (
            milliseconds(found.get(("slots", size, 2))),
            milliseconds(found.get(("whole", size, 0))),
        )
        yield (
            f"{name}: graph of 73 calls to one A @ B, {size:,} rows",
            times(graph, whole),
            f"{number(whole)} ms",
        )


def _capacity(records: Records, system: str, cold: str) -> Record:
    return next(
        (
            e
            for e in records
            if e["loop"] == "capacity" and e["system"] == system and e["cold"] == cold
        ),
        {},
    )


def _load_ratios(records: Records) -> Iterable[Row]:
    for cold in dict.fromkeys(str(each["cold"]) for each in records):
        mine = _capacity(records, "slosched", cold)
        for other in ("process", "loop"):
            theirs = _capacity(records, other, cold)
            if not mine or not theirs:
                continue
            base = float(theirs["achieved_per_s"])
            yield (
                f"capacity, slosched to {other}, cold {cold}",
                times(float(mine["achieved_per_s"]), base),
                f"{number(base)} answers/s",
            )
            yield (
                f"GPU GB-s per 1,000 answers, {other} to slosched, cold {cold}",
                times(_gpu_bill(theirs), _gpu_bill(mine)),
                f"{number(_gpu_bill(mine))} GB-s",
            )


def _gpu_bill(each: Record) -> float | None:
    bill = each.get("gpu_gb_s_integral")
    return 1000 * float(bill) / each["ok"] if bill and each["ok"] else None


def _tail_ratios(records: Records) -> Iterable[Row]:
    """p99 of warm requests beside cold ones on L3, at most 70 % of the capacity, to all-warm ones."""
    for each in records:
        fraction = float(each.get("fraction") or 0.0)
        if (
            each["rung"] != "L3"
            or each["system"] != "slosched"
            or each["loop"] == "capacity"
            or fraction > 0.7
        ):
            continue
        warm = [e for e in records if e["cold"] == "none" and _same_load(e, each)]
        if warm:
            load = f"at {fraction:g} of its capacity" if fraction else f"{each['loop']} loop"
            base = warm[0]["p99_ms"]
            yield (
                f"warm p99 beside cold {each['cold']}, {load}",
                times(each["warm_p99_ms"], base),
                f"{number(base)} ms",
            )


def _same_load(a: Record, b: Record) -> bool:
    names = ("system", "loop", "fraction", "think_ms", "connections")
    return all(a.get(name) == b.get(name) for name in names)


def _truth(records: Records) -> Iterable[Row]:
    held = [each for each in records if "wrong" in each]
    if held:
        wrong, answers = sum(e["wrong"] for e in held), sum(e["ok"] for e in held)
        largest = max((e["largest_error"] or float("inf") for e in held), default=0.0)
        yield (
            "wrong answers, warm and cold, alone and under load",
            f"{wrong} of {answers:,}",
            f"largest error {largest:.1e}",
        )


def sgd_runs(records: Records) -> dict[tuple[str, int], Record]:
    return {(e["system"], e["workers"]): e for e in records if "train_s" in e}


def _sgd_ratios(records: Records) -> Iterable[Row]:
    runs = sgd_runs(records)
    counts = sorted(n for system, n in runs if system == "shared")
    for workers in counts[1:]:
        shared, copies = runs["shared", workers], runs.get(("copies", workers))
        one = runs["shared", counts[0]]
        yield (
            f"sgd, shared: {counts[0]} to {workers} workers, training time",
            times(one["train_s"], shared["train_s"]),
            f"{number(one['train_s'])} s",
        )
        if copies and workers == counts[-1]:
            for what, value in _SGD:
                yield (
                    f"sgd, {workers} workers: copies to shared, {what}",
                    times(value(copies), value(shared)),
                    number(value(shared)),
                )


def moved_mb(each: Record) -> float | None:
    names = ("inputs_pulled_bytes", "weights_pulled_bytes", "weights_pushed_bytes")
    return sum(each[name] for name in names) / 1e6 if names[0] in each else None


_SGD: tuple[tuple[str, Callable[[Record], float | None]], ...] = (
    ("training time, s", lambda each: each["train_s"]),
    ("time to the target loss, s", lambda each: each.get("target_s")),
    ("MB moved", moved_mb),
    ("GB-s by the paper's formula", lambda each: each.get("gb_s_instances")),
    ("GB-s of all processes", lambda each: each.get("gb_s_integral")),
)
