"""How far a worker's clock is from its controller's, from the four times of each heartbeat.

One exchange: the worker sends a heartbeat at `sent_ns` (its clock), the controller receives it and
answers (its clock), the worker receives the answer at `returned_ns` (its clock). If both ways took
equally long, the offset is the mean of the two differences (RFC 5905 §8); if they did not, the error
is at most half the round trip. Queueing only ever adds to a round trip, so the exchange with the
least one is the best, and its half is the bound (Clockwork takes minima likewise).

Clocks drift, so a bound grows with the age of its exchange, by `DRIFT_PPM` (RFC 5905's PHI, for a
cheaper crystal): a slower exchange of now can be better than the quickest one of ten seconds ago. And
clocks are set: an exchange that contradicts the ones before it, bounds and all, ends their use. What is
stated as the error allows for a clock that is slewed (SLEW_PPM), as NTP does after a step of its own.
"""

from __future__ import annotations

from collections import deque

#: `error_ns` before the first exchange: nothing is known.
UNKNOWN_ERROR_NS = 2**62

#: Exchanges that are kept.
WINDOW = 64

#: How fast two clocks are trusted to part, in millionths.
DRIFT_PPM = 50
#: How fast they may part while one is slewed, in millionths (adjtime's and NTP's limit).
SLEW_PPM = 500


class ClockSync:
    """The offset of this clock from a peer's, by the least bound over the last `window` exchanges."""

    def __init__(self, window: int = WINDOW) -> None:
        #: (half the round trip, offset, when on our clock), ns
        self._samples: deque[tuple[int, int, int]] = deque(maxlen=window)
        self.offset_ns = 0
        self.error_ns = UNKNOWN_ERROR_NS
        self._bound_ns = UNKNOWN_ERROR_NS  # of the same exchange, if no clock is slewed

    @property
    def synchronised(self) -> bool:
        return bool(self._samples)

    def add(self, *, sent_ns: int, received_ns: int, answered_ns: int, returned_ns: int) -> bool:
        """Take one exchange: `sent_ns` and `returned_ns` on our clock, the others on the peer's.

        Afterwards `offset_ns` is the number to add to a time of the peer to get a local one, and `error_ns`
        bounds its error. Returns False, and changes nothing, for an impossible exchange.
        """
        round_trip_ns = (returned_ns - sent_ns) - (answered_ns - received_ns)
        if round_trip_ns < 0 or answered_ns < received_ns:
            return False
        offset_ns = ((sent_ns - received_ns) + (returned_ns - answered_ns)) // 2
        half_ns = (round_trip_ns + 1) // 2
        if self._samples:
            # The offset that was in use, as it should be by now if neither clock was set.
            _, used_ns, used_at_ns = self._best(returned_ns)
            bound_ns = self._bound_ns + half_ns
            if returned_ns < used_at_ns or abs(offset_ns - used_ns) > bound_ns:
                self._samples.clear()
        self._samples.append((half_ns, offset_ns, returned_ns))
        _, self.offset_ns, _ = self._best(returned_ns)
        return True

    def _best(self, now_ns: int) -> tuple[int, int, int]:
        """The exchange with the least bound at `now_ns`, which `error_ns` is made of."""
        best = self._samples[0]
        least_ns = UNKNOWN_ERROR_NS
        for sample in self._samples:
            bound_ns = sample[0] + (now_ns - sample[2]) * DRIFT_PPM // 1_000_000
            if bound_ns <= least_ns:  # of equals the newest
                best, least_ns = sample, bound_ns
        self._bound_ns = least_ns
        self.error_ns = best[0] + (now_ns - best[2]) * SLEW_PPM // 1_000_000
        return best

    def to_local_ns(self, peer_ns: int) -> int:
        """A time of the peer on our clock; never below 0."""
        return max(0, peer_ns + self.offset_ns)

    def to_peer_ns(self, local_ns: int) -> int:
        """A local time on the peer's clock; never below 0."""
        return max(0, local_ns - self.offset_ns)
