"""The kinds of actions that a worker carries out, each registered in one line of `KINDS`."""

from __future__ import annotations

from typing import Any

from slosched.core.worker.kinds.base import Acceptance, ActionKind
from slosched.core.worker.kinds.clear_cache import ClearCacheKind
from slosched.core.worker.kinds.evict_weights import EvictWeightsKind
from slosched.core.worker.kinds.get_worker_state import GetWorkerStateKind
from slosched.core.worker.kinds.infer import InferKind
from slosched.core.worker.kinds.load_model import LoadModelKind
from slosched.core.worker.kinds.load_weights import LoadWeightsKind
from slosched.core.worker.kinds.unload_model import UnloadModelKind
from slosched.core.worker.pipeline import Pipeline

KINDS: dict[type[object], type[ActionKind[Any]]] = {
    kind.message: kind
    for kind in (
        LoadModelKind,
        UnloadModelKind,
        LoadWeightsKind,
        EvictWeightsKind,
        InferKind,
        ClearCacheKind,
        GetWorkerStateKind,
    )
}


def kinds_of(pipeline: Pipeline, acceptance: Acceptance) -> dict[type[object], ActionKind[Any]]:
    """The kinds of one brain, by the type of their message."""
    return {message: kind(pipeline, acceptance) for message, kind in KINDS.items()}


def takes_inputs(message: object) -> bool:
    """True if frames may follow `message`."""
    kind = KINDS.get(type(message))
    return kind is not None and kind.takes_inputs
