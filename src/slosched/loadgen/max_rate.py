"""The highest rate at which an SLO holds, by bisection. Pure: a probe sends the requests, live or simulated.

Each rate is judged by up to three windows together. A window that was disturbed counts only if the SLO
holds in spite of it; else it is thrown away and repeated. The verdict's error budget is divided among the
looks at the counts, so that several looks do not make it less sure.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult
from slosched.loadgen.verdict import CONFIDENCE, PERCENTILE, Outcome, Verdict, judge
from slosched.units import NS_PER_S, format_duration, format_share
from slosched.workloads.composed import Composed
from slosched.workloads.rate_exp import rate_sweep
from slosched.workloads.streams import Slo

#: Number of undisturbed windows after which a rate is undecided.
_LOOKS = 3
#: Least number of requests in a window: some 20 late ones at 99 %.
LEAST_REQUESTS = 2_000
#: Requests of the same rate go out this long before a window begins, and are not counted.
LEAD_IN_NS = NS_PER_S
_MAX_RATES = 10_000


@dataclass(frozen=True)
class Window:
    """The outcome of one stretch of requests. `late` were not in time, for whatever reason.

    `disturbed` says in words why it does not count; `problem` why the search cannot go on.
    """

    sent: int
    late: int
    disturbed: tuple[str, ...] = ()
    problem: str = ""


class Probe(Protocol):
    """Sends `rate` requests/s for `length_ns` (after a lead-in) and waits for the answers.

    `number` counts the windows from 0: each has arrivals of its own.
    """

    def __call__(self, rate: float, length_ns: int, number: int) -> Window: ...


@dataclass(frozen=True)
class Search:
    """Where to look: `low`, `low + resolution`, ... up to `high`, requests/s.

    Raises InvalidConfig for values that mean nothing.
    """

    low: float
    high: float
    resolution: float
    window_ns: int
    #: How often a disturbed window of one rate is repeated.
    repeats: int = 3

    def __post_init__(self) -> None:
        for name, value in (
            ("low", self.low),
            ("high", self.high),
            ("resolution", self.resolution),
        ):
            if not (math.isfinite(value) and 0 < value <= 1e9):
                raise InvalidConfig(f"{name} must be above 0 and at most 1e9, not {value:g}")
        if self.high < self.low:
            raise InvalidConfig(f"high ({self.high:g}) must not be below low ({self.low:g})")
        if self.last >= _MAX_RATES:
            raise InvalidConfig(
                f"there are {self.last + 1} rates from {self.low:g} to {self.high:g} in steps of "
                f"{self.resolution:g}; take a coarser resolution"
            )
        if self.window_ns < 1 or self.repeats < 0:
            raise InvalidConfig("the window must be above 0, and repeats at least 0")

    @property
    def confidence(self) -> float:
        """The confidence of each look, so that all looks at one rate together leave 1 - CONFIDENCE."""
        return 1 - (1 - CONFIDENCE) / (_LOOKS + self.repeats + 1)

    @property
    def last(self) -> int:
        """The place of the highest rate, counted from 0."""
        return math.floor((self.high - self.low) / self.resolution + 1e-9)

    def rate(self, place: int) -> float:
        return self.low + place * self.resolution

    def length_ns(self, rate: float) -> int:
        """A window's length: `window_ns`, or what LEAST_REQUESTS take."""
        return max(self.window_ns, math.ceil(LEAST_REQUESTS * NS_PER_S / rate))


