"""Opens the model of a job by its name (job_models.py). Importing this imports neither torch nor a library."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from slosched.daemon.backends.job_models import made_by
from slosched.errors import InvalidConfig
from slosched.share_spec import Job

if TYPE_CHECKING:
    import torch

    from slosched.daemon.backends.eager.model import EagerModel

_ROOM = "slosched.daemon.backends.eager."
#: More rows than any of these models can take in one request.
_MOST_ROWS = 65_536


def open_model(job: Job, device: torch.device, seed: int, *, small: bool = False) -> EagerModel:
    """The model of `job` on `device`. `small`: with few and narrow layers, to try its code without a GPU.

    Raises UnknownName, InvalidConfig and MissingPackage.
    """
    if not 1 <= job.batch <= _MOST_ROWS:
        raise InvalidConfig(f"job {job.name!r}: a batch of {job.batch}; it is 1 to {_MOST_ROWS}")
    module, _, name = made_by(job.model).partition(":")
    make: Callable[..., EagerModel] = getattr(importlib.import_module(_ROOM + module), name)
    return make(job, device, seed, small=small)
