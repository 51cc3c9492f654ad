"""Measuring models on a GPU without a worker's loop: what `slosched profile` does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from slosched.config import ModelProfile, WorkerConfig
from slosched.daemon.backends.cuda.backend import CudaBackend
from slosched.daemon.repository.listing import Version
from slosched.errors import SloschedError

#: No model takes longer to build, capture and measure.
_WITHIN_S = 600.0


class GpuBench:
    """`device` with the models of `config`. Raises what a CudaBackend raises; `close` it."""

    def __init__(self, config: WorkerConfig, device: torch.device) -> None:
        # The cache is not used; what it needs of memory is one page.
        small = replace(config, gpus=1, weights_cache_bytes=config.page_bytes)
        self._backend = CudaBackend(small, device)
        self.loadable = self._backend.loadable
        self.no_cupy = self._backend.no_cupy

    def offer(self, versions: Sequence[Version]) -> None:
        """These can be measured, too."""
        self._backend.offer(versions)

    def measure(
        self,
        name: str,
        batches: Sequence[int],
        *,
        max_exec_ns: int,
        progress: Callable[[str], None] | None = None,
    ) -> ModelProfile:
        """The profile of `name`, as a worker on this GPU would measure it.

        Raises what building the model raises, or SloschedError if it takes ten minutes.
        """
        profiles: list[ModelProfile] = []
        errors: list[Exception] = []
        backend = self._backend

        def job() -> None:
            try:
                profile = backend.measure(name, batches, max_exec_ns=max_exec_ns, note=progress)
                profiles.append(profile)
            except Exception as error:
                errors.append(error)

        ended = backend.in_background(job, _WITHIN_S)
        for note in backend.take_notes():
            if progress is not None:
                progress(note)
        backend.adopt(name)
        backend.forget_unused()
        if errors:
            raise errors[0]
        if not ended or not profiles:
            raise SloschedError(f"{name} was not measured within {_WITHIN_S:.0f} s")
        return profiles[0]

    def close(self) -> None:
        self._backend.close()
