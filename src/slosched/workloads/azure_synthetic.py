"""A synthetic trace in the form and with the statistics of the Azure Functions data set.

The data set is a download of its own; this stands for it where it is not at hand. What it keeps of
it (Shahrad et al., "Serverless in the Wild", USENIX ATC'20):

- popularity: rates are log-normal through the two published points, 45 % of functions invoked at most
  once an hour and 81 % at most once a minute. So a few functions have nearly all calls. The tail is
  bent so that the mean is `PER_ROW_PER_MINUTE`: at Clockwork's scale for `azure 8` the 18,000
  functions send 9,600 requests/s, about what its paper reports.
- a day: each function swings by up to half, with its peak in the afternoon.
- bursts: a quarter of those that are not hot are on for minutes and off for longer.
- timers: a fifth of the rare functions fire every 1, 5, 15, ... minutes, half of them at full hours.

Drawn from numpy's legacy generator, whose streams are frozen: a seed gives the same bytes always.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from statistics import NormalDist
from typing import Any

from slosched.errors import InvalidConfig, OutputExists
from slosched.output_files import check_not_stdout, new_file
from slosched.workloads.azure_trace import (
    DAY_MINUTES,
    LEADING_COLUMNS,
    Counts,
    Trace,
    file_name,
    ordered,
)

#: Mean invocations of a function in a minute: 18,000 functions at 9,600/s.
PER_ROW_PER_MINUTE = 32.0
MAX_ROWS = 1_000_000
#: log10 of calls per minute: 45 % at most 1/60, 81 % at most 1.
_LOG_MEAN, _LOG_SIGMA = -1.555, 1.771
#: Beyond this many calls a minute a function is neither a timer nor bursty.
_HOT_PER_MINUTE = 600.0
_TIMER_SHARE, _BURSTY_SHARE = 0.2, 0.25
_TIMER_MINUTES = (1, 5, 10, 15, 30, 60, 120, 240, 480, 1440)
_PEAK_MINUTE, _PEAK_SIGMA = 14 * 60, 180.0
#: Shares of the triggers other than timers.
_TRIGGERS = {"http": 0.65, "queue": 0.18, "event": 0.03, "orchestration": 0.08, "storage": 0.03}


def popularity(rows: int) -> list[float]:
    """Mean calls per minute of each function, the most popular first; their mean is 32.

    Quantiles of the log-normal, not draws, so that traces of one size have one popularity. Where it
    would exceed the mean, x becomes x / (1 + x / bend); a few rows, whose quantiles end too soon,
    are all raised instead.
    """
    normal = NormalDist(_LOG_MEAN, _LOG_SIGMA)
    raw = [10 ** normal.inv_cdf(1 - (i + 0.5) / rows) for i in range(rows)]
    target = PER_ROW_PER_MINUTE * rows
    total = math.fsum(raw)
    if total <= target:
        return [rate * target / total for rate in raw]
    low, high = 1e-6, 1e12
    for _ in range(60):
        bend = math.sqrt(low * high)
        if math.fsum(rate / (1 + rate / bend) for rate in raw) < target:
            low = bend
        else:
            high = bend
    return [rate / (1 + rate / high) for rate in raw]


def synthetic_rows(*, rows: int, minutes: int, seed: int) -> Iterator[tuple[str, Counts]]:
    """The (trigger, counts by minute) of each function, in the file's order, made one by one.

    `minutes` begin at midnight. Raises InvalidConfig for rows, minutes or a seed out of range, at once.
    """
    if not 1 <= rows <= MAX_ROWS:
        raise InvalidConfig(f"rows must be within 1..{MAX_ROWS}, not {rows}")
    if not 1 <= minutes <= DAY_MINUTES:
        raise InvalidConfig(f"minutes must be within 1..{DAY_MINUTES}, not {minutes}")
    if not 0 <= seed < 2**32:
        raise InvalidConfig(f"the seed must be within 0..{2**32 - 1}, not {seed}")
    return _made(rows, minutes, seed)


def _made(rows: int, minutes: int, seed: int) -> Iterator[tuple[str, Counts]]:
    import numpy as np

    draws = np.random.RandomState(seed)
    day = _Day(np, minutes)
    rates = popularity(rows)
    for place in draws.permutation(rows).tolist():
        rate = rates[place]
        kind, trigger = draws.random_sample(2).tolist()
        if rate <= 1.0 and kind < _TIMER_SHARE:
            yield "timer", packed(day.timer(draws, rate))
            continue
        rises = day.diurnal(draws)
        if rate <= _HOT_PER_MINUTE and kind > 1 - _BURSTY_SHARE:
            rises *= day.on_off(draws)
        yield _trigger(trigger), packed(day.counts(draws, rate, rises))


def _trigger(draw: float) -> str:
    for name, share in _TRIGGERS.items():
        draw -= share
        if draw < 0:
            return name
    return "others"


def packed(counts: Any) -> Counts:
    """A numpy array of counts as `compact` would hold them."""
    highest = int(counts.max())
    code = "B" if highest < 1 << 8 else "H" if highest < 1 << 16 else "I"
    row: Counts = array(code)
    row.frombytes(counts.astype(f"u{row.itemsize}").tobytes())
    return row


class _Day:
    """What the minutes of one trace have in common, and the shapes of functions over them."""

    def __init__(self, np: Any, minutes: int) -> None:
        self._np = np
        self._minutes = minutes
        turn = 2 * np.pi * np.arange(minutes) / DAY_MINUTES
        self._cos, self._sin = np.cos(turn), np.sin(turn)

    def diurnal(self, draws: Any) -> Any:
        """A day's swing by minute, around 1."""
        swing = 0.5 * draws.random_sample()
        peak = 2 * math.pi * (_PEAK_MINUTE + _PEAK_SIGMA * draws.standard_normal()) / DAY_MINUTES
        return 1 + (swing * math.cos(peak)) * self._cos + (swing * math.sin(peak)) * self._sin

    def on_off(self, draws: Any) -> Any:
        """1 while on, 0 while off: on for 5 to 60 minutes, off for 1 to 20 times as long."""
        on_mean = 5 + 55 * draws.random_sample()
        off_mean = on_mean * (1 + 19 * draws.random_sample())
        states = self._np.zeros(self._minutes)
        at = -off_mean * draws.random_sample()
        while at < self._minutes:
            end = at + max(1.0, draws.exponential(on_mean))
            states[max(0, int(at)) : max(0, int(end))] = 1
            at = end + max(1.0, draws.exponential(off_mean))
        return states

    def counts(self, draws: Any, rate: float, rises: Any) -> Any:
        """Poisson counts of mean `rate` a minute over the trace, risen and fallen by `rises`."""
        np, minutes = self._np, self._minutes
        total = rises.sum()
        if total <= 0:  # never on within this few minutes
            rises, total = np.ones(minutes), float(minutes)
        if rate > 1.0:
            return draws.poisson(rises * (rate * minutes / total))
        # The same law with fewer draws: a Poisson total, each call at a minute of its own.
        calls = draws.random_sample(draws.poisson(rate * minutes)) * total
        at = np.minimum(np.searchsorted(np.cumsum(rises), calls, side="right"), minutes - 1)
        return np.bincount(at, minlength=minutes)

    def timer(self, draws: Any, rate: float) -> Any:
        """One call per period: the usual number of minutes that is nearest to 1 / `rate`."""
        period = min(_TIMER_MINUTES, key=lambda p: abs(math.log(p * rate)))
        phase = int(draws.randint(period)) if draws.random_sample() < 0.5 else 0
        counts = self._np.zeros(self._minutes, dtype=int)
        counts[phase::period] = 1
        return counts


