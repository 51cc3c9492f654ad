"""Measures the cascade of digits: scores, quality of each way to route, and times, as one document.

Every distance is of the same number of answers to the same held-out images: with few of them a Frechet
distance is too large by an amount that falls with their number, so values compare with each other only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slosched.cascade.digits.frechet import Labelled, bootstrap_error, frechet
from slosched.cascade.digits.models import heavy, light
from slosched.cascade.digits.routing import (
    JUDGE,
    RANDOM,
    RULES,
    SHARES,
    Costs,
    accuracy,
    auc,
    correlation,
    error_of,
    first_of,
    light_error,
    order_of,
    paired_differences,
    quality,
)
from slosched.cascade.digits.served import Floats, Ints, Served, exec_times_ns, one_thread, serve
from slosched.units import NS_PER_MS

Show = Callable[[str], None]

#: Requests whose answers are measured.
REQUESTS = 6000
#: Draws of the bootstrap, and how many random orders count as one.
_BOOTSTRAPS = 200
_RANDOM_ORDERS = 10
#: How often the times of the heavy program are measured, which takes seconds.
_HEAVY_REPEATS = 7
#: Batch size of which the cost of a request is a part.
_COST_BATCH = 8
#: Heavy shares at which the judge is compared with chance.
_COMPARED = SHARES[1:-1]
#: Steps of the distribution of scores.
_SCORE_STEPS = 50


def measure(
    count: int = REQUESTS, *, weights: Path | None = None, show: Show = lambda line: None
) -> tuple[dict[str, Any], Served]:
    """Serve `count` requests with both programs; what came of it for JSON, and the answers.

    Raises MissingPackage, InvalidConfig (no weights).
    """
    with one_thread():
        return _measured(count, weights, show)


def _measured(count: int, weights: Path | None, show: Show) -> tuple[dict[str, Any], Served]:
    show("measures the times of both programs")
    times = {
        "light": exec_times_ns(light(weights)),
        "heavy": exec_times_ns(heavy(weights), repeats=_HEAVY_REPEATS),
    }
    show(f"serves {count} requests with both programs")
    served = serve(count, weights=weights)
    show("measures quality")
    orders = {rule: order_of(rule, served) for rule in RULES}
    by_chance = [order_of(RANDOM, served, seed=seed) for seed in range(_RANDOM_ORDERS)]
    costs = Costs(*(times[key][_COST_BATCH] / _COST_BATCH / NS_PER_MS for key in times))
    document = {
        "requests": count,
        "real_images": len(served.real_part),
        "torch": torch.__version__,
        "exec_ns": times,
        "cost_batch": _COST_BATCH,
        "cost_ms": {"light": costs.light_ms, "heavy": costs.heavy_ms},
        "ends": _ends(served),
        "curves": _curves(served, orders, by_chance, costs),
        **_differences(served, orders[JUDGE], by_chance),
        "judge": _judge(served),
        "scores": _distribution(served.scores),
        "score_curves": {
            "light": _distribution(served.scores),
            "heavy": _distribution(served.heavy_scores),
            "real, held out": _distribution(served.real_scores),
        },
    }
    return document, served


def _ends(served: Served) -> dict[str, Any]:
    """Light only, heavy only; and the classifier and the distance for real images themselves."""
    none = np.zeros(len(served), bool)
    ends: dict[str, Any] = {}
    for name, mask in (("light", none), ("heavy", ~none)):
        ends[name] = {
            "frechet": quality(served, mask),
            "error": error_of(served, mask, repeats=_BOOTSTRAPS),
            "accuracy": accuracy(served, mask),
        }
    right = served.real.classes == served.real_part.labels
    learnt = Labelled(served.learnt.features, served.learnt_labels)
    ends["real"] = {
        "frechet": frechet(learnt.features, served.real.features),
        "error": bootstrap_error(learnt, served.real_labelled, repeats=_BOOTSTRAPS, seed=0),
        "images": len(learnt.labels),
        "accuracy": float(right.mean()),
    }
    return ends


def _curves(
    served: Served, orders: dict[str, Ints], by_chance: list[Ints], costs: Costs
) -> dict[str, list[dict[str, float]]]:
    """Each rule's quality at each heavy share; chance is the mean of several orders and runs no light program
    first where the heavy one answers."""
    curves = {}
    for rule, order in orders.items():
        points = []
        for share in SHARES:
            masks = [first_of(each, share) for each in (by_chance if rule == RANDOM else [order])]
            points.append(
                {
                    "heavy_share": share,
                    "frechet": float(np.mean([quality(served, mask) for mask in masks])),
                    "error": error_of(served, masks[0], repeats=_BOOTSTRAPS),
                    "accuracy": float(np.mean([accuracy(served, mask) for mask in masks])),
                    "cost_ms": costs.mean_ms(share, light_first=rule != RANDOM),
                }
            )
        curves[rule] = points
    return curves


def _differences(served: Served, judge: Ints, by_chance: list[Ints]) -> dict[str, Any]:
    """The judge less chance at each share, and the mean over all of them."""
    at_each, mean = paired_differences(
        served, judge, by_chance, _COMPARED, repeats=_BOOTSTRAPS, seed=1
    )
    return {
        "judge_less_random": [
            {"heavy_share": share, **asdict(each)}
            for share, each in zip(_COMPARED, at_each, strict=True)
        ],
        "judge_less_random_mean": asdict(mean),
    }


def _judge(served: Served) -> dict[str, float]:
    """What the scores know: of whether an image is real, of whose it is, and of how good it is."""
    right = (served.light_seen.classes == served.labels).astype(float)
    known = served.scores[right > 0], served.scores[right == 0]
    return {
        "auc_real_light": auc(served.real_scores, served.scores),
        "auc_real_heavy": auc(served.real_scores, served.heavy_scores),
        "auc_heavy_light": auc(served.heavy_scores, served.scores),
        "auc_right_wrong_class": auc(*known) if min(map(len, known)) else float("nan"),
        "wrong_class": float(len(known[1])),
        "correlation_error": correlation(served.scores, light_error(served)),
        "correlation_confidence": correlation(served.scores, served.light_seen.confidence),
        "correlation_heavy_score": correlation(served.scores, served.heavy_scores),
        "median_light": float(np.median(served.scores)),
        "median_heavy": float(np.median(served.heavy_scores)),
        "median_real": float(np.median(served.real_scores)),
    }


def _distribution(scores: Floats) -> dict[str, list[float]]:
    """f(t): the share of scores below t, from 0 to 1."""
    thresholds = [step / _SCORE_STEPS for step in range(_SCORE_STEPS + 1)]
    ordered = np.sort(scores)
    below = np.searchsorted(ordered, thresholds, side="left") / len(ordered)
    return {"thresholds": thresholds, "deferred": [float(each) for each in below]}
