"""What an instance has of a training's state: views of the host's copy, or copies of its own.

This is the whole difference between the modes. The code that trains is the same, and so are its pushes and
pulls.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from slosched.faasm.sgd import training as keys
from slosched.faasm.sgd.examples import Examples, Rows
from slosched.faasm.sgd.training import Training
from slosched.functions.state.array import StateArray
from slosched.functions.state.state import State


class Exchanged(msgspec.Struct, kw_only=True):
    """Bytes of values between instances' host and the global tier, by what they are, and the syncs that moved
    them. The ledger's are apart: without counting there are none."""

    inputs_pulled: int = 0
    weights_pulled: int = 0
    weights_pushed: int = 0
    ledger: int = 0
    syncs: int = 0

    def add(self, other: Exchanged) -> None:
        for name in self.__struct_fields__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


class Replica:
    """The arrays of one training in `state`. Views stay valid as long as the replica."""

    def __init__(self, state: State, training: Training) -> None:
        self._state, self.training = state, training
        self.exchanged = Exchanged()
        before = state.moved.pulled_bytes
        self._offsets = self._array(keys.OFFSETS, training.rows + 1, np.int64)
        self._columns = self._array(keys.COLUMNS, training.nonzeros, np.int32)
        self._values = self._array(keys.VALUES, training.nonzeros, np.float64)
        self._labels = self._array(keys.LABELS, training.rows, np.float64)
        self._counts = self._array(keys.COUNTS, training.features, np.int32)
        merge = training.how.merge
        self._weights = self._array(keys.WEIGHTS, training.features, np.float64, merge)
        counted = training.features if training.count_lost else 0
        self._ledger: StateArray | None = None
        if counted:
            self._ledger = self._array(keys.LEDGER, counted, np.int64, merge)
        self.counts: npt.NDArray[np.int32] = self._counts.get()
        self.exchanged.inputs_pulled += self._since(before)
        before = state.moved.pulled_bytes
        self.weights: npt.NDArray[np.float64] = self._weights.get(writable=True)
        self.exchanged.weights_pulled += self._since(before)
        before = state.moved.pulled_bytes
        self.ledger: npt.NDArray[np.int64] = np.zeros(0, np.int64)
        if self._ledger is not None:
            self.ledger = self._ledger.get(writable=True)
        self.exchanged.ledger += self._since(before)

    def _array(self, name: str, size: int, dtype: Any, merge: Any = "overwrite") -> StateArray:
        return self._state.array(self.training.key(name), size, dtype, merge=merge)

    def _since(self, before: int) -> int:
        return self._state.moved.pulled_bytes - before

    def rows(self, start: int, stop: int) -> Rows:
        """Views of these rows; only their part of the inputs is fetched. Offsets keep their numbers."""
        before = self._state.moved.pulled_bytes
        offsets = self._offsets.get_chunk(start, stop + 1)
        first, last = int(offsets[0]), int(offsets[-1])
        found = Rows(
            offsets,
            self._columns.get_chunk(first, last),
            self._values.get_chunk(first, last),
            self._labels.get_chunk(start, stop),
        )
        self.exchanged.inputs_pulled += self._since(before)
        return found

    def exchange(self) -> None:
        """Push the weights that were changed on this host (or in this copy), and read all of them again."""
        for array in (self._weights, self._ledger):
            if array is None:
                continue
            before = self._state.moved.pulled_bytes
            pushed = array.push_partial()
            array.pull()
            pulled = self._since(before)
            if array is self._weights:
                self.exchanged.weights_pushed += pushed
                self.exchanged.weights_pulled += pulled
            else:
                self.exchanged.ledger += pushed + pulled
        self.exchanged.syncs += 1

    def taken(self) -> Exchanged:
        """What was exchanged since this was last asked."""
        found, self.exchanged = self.exchanged, Exchanged()
        return found


class Instance:
    """What a process keeps between calls: the replica of the training that it works for."""

    def __init__(self) -> None:
        self._private: State | None = None
        self._replica: Replica | None = None

    def replica(self, state: State, training: Training) -> Replica:
        """The replica of this training; one of an earlier training is given up."""
        if self._replica is None or self._replica.training.id != training.id:
            self.leave()
            if training.how.private:
                self._private = State(state.namespace, state.store, private=True)
            self._replica = Replica(self._private or state, training)
        return self._replica

    def leave(self) -> bool:
        """Give up the replica, with all copies that are its own. Whether there was one."""
        had = self._replica is not None
        self._replica = None
        private, self._private = self._private, None
        if private is not None:
            private.close()
        return had


def upload(state: State, training: Training, examples: Examples) -> int:
    """Put the inputs and weights of zeros into the global tier, as another host does: no copy stays here.

    Returns the bytes that were sent.
    """
    rows = examples.train
    inputs: dict[str, npt.NDArray[Any]] = {
        keys.OFFSETS: rows.offsets,
        keys.COLUMNS: rows.columns,
        keys.VALUES: rows.values,
        keys.LABELS: rows.labels,
        keys.COUNTS: examples.counts,
    }
    with State(state.namespace, state.store, private=True) as other:
        for name, values in inputs.items():
            array = other.array(training.key(name), values.shape, values.dtype)
            array.set(values)
            array.push()
        other.array(training.key(keys.WEIGHTS), training.features, merge=training.how.merge)
        if training.count_lost:
            other.array(
                training.key(keys.LEDGER), training.features, np.int64, merge=training.how.merge
            )
        return other.moved.pushed_bytes


def arrived(state: State, training: Training) -> tuple[npt.NDArray[np.float64], int]:
    """What the global tier has at the end: the weights, and the sum of the ledger."""
    merge = training.how.merge
    with State(state.namespace, state.store, private=True) as other:
        weights = other.array(training.key(keys.WEIGHTS), training.features, merge=merge).copy()
        if not training.count_lost:
            return weights, 0
        ledger = other.array(training.key(keys.LEDGER), training.features, np.int64, merge=merge)
        return weights, int(ledger.get().sum())


def drop(state: State, training: Training) -> None:
    """Remove the training's keys."""
    for info in state.list():
        if info.key.startswith(f"{training.id}."):
            state.delete(info.key)