def synthetic_trace(*, rows: int, minutes: int, seed: int) -> Trace:
    """The trace as reading its file gives it. Raises what synthetic_rows raises."""
    return ordered(counts for _, counts in synthetic_rows(rows=rows, minutes=minutes, seed=seed))


def write_trace(directory: Path, number: int, *, rows: int, minutes: int, seed: int) -> Path:
    """Write the trace as file `number` of the data set; return its path. The bytes follow the seed.

    It has its name only when it is whole: an error or Ctrl-C leaves nothing, the directory aside that was
    there. Raises InvalidConfig if the directory cannot be written, OutputExists if the file is there.
    """
    path = directory / file_name(number)
    made = synthetic_rows(rows=rows, minutes=minutes, seed=seed)
    check_not_stdout(directory)
    if path.exists():
        raise OutputExists(f"{path} exists and is not overwritten; choose another --out")
    new = [folder for folder in (directory, *directory.parents) if not folder.exists()]
    try:
        with new_file(path, replacing=False) as file:
            header = [*LEADING_COLUMNS, *(str(minute) for minute in range(1, minutes + 1))]
            file.write((",".join(header) + "\n").encode("ascii"))
            for index, (trigger, counts) in enumerate(made):
                hashes = [_hash(kind, seed, index) for kind in ("owner", "app", "function")]
                row = ",".join([*hashes, trigger, *map(str, counts)]) + "\n"
                file.write(row.encode("ascii"))
    finally:
        for folder in new:  # one that holds the file, or something else, stays
            with suppress(OSError):
                folder.rmdir()
    return path


def _hash(kind: str, seed: int, index: int) -> str:
    return hashlib.sha256(f"{kind}/{seed}/{index}".encode()).hexdigest()
