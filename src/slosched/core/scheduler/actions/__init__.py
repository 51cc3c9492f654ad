"""What the controller can have a GPU do: one object for each kind of action.

A kind is a file here and a line in `make_kinds`, beside its messages and its number (messages.py, codes.py) and
what the worker does with it (core/worker).
"""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.config import SchedulerConfig
from slosched.core.scheduler.actions.evict_weights import EvictWeightsKind
from slosched.core.scheduler.actions.infer import InferKind
from slosched.core.scheduler.actions.kind import Kind
from slosched.core.scheduler.actions.load_weights import LoadWeightsKind
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.paths import Paths


def make_kinds(config: SchedulerConfig, changes: Changes, paths: Paths) -> dict[ActionType, Kind]:
    """Return one object of each kind, by its number."""
    kinds: tuple[Kind, ...] = (
        InferKind(config, changes, paths),
        LoadWeightsKind(changes),
        EvictWeightsKind(changes),
    )
    return {kind.action_type: kind for kind in kinds}
