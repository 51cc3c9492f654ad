"""The network between client, controller and workers: latency, jitter, bandwidth, order.

A message leaves its host through that host's one network card, which sends one after the other at
`bandwidth_bits_per_s`; it then takes the latency of its direction, and a random jitter on top. Messages of one
connection never overtake each other (ZeroMQ over TCP): one that would, arrives with the one before it.
What is not modelled: loss and retransmission (see faults), packets of several connections taking turns
on a card, and a card that receives more than it can take.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from random import Random
from typing import Any

from slosched.errors import InvalidConfig
from slosched.field_types import check_types
from slosched.sim.kernel import Kernel
from slosched.units import NS_PER_S

#: What a message without tensors is counted as, with the headers of TCP and IP: most are 60 to 150 bytes.
SMALL_MESSAGE_BYTES = 200

#: The exponential jitter is cut here, in means: 1 of 500 million draws is longer.
_JITTER_CUT = 20.0


@dataclass(frozen=True)
class Network:
    """One-way delays (ns), the mean of the random part of each (ns), and the cards' speed.

    Jitter is exponential with mean `jitter_ns`, drawn for each message. A way with a `spread` has a random
    part drawn from that instead: evenly spaced quantiles, ns, from the least to the greatest, as a live run
    shows them. `bandwidth_bits_per_s` 0: sending takes no time. Raises InvalidConfig for values below 0,
    and for a spread of one value or one that decreases.
    """

    to_worker_ns: int = 200_000
    from_worker_ns: int = 200_000
    from_client_ns: int = 200_000
    to_client_ns: int = 200_000
    jitter_ns: int = 0
    bandwidth_bits_per_s: int = 0
    to_worker_spread_ns: tuple[int, ...] = ()
    from_worker_spread_ns: tuple[int, ...] = ()
    from_client_spread_ns: tuple[int, ...] = ()
    to_client_spread_ns: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_types(self)
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, tuple):
                if value < 0:
                    raise InvalidConfig(f"network: {field.name} must be at least 0, not {value}")
            elif value and (len(value) < 2 or value[0] < 0 or list(value) != sorted(value)):
                raise InvalidConfig(
                    f"network: {field.name} must be two or more quantiles from 0 on that never decrease"
                )

    @property
    def random(self) -> bool:
        """True if what a message takes depends on chance."""
        spreads = (
            self.to_worker_spread_ns,
            self.from_worker_spread_ns,
            self.from_client_spread_ns,
            self.to_client_spread_ns,
        )
        return bool(self.jitter_ns) or any(spreads)


class Card:
    """A host's network card: what it still has to send delays what comes after."""

    __slots__ = ("_bits_per_s", "_free_ns")

    def __init__(self, bits_per_s: int) -> None:
        self._bits_per_s = bits_per_s
        self._free_ns = 0

    def sent_ns(self, size_bytes: int, *, now_ns: int) -> int:
        """When the last bit of a message handed over now is out."""
        begin_ns = self._free_ns if self._free_ns > now_ns else now_ns
        if self._bits_per_s:
            begin_ns += size_bytes * 8 * NS_PER_S // self._bits_per_s
        self._free_ns = begin_ns
        return begin_ns


class Wire:
    """One direction of one connection: `send` calls `deliver(message)` when the message arrives.

    `disturb`, where it is set, is asked about each message and returns a delay for every copy that
    arrives: () loses it, (0,) is as usual, (0, 5_000_000) delivers it twice. What follows a late one
    waits behind it; only second copies overtake, as what is sent again after a reconnect may.
    """

    __slots__ = (
        "_card",
        "_deliver",
        "_jitter_ns",
        "_kernel",
        "_last_ns",
        "_latency_ns",
        "_plain",
        "_random",
        "_spread_ns",
        "bytes_sent",
        "disturb",
        "messages_sent",
    )

    def __init__(
        self,
        kernel: Kernel,
        deliver: Callable[[Any], None],
        *,
        latency_ns: int,
        jitter_ns: int,
        card: Card | None,
        seed: int,
        spread_ns: tuple[int, ...] = (),
    ) -> None:
        self._kernel = kernel
        self._deliver = deliver
        self._spread_ns = spread_ns
        self._latency_ns = latency_ns
        self._jitter_ns = jitter_ns
        self._card = card
        self._plain = not jitter_ns and not spread_ns and card is None
        self._random = Random(seed).random
        self._last_ns = 0
        self.disturb: Callable[[Any], tuple[int, ...]] | None = None
        self.messages_sent = 0
        self.bytes_sent = 0

    def send(self, message: Any, size_bytes: int = SMALL_MESSAGE_BYTES) -> None:
        """Hand `message` to the card now."""
        self.messages_sent += 1
        self.bytes_sent += size_bytes
        kernel = self._kernel
        if self.disturb is not None:
            self._send_disturbed(message, size_bytes, self.disturb(message))
        elif self._plain:
            kernel.at(kernel.now_ns + self._latency_ns, self._deliver, message)
        else:
            kernel.at(self._arrival_ns(size_bytes), self._deliver, message)

    def _arrival_ns(self, size_bytes: int, late_ns: int = 0) -> int:
        at_ns = self._kernel.now_ns
        if self._card is not None:
            at_ns = self._card.sent_ns(size_bytes, now_ns=at_ns)
        at_ns += self._latency_ns + late_ns
        if self._spread_ns:
            at_ns += self._drawn_ns()
        elif self._jitter_ns:
            draw = min(-math.log(1.0 - self._random()), _JITTER_CUT)
            at_ns += int(self._jitter_ns * draw)
        if at_ns < self._last_ns:
            return self._last_ns
        self._last_ns = at_ns
        return at_ns

    def _drawn_ns(self) -> int:
        """A draw from the spread: linear between neighbouring quantiles."""
        spread_ns = self._spread_ns
        place = self._random() * (len(spread_ns) - 1)
        low = int(place)
        below_ns = spread_ns[low]
        return below_ns + int((spread_ns[low + 1] - below_ns) * (place - low))

    def _send_disturbed(self, message: Any, size_bytes: int, delays_ns: tuple[int, ...]) -> None:
        first_ns = delays_ns[0] if delays_ns else 0
        at_ns = self._arrival_ns(size_bytes, first_ns)
        for delay_ns in delays_ns:
            self._kernel.at(at_ns + delay_ns - first_ns, self._deliver, message)
