"""How early an answer must leave to be in time at its client, where the SLO counts from the client's send.

The client tells what it saw of earlier requests: the time from its send to the receipt of the answer, less
the answer's time here. That is the latency of the request to this controller and of the answer back,
together. Only their sum is needed, so no clock need be shared. The forecast is the median of the latest ones
(estimators.py): in the simulator, with jitter, a higher percentile refuses more requests than it saves.
"""

from __future__ import annotations

from slosched.core.scheduler.estimators import WindowEstimator

#: Requests whose latency is kept.
_WINDOW = 200
#: At most this part of an SLO is left for the network: a client further away is served as well as it can be.
_MOST_OF_SLO = 0.5


class ClientLatency:
    """The forecast of one client's two network latencies together, in ns. 0 until it has told one."""

    __slots__ = ("_estimator",)

    def __init__(self) -> None:
        self._estimator: WindowEstimator | None = None

    def learn(self, round_trip_ns: int) -> None:
        """Take what the client saw of one request."""
        if self._estimator is None:
            self._estimator = WindowEstimator(round_trip_ns, window=_WINDOW, seed_weight=1)
        else:
            self._estimator.add(round_trip_ns)

    def early_ns(self, slo_ns: int) -> int:
        """How long before the SLO's end an answer must leave."""
        if self._estimator is None:
            return 0
        return min(self._estimator.expected_ns, round(slo_ns * _MOST_OF_SLO))
