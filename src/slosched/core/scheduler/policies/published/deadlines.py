"""The deadlines that the published schedulers plan by (OSDI'20 §5.3; reference code, `set_slo`)."""

from __future__ import annotations

from slosched.units import NS_PER_MS

#: Everything is planned to end this much before the client's deadline ...
BUFFER_NS = 5 * NS_PER_MS
#: ... and weights are asked for no more than this ahead.
_MAX_LOADWEIGHTS_SLO_NS = 25 * NS_PER_MS


def internal_slos_ns(
    slo_ns: int, *, single_ns: int, transfer_ns: int, ahead_ns: int
) -> tuple[int, int]:
    """Return how long after its arrival a request must be done, and its weights be there, in ns.

    `single_ns` and `transfer_ns` are what batch 1 and the weights of its model are expected to take.
    Neither result is ever below `ahead_ns` + 5 ms, however short the SLO is.
    """
    floor_ns = ahead_ns + BUFFER_NS
    exec_slo_ns = slo_ns - BUFFER_NS if slo_ns >= BUFFER_NS else slo_ns
    rest_ns = slo_ns - (transfer_ns + single_ns + floor_ns)
    weights_slo_ns = min(_MAX_LOADWEIGHTS_SLO_NS, rest_ns if rest_ns >= 0 else slo_ns)
    return max(exec_slo_ns, floor_ns), max(weights_slo_ns, floor_ns)
