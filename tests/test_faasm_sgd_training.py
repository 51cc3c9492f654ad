"""Trainings through functions and state: equal to the sequential one, and what copies lose and move."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import slosched.engines
from slosched.engines.engine import Engine
from slosched.faasm.sgd import functions, replica
from slosched.faasm.sgd import training as keys
from slosched.faasm.sgd.examples import FEATURES, Examples, Size
from slosched.faasm.sgd.kernel import NEVER, advance
from slosched.faasm.sgd.measure import NotAsAsked, lack_of_memory, measured, reached_s
from slosched.faasm.sgd.randomness import shuffled
from slosched.faasm.sgd.reference import sequential
from slosched.faasm.sgd.replica import Exchanged, Instance, Replica
from slosched.faasm.sgd.synthetic import synthetic
from slosched.faasm.sgd.training import MODES, NO_INTERVAL, Training, instance_bytes, training_of
from slosched.functions.state.state import State

EXAMPLES = synthetic(Size(train=60, held_out=20, features=500), 3)
WEIGHTS_BYTES = 8 * EXAMPLES.features


def a_training(examples: Examples = EXAMPLES, **changes: Any) -> Training:
    given: dict[str, Any] = {
        "id": secrets.token_hex(4),
        "mode": "shared",
        "workers": 1,
        "interval": 700,
        "seed": 5,
        "epochs": 3,
        "rows": len(examples.train),
        "features": examples.features,
        "nonzeros": examples.train.nonzeros,
        "rate": 0.1,
        "mu": 1.0,
    }
    return Training(**{**given, **changes})


@pytest.fixture
def state() -> Iterator[State]:
    with State(f"sgd-{secrets.token_hex(6)}", own=True) as opened:
        yield opened


@pytest.fixture
def engine(state: State) -> Iterator[Engine]:
    with slosched.engines.open("local", [functions.__name__], state=state) as opened:
        yield opened


def no_bill() -> Any:
    """A bill that has nothing."""
    return nullcontext(SimpleNamespace(processes={}, record=dict))


def train(
    engine: Engine, state: State, training: Training, examples: Examples = EXAMPLES
) -> dict[str, Any]:
    truth = sequential(training, examples.train, examples.counts)
    return measured(
        engine, state, training, examples, truth=truth, target=truth.losses[1], billed=no_bill
    )


class TestOneWorker:
    @pytest.mark.parametrize("mode", ["shared", "copies"])
    @pytest.mark.parametrize("interval", [1, 700, NO_INTERVAL])
    @pytest.mark.parametrize("count_lost", [False, True])
    def test_is_the_sequential_training_bit_by_bit(
        self, engine: Engine, state: State, mode: str, interval: int, count_lost: bool
    ) -> None:
        training = a_training(mode=mode, interval=interval, count_lost=count_lost)
        found = train(engine, state, training)
        truth = sequential(training, EXAMPLES.train, EXAMPLES.counts)
        assert found["equal_to_sequential"] and found["largest_difference"] == 0
        assert found["losses"] == truth.losses and found["target_s"] == found["epoch_ends_s"][1]
        assert found["updates"] == 3 * EXAMPLES.train.nonzeros
        assert found["syncs"] == {1: 180, NO_INTERVAL: 3}.get(interval, found["syncs"])
        if count_lost:
            assert found["updates_lost"] == 0 < found["updates_noted"]

    def test_sums_of_changes_round_and_lose_nothing(self, engine: Engine, state: State) -> None:
        found = train(engine, state, a_training(mode="sum-delta", count_lost=True))
        assert found["largest_difference"] < 1e-12 and found["updates_lost"] == 0

    def test_a_difference_would_be_seen(self, engine: Engine, state: State) -> None:
        training = a_training()
        truth = sequential(training, EXAMPLES.train, EXAMPLES.counts)
        truth.weights[0] = np.nextafter(truth.weights[0], 1)
        found = measured(engine, state, training, EXAMPLES, truth=truth, target=0.0, billed=no_bill)
        assert not found["equal_to_sequential"] and found["target_s"] is None


class TestSeveralWorkers:
    @pytest.mark.parametrize("mode", MODES)
    def test_train_every_row_once_in_each_epoch(
        self, engine: Engine, state: State, mode: str
    ) -> None:
        found = train(engine, state, a_training(mode=mode, workers=7))
        assert found["batches"] == 7 and found["updates"] == 3 * EXAMPLES.train.nonzeros
        assert found["losses"][-1] < found["losses"][0] and not found["equal_to_sequential"]
        assert state.list() == [], "the training's keys are gone"
        assert [each.name for each in state._local.parent.glob("private-*")] == []

    def test_batches_cover_the_rows(self) -> None:
        for rows, workers in ((60, 7), (60, 60), (3, 16), (1, 1), (128, 16)):
            batches = a_training(rows=rows, workers=workers).batches
            assert len(batches) <= workers and batches[0][0] == 0 and batches[-1][1] == rows
            assert all(a[1] == b[0] for a, b in itertools.pairwise(batches))
            assert all(start < stop for start, stop in batches)

    def test_a_run_with_other_batches_than_asked_is_no_result(
        self, engine: Engine, state: State, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        training = a_training(workers=2)
        call = engine.call

        def with_three(function: Any, message: dict[str, Any], *args: Any, **more: Any) -> Any:
            return call(function, {**message, "workers": 3}, *args, **more)

        monkeypatch.setattr(engine, "call", with_three)
        with pytest.raises(NotAsAsked, match="9 batches were trained, and 6"):
            train(engine, state, training)
        assert state.list() == []


class TestTwoInstances:
    """Two instances take turns, so what each overwrites is known."""

    def replicas(self, state: State, mode: str) -> tuple[list[Replica], list[Instance], Training]:
        training = a_training(mode=mode, workers=2, count_lost=True)
        replica.upload(state, training, EXAMPLES)
        instances = [Instance(), Instance()]
        return [each.replica(state, training) for each in instances], instances, training

    def step(self, own: Replica, start: int, stop: int) -> int:
        """Train on rows and push nothing. Returns the updates that changed a weight."""
        rows = own.rows(start, stop)
        data = rows.offsets, rows.columns, rows.values, rows.labels
        order = shuffled(stop - start, 1)
        weights = own.weights, own.ledger
        return advance(order, 0, *data, own.counts, *weights, 0.1, 1.0, NEVER)[2]

    def both_at_once(self, state: State, mode: str) -> tuple[int, int, Training]:
        replicas, instances, training = self.replicas(state, mode)
        made = self.step(replicas[0], 0, 30) + self.step(replicas[1], 30, 60)
        weights = replicas[0].weights.copy(), replicas[1].weights.copy()
        for each in replicas:
            each.exchange()
        arrived, noted = replica.arrived(state, training)
        for instance in instances:
            assert instance.leave() and not instance.leave()
        expected = {
            "copies": np.where(weights[1] != 0, weights[1], weights[0]),
            "sum-delta": weights[0] + weights[1],
            "shared": weights[1],
        }[mode]
        assert np.allclose(arrived, expected, rtol=0, atol=1e-15)
        return made, noted, training

    def test_copies_overwrite_what_the_other_pushed(self, state: State) -> None:
        made, noted, training = self.both_at_once(state, "copies")
        with State(state.namespace, state.store, private=True) as other:
            ledger = other.array(training.key(keys.LEDGER), EXAMPLES.features, np.int64).copy()
        rows = EXAMPLES.train
        first = np.bincount(rows.columns[: rows.offsets[30]], minlength=EXAMPLES.features)
        second = np.bincount(rows.columns[rows.offsets[30] :], minlength=EXAMPLES.features)
        assert made == first.sum() + second.sum(), "all margins are below 1 at first"
        assert (ledger == np.where(second > 0, second, first)).all()
        assert made - noted == first[second > 0].sum() > 0

    def test_sums_lose_nothing(self, state: State) -> None:
        made, noted, _ = self.both_at_once(state, "sum-delta")
        assert made == noted

    def test_a_shared_tier_has_both_at_once(self, state: State) -> None:
        made, noted, _ = self.both_at_once(state, "shared")
        assert made == noted, "what takes turns does not race"

    def test_a_shared_tier_fetches_inputs_once_and_copies_twice(self, state: State) -> None:
        moved = {}
        for mode in MODES:
            replicas, instances, training = self.replicas(state, mode)
            for each in replicas:
                each.rows(0, 60)
            moved[mode] = [each.taken() for each in replicas]
            for instance in instances:
                instance.leave()
            replica.drop(state, training)
        inputs = {mode: [each.inputs_pulled for each in found] for mode, found in moved.items()}
        assert inputs["shared"] == [EXAMPLES.nbytes, 0]
        assert inputs["copies"] == inputs["sum-delta"] == [EXAMPLES.nbytes] * 2
        weights = {mode: [each.weights_pulled for each in found] for mode, found in moved.items()}
        assert weights["shared"] == [WEIGHTS_BYTES, 0]
        assert weights["copies"] == [WEIGHTS_BYTES, WEIGHTS_BYTES]

    def test_a_push_sends_what_was_changed(self, state: State) -> None:
        replicas, instances, _ = self.replicas(state, "copies")
        first = replicas[0]
        first.taken()
        first.weights[7] = 1.0
        first.exchange()
        found = first.taken()
        assert found.weights_pushed == 8 and found.syncs == 1 and found.inputs_pulled == 0
        first.exchange()
        assert first.taken() == Exchanged(syncs=1), "this host alone pushed, so nothing is fetched"
        replicas[1].weights[8] = 2.0
        replicas[1].exchange()
        first.exchange()
        assert first.taken().weights_pulled == WEIGHTS_BYTES and first.weights[8] == 2.0
        for instance in instances:
            instance.leave()

    def test_an_instance_that_takes_up_another_training_gives_up_the_first(
        self, state: State
    ) -> None:
        instance = Instance()
        ids = []
        for _ in range(2):
            training = a_training(mode="copies")
            replica.upload(state, training, EXAMPLES)
            own = instance.replica(state, training)
            assert instance.replica(state, training) is own
            ids.append(id(own))
            assert len(list(state._local.parent.glob("private-*"))) == 1
        instance.leave()
        assert list(state._local.parent.glob("private-*")) == []


class TestWhatTravels:
    def test_a_training_arrives_as_it_was(self) -> None:
        training = a_training(count_lost=True, interval=NO_INTERVAL)
        assert training_of(training.message()) == training
        assert training.how.private is False

    def test_the_steps_have_size_classes(self) -> None:
        sizes = [
            functions.step.size_class(({}, 0, 0, 0, rows), {})
            for rows in (1, 8, 128, 1447, 23_149, 781_265)
        ]
        assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == 15
        assert functions.step.size_class(({}, 0, 0, 0, 0), {"leave": True}) == 0

    def test_batches_begin_in_another_order_in_each_epoch(self) -> None:
        training = a_training(workers=16)
        orders = [functions._order(training, epoch) for epoch in (0, 0, 1)]
        assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(15))


def test_memory_that_is_not_there_is_said_before_it_is_taken() -> None:
    assert lack_of_memory(EXAMPLES, 2, private=True) == ""
    assert "100000000 copies take" in lack_of_memory(EXAMPLES, 10**8, private=True)
    assert lack_of_memory(EXAMPLES, 10**8, private=False) == "", "one copy, whatever the number"
    assert instance_bytes(EXAMPLES) > EXAMPLES.nbytes + 2 * WEIGHTS_BYTES
    assert EXAMPLES.features < FEATURES


def test_the_target_is_reached_at_the_end_of_an_epoch() -> None:
    assert reached_s([3.0, 2.0, 1.0], [0.5, 1.0, 1.5], 2.0) == 1.0
    assert reached_s([3.0, 2.5], [0.5, 1.0], 2.0) is None
