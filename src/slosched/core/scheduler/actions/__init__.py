"""What the controller can have a GPU do: one object for each kind of action.

A kind is a file here, beside its messages and its number (messages.py, codes.py) and what the worker does with
it (core/worker/kinds).
"""

from __future__ import annotations

from slosched.codes import ActionType
from slosched.config import SchedulerConfig
from slosched.core.scheduler.actions.kind import Kind
from slosched.core.scheduler.changes import Changes
from slosched.core.scheduler.paths import Paths
from slosched.discovery import classes_in


def make_kinds(config: SchedulerConfig, changes: Changes, paths: Paths) -> dict[ActionType, Kind]:
    """Return one object of each kind, by its number."""
    classes = [each for each in classes_in(__name__) if issubclass(each, Kind)]
    return {each.action_type: each(config, changes, paths) for each in classes}
