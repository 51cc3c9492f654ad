"""Whether an SLO holds, and how sure that is: the early-stopping rule of MLPerf's LoadGen. Pure.

`late` of `sent` requests were not in time: answered late, refused, failed, or never answered. If each
request were late with probability 1 - p, independently of the others, how probable would `late` or
fewer be? If 1 % or less, the SLO *holds*: the share in time is above p, with 99 %
confidence. If as many or more would have been as improbable, it *fails*, with the same confidence.
Otherwise it is undecided, and the verdict says how many more requests would decide if none were late.

LoadGen decides the first (its tolerance is 0, as here) and calls everything else unsuccessful. What the
rule assumes, and where that does not hold, is in docs/verdicts.md.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import exp, fsum, lgamma, log, log1p
from typing import Any

from slosched.errors import InvalidConfig

#: What a verdict is about, and how sure it has to be, where nothing else is said.
PERCENTILE = 0.99
CONFIDENCE = 0.99
#: Terms of a tail that are smaller than this part of its largest one change nothing.
_NEGLIGIBLE = 1e-18
#: Limits of a sentence: undecided steps for which it says what would decide them, and steps that it lists.
_MOST_OPEN = 5
_MOST_LISTED = 12


class Outcome(StrEnum):
    """What a verdict says of an SLO."""

    HOLDS = "holds"
    FAILS = "fails"
    UNDECIDED = "undecided"


@dataclass(frozen=True)
class Verdict:
    """What `sent` requests, of which `late` were not in time, say of an SLO.

    `needs` is how many more would make it hold if none of them were late; 0 if it is decided.
    """

    outcome: Outcome
    sent: int
    late: int
    needs: int
    percentile: float
    confidence: float

    @property
    def word(self) -> str:
        """The verdict as the cell of a narrow table."""
        return {Outcome.HOLDS: "yes", Outcome.FAILS: "no"}.get(self.outcome, "undecided")

    @property
    def short(self) -> str:
        """The verdict as the cell of a table."""
        more = f": {self.needs:,} more" if self.outcome is Outcome.UNDECIDED else ""
        return f"{self.word}{more}"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "outcome": str(self.outcome),
            "needs_more_if_none_late": self.needs,
            "sent": self.sent,
            "late": self.late,
            "percentile": self.percentile,
            "confidence": self.confidence,
        }


def judge(
    sent: int, late: int, *, percentile: float = PERCENTILE, confidence: float = CONFIDENCE
) -> Verdict:
    """Decide from `late` of `sent` requests whether at least `percentile` of all would be in time.

    Raises InvalidConfig for counts that cannot be, or shares that are not within 0..1.
    """
    _check(percentile, confidence)
    if not 0 <= late <= sent:
        raise InvalidConfig(f"of {sent} requests {late} cannot have been late")
    doubt, share = 1 - confidence, 1 - percentile
    needs = 0
    if at_most(late, sent, share) <= doubt:
        outcome = Outcome.HOLDS
    elif late and 1 - at_most(late - 1, sent, share) <= doubt:
        outcome = Outcome.FAILS
    else:
        outcome = Outcome.UNDECIDED
        needs = least_sent(late, percentile=percentile, confidence=confidence) - sent
    return Verdict(
        outcome=outcome,
        sent=sent,
        late=late,
        needs=needs,
        percentile=percentile,
        confidence=confidence,
    )


@functools.lru_cache(maxsize=4096)
def least_sent(late: int, *, percentile: float = PERCENTILE, confidence: float = CONFIDENCE) -> int:
    """The fewest requests of which `late` may be late so that the SLO holds (LoadGen's h + t)."""
    _check(percentile, confidence)
    doubt, share = 1 - confidence, 1 - percentile
    low, high = late, late + 1
    while at_most(late, high, share) > doubt:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if at_most(late, middle, share) > doubt:
            low = middle
        else:
            high = middle
    return high


def most_late(sent: int, *, percentile: float = PERCENTILE, confidence: float = CONFIDENCE) -> int:
    """How many of `sent` requests may be late so that the SLO holds; -1: there are too few to say."""
    _check(percentile, confidence)
    doubt, share = 1 - confidence, 1 - percentile
    low, high = -1, sent
    while high - low > 1:
        middle = (low + high) // 2
        if at_most(middle, sent, share) <= doubt:
            low = middle
        else:
            high = middle
    return low


@functools.lru_cache(maxsize=64)
def least_samples(percentile: float = PERCENTILE, confidence: float = CONFIDENCE) -> int:
    """The fewest latencies from which LoadGen reports a percentile: 662 for p99, 64 for p90."""
    return least_sent(1, percentile=percentile, confidence=confidence)


def rank_of_bound(
    count: int, *, percentile: float = PERCENTILE, confidence: float = CONFIDENCE
) -> int | None:
    """Which of `count` latencies, sorted upwards and counted from 0, is LoadGen's early-stopping estimate.

    It is at least the percentile of all latencies that there could be, with that confidence. None if
    there are fewer than `least_samples`.
    """
    slowest = most_late(count, percentile=percentile, confidence=confidence)
    return count - slowest if slowest >= 1 else None


# ------------------------------------------------------------------------------------ in words


def sentence(subject: str, steps: Iterable[tuple[str, Verdict | None]]) -> str:
    """Say at which steps an SLO holds; "" without steps.

    `subject` begins the sentence ("SLO 25ms"; "" for none). A step is what it is called and its verdict;
    None where its requests were sent late, so that it has none.
    """
    steps = list(steps)
    if not steps:
        return ""
    first = next((verdict for _, verdict in steps if verdict is not None), None)
    percentile = PERCENTILE if first is None else first.percentile
    confidence = CONFIDENCE if first is None else first.confidence
    parts = [
        f"{outcome} {_listed([name for name, _ in steps], places)}"
        for outcome, places in (
            ("at", _places(steps, Outcome.HOLDS)),
            ("not at", _places(steps, Outcome.FAILS)),
        )
        if places
    ]
    undecided = _places(steps, Outcome.UNDECIDED)
    if len(undecided) > _MOST_OPEN:
        parts.append(f"undecided at {_listed([name for name, _ in steps], undecided)}")
    elif undecided:
        parts.append(f"undecided at {', '.join(_open(*steps[place]) for place in undecided)}")
    late = [place for place, (_, verdict) in enumerate(steps) if verdict is None]
    if late:
        names = [name for name, _ in steps]
        parts.append(f"no verdict at {_listed(names, late)}, where the client sent late")
    return (
        f"{subject + ': ' if subject else ''}{100 * percentile:g} % in time (client), with "
        f"{100 * confidence:g} % confidence: {'; '.join(parts)}"
    )


def _places(steps: list[tuple[str, Verdict | None]], outcome: Outcome) -> list[int]:
    return [
        place
        for place, (_, verdict) in enumerate(steps)
        if verdict is not None and verdict.outcome is outcome
    ]


def _listed(names: list[str], places: list[int]) -> str:
    """The names at `places`; four or more neighbours as "first to last", and not more than can be read."""
    parts: list[str] = []
    begin = 0
    for end in range(1, len(places) + 1):
        if end < len(places) and places[end] == places[end - 1] + 1:
            continue
        run = [names[place] for place in places[begin:end]]
        parts += [f"{run[0]} to {run[-1]}"] if len(run) > 3 else run
        begin = end
    if len(parts) > _MOST_LISTED:
        parts = [*parts[:_MOST_LISTED], f"{len(parts) - _MOST_LISTED} more"]
    *others, last = parts
    return f"{', '.join(others)} and {last}" if others else last


def _open(name: str, verdict: Verdict | None) -> str:
    assert verdict is not None
    return (
        f"{name} ({verdict.sent:,} requests, {verdict.late:,} not in time; {verdict.needs:,} more would "
        "decide if none is late)"
    )


# ---------------------------------------------------------------------------------- arithmetic


def at_most(count: int, trials: int, chance: float) -> float:
    """The probability of at most `count` successes in `trials` of `chance` each: the binomial's lower tail.

    Summed from the largest term outwards, whose logarithm is exact to about 1e-9 up to 10^7 trials.
    """
    if count < 0:
        return 0.0
    if count >= trials:
        return 1.0
    odds = chance / (1 - chance)
    if count <= trials * chance:
        return _tail(count, trials, chance, lambda k: k / ((trials - k + 1) * odds), -1)
    upper = _tail(count + 1, trials, chance, lambda k: (trials - k) * odds / (k + 1), +1)
    return 1.0 - upper


def _tail(
    count: int, trials: int, chance: float, ratio: Callable[[int], float], step: int
) -> float:
    """The terms from `count` on, away from the mean: each is `ratio(k)` times the one before."""
    largest = exp(
        lgamma(trials + 1)
        - lgamma(count + 1)
        - lgamma(trials - count + 1)
        + count * log(chance)
        + (trials - count) * log1p(-chance)
    )
    terms, term = [1.0], 1.0
    while 0 < count < trials and term > _NEGLIGIBLE:
        term *= ratio(count)
        count += step
        terms.append(term)
    return min(1.0, largest * fsum(terms))


def _check(percentile: float, confidence: float) -> None:
    for name, share in (("percentile", percentile), ("confidence", confidence)):
        if not 0 < share < 1:
            raise InvalidConfig(f"a {name} must be within 0..1, not {share:g}")
