"""Which requests are cold: one rule for every system, so that each gets the same cold requests.

The original counts in each container: request i is cold if i % K == 0, and the first one is. The counter
here is the sender's: request n of a run belongs to instance n mod N, and is its request n div N. So a
scheduler knows beforehand which requests are cold, and which process answers them is the system's affair.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, field

from slosched.errors import InvalidConfig

_EVERY = re.compile(r"(?:every:)?(\d+)")
_RATIO = re.compile(r"(?:ratio:)?(\d+(?:\.\d+)?)(%?)")
NEVER = "none"


@dataclass(kw_only=True)
class ColdRule:
    """`every` K-th request of each instance (0: none), a `ratio` of all drawn from a seed, or each user's
    first.

    Made by `cold_rule`. Each run of a load begins with a new one.
    """

    name: str
    every: int = 0
    ratio: float = 0.0
    users_first: bool = False
    instances: int = 1
    seed: int = 0
    _seen: set[int] = field(default_factory=set)

    def is_cold(self, number: int, user: int) -> bool:
        """Whether request `number` of `user` is cold. To be asked once for each request."""
        if self.users_first:
            first = user not in self._seen
            self._seen.add(user)
            return first
        if self.every:
            return number // self.instances % self.every == 0
        return self.ratio > 0 and _source(self.seed, "cold", number).random() < self.ratio

    @property
    def interval(self) -> int:
        """K, as the original names its runs; of a ratio its reciprocal, and 0 without cold requests."""
        return self.every or (round(1 / self.ratio) if self.ratio else 0)

    @property
    def share(self) -> float | None:
        """The share of cold requests that it stands for; None where users decide."""
        if self.users_first:
            return None
        return 1 / self.every if self.every else self.ratio


def cold_rule(text: str, *, instances: int, seed: int) -> ColdRule:
    """The rule that `text` writes: none, user, every:5 (or 5), ratio:0.2 (or 20%). Raises InvalidConfig."""
    text = text.strip()
    if text in (NEVER, "0", "0%"):
        return ColdRule(name=NEVER)
    if text == "user":
        return ColdRule(name=text, users_first=True)
    if match := _EVERY.fullmatch(text):
        if not int(match[1]):
            return ColdRule(name=NEVER)
        return ColdRule(name=f"every:{int(match[1])}", every=int(match[1]), instances=instances)
    if (match := _RATIO.fullmatch(text)) and (match[2] or text.startswith("ratio:")):
        ratio = float(match[1]) / (100 if match[2] else 1)
        if 0 < ratio <= 1:
            return ColdRule(name=f"{100 * ratio:g}%", ratio=ratio, seed=seed)
    raise InvalidConfig(
        f"{text!r} does not say which requests are cold: none, user, every:5 for each fifth, or 20% of all"
    )


def container_pause_ns(seed: int, number: int, mean_ns: int) -> int:
    """What the emulated start of a container takes for request `number`: normal, with a deviation of half of
    the mean, and not below 0, as the original sleeps."""
    return max(0, round(_source(seed, "container", number).gauss(1.0, 0.5) * mean_ns))


def _source(seed: int, purpose: str, number: int) -> random.Random:
    """A source for one request: what is drawn for it does not depend on the others."""
    return random.Random(f"{seed} {purpose} {number}")
