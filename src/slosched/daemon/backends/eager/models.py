"""The models that run eagerly, by name. Importing this imports neither torch nor a library of models."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from slosched.errors import UnknownName
from slosched.share_spec import Job

if TYPE_CHECKING:
    import torch

    from slosched.daemon.backends.eager.model import EagerModel

_ROOM = "slosched.daemon.backends.eager."


class Entry(NamedTuple):
    """Where a model is made, `module:class`, and a line about it for help texts."""

    made_by: str
    line: str


ENTRIES: dict[str, Entry] = {
    "tiny": Entry("tiny:Tiny", "layers of a chosen time, for tests: tiny:LAYERS:MS"),
}


def model_names() -> dict[str, str]:
    """The names with a line each."""
    return {name: entry.line for name, entry in ENTRIES.items()}


def open_model(job: Job, device: torch.device, seed: int, *, small: bool = False) -> EagerModel:
    """The model of `job` on `device`. `small`: with few and narrow layers, to try its code without a GPU.

    Raises UnknownName, InvalidConfig and MissingPackage.
    """
    entry = ENTRIES.get(job.model.partition(":")[0])
    if entry is None:
        raise UnknownName("model", job.model, list(ENTRIES))
    module, _, name = entry.made_by.partition(":")
    make: Callable[..., EagerModel] = getattr(importlib.import_module(_ROOM + module), name)
    return make(job, device, seed)
