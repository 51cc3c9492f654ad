"""scikit-learn's digits, 1,797 images of 8x8 with ink of 0..16, in three parts that share no image.

`learn` is what the generators and, with `judge`, the classifier learn from; `judge` are the real images
that the judge learns from; `measure` is held out, for every measurement. Each part has the same share of
every class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from slosched.errors import MissingPackage

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

LEVELS = 16  # of ink: 0 to 16
_SHARES = (0.5, 0.25)  # of learn and judge
_SPLIT_SEED = 20


@dataclass(frozen=True)
class Part:
    """Ink (n, 1, 8, 8) within 0..1, and the labels (n,)."""

    ink: Images
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def with_more(self, other: Part) -> Part:
        """Both parts as one."""
        ink, labels = (
            np.concatenate([self.ink, other.ink]),
            np.concatenate([self.labels, other.labels]),
        )
        return Part(ink, labels)


@dataclass(frozen=True)
class Digits:
    learn: Part
    judge: Part
    measure: Part


def load_digits() -> Digits:
    """The three parts, the same each time. Raises MissingPackage without scikit-learn."""
    try:
        from sklearn import datasets
    except ImportError:
        raise MissingPackage(
            "the digits need scikit-learn, which is not installed: pip install 'slosched[digits]'"
        ) from None
    bunch: Any = datasets.load_digits()
    ink = (bunch.images / LEVELS).astype(np.float32)[:, None]
    labels = bunch.target.astype(np.int64)
    random = np.random.default_rng(_SPLIT_SEED)
    places: tuple[list[int], list[int], list[int]] = ([], [], [])
    for label in range(10):
        own = random.permutation(np.flatnonzero(labels == label))
        ends = np.cumsum([round(share * len(own)) for share in _SHARES])
        for part, chosen in zip(places, np.split(own, ends), strict=True):
            part.extend(chosen.tolist())
    return Digits(*(Part(ink[sorted(part)], labels[sorted(part)]) for part in places))


def as_stored(ink: Images) -> Images:
    """Ink in the levels of the real images, so that what is measured cannot be the rounding."""
    return np.asarray(np.round(ink.clip(0, 1) * LEVELS) / LEVELS, np.float32)
