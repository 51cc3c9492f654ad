"""Which requests the heavy program answers, by four rules, and what quality and cost come of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slosched.cascade.digits.frechet import Labelled, Matrix, Normal, bootstrap_error, frechet
from slosched.cascade.digits.served import Floats, Ints, Served

Mask = npt.NDArray[np.bool_]  # of requests: True, the heavy program answers

#: Heavy shares at which each rule is measured.
SHARES = tuple(step / 10 for step in range(11))
#: What share of all requests the greedy oracle moves at a time.
_GREEDY_PART = 0.02

JUDGE, RANDOM, ERROR_ORACLE, GREEDY_ORACLE = "judge", "random", "oracle: error", "oracle: greedy"
RULES = (JUDGE, RANDOM, ERROR_ORACLE, GREEDY_ORACLE)


@dataclass(frozen=True)
class Costs:
    """Exec time of one request, ms: of a full batch, divided by its size."""

    light_ms: float
    heavy_ms: float

    def mean_ms(self, share: float, *, light_first: bool) -> float:
        """The mean of all requests, `share` of which are answered by the heavy program."""
        first = 1.0 if light_first else 1.0 - share
        return first * self.light_ms + share * self.heavy_ms


def order_of(rule: str, served: Served, *, seed: int = 0) -> Ints:
    """The requests in the order in which `rule` gives them to the heavy program.

    judge: the lowest score first. random: by chance. oracle: error: the largest distance, in the classifier's
    features, between the light image and the heavy one of the same request, which needs both. oracle: greedy:
    whatever lowers the Frechet distance to the held-out images the most, which sees the yardstick itself.
    """
    if rule == JUDGE:
        return np.argsort(served.scores, kind="stable")
    if rule == RANDOM:
        return np.random.default_rng(seed).permutation(len(served))
    if rule == ERROR_ORACLE:
        return np.argsort(-light_error(served), kind="stable")
    return _greedy_order(served)


def light_error(served: Served) -> Floats:
    """Distance of the light image to the heavy one of the same request, in the classifier's features."""
    apart = served.light_seen.features - served.heavy_seen.features
    return np.asarray(np.sqrt((apart**2).sum(1)))


def first_of(order: Ints, share: float) -> Mask:
    """The first `share` of `order` as a mask."""
    mask = np.zeros(len(order), bool)
    mask[order[: round(share * len(order))]] = True
    return mask


def mixed(served: Served, mask: Mask) -> Matrix:
    """Features of what is answered."""
    return np.where(mask[:, None], served.heavy_seen.features, served.light_seen.features)


def quality(served: Served, mask: Mask) -> float:
    """The Frechet distance of the answers to the held-out real images."""
    return frechet(mixed(served, mask), served.real.features)


def error_of(served: Served, mask: Mask, *, repeats: int) -> float:
    """The standard error of `quality` by bootstrap."""
    made = Labelled(mixed(served, mask), served.labels)
    return bootstrap_error(made, served.real_labelled, repeats=repeats, seed=0)


def accuracy(served: Served, mask: Mask) -> float:
    """The share of answers that the classifier takes for the digit that was asked for."""
    classes = np.where(mask, served.heavy_seen.classes, served.light_seen.classes)
    return float((classes == served.labels).mean())


def _greedy_order(served: Served) -> Ints:
    """Step by step those whose change is the best by the derivative of the distance."""
    mask = np.zeros(len(served), bool)
    real, part = Normal.of(served.real.features), max(1, round(_GREEDY_PART * len(served)))
    order: list[int] = []
    while len(order) < len(served):
        gain = _gain(served, mask, real)
        gain[mask] = -np.inf
        chosen = np.argsort(-gain, kind="stable")[: min(part, len(served) - len(order))]
        mask[chosen] = True
        order.extend(chosen.tolist())
    return np.array(order, np.int64)


def _gain(served: Served, mask: Mask, real: Normal) -> Floats:
    """By how much the distance falls, to first order, if a request goes to the heavy program (times n).

    With the moments m and C of the answers, the derivative is 2 (m - m') by m, and by C it is
    1 - C'^(1/2) (C'^(1/2) C C'^(1/2))^(-1/2) C'^(1/2).
    """
    now = Normal.of(mixed(served, mask))
    root = _power(real.covariance, 0.5)
    by_covariance = np.eye(len(now.mean)) - root @ _power(root @ now.covariance @ root, -0.5) @ root
    by_mean = 2 * (now.mean - real.mean)

    def part(features: Matrix) -> Floats:
        apart = features - now.mean
        return np.asarray(apart @ by_mean + ((apart @ by_covariance) * apart).sum(1))

    return part(served.light_seen.features) - part(served.heavy_seen.features)


def _power(matrix: Matrix, power: float) -> Matrix:
    values, vectors = np.linalg.eigh(matrix)
    return np.asarray((vectors * values.clip(1e-9) ** power) @ vectors.T)


# ---------------------------------------------------------------------------------- with intervals


@dataclass(frozen=True)
class Difference:
    """A difference of distances, and its 95 % interval."""

    value: float
    low: float
    high: float


def paired_differences(
    served: Served,
    one: Ints,
    others: Sequence[Ints],
    shares: Sequence[float],
    *,
    repeats: int,
    seed: int,
) -> tuple[list[Difference], Difference]:
    """The distance by the order `one` less the mean of that by `others`: at each share, and the mean over them.

    Each bootstrap draws the same requests and real images for all of them, within each class.
    """
    firsts = [mixed(served, first_of(one, share)) for share in shares]
    rests = [[mixed(served, first_of(order, share)) for order in others] for share in shares]

    def values(rows: Ints, real: Matrix) -> Floats:
        target = Normal.of(real)
        return np.array(
            [
                Normal.of(first[rows]).distance(target)
                - np.mean([Normal.of(each[rows]).distance(target) for each in rest])
                for first, rest in zip(firsts, rests, strict=True)
            ]
        )

    random, real = np.random.default_rng(seed), served.real_labelled
    made = Labelled(firsts[0], served.labels)
    found = np.array(
        [values(made.drawn(random), real.features[real.drawn(random)]) for _ in range(repeats)]
    )
    now = values(np.arange(len(served)), real.features)
    at_each = [_difference(*pair) for pair in zip(now, found.T, strict=True)]
    return at_each, _difference(now.mean(), found.mean(1))


def _difference(value: float, found: Floats) -> Difference:
    low, high = np.quantile(found, [0.025, 0.975])
    return Difference(float(value), float(low), float(high))


def auc(high: Floats, low: Floats) -> float:
    """The probability that a number of `high` is above one of `low`; ties count half."""
    both = np.concatenate([high, low])
    _, place, counts = np.unique(both, return_inverse=True, return_counts=True)
    rank = np.cumsum(counts) - (counts - 1) / 2
    total = rank[place[: len(high)]].sum()
    return float((total - len(high) * (len(high) + 1) / 2) / (len(high) * len(low)))


def correlation(a: Floats, b: Floats) -> float:
    """Spearman's, of ranks; 0 where one of both does not vary."""
    ranks = [np.unique(each, return_inverse=True)[1].astype(float) for each in (a, b)]
    if min(each.std() for each in ranks) == 0:
        return 0.0
    return float(np.corrcoef(ranks)[0, 1])
