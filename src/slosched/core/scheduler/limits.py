"""How much is accepted: from one client and from all together. The rest is answered at once, in words.

Without limits one client's queue could fill the controller's memory, at the expense of all clients.
"""

from __future__ import annotations

from slosched.config import SchedulerConfig
from slosched.core.scheduler.state import Client
from slosched.units import format_duration


class Limits:
    """Holds the requests that wait for their answers, and the bytes of their inputs, against `config`."""

    def __init__(self, config: SchedulerConfig) -> None:
        self._config = config
        self._bytes = 0  # of all clients

    @property
    def input_bytes(self) -> int:
        """Bytes of the inputs of requests that wait for their answers."""
        return self._bytes

    def exceeded(self, client: Client, slo_ns: int, input_bytes: int, *, waiting: int) -> str:
        """Words for why another request of `client` is not taken; empty when it is.

        `waiting` is the number of requests of all clients that have no answer yet.
        """
        config = self._config
        if slo_ns > config.max_slo_ns:
            return (
                f"the SLO of {format_duration(slo_ns)} is above this controller's --max-slo of "
                f"{format_duration(config.max_slo_ns)}"
            )
        if len(client.requests) >= config.max_client_requests:
            return _refusal("this client", len(client.requests), "max-client-requests")
        if waiting >= config.max_requests:
            return _refusal("all clients", waiting, "max-requests")
        if not input_bytes:
            return ""
        if client.input_bytes + input_bytes > config.max_client_bytes:
            return _full("this client", client.input_bytes, "max-client-bytes")
        if self._bytes + input_bytes > config.max_bytes:
            return _full("all clients", self._bytes, "max-bytes")
        return ""

    def took(self, client: Client, input_bytes: int) -> None:
        """Count the input of an accepted request."""
        client.input_bytes += input_bytes
        self._bytes += input_bytes

    def answered(self, client: Client, input_bytes: int) -> None:
        """A request that was counted by `took` is answered."""
        client.input_bytes -= input_bytes
        self._bytes -= input_bytes


def _refusal(who: str, count: int, option: str) -> str:
    return f"{count} requests of {who} wait for their answers already, as many as --{option} allows"


def _full(who: str, held_bytes: int, option: str) -> str:
    return (
        f"inputs of {who} that wait take {held_bytes:,} bytes already, and --{option} allows no more "
        "with this one"
    )
