"""What the paper claims of inference, beside what a run found; whether what was refused was hopeless.

The paper's numbers are those of its abstract and section 6.3 (USENIX ATC'20): twice the throughput, a 90 %
lower tail.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from slosched.faasm.inference.measures import capacity_of
from slosched.faasm.inference.requests import Outcome
from slosched.units import NS_PER_MS

Record = Mapping[str, Any]
Outcomes = Mapping[str, Sequence[Outcome]]

WARM_NOTE = (
    "times: p99 of the warm requests of a run with cold ones, divided by that of the run of the same load "
    "without. The "
    "aim is at most 2 at 20 % cold on L3. Runs of throughput are at fractions of each rule's own capacity."
)
REFUSALS_NOTE = (
    "fastest_cold_ms: the quickest cold request of that rung that any system answered in this run. "
    "Refused ones were "
    "hopeless where it is above the SLO; else they were refused for what waited before them, and "
    "same_requests_in_time says how many of the same requests the others answered within the SLO."
)
ANSWERS_NOTE = (
    "The same picture has to get the same five classes from every system; same_bits compares the "
    "probabilities, too. wrong: of all answers, also under load beside cold requests, those that differ from "
    "the same network in float64 on the CPU by more than 1 part in 10,000 of a probability; largest_error: of "
    "any, as a part. "
    "Weights are random, so that the classes mean nothing."
)
WHY = (
    "of: slosched's run, and the baseline's; each at a part of its own capacity, so that the rates differ. "
    "Why it differs: the paper's containers share nothing, pull their model again at a cold start and "
    "wait for a "
    "container; its Faaslets restore a snapshot below 1 ms and keep the model. The sleep that stands for the "
    "container is the original's own. On the rungs L1 to L4 both sides drop the same, so that what is "
    "left is what the "
    "system adds; and a host of two cores has no more throughput than its cores."
)


def warm_beside_cold(records: Sequence[Record]) -> list[dict[str, Any]]:
    """Each run with cold requests against the same load on the same system without."""
    rows = []
    for each in records:
        if each["cold"] == "none" or each["loop"] == "capacity" or each["warm_p99_ms"] is None:
            continue
        alone = [
            other
            for other in records
            if other["cold"] == "none"
            and other["system"] == each["system"]
            and other["loop"] == ("closed" if each["loop"] == "slo" else each["loop"])
            and other.get("fraction") == each.get("fraction")
            and other.get("think_ms") == each.get("think_ms")
        ]
        if not alone or not alone[0]["p99_ms"]:
            continue
        times = each["warm_p99_ms"] / alone[0]["p99_ms"]
        rows.append(
            {
                "system": each["system"],
                "loop": each["loop"],
                "cold": each["cold"],
                "rung": each["rung"],
                "fraction": each.get("fraction"),
                "warm_n": each["n"] - each["cold_n"],
                "warm_p99_ms": each["warm_p99_ms"],
                "all_warm_p99_ms": alone[0]["p99_ms"],
                "times": times,
                "within_2": times <= 2,
            }
        )
    return rows


def refusals(records: Sequence[Record], outcomes: Outcomes) -> list[dict[str, Any]]:
    """The cold requests that slosched refused, and whether another system shows that they had a chance."""
    rows = []
    for each in records:
        if each["system"] != "slosched" or not each["refused"]:
            continue
        mine = outcomes[str(each["raw"])]
        refused = [outcome for outcome in mine if outcome.status == "refused" and outcome.is_cold]
        fastest = fastest_cold_ms(records, outcomes, str(each["rung"]))
        slo_ms = float(each["slo_ms"])
        hopeless = len(refused) if fastest is not None and fastest > slo_ms else 0
        others = _same(records, each)
        numbers = {outcome.number for outcome in refused}
        same = [
            outcome
            for other in others
            for outcome in outcomes[str(other["raw"])]
            if outcome.number in numbers
        ]
        in_time = [
            outcome
            for outcome in same
            if outcome.status == "ok" and outcome.latency_ns <= slo_ms * NS_PER_MS
        ]
        rows.append(
            {
                "loop": each["loop"],
                "cold": each["cold"],
                "rung": each["rung"],
                "fraction": each.get("fraction"),
                "slo_ms": slo_ms,
                "refused_warm": each["refused"] - len(refused),
                "refused_cold": len(refused),
                "fastest_cold_ms": fastest,
                "hopeless": hopeless,
                "same_requests_in_time": f"{len(in_time)} of {len(same)}",
                "by": ", ".join(str(other["system"]) for other in others) or None,
                "refused_after_ms": _median(
                    [outcome.latency_ns / NS_PER_MS for outcome in refused]
                ),
            }
        )
    return rows


def fastest_cold_ms(records: Sequence[Record], outcomes: Outcomes, rung: str) -> float | None:
    """The quickest answered cold request of the rung in any system, without emulated starts."""
    return min(
        (
            outcome.latency_ns / NS_PER_MS
            for each in records
            if each["system"] != "container"
            for outcome in outcomes[str(each["raw"])]
            if outcome.rung == rung and outcome.status == "ok"
        ),
        default=None,
    )


def _same(records: Sequence[Record], mine: Record) -> list[Record]:
    """The same load on other systems, whose requests of the same numbers are the same ones."""
    loop = "closed" if mine["loop"] == "slo" else mine["loop"]
    return [
        each
        for each in records
        if each["system"] not in ("slosched", "container")
        and each["loop"] == loop
        and each["cold"] == mine["cold"]
        and each["rung"] == mine["rung"]
        and each.get("fraction") == mine.get("fraction")
        and each.get("think_ms") == mine.get("think_ms")
    ]


def answers(records: Sequence[Record]) -> list[dict[str, Any]]:
    """For each system whether its answers are those of all the others."""
    bits: dict[str, dict[str, set[str]]] = {}
    for each in records:
        for picture, words in each["answers"].items():
            bits.setdefault(str(each["system"]), {}).setdefault(picture, set()).update(words)
    first = next(iter(bits.values()), {})
    rows = []
    for system, pictures in bits.items():
        pairs = [
            (first.get(picture, set()), words)
            for picture, words in pictures.items()
            if picture in first
        ]
        rows.append(
            {
                "system": system,
                "pictures": len(pictures),
                "compared_with": next(iter(bits)),
                "same_classes": sum(1 for a, b in pairs if _classes(a) == _classes(b)),
                "same_bits": sum(1 for a, b in pairs if a == b and len(b) == 1),
                "compared": len(pairs),
                **_against_truth([each for each in records if each["system"] == system]),
            }
        )
    return rows


def _against_truth(mine: Sequence[Record]) -> dict[str, Any]:
    """How many answers of a system were compared with the truth, and what came out."""
    held = [each for each in mine if "wrong" in each]
    errors = [each["largest_error"] for each in held]
    return {
        "answers": sum(each["ok"] for each in held),
        "wrong": sum(each["wrong"] for each in held) if held else None,
        "largest_error": max(errors) if errors and None not in errors else None,
    }


def _classes(words: set[str]) -> set[str]:
    return {each.rpartition(" ")[0] for each in words}


def claims(records: Sequence[Record]) -> list[dict[str, Any]]:
    """The paper's two claims, and the same ratios of this run."""
    rows: list[dict[str, Any]] = []
    rules = [
        each for each in dict.fromkeys(str(each["cold"]) for each in records) if each != "none"
    ]
    for rule in rules:
        found = {
            str(each["system"]): each
            for each in records
            if each["loop"] == "capacity" and each["cold"] == rule and each["rung"] == "L3"
        }
        for baseline in ("container", "process"):
            if "slosched" in found and baseline in found and capacity_of(found[baseline]):
                rows.append(
                    {
                        "claim": "2 x throughput (answers per s)",
                        "cold": rule,
                        "against": _named(baseline),
                        "slosched": capacity_of(found["slosched"]),
                        "baseline": capacity_of(found[baseline]),
                        "found": f"{capacity_of(found['slosched']) / capacity_of(found[baseline]):.2f} x",
                        "of": f"{found['slosched']['ok']} answers; {found[baseline]['ok']} answers",
                    }
                )
            tails = _lowest_loads(records, rule)
            if "slosched" in tails and baseline in tails:
                mine, theirs = tails["slosched"], tails[baseline]
                rows.append(
                    {
                        "claim": "90 % lower tail (p99, ms)",
                        "cold": rule,
                        "against": _named(baseline),
                        "slosched": mine["p99_ms"],
                        "baseline": theirs["p99_ms"],
                        "found": _lower(float(mine["p99_ms"]), float(theirs["p99_ms"])),
                        "of": f"{_load_of(mine)}; {_load_of(theirs)}",
                    }
                )
    return rows


def _lowest_loads(records: Sequence[Record], rule: str) -> dict[str, Record]:
    """By system the run at the lowest rate of the open loop, where queues play no part."""
    found: dict[str, Record] = {}
    for each in records:
        if (
            each["loop"] == "open"
            and each["cold"] == rule
            and each["rung"] == "L3"
            and each["p99_ms"]
        ):
            best = found.setdefault(str(each["system"]), each)
            if each["fraction"] < best["fraction"]:
                found[str(each["system"])] = each
    return found


def _load_of(each: Record) -> str:
    return f"{each['n']} requests at {each['offered_per_s']:.3g}/s, {each['cold_n']} cold"


def _named(baseline: str) -> str:
    return (
        "container (EMULATED start)" if baseline == "container" else "process per instance, real L3"
    )


def _median(values: Sequence[float]) -> float | None:
    ordered = sorted(values)
    return ordered[len(ordered) // 2] if ordered else None


def _lower(mine: float, theirs: float) -> str:
    """How far `mine` is below `theirs`, in words."""
    part = 100 * (1 - mine / theirs)
    return f"{part:.0f} % lower" if part >= 0 else f"{-part:.0f} % higher"
