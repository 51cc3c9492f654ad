"""The step of the SVM: a subgradient of the hinge loss, one example at a time (HOGWILD!, NIPS'11, section 5).

For an example (x, y) and each j with x_j != 0, in ascending order of j:

    if y (w . x) < 1:  w_j += rate y x_j
    always:            w_j *= 1 - rate mu / counts_j

The margin y (w . x) is taken once, before any w_j changes. Workers that share `weights` run this without locks:
a write of one may be lost to another's. With one worker the results are equal to the same loop in Python, bit
by bit.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from slosched.faasm.sgd.compiled import compiled
from slosched.faasm.sgd.randomness import shuffled

Floats = npt.NDArray[np.float64]
Offsets = npt.NDArray[np.int64]
Columns = npt.NDArray[np.int32]

#: The published constants. Its decay of 0.8 per epoch is declared and not applied, so there is none here.
RATE, MU = 0.1, 1.0
NEVER = 2**62


@compiled
def advance(
    order: npt.NDArray[np.int64],
    position: int,
    offsets: Offsets,
    columns: Columns,
    values: Floats,
    labels: Floats,
    counts: npt.NDArray[np.int32],
    weights: Floats,
    ledger: npt.NDArray[np.int64],
    rate: float,
    mu: float,
    budget: int,
) -> tuple[int, int, int]:
    """Visit examples order[position], ... until `budget` updates are made or all are visited.

    `offsets` (rows + 1) may begin at any number, that of the first element of `columns` and `values`. An update
    is a change of one w_j for one example; an example that was begun is completed. `ledger` has the length of
    `weights`, or 0: then nothing is counted in it. Its element j gains 1 for each update that changes the bits
    of w_j. Returns (the next position, updates, those that the ledger gained).
    """
    updates, noted = 0, 0
    first = offsets[0]
    counting = len(ledger) > 0
    while position < len(order) and updates < budget:
        row = order[position]
        position += 1
        start, stop = offsets[row] - first, offsets[row + 1] - first
        y = labels[row]
        product = 0.0
        for k in range(start, stop):
            product += weights[columns[k]] * values[k]
        violates = y * product < 1.0
        for k in range(start, stop):
            j = columns[k]
            before = weights[j]
            weight = before
            if violates:
                weight += rate * y * values[k]
            weight *= 1.0 - rate * mu / counts[j]
            weights[j] = weight
            if counting and weight != before:
                ledger[j] += 1
                noted += 1
        updates += stop - start
    return position, updates, noted


@compiled
def hinge(
    offsets: Offsets, columns: Columns, values: Floats, labels: Floats, weights: Floats
) -> tuple[float, int]:
    """The sum of the hinge losses max(0, 1 - y (w . x)) in the order of the rows, and how many are on the right
    side of the plane."""
    first = offsets[0]
    total, right = 0.0, 0
    for row in range(len(labels)):
        product = 0.0
        for k in range(offsets[row] - first, offsets[row + 1] - first):
            product += weights[columns[k]] * values[k]
        margin = labels[row] * product
        if margin < 1.0:
            total += 1.0 - margin
        if margin > 0.0:
            right += 1
    return total, right


def loss_of(hinge_sum: float, rows: int) -> float:
    """The published loss: the root of the mean hinge loss, which the original calls RMSE."""
    return float(np.sqrt(hinge_sum) / np.sqrt(rows))


def warm_up() -> None:
    """Compile what a step calls, or load it: before the first one is timed, and before processes are forked."""
    for writable in (
        True,
        False,
    ):  # views of the state are read-only, which is another type to the compiler
        offsets = np.array([0, 1], np.int64)
        columns, values, labels = np.zeros(1, np.int32), np.ones(1), np.ones(1)
        counts = np.ones(1, np.int32)
        for each in (offsets, columns, values, labels, counts):
            each.flags.writeable = writable
        data = offsets, columns, values, labels
        weights, ledger = np.zeros(1), np.zeros(1, np.int64)
        advance(shuffled(1, 0), 0, *data, counts, weights, ledger, RATE, MU, NEVER)
        hinge(*data, weights)
