"""How much each model is asked for lately, where *lately* is counted in requests and not in seconds.

Each request adds its weight to its model's score, and all scores fade by the same share with every
request, of any model, so that a model has on average `_SAMPLES` requests in memory whether there are ten
requests a second or ten thousand. Scores are kept inflated instead of faded (the newest request counts
most): between two requests no score changes, nor the order of any two.
"""

from __future__ import annotations

from slosched.core.scheduler.cluster import Cluster
from slosched.core.scheduler.state import Instance, Request

#: Requests that a model of average popularity has in memory: its rate is known to about a fifth.
_SAMPLES = 10
#: The memory is never shorter than this number of requests.
_LEAST_MEMORY = 200
_TOO_LARGE = 1e100


class Score:
    """The scores of one model; `Popularity.per_ns` turns each into a rate."""

    __slots__ = ("asked", "need", "shortage")

    def __init__(self) -> None:
        self.asked = 0.0  # recent requests
        self.need = 0.0  # the same, each by the share of its SLO that loading first would take
        self.shortage = 0.0  # requests lost for want of another GPU that holds the model


#: The scores of a model without requests.
_NONE = Score()


def cold_ns(model: Instance) -> int:
    """The time of a load and of the exec of one request (above 0)."""
    return max(1, model.weights_ns + model.b1_ns)


class Popularity:
    """The scores of all models, and what one of them is per ns."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._scores: dict[int, Score] = {}  # by model id
        self._unloaded = cluster.changes.follow_unloaded()
        self._unit = 1.0  # what the newest request counts
        self._elapsed = 0.0  # time between requests, ns, counted like these
        self._last_ns = -1

    def asked(self, request: Request, *, now_ns: int) -> None:
        """Count `request` by the share of its time that loading the model first would take."""
        while self._unloaded:
            self._scores.pop(self._unloaded.popitem()[0], None)
        model = request.instance
        score = self._scores.get(model.model_id) or self._score(model)
        needs_ns = model.weights_ns + model.b1_ns or 1  # cold_ns, without the call
        memory = _SAMPLES * len(self._cluster.models)
        unit = self._unit = self._unit * (
            1.0 + 1.0 / (memory if memory > _LEAST_MEMORY else _LEAST_MEMORY)
        )
        if self._last_ns >= 0:
            self._elapsed += unit * (now_ns - self._last_ns)
        else:  # as if the one before had come a load's time earlier
            self._elapsed = unit * needs_ns
        self._last_ns = now_ns
        slo_ns = request.slo_ns
        score.asked += unit
        score.need += unit if slo_ns <= needs_ns else unit * needs_ns / slo_ns
        if unit > _TOO_LARGE:
            self._deflate()

    def short(self, model: Instance) -> None:
        """A request was lost that one more GPU with `model` could have served."""
        self._score(model).shortage += self._unit

    def _score(self, model: Instance) -> Score:
        score = self._scores.get(model.model_id)
        if score is None:
            score = self._scores[model.model_id] = Score()
        return score

    def score(self, model: Instance) -> Score:
        """The scores of `model`, to be read only."""
        return self._scores.get(model.model_id, _NONE)

    def per_ns(self, score: float, now_ns: int) -> float:
        """A score as requests per ns, each by its weight."""
        if score == 0.0:
            return 0.0
        return score / (self._elapsed + self._unit * (now_ns - self._last_ns))

    def _deflate(self) -> None:
        factor = 1.0 / self._unit
        for score in self._scores.values():
            score.asked *= factor
            score.need *= factor
            score.shortage *= factor
        self._elapsed *= factor
        self._unit = 1.0
