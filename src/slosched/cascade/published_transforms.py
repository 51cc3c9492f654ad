"""What the plotter of DiffServe's artifact does to its logs before it draws them; for `--published` alone.

The results are not what was measured: thresholds are rounded to 0.05, looked up in one cascade's table for
all cascades and scaled to 0..1; the heavy share is divided by its own maximum and shifted by a constant of
each cascade; the two printed averages are of moving averages, so that seconds count alike, whatever their
load.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from slosched.cascade.artifact_logs import query_counts, slo_counts, thresholds
from slosched.cascade.outcome import Outcome
from slosched.cascade_spec import QualityCurve
from slosched.errors import InvalidConfig

#: The rows of the logs that are drawn, and the rows of one point.
_ROWS = 355
CHUNK = 5
#: Moves the light share at which each cascade's FID is read.
_OFFSETS = {"sdturbo": 0.08, "sdxs": 0.04, "sdxlltn": -0.1}
#: f(t) of the cascade sdxs at t = 0, 0.05, 0.1, ...: the table that the plotter takes for every cascade.
_F_OF_T = (0.0, 0.215, 0.321, 0.413, 0.497, 0.616, 0.715, 0.784, 0.846, 0.908, 0.999)
_KEPT = 0.7  # of the smoothed threshold before
_FIT_POINTS = 100

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class PublishedSeries:
    """The three series, each with a point for every 5 rows, and the two averages that are printed."""

    threshold: Floats
    violation_ratio: Floats
    fid: Floats

    @property
    def mean_violation_ratio(self) -> float:
        return float(np.mean(self.violation_ratio))

    @property
    def mean_fid(self) -> float:
        return float(np.mean(self.fid))


def published_series(outcome: Outcome, cascade: str, quality: QualityCurve) -> PublishedSeries:
    """The artifact's series of a run. Raises InvalidConfig for a cascade that the artifact does not have."""
    light, heavy = query_counts(outcome)
    counts = slo_counts(outcome)
    return PublishedSeries(
        threshold=threshold_series(thresholds(outcome)),
        violation_ratio=violation_series(
            (counts["timeout"] + counts["drop"]).tolist(), counts["total"].tolist()
        ),
        fid=fid_series(light.tolist(), heavy.tolist(), cascade, quality),
    )


def threshold_series(per_second: Sequence[float]) -> Floats:
    """Means of 5 rows, rounded to 0.05, through f(t) of sdxs, smoothed, scaled to 0..1.

    A series that never changes stays 0, where the plotter divides 0 by 0.
    """
    means = [float(np.mean(chunk)) for chunk in _chunks(per_second)]
    deferred = [_F_OF_T[place] if (place := round(t * 20)) < len(_F_OF_T) else 1.0 for t in means]
    smoothed = deferred[:1]
    for value in deferred[1:]:
        smoothed.append((1 - _KEPT) * value + _KEPT * smoothed[-1])
    series = np.array(smoothed)
    series -= series.min(initial=np.inf) if len(series) else 0.0
    top = series.max(initial=0.0)
    return series / top if top else series


def violation_series(failed: Sequence[int], total: Sequence[int]) -> Floats:
    """Failed over all requests of each 5 rows, then moving averages of 5 of these."""
    ratios = [
        sum(bad) / (sum(of) or 1) for bad, of in zip(_chunks(failed), _chunks(total), strict=True)
    ]
    return _smoothed(ratios)


def fid_series(
    light: Sequence[int], heavy: Sequence[int], cascade: str, quality: QualityCurve
) -> Floats:
    """Heavy over light requests of each 5 rows, over its maximum; FID from a quadratic fit of the table at
    1 - ratio + offset; then moving averages of 5. A run without heavy requests keeps ratio 0."""
    if cascade not in _OFFSETS:
        raise InvalidConfig(
            f"the artifact draws the cascades {', '.join(_OFFSETS)} and not {cascade!r}; leave --published out"
        )
    pairs = zip(_chunks(light), _chunks(heavy), strict=True)
    ratios = [sum(to_heavy) / sum(to_light) for to_light, to_heavy in pairs if sum(to_light)]
    top = max(ratios, default=0.0) or 1.0
    fitted = np.poly1d(np.polyfit(quality.light_shares, quality.fids, deg=2))
    places = np.linspace(0.0, 1.0, _FIT_POINTS)
    shares = [1 - ratio / top + _OFFSETS[cascade] for ratio in ratios]
    return _smoothed([float(fitted(places[np.abs(places - share).argmin()])) for share in shares])


def _chunks(values: Sequence[float]) -> list[Sequence[float]]:
    values = values[:_ROWS]
    return [values[first : first + CHUNK] for first in range(0, len(values), CHUNK)]


def _smoothed(values: Sequence[float]) -> Floats:
    if not values:
        return np.empty(0)
    if len(values) < CHUNK:  # the artifact's runs are longer; of fewer points there is one mean
        return np.array([float(np.mean(values))])
    return np.convolve(values, np.ones(CHUNK) / CHUNK, mode="valid")
