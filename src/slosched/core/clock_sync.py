"""How far a worker's clock is from its controller's, from the four times of each heartbeat.

One exchange: the worker sends a heartbeat at `sent_ns` (its clock), the controller receives it and
answers (its clock), the worker receives the answer at `returned_ns` (its clock). If both ways took
equally long, the offset is the mean of the two differences (RFC 5905 §8); if they did not, the error
is at most half the round trip. Queueing only ever adds to a round trip, so the exchange with the
least one in the window is the best, and its half is the bound (Clockwork takes minima likewise).
"""

from __future__ import annotations

from collections import deque

#: `error_ns` before the first exchange: nothing is known.
UNKNOWN_ERROR_NS = 2**62

#: Exchanges that are kept.
WINDOW = 64


class ClockSync:
    """The offset of this clock from a peer's, by minimum delay over the last `window` exchanges."""

    def __init__(self, window: int = WINDOW) -> None:
        self._samples: deque[tuple[int, int]] = deque(maxlen=window)  # (round trip, offset), ns
        self.offset_ns = 0
        self.error_ns = UNKNOWN_ERROR_NS

    @property
    def synchronised(self) -> bool:
        return bool(self._samples)

    def add(self, *, sent_ns: int, received_ns: int, answered_ns: int, returned_ns: int) -> bool:
        """Take one exchange: `sent_ns` and `returned_ns` on our clock, the others on the peer's.

        Afterwards `offset_ns` is what to add to a time of the peer to get one of ours, and `error_ns`
        bounds its error. Returns False, and changes nothing, for an impossible exchange.
        """
        round_trip_ns = (returned_ns - sent_ns) - (answered_ns - received_ns)
        if round_trip_ns < 0 or answered_ns < received_ns:
            return False
        offset_ns = ((sent_ns - received_ns) + (returned_ns - answered_ns)) // 2
        self._samples.append((round_trip_ns, offset_ns))
        least = self._samples[0]
        for sample in self._samples:
            if sample[0] <= least[0]:  # of equals the newest: clocks drift
                least = sample
        self.error_ns = (least[0] + 1) // 2
        self.offset_ns = least[1]
        return True

    def to_local_ns(self, peer_ns: int) -> int:
        """A time of the peer on our clock; never below 0."""
        return max(0, peer_ns + self.offset_ns)

    def to_peer_ns(self, local_ns: int) -> int:
        """A time of ours on the peer's clock; never below 0."""
        return max(0, local_ns - self.offset_ns)
