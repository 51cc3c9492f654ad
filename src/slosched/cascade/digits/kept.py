"""Answers that a client kept of a live run, and what they were worth: measured, and held against the
models.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from slosched.cascade.digits.data import Images, load_digits
from slosched.cascade.digits.frechet import Labelled, bootstrap_error, frechet
from slosched.cascade.digits.models import heavy, light
from slosched.cascade.digits.networks import CLASSES
from slosched.cascade.digits.served import Ints, Yardstick, one_thread
from slosched.codes import Verdict
from slosched.errors import InvalidConfig
from slosched.units import NS_PER_MS

_FORCED = (int(Verdict.FORCED), int(Verdict.INSTEAD), int(Verdict.OUTRANKED))
_BOOTSTRAPS = 200
#: The fewest answers of a class that a distance is computed of; features are 24 numbers.
_LEAST = 10
#: Draws of as many answers as the other runs have.
_DRAWS = 20
#: Answers of each program that are computed again.
_CHECKED = 32


@dataclass(frozen=True)
class Kept:
    """A row for each request of a run. `stage` answered: 0 the light program, 1 the heavy one, -1 none."""

    labels: Ints
    seeds: Ints
    met: npt.NDArray[np.bool_]
    stage: Ints
    verdict: Ints
    latency_ns: Ints
    late_ns: Ints
    answers: Images

    def __len__(self) -> int:
        return len(self.labels)


def read_kept(path: Path, labels: Ints, seeds: Ints) -> Kept:
    """What the client wrote, for requests with these labels and seeds, (n,). Raises InvalidConfig."""
    try:
        with np.load(path, allow_pickle=False) as file:
            names = ("met", "stage", "verdict", "latency_ns", "late_ns")
            columns = {name: file[name] for name in names}
            answers = file["output.answer"]
    except (OSError, ValueError, KeyError) as error:
        raise InvalidConfig(f"{path} is not a file of answers ({error})") from None
    return Kept(labels, seeds, answers=answers, **columns)


def worth(runs: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    """What each run came to: violations, shares, latency, and the quality of the answers in time.

    Each distance is of the same number of answers of each class, the fewest that any run has in time: a Frechet
    distance falls with their number, and depends on how many there are of a class. It is the mean of 20 draws.
    Runs with fewer than 10 of a class have none, and do not count for that.
    """
    with one_thread():
        return _worth(runs)


def _worth(runs: Mapping[str, Kept]) -> dict[str, dict[str, Any]]:
    yardstick, real = Yardstick(), load_digits().measure
    held_out = Labelled(yardstick.see(real.ink).features, real.labels)
    fewest = {name: _fewest_of_a_class(run) for name, run in runs.items()}
    common = min((count for count in fewest.values() if count >= _LEAST), default=0)
    found = {}
    for name, run in runs.items():
        document = _counts(run)
        met = np.flatnonzero(run.met)
        if len(met):
            seen = yardstick.see(run.answers[met])
            document["accuracy"] = float((seen.classes == run.labels[met]).mean())
            if fewest[name] >= _LEAST:
                made = Labelled(seen.features, run.labels[met])
                document |= _distance(made, held_out, common)
        found[name] = document | compared(run)
    return found


def _fewest_of_a_class(run: Kept) -> int:
    return int(np.bincount(run.labels[run.met], minlength=CLASSES).min())


def _distance(made: Labelled, held_out: Labelled, of_each: int) -> dict[str, Any]:
    """The mean distance of draws of `of_each` answers of each class, and its error by bootstrap."""
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(_DRAWS):
        parts = [
            random.choice(np.flatnonzero(made.labels == label), of_each, replace=False)
            for label in range(CLASSES)
        ]
        drawn.append(np.concatenate(parts))
    values = [frechet(made.features[rows], held_out.features) for rows in drawn]
    one = Labelled(made.features[drawn[0]], made.labels[drawn[0]])
    return {
        "frechet": float(np.mean(values)),
        "frechet_error": bootstrap_error(one, held_out, repeats=_BOOTSTRAPS, seed=0),
        "frechet_answers": CLASSES * of_each,
    }


def _counts(run: Kept) -> dict[str, Any]:
    answered = run.stage >= 0
    share = (run.stage[answered] == 0).mean() if answered.any() else float("nan")
    waited = run.latency_ns[run.met] / NS_PER_MS
    return {
        "requests": len(run),
        "violations": int((~run.met).sum()),
        "violation_ratio": float((~run.met).mean()),
        "light_share": float(share),
        "forced_share": float(np.isin(run.verdict[answered], _FORCED).mean())
        if answered.any()
        else 0.0,
        "latency_ms": {
            f"p{q}": float(np.percentile(waited, q)) if len(waited) else None for q in (50, 99)
        },
        "send_late_ms_p99": float(np.percentile(run.late_ns, 99) / NS_PER_MS),
    }


def compared(run: Kept) -> dict[str, Any]:
    """Some served answers beside a direct forward of the same program: how many, and the largest
    difference.
    """
    largest, count = 0.0, 0
    for stage, model in enumerate((light(), heavy())):
        places = np.flatnonzero(run.met & (run.stage == stage))[:_CHECKED]
        if not len(places):
            continue
        with torch.inference_mode():
            label, seed = (torch.from_numpy(each[places, None]) for each in (run.labels, run.seeds))
            direct = model(label, seed)["answer"].numpy()
        largest = max(largest, float(np.abs(direct - run.answers[places]).max()))
        count += len(places)
    return {"compared": count, "largest_difference": largest}
