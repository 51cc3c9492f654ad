"""Labelled sparse examples: the data of the experiment in memory, and the shapes that it comes in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.errors import InvalidConfig, UnknownName

#: The number of features of RCV1-v2 (Lewis et al., JMLR 5, 2004).
FEATURES = 47_236


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """A size of the experiment. `held_out` are the examples beside `train` that only measure accuracy."""

    train: int
    held_out: int
    features: int = FEATURES


#: HOGWILD! (NIPS'11) trains on what RCV1-v2 calls its test split and holds out the other, so `full` does, too.
SIZES = {
    "micro": Size(train=128, held_out=0),  # 128 examples teach nothing general
    "small": Size(train=23_149, held_out=2_315),
    "full": Size(train=781_265, held_out=23_149),
}


def size_named(name: str) -> Size:
    """The size of that name. Raises UnknownName."""
    if name not in SIZES:
        raise UnknownName("size", name, list(SIZES))
    return SIZES[name]


@dataclass(frozen=True, eq=False)
class Rows:
    """Examples as the rows of a sparse matrix (CSR).

    `offsets` (rows + 1, int64): row i has the elements [offsets[i], offsets[i + 1]) of `columns` (int32,
    ascending within a row) and `values` (float64). `labels` (rows, float64) are 1 or -1.
    """

    offsets: npt.NDArray[np.int64]
    columns: npt.NDArray[np.int32]
    values: npt.NDArray[np.float64]
    labels: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def nonzeros(self) -> int:
        return len(self.columns)

    def part(self, start: int, stop: int) -> Rows:
        """Rows [start, stop), copied."""
        first, last = int(self.offsets[start]), int(self.offsets[stop])
        return Rows(
            self.offsets[start : stop + 1] - first,
            self.columns[first:last].copy(),
            self.values[first:last].copy(),
            self.labels[start:stop].copy(),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Examples:
    """A data set. `origin` says in words where it comes from, `counts` (features, int32) in how many rows of
    `train` each feature is not zero."""

    origin: str
    features: int
    train: Rows
    held_out: Rows
    counts: npt.NDArray[np.int32]

    @property
    def nbytes(self) -> int:
        """The bytes of what the workers read: rows, labels and counts of `train`."""
        rows = self.train
        arrays = (rows.offsets, rows.columns, rows.values, rows.labels, self.counts)
        return sum(each.nbytes for each in arrays)

    def facts(self) -> dict[str, object]:
        """What a manifest says of the data: its shape, how uneven it is, and a digest of all its bytes."""
        lengths = np.diff(self.train.offsets)
        rows = len(self.train)
        top = np.sort(self.counts)[::-1]
        return {
            "origin": self.origin,
            "rows": rows,
            "held_out_rows": len(self.held_out),
            "features": self.features,
            "nonzeros": self.train.nonzeros,
            "nonzeros_per_row": {
                "mean": round(float(lengths.mean()), 2),
                **{f"p{p}": int(np.percentile(lengths, p)) for p in (1, 50, 99)},
                "most": int(lengths.max()),
            },
            "features_used": int((self.counts > 0).sum()),
            "rows_with_the_most_frequent_feature": round(int(top[0]) / rows, 4),
            "share_of_the_100_most_frequent": round(int(top[:100].sum()) / int(top.sum()), 4),
            "positive": round(float((self.train.labels > 0).mean()), 4),
            "sha256": self.digest(),
        }

    def digest(self) -> str:
        """SHA-256 of all arrays: equal for equal data."""
        found = hashlib.sha256()
        for rows in (self.train, self.held_out):
            for each in (rows.offsets, rows.columns, rows.values, rows.labels):
                found.update(each.tobytes())
        found.update(self.counts.tobytes())
        return found.hexdigest()


def examples_of(
    rows: Rows, *, held_out: int, features: int, origin: str, counts: npt.NDArray[np.int32] | None
) -> Examples:
    """Examples whose last `held_out` rows are not trained on. `counts` are made where there are none.

    Raises InvalidConfig if nothing is left to train on.
    """
    train = len(rows) - held_out
    if train < 1 or not rows.offsets[train]:
        raise InvalidConfig(f"{origin} has no example to train on")
    kept = rows.part(0, train)
    if counts is None:
        counts = np.bincount(kept.columns, minlength=features).astype(np.int32)
    return Examples(
        origin=origin,
        features=features,
        train=kept,
        held_out=rows.part(train, len(rows)),
        counts=counts,
    )
