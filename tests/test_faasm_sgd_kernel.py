"""The step of sgd is equal, bit by bit, to the same loop in plain Python."""

from __future__ import annotations

import math

import numpy as np
import pytest

from slosched.faasm.sgd.examples import Examples, Size
from slosched.faasm.sgd.kernel import NEVER, advance, hinge, loss_of
from slosched.faasm.sgd.randomness import number, shuffled, stream
from slosched.faasm.sgd.reference import sequential
from slosched.faasm.sgd.synthetic import synthetic
from slosched.faasm.sgd.training import Training

EXAMPLES = synthetic(Size(train=60, held_out=10, features=500), 3)


def a_training(examples: Examples = EXAMPLES, **changes: object) -> Training:
    given: dict[str, object] = {
        "id": "t",
        "mode": "shared",
        "workers": 1,
        "interval": 1000,
        "seed": 5,
        "epochs": 4,
        "rows": len(examples.train),
        "features": examples.features,
        "nonzeros": examples.train.nonzeros,
        "rate": 0.1,
        "mu": 1.0,
    }
    return Training(**{**given, **changes})  # type: ignore[arg-type]


def plain_steps(examples: Examples, order: list[int], weights: list[float]) -> int:
    """The rule at the head of kernel.py, one float at a time. Returns the updates."""
    rows, updates = examples.train, 0
    for row in order:
        places = range(int(rows.offsets[row]), int(rows.offsets[row + 1]))
        y = float(rows.labels[row])
        product = 0.0
        for k in places:
            product += weights[rows.columns[k]] * float(rows.values[k])
        for k in places:
            j = int(rows.columns[k])
            if y * product < 1.0:
                weights[j] += 0.1 * y * float(rows.values[k])
            weights[j] *= 1.0 - 0.1 * 1.0 / int(examples.counts[j])
            updates += 1
    return updates


def plain_hinge(examples: Examples, weights: list[float]) -> float:
    rows, total = examples.train, 0.0
    for row in range(len(rows)):
        product = 0.0
        for k in range(int(rows.offsets[row]), int(rows.offsets[row + 1])):
            product += weights[rows.columns[k]] * float(rows.values[k])
        total += max(0.0, 1.0 - float(rows.labels[row]) * product)
    return total


class TestTheSequentialTraining:
    def test_is_the_plain_loop_bit_by_bit(self) -> None:
        training = a_training()
        curve = sequential(training, EXAMPLES.train, EXAMPLES.counts)
        weights = [0.0] * EXAMPLES.features
        losses = []
        for epoch in range(training.epochs):
            order = shuffled(training.rows, training.seed, epoch, 0).tolist()
            updates = plain_steps(EXAMPLES, order, weights)
            assert updates == EXAMPLES.train.nonzeros
            losses.append(math.sqrt(plain_hinge(EXAMPLES, weights)) / math.sqrt(training.rows))
        assert (curve.weights.view(np.int64) == np.array(weights).view(np.int64)).all()
        assert curve.losses == losses
        assert losses[-1] < losses[0], "it learns"

    def test_visits_in_another_order_with_another_seed(self) -> None:
        curves = [
            sequential(a_training(seed=seed), EXAMPLES.train, EXAMPLES.counts) for seed in (1, 1, 2)
        ]
        assert curves[0].losses == curves[1].losses != curves[2].losses


class TestAdvance:
    def steps(self, budget: int, *, counting: bool) -> tuple[np.ndarray, np.ndarray, list[tuple]]:  # type: ignore[type-arg]
        rows = EXAMPLES.train
        weights = np.zeros(EXAMPLES.features)
        ledger = np.zeros(EXAMPLES.features if counting else 0, np.int64)
        order = shuffled(len(rows), 1)
        position, parts = 0, []
        while position < len(order):
            before = position
            data = (rows.offsets, rows.columns, rows.values, rows.labels)
            position, updates, noted = advance(
                order, position, *data, EXAMPLES.counts, weights, ledger, 0.1, 1.0, budget
            )
            visited = order[before:position]
            lengths = rows.offsets[visited + 1] - rows.offsets[visited]
            assert updates == lengths.sum()
            assert updates - lengths[-1] < budget, "it stops with the example that fills the budget"
            parts.append((updates, noted))
        return weights, ledger, parts

    @pytest.mark.parametrize("budget", [1, 500, NEVER])
    def test_cut_into_parts_is_the_same(self, budget: int) -> None:
        weights, _, parts = self.steps(budget, counting=False)
        whole, _, one = self.steps(NEVER, counting=False)
        assert (weights == whole).all() and len(one) == 1
        assert sum(updates for updates, _ in parts) == EXAMPLES.train.nonzeros
        assert len(parts) == (len(EXAMPLES.train) if budget == 1 else len(parts))

    def test_the_ledger_counts_what_changes_a_weight_and_changes_nothing(self) -> None:
        weights, ledger, parts = self.steps(700, counting=True)
        assert (weights == self.steps(700, counting=False)[0]).all()
        assert ledger.sum() == sum(noted for _, noted in parts)
        assert 0 < ledger.sum() <= EXAMPLES.train.nonzeros
        assert (ledger <= EXAMPLES.counts).all() and (ledger[weights != 0] > 0).all()

    def test_offsets_may_begin_anywhere(self) -> None:
        """A worker has the part of the arrays with its rows, and the offsets of the whole."""
        rows = EXAMPLES.train
        first, last = int(rows.offsets[20]), int(rows.offsets[30])
        weights = np.linspace(-1, 1, EXAMPLES.features)
        part = rows.part(20, 30)
        found = hinge(
            rows.offsets[20:31],
            rows.columns[first:last],
            rows.values[first:last],
            rows.labels[20:30],
            weights,
        )
        assert found == hinge(part.offsets, part.columns, part.values, part.labels, weights)
        assert part.offsets[0] == 0 and found[0] > 0


class TestHinge:
    def test_is_the_mean_by_numpy(self) -> None:
        rows = EXAMPLES.train
        weights = np.sin(np.arange(EXAMPLES.features))
        total, right = hinge(rows.offsets, rows.columns, rows.values, rows.labels, weights)
        margins = rows.labels * np.add.reduceat(
            weights[rows.columns] * rows.values, rows.offsets[:-1]
        )
        losses = np.maximum(0, 1 - margins)
        assert total == pytest.approx(losses.sum(), rel=1e-12)
        assert right == (margins > 0).sum()
        assert loss_of(total, len(rows)) == pytest.approx(math.sqrt(losses.mean()), rel=1e-12)


class TestRandomness:
    def test_shuffled_is_a_permutation_by_its_names(self) -> None:
        assert sorted(shuffled(1000, 7, 1)) == list(range(1000))
        assert (shuffled(1000, 7, 1) == shuffled(1000, 7, 1)).all()
        assert (shuffled(1000, 7, 1) != shuffled(1000, 7, 2)).any()
        assert list(shuffled(0, 1)) == [] and list(shuffled(1, 1)) == [0]

    def test_numbers_are_those_of_splitmix64(self) -> None:
        """The first outputs of the published generator for the seed 1234567."""
        key = np.uint64(1234567)
        assert [int(number(key, n)) for n in range(3)] == [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
        ]

    def test_streams_differ_by_each_number_of_their_names(self) -> None:
        names = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (-1,)]
        assert len({int(stream(*each)) for each in names}) == len(names)