@dataclass(frozen=True)
class Tried:
    """One rate and the verdict from `windows` of it (None: there were none that count).

    `disturbed` says why it was given up, in words; `problem` why the search was.
    """

    rate: float
    verdict: Verdict | None
    windows: int
    disturbed: tuple[str, ...] = ()
    problem: str = ""

    @property
    def holds(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is Outcome.HOLDS

    @property
    def words(self) -> str:
        """What was found, as it follows a rate."""
        if self.problem or self.disturbed or self.verdict is None:
            return "was disturbed too often"
        return {
            Outcome.HOLDS: "holds",
            Outcome.FAILS: "does not hold",
            Outcome.UNDECIDED: "is undecided",
        }[self.verdict.outcome]

    @property
    def text(self) -> str:
        """The rate and what was found, in one line."""
        if self.problem:
            return f"{_rate(self.rate)}: {self.problem}"
        if self.disturbed or self.verdict is None:
            return f"{_rate(self.rate)}: {self.words} ({'; '.join(self.disturbed)})"
        sent, late = self.verdict.sent, self.verdict.late
        share = format_share((sent - late) / sent if sent else 0.0)
        again = f" in {self.windows} windows" if self.windows > 1 else ""
        return f"{_rate(self.rate)}: {self.words}; {sent:,} requests{again}, {share} in time"


class End(StrEnum):
    """How a search ended."""

    FOUND = "found"  # one rate holds, and the next does not, or is undecided
    ALL_HOLD = "all hold"  # also the highest
    NONE_HOLDS = "none holds"  # not even the lowest
    DISTURBED = "disturbed"  # what lies next above the highest that holds could not be measured
    STOPPED = "stopped"  # by a problem, which is told


@dataclass(frozen=True)
class MaxRate:
    """What a search found. `holds` is the highest rate that did, `beyond` the lowest tried above it."""

    end: End
    tried: tuple[Tried, ...]
    holds: Tried | None = None
    beyond: Tried | None = None
    problem: str = ""

    @property
    def text(self) -> str:
        """The answer in one line."""
        known = [
            f"{tried.rate:.6g}{unit} {tried.words}"
            for tried, unit in ((self.holds, " requests/s"), (self.beyond, ""))
            if tried is not None
        ]
        if self.holds is None:
            early = "stopped before any rate was found to hold"
            known.insert(0, early if self.problem else "no rate was found to hold")
        if self.end is End.ALL_HOLD:
            known.append("the highest rate that was asked for")
        if self.problem:
            known.append(f"the search ended early: {self.problem}")
        return (
            f"with >= {100 * PERCENTILE:g} % in time at {100 * CONFIDENCE:g} % confidence: "
            f"{', '.join(known)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {
            "end": str(self.end),
            "text": self.text,
            "problem": self.problem,
            "percentile": PERCENTILE,
            "confidence": CONFIDENCE,
            "holds_rps": None if self.holds is None else self.holds.rate,
            "beyond_rps": None if self.beyond is None else self.beyond.rate,
            "tried": [
                {
                    "rate_rps": tried.rate,
                    "windows": tried.windows,
                    "disturbed": list(tried.disturbed),
                    "verdict": None if tried.verdict is None else tried.verdict.as_dict(),
                }
                for tried in self.tried
            ],
        }


def find_max_rate(
    probe: Probe, search: Search, *, on_tried: Callable[[Tried], None] = lambda tried: None
) -> MaxRate:
    """Look for the highest rate of `search` at which the SLO holds; `on_tried` is called for each rate.

    It takes for granted that what holds at a rate holds at lower ones. A rate that is undecided, or was
    disturbed too often, counts as one that does not hold.
    """
    looker = _Looker(probe, search, on_tried)
    first, last = 0, search.last
    low = looker.look(first)
    if not low.holds:
        return looker.ended(None, low)
    high = looker.look(last) if last else low
    while last - first > 1 and not (high.problem or high.holds):
        middle = looker.look((first + last) // 2)
        if middle.problem:
            return looker.ended(low, high, middle.problem)
        if middle.holds:
            first, low = (first + last) // 2, middle
        else:
            last, high = (first + last) // 2, middle
    return looker.ended(high, None) if high.holds else looker.ended(low, high)


class _Looker:
    """Tries rates and keeps what was found."""

    def __init__(self, probe: Probe, search: Search, on_tried: Callable[[Tried], None]) -> None:
        self._probe, self._search, self._on_tried = probe, search, on_tried
        self._number = 0
        self._all: list[Tried] = []

    def look(self, place: int) -> Tried:
        found = self._judged(self._search.rate(place))
        self._all.append(found)
        self._on_tried(found)
        return found

    def ended(self, low: Tried | None, high: Tried | None, problem: str = "") -> MaxRate:
        """`low` holds, `high` does not, or could not be measured."""
        if high is not None and high.problem:
            problem, high = high.problem, None
        if problem:
            end = End.STOPPED
        elif high is None:
            end = End.ALL_HOLD
        elif high.disturbed:
            end = End.DISTURBED
        else:
            end = End.FOUND if low is not None else End.NONE_HOLDS
        return MaxRate(end, tuple(self._all), low, high, problem)

    def _judged(self, rate: float) -> Tried:
        search = self._search
        sent = late = windows = spoiled = 0
        verdict: Verdict | None = None
        while windows < _LOOKS:
            window = self._probe(rate, search.length_ns(rate), self._number)
            self._number += 1
            if window.problem:
                return Tried(rate, verdict, windows, problem=window.problem)
            if window.disturbed:
                # A disturbance makes requests late, and hardly ever in time.
                alone = judge(window.sent, window.late, confidence=search.confidence)
                if alone.outcome is Outcome.HOLDS:
                    return Tried(rate, alone, 1)
                spoiled += 1
                if spoiled > search.repeats:
                    return Tried(rate, verdict, windows, window.disturbed)
                continue
            windows += 1
            sent, late = sent + window.sent, late + window.late
            verdict = judge(sent, late, confidence=search.confidence)
            if verdict.outcome is not Outcome.UNDECIDED:
                break
        return Tried(rate, verdict, windows)


# ------------------------------------------------------------------------------------- windows


def window_workload(*, model: str, copies: int, slo: Slo, rate: float, length_ns: int) -> Composed:
    """The workload of one window: Poisson arrivals, a lead-in, then the step that counts."""
    terms = (model, str(copies), "poisson", f"{slo[0]:g}x" if slo[0] else f"{slo[1]}ns")
    return rate_sweep(
        "max-rate",
        (*terms, f"{rate:.6g}", f"{length_ns}ns"),
        model=model,
        copies=copies,
        dist="poisson",
        slo=slo,
        stages=[(rate, LEAD_IN_NS), (rate, length_ns)],
    )


def window_of(result: RunResult, stalls: tuple[str, ...] = ()) -> Window:
    """What a run of `window_workload` says; `stalls` is what disturbed the machine meanwhile."""
    if not result.complete:
        return Window(0, 0, problem=result.problem)
    counted = [step for step in result.steps if step.index == 1]
    late_ns = max((step.issue_delay_p99_ns for step in counted), default=0)
    reasons = list(stalls)
    if any(step.sent_late for step in counted):
        reasons.append(f"sends were late: issue delay p99 {format_duration(late_ns)}")
    sent = sum(step.sent for step in counted)
    in_time = sum(step.in_time for step in counted)
    return Window(sent, sent - in_time, tuple(reasons))


def _rate(rate: float) -> str:
    return f"{rate:.6g}/s"
