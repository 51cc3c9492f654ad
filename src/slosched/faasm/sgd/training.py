"""One training as its calls know it, and the modes in which its workers share state."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from msgspec import Meta

from slosched.errors import UnknownName
from slosched.faasm.sgd.examples import Examples
from slosched.functions.state.store import Merge

#: Keys of the state, each after the training's id; those of the original where it has them.
OFFSETS, COLUMNS, VALUES = "inputs_outr", "inputs_innr", "inputs_vals"
LABELS, COUNTS, WEIGHTS = "outputs", "feature_counts", "weights"
LEDGER = "ledger"
#: An interval that never comes: weights are pushed at the end of a batch alone.
NO_INTERVAL = -1


class Mode(msgspec.Struct, frozen=True, kw_only=True):
    """`private`: every instance has a copy of all state that it reads, as a container has. `merge` is what
    becomes of two pushes of one weight."""

    private: bool
    merge: Merge
    about: str


MODES = {
    "shared": Mode(
        private=False,
        merge="overwrite",
        about="one copy of inputs and weights per host; workers write the weights without locks (warm slots)",
    ),
    "copies": Mode(
        private=True,
        merge="overwrite",
        about="no shared tier: a process per instance with a copy of all that it reads (native baseline)",
    ),
    "sum-delta": Mode(
        private=True,
        merge="sum",
        about="copies whose pushes add what each instance changed, so that none overwrites another's",
    ),
}


def mode_named(name: str) -> Mode:
    """The mode of that name. Raises UnknownName."""
    if name not in MODES:
        raise UnknownName("mode", name, list(MODES))
    return MODES[name]


class Training(msgspec.Struct, frozen=True, kw_only=True):
    """`id` begins its keys in the state. Each worker pushes its weights every `interval` updates, or not (-1).

    `rows`, `features` and `nonzeros` are the shape of the inputs. With `count_lost` a second array counts the
    updates of each weight and is exchanged in the same way, so that what is lost of it is what is lost of them.
    """

    id: str
    mode: str
    workers: Annotated[int, Meta(ge=1)]
    interval: int
    seed: int
    epochs: Annotated[int, Meta(ge=1)]
    rows: Annotated[int, Meta(ge=1)]
    features: int
    nonzeros: int
    rate: float
    mu: float
    count_lost: bool = False

    def key(self, name: str) -> str:
        return f"{self.id}.{name}"

    @property
    def how(self) -> Mode:
        return mode_named(self.mode)

    @property
    def batches(self) -> list[tuple[int, int]]:
        """The rows [start, stop) of each worker: contiguous, at most `workers` of them."""
        size = -(-self.rows // self.workers)
        return [(start, min(start + size, self.rows)) for start in range(0, self.rows, size)]

    def message(self) -> dict[str, Any]:
        """What travels to a call; `training_of` reads it."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found


def training_of(message: dict[str, Any]) -> Training:
    """Raises msgspec.ValidationError for nonsense."""
    return msgspec.convert(message, Training)


def instance_bytes(examples: Examples) -> int:
    """Shared memory that an instance with copies of its own takes: each array, a byte per element, and the
    weights once more as of the last exchange."""
    rows = examples.train
    elements = len(rows.offsets) + 2 * rows.nonzeros + len(rows) + 2 * examples.features
    return examples.nbytes + 2 * 8 * examples.features + elements
