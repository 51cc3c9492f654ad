"""Shares of the GPUs by client, where the operator wants them (`client_weights = "shares"`).

A client's account is the exec time that its requests were given lately, each an equal part of its batch,
over its weight. While requests are being lost, a request of a client whose account stands at the part r of
the highest one counts 1 / r^3 times what it is worth, up to `MAX_FACTOR`: it goes ahead of the others in its
model's queue, and its batch ahead of other models' batches. Clients with lower accounts therefore
catch up with the highest one; in steady state all overloaded clients receive GPU time in proportion to their
weights (weighted max-min fairness), within a few `MEMORY_NS`.

Clients of one name have one account (several processes of one service); those without a name each have
their own. Clients are not authenticated, so a client that uses many names has many accounts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from slosched.core.scheduler.state import Client, Request
from slosched.units import NS_PER_MS, NS_PER_S

MEMORY_NS = NS_PER_S
#: Largest factor: enough for one request to go ahead of any batch of clients that have had their share.
MAX_FACTOR = 64.0
#: Steep, so that a client with little use comes well before clients of nearly equal use.
_STEEPNESS = 3
#: Below this share of lost requests clients do not compete.
_OVERLOADED = 0.02
_LOOK_AGAIN_NS = 20 * NS_PER_MS


class _Account:
    """Exec time given lately, ns, fading; over the weight where it is compared."""

    __slots__ = ("at_ns", "factor", "given_ns", "weight")

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.given_ns = 0.0
        self.at_ns = 0
        self.factor = MAX_FACTOR  # multiplies the weight of its requests

    def level(self, now_ns: int) -> float:
        if self.given_ns:
            self.given_ns *= math.exp((self.at_ns - now_ns) / MEMORY_NS)
        self.at_ns = now_ns
        return self.given_ns / self.weight


class Shares:
    """The accounts of one scheduler's clients."""

    def __init__(self) -> None:
        self._accounts: dict[str | bytes, _Account] = {}
        self._look_again_ns = 0

    def _account(self, client: Client) -> _Account:
        key = client.name or client.identity
        account = self._accounts.get(key)
        if account is None:
            account = self._accounts[key] = _Account(client.weight)
        account.weight = client.weight  # it may have come back with another one
        return account

    def value(self, request: Request, loss: float) -> float:
        """The value of `request` from now on; `loss` is the share of requests lost lately."""
        if loss < _OVERLOADED:
            return request.weight
        return request.weight * self._account(request.client).factor

    def given(self, requests: Sequence[Request], exec_ns: int, *, now_ns: int) -> None:
        """`requests` share one action of `exec_ns`."""
        each_ns = exec_ns / len(requests)
        for request in requests:
            account = self._account(request.client)
            account.level(now_ns)
            account.given_ns += each_ns
        if now_ns >= self._look_again_ns:
            self._look_again_ns = now_ns + _LOOK_AGAIN_NS
            self._compare(now_ns)

    def _compare(self, now_ns: int) -> None:
        """Update all factors, and forget accounts that were given nothing for long."""
        levels = {key: account.level(now_ns) for key, account in self._accounts.items()}
        highest = max(levels.values())
        for key, level in levels.items():
            account = self._accounts[key]
            least = highest / MAX_FACTOR ** (1 / _STEEPNESS)
            account.factor = MAX_FACTOR if level <= least else (highest / level) ** _STEEPNESS
            if account.given_ns < 1.0:
                del self._accounts[key]
