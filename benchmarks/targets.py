"""What the figures are held against: other systems' figures, and the targets of the serving core.

The shares are of all requests sent. Those of the C++ original (Clockwork's published code) are for six
emulated GPUs, 12 copies and profile v100; the peers' are for one emulated GPU of that profile, open
loop, on two cores (their sources say nothing of this machine: compare ratios, not milliseconds).
"""

from __future__ import annotations

from dataclasses import dataclass

#: Rate -> SLO -> share in time of the C++ original.
ORIGINAL: dict[float, dict[str, float]] = {
    600: {"1.5x": 0.747, "2.25x": 0.940, "3.38x": 0.999, "5.06x": 1.0, "7.59x": 1.0},
    1200: {"1.5x": 0.515, "2.25x": 0.823, "3.38x": 0.993, "5.06x": 0.992, "7.59x": 0.997},
    2400: {"1.5x": 0.017, "2.25x": 0.086, "3.38x": 0.439, "5.06x": 0.898, "7.59x": 0.991},
}

#: Rate -> (the first SLO factor it holds for, the least share in time).
SWEEP_TARGETS: dict[float, tuple[float, float]] = {
    600: (3.375, 0.99),
    1200: (3.375, 0.99),
    2400: (7.59, 0.98),
}


@dataclass(frozen=True)
class SingleTarget:
    """One GPU, one model, 600 requests/s. Latencies in ms; None where there is no target."""

    share: float
    peer_share: float
    p50_ms: float | None = None
    p99_ms: float | None = None


#: The best peer (mosec) answers the same load in 14.3 ms (p50) and 27.8 ms (p99), whatever the SLO.
PEER_P50_MS = 14.3
PEER_P99_MS = 27.8
SINGLE_TARGETS = {
    "25ms": SingleTarget(share=0.995, peer_share=0.973, p50_ms=9.0, p99_ms=20.0),
    "10ms": SingleTarget(share=0.78, peer_share=0.157),
}

ISSUE_DELAY_P99_MS = 2.0
INPUTS_SHARE = 0.99
STARTUP_S = 1.0
#: "Flat": the fitted growth over the whole run stays below this share of the resident memory.
MEMORY_GROWTH = 0.02
