"""How long requests are, for models with a dimension that varies: log-normal lengths within bounds."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, log

from slosched.errors import InvalidConfig
from slosched.workloads.values import read_count, read_positive

_FORM = "MEDIAN~SIGMA~LEAST~MOST, as 60~1~5~512"
_MOST = 1_000_000
#: Added to a stream's seed for its lengths: beyond every stream's own, and its bursts'.
_LENGTH_SEEDS = 1 << 97
#: What lies outside the bounds is drawn again, this often at most; the nearest bound then.
_TRIES = 100


@dataclass(frozen=True, slots=True)
class Lengths:
    """Whole lengths within `least`..`most` whose logarithms are normal: mean ln(`median`), deviation `sigma`.

    So most are short and few are long, as texts are. Raises InvalidConfig for numbers that cannot be.
    """

    median: float
    sigma: float
    least: int
    most: int

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most <= _MOST:
            raise InvalidConfig(
                f"lengths must be within 1..{_MOST}, the least before the most, not {self.least} and "
                f"{self.most}"
            )
        if not self.least <= self.median <= self.most:
            raise InvalidConfig(
                f"the median length must be within {self.least}..{self.most}, not {self.median:g}"
            )
        if not (0 <= self.sigma <= 10 and isfinite(self.sigma)):
            raise InvalidConfig(f"sigma of lengths must be within 0..10, not {self.sigma:g}")

    def draws(self, seed: int) -> Iterator[int]:
        """Endless lengths, the same for the same seed."""
        generator = random.Random(_LENGTH_SEEDS + seed)
        middle, least, most = log(self.median), self.least, self.most
        while True:
            for _ in range(_TRIES):
                length = round(generator.lognormvariate(middle, self.sigma))
                if least <= length <= most:
                    break
            yield min(max(length, least), most)

    @property
    def text(self) -> str:
        """As it is written on the command line."""
        return f"{self.median:g}~{self.sigma:g}~{self.least}~{self.most}"


def read_lengths(name: str, text: str) -> Lengths:
    """Lengths as MEDIAN~SIGMA~LEAST~MOST say them."""
    parts = text.split("~")
    if len(parts) != 4:
        raise InvalidConfig(f"{name} must be {_FORM}, not {text!r}")
    median, sigma = (read_positive(name, part) for part in parts[:2])
    least, most = (read_count(name, part, high=_MOST) for part in parts[2:])
    return Lengths(median, sigma, least, most)
