"""What the capacity planner decides: how sure a share is, which number of GPUs to try next, and the verdict.

Pure: nothing is simulated here. Counts come in blocks (a tenth of one seed's run each), because misses
come in bursts: ten requests that were late together say less than ten that were late apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

#: Two-sided 95 % quantile of the normal distribution.
_Z95 = 1.959964
#: A number of GPUs is followed by one half as large again, until one suffices.
_GROWTH = 1.5

INTERVAL = (
    "95 % (two-sided): Wilson's for the pooled share, its size divided by the design effect of the "
    "blocks (at least 1), with Student's quantile for the number of blocks"
)


class Block(NamedTuple):
    """Requests of one block of one run: how many were sent, and how many of them were in time."""

    sent: int
    in_time: int


@dataclass(frozen=True)
class Share:
    """The share of requests in time, pooled over blocks, with its 95 % interval."""

    sent: int
    in_time: int
    low: float
    high: float
    design_effect: float

    @property
    def point(self) -> float:
        """In time / sent."""
        return self.in_time / self.sent if self.sent else 0.0


class Judged(NamedTuple):
    """What the search knows about a number of GPUs: the share that is judged, and its bounds."""

    low: float
    point: float
    high: float


def student95(degrees: int) -> float:
    """The two-sided 95 % quantile of Student's t, within 0.01 from 8 degrees of freedom on.

    Cornish and Fisher's expansion (Abramowitz and Stegun, 26.7.5), three terms.
    """
    z = _Z95
    return (
        z
        + (z**3 + z) / (4 * degrees)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * degrees**3)
    )


def share_of(blocks: Sequence[Block]) -> Share:
    """Pool `blocks`, of which there are two or more; INTERVAL says how the bounds come about."""
    sent = sum(block.sent for block in blocks)
    in_time = sum(block.in_time for block in blocks)
    if not sent:
        return Share(0, 0, 0.0, 1.0, 1.0)
    count = len(blocks)
    share = in_time / sent
    effect = 1.0
    if 0 < in_time < sent:
        # The variance of a ratio over clusters, against that of as many independent requests.
        spread = math.fsum((block.in_time - share * block.sent) ** 2 for block in blocks)
        effect = max(1.0, count / (count - 1) * spread / (sent * share * (1 - share)))
    low, high = wilson(share, sent / effect, student95(count - 1))
    return Share(sent, in_time, low, high, effect)


def wilson(share: float, size: float, z: float) -> tuple[float, float]:
    """Wilson's interval of a share out of `size` independent requests (which need not be whole)."""
    centre = share + z * z / (2 * size)
    half = z * math.sqrt(share * (1 - share) / size + z * z / (4 * size * size))
    scale = 1 + z * z / size
    # At a share of 0 or 1 the bound is exact; rounding must not pass it.
    low = 0.0 if share == 0 else max(0.0, (centre - half) / scale)
    high = 1.0 if share == 1 else min(1.0, (centre + half) / scale)
    return low, high


def least_requests(target: float, blocks: int) -> int:
    """How many requests it takes to show `target` (below 1) if not one of them misses."""
    z = student95(blocks - 1)
    return math.ceil(z * z * target / (1 - target))


# -------------------------------------------------------------------------------------- search


def next_number(
    known: Mapping[int, Judged], *, low: int, high: int, target: float, guess: int
) -> int | None:
    """The number of GPUs to try next; None when all is known that the verdict needs.

    First the smallest number within `low`..`high` whose lower bound reaches `target` is looked for, up
    from `guess` by half as much again and then by bisection; then the smallest whose point estimate does; then
    the neighbours of the former are looked at, because bisection believes that more GPUs never hurt. If
    none does, and `high` alone was tried, so is a smaller one.
    """
    for bound in ("low", "point"):
        number = _bisect(known, bound, low, high, target, guess)
        if number is not None:
            return number
    found = smallest(known, "low", target)
    if found is None:
        # Whether more GPUs would help shows only beside fewer.
        return max(low, high * 2 // 3) if list(known) == [high] and low < high else None
    return next((n for n in (found - 1, found + 1) if low <= n <= high and n not in known), None)


def smallest(known: Mapping[int, Judged], bound: str, target: float) -> int | None:
    """The smallest number that was tried whose `bound` ("low" or "point") reaches `target`."""
    return min((n for n, judged in known.items() if getattr(judged, bound) >= target), default=None)


def _bisect(
    known: Mapping[int, Judged], bound: str, low: int, high: int, target: float, guess: int
) -> int | None:
    if not known:
        return min(max(guess, low), high)
    enough = smallest(known, bound, target)
    if enough is None:
        most = max(known)
        return None if most >= high else min(high, max(most + 1, int(most * _GROWTH)))
    # Everything that was tried below it fell short.
    short = max((n for n in known if n < enough), default=low - 1)
    return None if enough - short == 1 else (enough + short) // 2


@dataclass(frozen=True)
class Verdict:
    """How many GPUs suffice. None: no number that was tried does.

    `gpus` is the smallest whose lower bound reaches the target, `gpus_by_point` the smallest whose
    point estimate does. `doubts` says where the numbers contradict each other.
    """

    gpus: int | None
    gpus_by_point: int | None
    doubts: tuple[str, ...]


def conclude(known: Mapping[int, Judged], *, low: int, high: int, target: float) -> Verdict:
    """The verdict from the numbers that were tried."""
    gpus = smallest(known, "low", target)
    doubts = []
    if gpus is not None:
        short = [n for n in sorted(known) if n > gpus and known[n].low < target]
        if short:
            doubts.append(
                f"{_list(short)} GPUs fell short although {gpus} sufficed: the target lies within the "
                "noise; take more seeds or a longer duration"
            )
        if gpus == low > 1:
            doubts.append(f"fewer than {low} GPUs were not tried and may suffice")
    worse = [
        (fewer, more)
        for more in sorted(known)
        for fewer in sorted(known)
        if fewer < more and known[fewer].low > known[more].high
    ]
    if worse:
        fewer, more = worse[0]
        doubts.append(
            f"{more} GPUs did worse than {fewer}, beyond what chance explains: this scheduler does not "
            "always gain from more GPUs, and bisection may have missed a smaller number"
        )
    return Verdict(gpus, smallest(known, "point", target), tuple(doubts))


def _list(numbers: Sequence[int]) -> str:
    return ", ".join(str(number) for number in numbers)
