"""How much each model is asked for of late, where *late* is counted in requests and not in seconds.

Each request adds its weight to its model's score, and all scores fade by the same share with every
request of anybody, so that a model has on average `_SAMPLES` requests in memory whether there are ten
requests a second or ten thousand. Scores are kept inflated instead of faded (the newest request counts
most): between two requests no score changes, nor the order of any two.
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Model, Request

#: Requests that a model of average popularity has in memory: its rate is known to about a fifth.
_SAMPLES = 10
#: Fewer models share a memory of so many requests.
_LEAST_MEMORY = 200
_TOO_LARGE = 1e100


class Popularity:
    """Scores of all models (`Model.asked`, `need` and `shortage`) and what one of them is per ns."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._unit = 1.0  # what the newest request counts
        self._elapsed = 0.0  # time between requests, ns, counted like these
        self._last_ns = -1

    def asked(self, request: Request, *, now_ns: int) -> None:
        """Count `request` by the share of its time that loading the model first would take."""
        model = request.model
        cold_ns = model.cold_ns
        memory = _SAMPLES * len(self._cluster.models)
        unit = self._unit = self._unit * (
            1.0 + 1.0 / (memory if memory > _LEAST_MEMORY else _LEAST_MEMORY)
        )
        if self._last_ns >= 0:
            self._elapsed += unit * (now_ns - self._last_ns)
        else:  # as if one had come in the time of a load
            self._elapsed = unit * cold_ns
        self._last_ns = now_ns
        slo_ns = request.slo_ns
        model.asked += unit
        model.need += unit if slo_ns <= cold_ns else unit * cold_ns / slo_ns
        if unit > _TOO_LARGE:
            self._deflate()

    def short(self, model: Model) -> None:
        """A request was lost that one more GPU with `model` could have served."""
        model.shortage += self._unit

    def per_ns(self, score: float, now_ns: int) -> float:
        """A score as requests per ns, each by its weight."""
        if score == 0.0:
            return 0.0
        return score / (self._elapsed + self._unit * (now_ns - self._last_ns))

    def _deflate(self) -> None:
        factor = 1.0 / self._unit
        for model in self._cluster.models.values():
            model.asked *= factor
            model.need *= factor
            model.shortage *= factor
        self._elapsed *= factor
        self._unit = 1.0
