"""Measuring models on a GPU without a worker: what `slosched profile` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from slosched.config import ModelProfile, WorkerConfig
from slosched.daemon.backends.cuda.backend import CudaBackend
from slosched.errors import SloschedError, UnknownName

#: No model of the zoo takes longer to build, capture and measure.
_WITHIN_S = 600.0
#: The cache is not used; what it needs of memory is one page.
_PAGES = 1


def measure_on_gpu(
    name: str,
    config: WorkerConfig,
    device: torch.device,
    batches: Sequence[int],
    *,
    max_exec_ns: int,
    progress: Callable[[str], None] | None = None,
) -> ModelProfile:
    """The profile of the model `name` on `device`, as a worker there would measure it.

    Raises UnknownName, what building the model raises, or SloschedError if it takes ten minutes.
    """
    small = replace(config, gpus=1, weights_cache_bytes=_PAGES * config.page_bytes)
    backend = CudaBackend(small, device)
    profiles: list[ModelProfile] = []
    errors: list[Exception] = []

    def job() -> None:
        try:
            profiles.append(backend.measure(name, batches, max_exec_ns=max_exec_ns, note=progress))
        except Exception as error:
            errors.append(error)

    try:
        if name not in backend.loadable:
            raise UnknownName("model", name, list(backend.loadable))
        ended = backend.in_background(job, _WITHIN_S)
        for note in backend.take_notes():
            if progress is not None:
                progress(note)
        if errors:
            raise errors[0]
        if not ended or not profiles:
            raise SloschedError(f"{name} was not measured within {_WITHIN_S:.0f} s")
        return profiles[0]
    finally:
        backend.close()
