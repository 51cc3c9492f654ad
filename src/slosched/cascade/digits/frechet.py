"""The Frechet distance between two sets of feature vectors, each taken as a normal distribution; numpy alone.

Here the features are those of the package's own classifier of digits, so a distance compares with others made
here and with no FID, which has the features of an Inception network.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Normal:
    """Mean (d,) and covariance (d, d) of feature vectors."""

    mean: Matrix
    covariance: Matrix

    @classmethod
    def of(cls, features: Matrix) -> Normal:
        """From features (n, d), n at least 2."""
        return cls(features.mean(0), np.cov(features, rowvar=False))

    def distance(self, other: Normal) -> float:
        """|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2)), at least 0 (Dowson and Landau, 1982)."""
        values, vectors = np.linalg.eigh(self.covariance)
        root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
        inner = np.linalg.eigvalsh(root @ other.covariance @ root)
        cross = 2 * np.sqrt(inner.clip(0)).sum()
        means = float(((self.mean - other.mean) ** 2).sum())
        return max(0.0, means + float(np.trace(self.covariance + other.covariance) - cross))


def frechet(features: Matrix, real: Matrix) -> float:
    """The distance of features (n, d) to those of real images (m, d)."""
    return Normal.of(features).distance(Normal.of(real))


@dataclass(frozen=True)
class Labelled:
    """Feature vectors (n, d), and the class of each, (n,)."""

    features: Matrix
    labels: npt.NDArray[np.int64]

    def drawn(self, random: np.random.Generator) -> npt.NDArray[np.int64]:
        """Places of a bootstrap: with replacement, as many of each class as there are.

        How many there are of a class is chosen, by the requests and by the split, and not left to chance.
        """
        parts = []
        for label in np.unique(self.labels):
            own = np.flatnonzero(self.labels == label)
            parts.append(own[random.integers(len(own), size=len(own))])
        return np.concatenate(parts)


def bootstrap_error(made: Labelled, real: Labelled, *, repeats: int, seed: int) -> float:
    """The standard error of `frechet` by drawing both sets anew, within each class."""
    random = np.random.default_rng(seed)
    found = [
        frechet(made.features[made.drawn(random)], real.features[real.drawn(random)])
        for _ in range(repeats)
    ]
    return float(np.std(found, ddof=1))
