"""What the requests of one run come to: rates, percentiles with and without those that were not answered."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Mapping, Sequence
from typing import Any

from slosched.faasm.inference.load import Loaded
from slosched.faasm.inference.requests import STATUSES, Outcome
from slosched.units import NS_PER_MS, NS_PER_S

_SHARES = (50, 90, 99)
#: Classes of an answer.
TOP = 5
#: The part by which a probability may be off. In float32 it is 1e-6; another picture's answer is off by 1e-3.
TOLERANCE = 1e-4
_LEAST = 1e-9
#: The probabilities of a picture's classes.
Truth = Sequence[float]


def percentile(ordered: Sequence[float], share: int) -> float:
    """The percentile of sorted values by nearest rank; NaN without values."""
    if not ordered:
        return math.nan
    rank = max(1, -(-share * len(ordered) // 100))
    return ordered[rank - 1]


def record(loaded: Loaded, truths: Sequence[Truth] = ()) -> dict[str, Any]:
    """The fields of a record. Latencies are in ms, from the intended time. `truths` are the right probabilities
    of each picture's classes.

    `p99_ms` is of answered requests, `p99_all_ms` counts each other one (timed out, refused, failed) as
    infinite, and is None where it is. `warm_` and `cold_` are of these requests alone. A rate counts what
    was answered within the run's duration.
    """
    outcomes = loaded.outcomes
    end_ns = loaded.begin_ns + loaded.duration_ns
    seconds = loaded.duration_ns / NS_PER_S
    within = [each for each in outcomes if each.status == "ok" and each.done_ns <= end_ns]
    cold = [each for each in outcomes if each.is_cold]
    late_ns = sorted(each.sent_ns - each.intended_ns for each in outcomes)
    return {
        "duration_s": seconds,
        "n": len(outcomes),
        **{status: sum(1 for each in outcomes if each.status == status) for status in STATUSES},
        "cold_n": len(cold),
        "cold_ratio": len(cold) / len(outcomes) if outcomes else 0.0,
        "cold_refused": sum(1 for each in cold if each.status == "refused"),
        "offered_per_s": len(outcomes) / seconds,
        "achieved_per_s": len(within) / seconds,
        "drained_per_s": _drained_per_s(loaded),
        **percentiles("", outcomes),
        **percentiles("warm_", [each for each in outcomes if not each.is_cold]),
        **percentiles("cold_", cold),
        "issue_delay_p99_ms": _ms(percentile(late_ns, 99)),
        "answers": answers_of(outcomes),
        **(compared(outcomes, truths) if truths else {}),
    }


def compared(outcomes: Sequence[Outcome], truths: Sequence[Truth]) -> dict[str, Any]:
    """How many of the answers are wrong, and the largest error of any probability, as a part of it.

    An answer is right if its classes are five of the likeliest of its picture and each has its probability,
    all within the part TOLERANCE of the fifth, so that classes as likely as one another may change places.
    """
    wrong, largest = 0, 0.0
    for each in outcomes:
        if each.status == "ok":
            error = answer_error(each.top, each.scores, truths[each.picture])
            wrong += error > TOLERANCE
            largest = max(largest, error)
    return {"wrong": wrong, "largest_error": _finite(largest)}


def answer_error(top: Sequence[int], scores: Sequence[float], truth: Truth) -> float:
    """The largest error of an answer: of a probability, or by which a class is below the fifth likeliest.

    It is a part of the fifth likeliest's probability; inf for an answer that is not one of five classes.
    """
    if len(set(top)) != TOP or len(scores) != TOP or not all(0 <= at < len(truth) for at in top):
        return math.inf
    fifth = max(heapq.nlargest(TOP, truth)[-1], _LEAST)
    errors = [abs(score - truth[at]) for at, score in zip(top, scores, strict=True)]
    errors += [fifth - truth[at] for at in top]
    return max(errors) / fifth if all(map(math.isfinite, errors)) else math.inf


def _drained_per_s(loaded: Loaded) -> float:
    """Answers per s from the begin to the last one, also behind the run's end."""
    done = [each.done_ns for each in loaded.outcomes if each.status == "ok"]
    return len(done) * NS_PER_S / (max(done) - loaded.begin_ns) if done else 0.0


def capacity_of(found: Mapping[str, Any]) -> float:
    """The capacity that a record of a run without think times shows, per s: 0 if nothing was answered.

    A short run of a slow system may end before its first answers; these then count for the time they took.
    """
    return float(found["achieved_per_s"] or found["drained_per_s"])


def percentiles(prefix: str, outcomes: Sequence[Outcome]) -> dict[str, float | None]:
    """p50, p90 and p99 of answered requests, and with the others as infinite."""
    answered = sorted(each.latency_ns / NS_PER_MS for each in outcomes if each.status == "ok")
    everything = answered + [math.inf] * (len(outcomes) - len(answered))
    found: dict[str, float | None] = {}
    for share in _SHARES:
        found[f"{prefix}p{share}_ms"] = _finite(percentile(answered, share))
        found[f"{prefix}p{share}_all_ms"] = _finite(percentile(everything, share))
    return found


def answers_of(outcomes: Sequence[Outcome]) -> dict[str, list[str]]:
    """For each picture the different answers that came: classes, and a digest of the probabilities' bits."""
    found: dict[str, dict[str, None]] = {}
    for each in outcomes:
        if each.status == "ok":
            bits = hashlib.sha256(
                ",".join(score.hex() for score in each.scores).encode()
            ).hexdigest()
            words = f"{' '.join(map(str, each.top))} {bits[:8]}"
            found.setdefault(str(each.picture), {})[words] = None
    return {picture: [*words] for picture, words in sorted(found.items())}


def _ms(value_ns: float) -> float | None:
    return _finite(value_ns / NS_PER_MS)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
