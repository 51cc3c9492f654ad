"""What a request is worth: the weight of its client times that of its SLO's class, 1 by default.

INFER5 counts a request as its weight over that of the requests that are lost (their moving average): only
ratios of weights matter, and requests that are lost anyway are served as efficiently as without weights.

Clients are not authenticated, so a client's own statement counts only as far as the operator lets it: the first
rule that matches its name, else what it says up to `max_client_weight`.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fnmatch import fnmatchcase
from heapq import nsmallest

from slosched.config import WEIGHT_RANGE, SchedulerConfig, is_weight
from slosched.core.scheduler.state import Client, Request

#: From this share of losses on, weights count in full; without losses they do not matter.
_IN_FULL_AT = 0.1
#: How many requests beyond the batch size are considered when the most valuable ones are chosen.
_LOOKED_AT = 112


class Weights:
    """The rules of one scheduler's configuration. `any` is False where no request can weigh but 1."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._by_client = [(r.client, r.weight) for r in config.weights if r.client]
        self._by_slo = sorted(
            (r.slo_max_ns, place, r.weight)
            for place, r in enumerate(config.weights)
            if r.slo_max_ns
        )
        self._most = config.max_client_weight
        #: With shares, a client's weight does not change the value of its requests.
        self._values = config.client_weights == "value"

    def of_client(self, name: str, asked: float) -> float:
        """The weight of the client `name`, which asks for `asked` (within WEIGHT_RANGE)."""
        for pattern, weight in self._by_client:
            if fnmatchcase(name, pattern):
                return weight
        return min(asked, self._most)

    def of_request(self, client: Client, slo_ns: int) -> float:
        """The weight of a request of `client`; among SLO classes the narrowest that contains it counts."""
        weight = client.weight if self._values else 1.0
        for slo_max_ns, _, class_weight in self._by_slo:
            if slo_ns <= slo_max_ns:
                least, most = WEIGHT_RANGE
                return min(max(weight * class_weight, least), most)
        return weight


def weight_error(weight: float) -> str:
    """Why a client's weight is not accepted; "" if it is."""
    if is_weight(weight):
        return ""
    least, most = WEIGHT_RANGE
    return f"a client's weight must be within {least:g}..{most:g}, not {weight:g}"


class Standing:
    """What INFER5 notes about a request (`Request.policy_data`); a request without has these values.

    Most requests have a value of 1 and are never stepped over, so most requests carry none.
    """

    __slots__ = ("stepped_over", "value")

    def __init__(self) -> None:
        self.value = 1.0  # how many requests of weight 1 it counts as while it is queued
        #: A larger batch was preferred that this request was too old for.
        self.stepped_over = False


def standing_of(request: Request) -> Standing:
    """The request's standing, which is made if it has none."""
    standing: Standing | None = request.policy_data
    if standing is None:
        standing = request.policy_data = Standing()
    return standing


def value_of(request: Request) -> float:
    """How many requests of weight 1 `request` counts as."""
    standing: Standing | None = request.policy_data
    return 1.0 if standing is None else standing.value


def was_stepped_over(request: Request) -> bool:
    """Whether a larger batch was preferred that `request` was too old for."""
    standing: Standing | None = request.policy_data
    return standing is not None and standing.stepped_over


def worth_most(
    queue: Sequence[Request], skipped: int, taken: int, credit_ns: float, loss: float
) -> list[Request]:
    """The `taken` requests behind the first `skipped` that a batch should carry, in the queue's order.

    They are those whose deadline is soonest when each is moved ahead by `credit_ns` times its value, as far
    as values count at this `loss`: what the batch's key gains by it. All of equal value: the first ones.
    """
    stop = min(len(queue), skipped + taken + _LOOKED_AT)
    if stop - skipped == taken:
        return list(queue[skipped:stop])
    ahead_ns = credit_ns * _emphasis(loss)
    places = nsmallest(
        taken,
        range(skipped, stop),
        key=lambda place: queue[place].due_ns - ahead_ns * value_of(queue[place]),
    )
    places.sort()
    return [queue[place] for place in places]


def value_aboard(aboard: Sequence[Request], loss: float) -> float:
    """How many requests of value 1 a batch of `aboard` counts as, at this `loss`."""
    count = len(aboard)
    return count + _emphasis(loss) * (sum(value_of(request) for request in aboard) - count)


def _emphasis(loss: float) -> float:
    """How far values count at this `loss` (the share of requests lost): 0 to 1."""
    return loss / _IN_FULL_AT if loss < _IN_FULL_AT else 1.0


def take_worth_most(
    queue: list[Request], skipped: int, taken: int, credit_ns: float, loss: float
) -> tuple[list[Request], int]:
    """Take `worth_most` out of the queue. Returns them, and the number of skipped requests left before them."""
    requests = worth_most(queue, skipped, taken, credit_ns, loss)
    for request in requests:
        skipped = bisect_left(queue, request)
        del queue[skipped]
    return requests, skipped
