"""No model with feasible requests is starved: who was passed over for long gets a turn.

A policy that serves the most urgent or the most efficient batch may never serve some model: one that takes
50 ms for a request beside a flood for one that takes 2 ms. What is promised, for models with weights on a
GPU:

    A model that loses a request which had waited, or had to be refused early (forecast.py), and gets no
    batch for `PATIENCE_NS` after that, is *held back*. A GPU that opens then and could serve one of its
    requests in time takes it before everything else; of several models the one that has been waiting
    longest.
    After a turn of exec time e the next one comes when other batches of `OTHERS_PER_TURN` e were sent: all
    turns together cost at most a part in `OTHERS_PER_TURN` + 1 of the exec time.

So n models with batches of at most e, each of which has a feasible request whenever one of G busy GPUs
opens, get a batch each at least every PATIENCE_NS + n e (1 + OTHERS_PER_TURN) / G after a loss (n up to
`LOOKED_AT`; of more, some wait longer). A model that loses nothing never needs this, and a cluster that
serves every model four times a second, however overloaded, decides exactly as without.
"""

from __future__ import annotations

from itertools import islice

from slosched.core.scheduler.state import Model
from slosched.units import NS_PER_MS

PATIENCE_NS = 250 * NS_PER_MS
OTHERS_PER_TURN = 20
#: So many are looked at for one GPU at one time; those in vain go behind the others.
LOOKED_AT = 16


class AntiStarvation:
    """Which models wait for a turn, by the time of the first loss since their last batch.

    `turns` counts those that were given.
    """

    __slots__ = ("_due", "_owed_ns", "_patient", "turns")

    def __init__(self) -> None:
        self._patient: dict[int, tuple[int, Model]] = {}  # by model id, the longest wait first
        self._due: dict[int, Model] = {}
        self._owed_ns = 0  # exec time of other batches before the next turn
        self.turns = 0

    def lost(self, model: Model, *, now_ns: int) -> None:
        """A request of `model` that had waited was given up, or it was refused early."""
        model_id = model.model_id
        if model_id not in self._patient and model_id not in self._due:
            self._patient[model_id] = (now_ns, model)

    def served(self, model: Model, exec_ns: int, *, turn: bool) -> None:
        """A batch of `model` was sent; `turn`: because it was held back."""
        self._patient.pop(model.model_id, None)
        self._due.pop(model.model_id, None)
        if turn:
            self.turns += 1
            self._owed_ns = OTHERS_PER_TURN * exec_ns
        elif self._owed_ns:
            self._owed_ns = max(0, self._owed_ns - exec_ns)

    def gone(self, model: Model) -> None:
        """`model` is unloaded."""
        self._patient.pop(model.model_id, None)
        self._due.pop(model.model_id, None)

    def due(self, now_ns: int) -> list[Model]:
        """The models whose turn it is, the first before the others; at most `LOOKED_AT`."""
        if self._owed_ns or not (self._patient or self._due):
            return []
        patient, due = self._patient, self._due
        while patient:
            model_id = next(iter(patient))
            since_ns, model = patient[model_id]
            if now_ns - since_ns < PATIENCE_NS:
                break
            del patient[model_id]
            due[model_id] = model
        return list(islice(due.values(), LOOKED_AT))

    def in_vain(self, models: list[Model]) -> None:
        """None of `models` could go to the GPU that was looked at: let others be looked at next."""
        if len(self._due) > LOOKED_AT:
            for model in models:
                self._due[model.model_id] = self._due.pop(model.model_id)
