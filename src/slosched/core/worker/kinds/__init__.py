"""The kinds of actions that a worker carries out: each is a file here."""

from __future__ import annotations

from typing import Any

from slosched.core.worker.kinds.base import Acceptance, ActionKind
from slosched.core.worker.pipeline import Pipeline
from slosched.discovery import classes_in
from slosched.messages import ChildReply

KINDS: dict[type[object], type[ActionKind[Any]]] = {
    each.message: each for each in classes_in(__name__) if issubclass(each, ActionKind)
}


def kinds_of(pipeline: Pipeline, acceptance: Acceptance) -> dict[type[object], ActionKind[Any]]:
    """The kinds of one brain, by the type of their message."""
    return {message: kind(pipeline, acceptance) for message, kind in KINDS.items()}


def takes_inputs(message: object) -> bool:
    """True if frames may follow `message`."""
    if isinstance(message, ChildReply):
        return True
    kind = KINDS.get(type(message))
    return kind is not None and kind.takes_inputs
