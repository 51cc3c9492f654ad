"""Recent losses: how many requests were lost lately, and what those were worth."""

from __future__ import annotations

from slosched.core.scheduler.state import Request

#: Weight of one request in the moving averages.
_LOSS_WEIGHT = 0.012


class Losses:
    """Moving averages over the requests that were served or lost."""

    def __init__(self) -> None:
        self.share = 0.0  # of lost requests
        self.unit = 1.0  # the average weight of lost requests, which counts as 1

    def lost(self, request: Request) -> None:
        """`request` is refused or given up."""
        self.share += _LOSS_WEIGHT * (1.0 - self.share)
        if request.weight != self.unit:
            self.unit += _LOSS_WEIGHT * (request.weight - self.unit)

    def served(self, count: int) -> None:
        """`count` requests were given a GPU."""
        self.share *= (1.0 - _LOSS_WEIGHT) ** count
