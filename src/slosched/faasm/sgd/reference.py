"""The sequential training: one example after the other in one process, without state, calls or engines."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from slosched.clock import now_ns
from slosched.faasm.sgd.examples import Rows
from slosched.faasm.sgd.kernel import NEVER, advance, hinge, loss_of
from slosched.faasm.sgd.randomness import shuffled
from slosched.faasm.sgd.training import Training


@dataclass(frozen=True, eq=False)
class Curve:
    """`losses` after each epoch, `ends_ns` since the training began, and the weights at its end."""

    losses: list[float]
    ends_ns: list[int]
    weights: npt.NDArray[np.float64]


def sequential(training: Training, rows: Rows, counts: npt.NDArray[np.int32]) -> Curve:
    """What `training` gives with one worker, whatever its mode says. The loss is computed as its step does."""
    weights = np.zeros(training.features)
    ledger = np.zeros(0, np.int64)
    data = rows.offsets, rows.columns, rows.values, rows.labels
    losses, ends_ns = [], []
    began_ns = now_ns()
    for epoch in range(training.epochs):
        order = shuffled(len(rows), training.seed, epoch, 0)
        advance(order, 0, *data, counts, weights, ledger, training.rate, training.mu, NEVER)
        losses.append(loss_of(hinge(*data, weights)[0], len(rows)))
        ends_ns.append(now_ns() - began_ns)
    return Curve(losses, ends_ns, weights)
