"""The highest rate at which an SLO holds, by bisection. Pure: a probe sends the requests, live or simulated.

Each rate is judged by up to three windows together, and each look asks for a third of the doubt that the
verdict may leave, so that looking three times does not make it less sure. What a window says that was
disturbed is thrown away, and it is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from slosched.errors import InvalidConfig
from slosched.loadgen.results import ISSUE_DELAY_BOUND_NS, RunResult
from slosched.loadgen.verdict import CONFIDENCE, PERCENTILE, Outcome, Verdict, judge
from slosched.units import NS_PER_S, format_duration
from slosched.workloads.composed import Composed
from slosched.workloads.rate_exp import rate_sweep
from slosched.workloads.streams import Slo

#: A rate is undecided after so many undisturbed windows.
_LOOKS = 3
#: A window is long enough for so many requests: some 20 late ones at 99 %.
LEAST_REQUESTS = 2_000
#: Requests of the same rate go out this long before a window begins, and are not counted.
LEAD_IN_NS = NS_PER_S
_MAX_RATES = 10_000


@dataclass(frozen=True)
class Window:
    """What one stretch of requests came to. `late` were not in time, for whatever reason.

    `disturbed` says what makes it count for nothing, in words; `problem` why the search cannot go on.
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
    """One rate: its verdict from all undisturbed windows (None: there were none)."""

    rate: float
    verdict: Verdict | None
    windows: int
    disturbed: tuple[str, ...] = ()
    problem: str = ""

    @property
    def decided(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is not Outcome.UNDECIDED

    @property
    def holds(self) -> bool:
        return self.verdict is not None and self.verdict.outcome is Outcome.HOLDS

    @property
    def text(self) -> str:
        """The rate and what was found, in one line."""
        if self.problem:
            return f"{_rate(self.rate)}: {self.problem}"
        if self.disturbed or self.verdict is None:
            return f"{_rate(self.rate)}: disturbed too often ({'; '.join(self.disturbed)})"
        sent, late = self.verdict.sent, self.verdict.late
        share = 100 * (sent - late) / sent if sent else 0.0
        words = {
            Outcome.HOLDS: "holds",
            Outcome.FAILS: "does not hold",
            Outcome.UNDECIDED: "undecided",
        }[self.verdict.outcome]
        again = f" in {self.windows} windows" if self.windows > 1 else ""
        return f"{_rate(self.rate)}: {words}; {sent:,} requests{again}, {share:.2f} % in time"


class End(StrEnum):
    """How a search ended."""

    FOUND = "found"  # one rate holds, and the next does not, or is undecided
    ALL_HOLD = "all hold"  # also the highest
    NONE_HOLDS = "none holds"  # not even the lowest
    DISTURBED = "disturbed"
    STOPPED = "stopped"  # by a problem, which is told


@dataclass(frozen=True)
class MaxRate:
    """What a search found. `holds` is the highest rate that did, `beyond` the lowest tried above it."""

    end: End
    tried: tuple[Tried, ...]
    holds: Tried | None = None
    beyond: Tried | None = None
    problem: str = field(default="")

    @property
    def text(self) -> str:
        """The answer in one line."""
        head = f"with >= {100 * PERCENTILE:g} % in time at {100 * CONFIDENCE:g} % confidence"
        found = None if self.holds is None else f"{self.holds.rate:.6g} requests/s holds"
        if self.end is End.ALL_HOLD:
            return f"{head}: {found}, the highest rate that was asked for"
        if self.end is End.NONE_HOLDS:
            assert self.beyond is not None
            undecided = "is undecided" if not self.beyond.decided else "does not hold"
            return f"{head}: the lowest rate, {self.beyond.rate:.6g} requests/s, {undecided}"
        beyond = ""
        if self.beyond is not None:
            words = "does not" if self.beyond.decided else "is undecided"
            beyond = f", {self.beyond.rate:.6g} {words}"
        if self.end is End.FOUND:
            return f"{head}: {found}{beyond}"
        return f"{head}: {found or 'no rate is known to hold'}{beyond}; {self.problem}"

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
    """Look for the highest rate of `search` at which the SLO holds; `on_tried` hears of each rate.

    It takes for granted that what holds at a rate holds at lower ones. An undecided rate counts as one
    that does not hold; one that was disturbed too often ends the search.
    """
    looker = _Looker(probe, search, on_tried)
    low = looker.look(0)
    if not _known(low):
        return looker.broken(None, None)
    if not low.holds:
        return MaxRate(End.NONE_HOLDS, looker.tried, None, low)
    if search.last == 0:
        return MaxRate(End.ALL_HOLD, looker.tried, low)
    high = looker.look(search.last)
    if not _known(high):
        return looker.broken(low, None)
    if high.holds:
        return MaxRate(End.ALL_HOLD, looker.tried, high)
    first, last = 0, search.last
    while last - first > 1:
        middle = looker.look((first + last) // 2)
        if not _known(middle):
            return looker.broken(low, high)
        if middle.holds:
            first, low = (first + last) // 2, middle
        else:
            last, high = (first + last) // 2, middle
    return MaxRate(End.FOUND, looker.tried, low, high)


def _known(tried: Tried) -> bool:
    """Whether the rate was measured: not broken off, and not without any undisturbed window."""
    return not tried.problem and (tried.decided or not tried.disturbed)


class _Looker:
    """Tries rates and keeps what was found."""

    def __init__(self, probe: Probe, search: Search, on_tried: Callable[[Tried], None]) -> None:
        self._probe, self._search, self._on_tried = probe, search, on_tried
        self._number = 0
        self._all: list[Tried] = []

    @property
    def tried(self) -> tuple[Tried, ...]:
        return tuple(self._all)

    def look(self, place: int) -> Tried:
        found = self._judged(self._search.rate(place))
        self._all.append(found)
        self._on_tried(found)
        return found

    def broken(self, low: Tried | None, high: Tried | None) -> MaxRate:
        last = self._all[-1]
        end = End.STOPPED if last.problem else End.DISTURBED
        return MaxRate(end, self.tried, low, high, last.problem or f"at {last.text}")

    def _judged(self, rate: float) -> Tried:
        confidence = 1 - (1 - CONFIDENCE) / _LOOKS
        sent = late = windows = spoiled = 0
        verdict: Verdict | None = None
        while windows < _LOOKS:
            window = self._probe(rate, self._search.length_ns(rate), self._number)
            self._number += 1
            if window.problem:
                return Tried(rate, verdict, windows, problem=window.problem)
            if window.disturbed:
                spoiled += 1
                if spoiled > self._search.repeats:
                    return Tried(rate, verdict, windows, window.disturbed)
                continue
            windows += 1
            sent, late = sent + window.sent, late + window.late
            verdict = judge(sent, late, confidence=confidence)
            if verdict.outcome is not Outcome.UNDECIDED:
                break
        return Tried(rate, verdict, windows)


# ------------------------------------------------------------------------------------- windows


def window_workload(*, model: str, copies: int, slo: Slo, rate: float, length_ns: int) -> Composed:
    """The workload of one window: Poisson arrivals, a lead-in, then the step that counts."""
    said = (model, str(copies), "poisson", f"{slo[0]:g}x" if slo[0] else f"{slo[1]}ns")
    return rate_sweep(
        "max-rate",
        (*said, f"{rate:.6g}", f"{length_ns}ns"),
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
    if late_ns > ISSUE_DELAY_BOUND_NS:
        reasons.append(f"sends were late: issue delay p99 {format_duration(late_ns)}")
    sent = sum(step.sent for step in counted)
    in_time = sum(step.in_time for step in counted)
    return Window(sent, sent - in_time, tuple(reasons))


def _rate(rate: float) -> str:
    return f"{rate:.6g}/s"
