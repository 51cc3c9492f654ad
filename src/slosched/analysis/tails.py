"""Distributions drawn for their tail: the axis gives each further nine as much room as the last."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_POINTS_PER_NINE = 60
#: Shares that are named in tables.
NAMED = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p99.9": 0.999, "p99.99": 0.9999, "max": 1.0}


def tail(values: NDArray[Any]) -> tuple[list[float], list[float]]:
    """Return (nines, quantiles) of `values`: at n nines the quantile of the share 1 - 10**-n.

    It ends where one value is left above, with the largest. Raises ValueError without values.
    """
    ordered = np.sort(values)
    last = np.log10(len(ordered))
    nines = np.linspace(0, last, int(last * _POINTS_PER_NINE) + 2)
    quantiles = np.quantile(ordered, 1 - 10**-nines)
    quantiles[-1] = ordered[-1]
    return nines.tolist(), quantiles.tolist()


def named_quantiles(values: NDArray[Any]) -> dict[str, float]:
    """Return p50 to the largest value; those that too few values could show are left out."""
    rows = len(values)
    return {
        name: float(np.quantile(values, share))
        for name, share in NAMED.items()
        if rows and (share == 1.0 or rows * (1 - share) >= 0.999)
    }


def tail_axis(ax: Any, most: float) -> None:
    """Make the y axis of `ax` one of nines, from 0 to `most` of them, labelled in percent."""
    from slosched.analysis.style import FixedLocator, FuncFormatter

    ax.set_ylim(0, max(most, 1.0) * 1.02)
    ax.yaxis.set_major_locator(FixedLocator(range(int(most) + 1)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda nines, _: _percent(round(nines))))
    ax.set_ylabel("Percentile")


def _percent(nines: int) -> str:
    return {0: "0", 1: "90", 2: "99"}.get(nines, "99." + "9" * (nines - 2))
