"""What both programs answer to the same requests, and what the classifier says of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from slosched.cascade.digits.data import Images, Part, as_stored, load_digits
from slosched.cascade.digits.frechet import Labelled, Matrix
from slosched.cascade.digits.models import CLASSIFIER, heavy, light, trained
from slosched.cascade.digits.networks import CLASSES, Recogniser
from slosched.clock import now_ns

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

#: How many rows are computed at a time.
_ROWS = 256
#: Batch sizes whose times are measured, and how often.
BATCHES = (1, 2, 4, 8, 16)
_REPEATS = 15


@dataclass(frozen=True)
class Seen:
    """Images as the classifier sees them: features (n, d), the likeliest class, its probability."""

    features: Matrix
    classes: Ints
    confidence: Floats


@dataclass(frozen=True)
class Served:
    """The same requests answered by both programs, and held-out real images beside them.

    `scores` are the judge's of the light answers, `heavy_scores` and `real_scores` those that it would give
    to the others. `real` is what distances are taken to, `learnt` the real images that the teacher learnt
    from.
    """

    labels: Ints
    light: Images
    heavy: Images
    scores: Floats
    heavy_scores: Floats
    real_scores: Floats
    real_part: Part
    light_seen: Seen
    heavy_seen: Seen
    real: Seen
    learnt: Seen
    learnt_labels: Ints

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def real_labelled(self) -> Labelled:
        return Labelled(self.real.features, self.real_part.labels)


class Yardstick:
    """The classifier: what every image is measured with."""

    def __init__(self, weights: Path | None = None) -> None:
        """Raises what `trained` raises."""
        network = trained(CLASSIFIER, weights)
        assert isinstance(network, Recogniser)
        self._network = network

    def see(self, ink: Images) -> Seen:
        """Look at ink (n, 1, 8, 8), rounded to the levels of the real images."""
        with torch.inference_mode():
            features = self._network.features(torch.from_numpy(as_stored(ink)))
            shares = self._network.head(features).softmax(1)
        best = shares.max(1)
        return Seen(features.double().numpy(), best.indices.numpy(), best.values.double().numpy())


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute in one thread: sums have the same order each time, and busy cores delay nothing else."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def requests_of(count: int, first_seed: int = 0) -> tuple[Ints, Ints]:
    """Labels and seeds (count, 1): each class equally often, seeds from `first_seed` up."""
    places = np.arange(count, dtype=np.int64)[:, None]
    return places % CLASSES, places + first_seed


def serve(count: int, *, weights: Path | None = None) -> Served:
    """`count` requests through both programs. Raises what `trained` and `load_digits` raise."""
    digits, yardstick = load_digits(), Yardstick(weights)
    one, other = light(weights), heavy(weights)
    labels, seeds = requests_of(count)
    by_light, scores = _answers(one, labels, seeds)
    by_heavy, _ = _answers(other, labels, seeds)
    return Served(
        labels=labels[:, 0],
        light=by_light,
        heavy=by_heavy,
        scores=scores,
        heavy_scores=_judged(one.judge, by_heavy),
        real_scores=_judged(one.judge, digits.measure.ink),
        real_part=digits.measure,
        light_seen=yardstick.see(by_light),
        heavy_seen=yardstick.see(by_heavy),
        real=yardstick.see(digits.measure.ink),
        learnt=yardstick.see(digits.learn.ink),
        learnt_labels=digits.learn.labels,
    )


def _answers(model: nn.Module, labels: Ints, seeds: Ints) -> tuple[Images, Floats]:
    """The answers, and the scores; of a model without a judge no scores."""
    images, scores = [], []
    with torch.inference_mode():
        for at in range(0, len(labels), _ROWS):
            rows = slice(at, at + _ROWS)
            found = model(torch.from_numpy(labels[rows]), torch.from_numpy(seeds[rows]))
            images.append(found["answer"].numpy())
            if "score" in found:
                scores.append(found["score"].double().numpy())
    return np.concatenate(images), np.concatenate(scores) if scores else np.empty(0)


def _judged(judge: nn.Module, ink: Images) -> Floats:
    with torch.inference_mode():
        scores: torch.Tensor = judge(torch.from_numpy(ink))[:, 0].sigmoid().double()
    return np.asarray(scores.numpy())


def exec_times_ns(
    model: nn.Module, batches: Sequence[int] = BATCHES, repeats: int = _REPEATS
) -> dict[int, int]:
    """The time of a batch on this processor, in one thread, by its size: the least of `repeats`.

    Other programs on the machine only make it longer.
    """
    with one_thread():
        return {batch: _time_ns(model, batch, repeats) for batch in batches}


def _time_ns(model: nn.Module, batch: int, repeats: int) -> int:
    labels, seeds = (torch.from_numpy(each) for each in requests_of(batch))
    times = []
    gc.collect()
    with torch.inference_mode():
        model(labels, seeds)
        for _ in range(repeats):
            began_ns = now_ns()
            model(labels, seeds)
            times.append(now_ns() - began_ns)
    return min(times)
