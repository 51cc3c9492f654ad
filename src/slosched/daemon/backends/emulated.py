"""Emulated GPUs for a live worker: the core's EmulatedGpu, and outputs of the right size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from slosched.clock import now_ns
from slosched.config import WorkerConfig
from slosched.config_file import load_profile
from slosched.core.worker.emulated import Echo, emulated_gpus, prepare_emulated
from slosched.core.worker.interface import ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import Frame, Plain
from slosched.messages import GpuInfo

#: More than any port number: no two pairs of seed and port make the same seed.
_PORTS = 1 << 16


class EmulatedBackend(Plain):
    """`config.gpus` GPUs of `config.profile`, in one process and behind one address.

    Nothing is computed: sizes and times are real, and an output repeats the first bytes of its request's
    input (core/worker/emulated.py, Echo), before zeros. What
    `config.noise.seed` draws is another sequence at each port, so that processes of one config are
    disturbed apart.
    Raises UnknownName or InvalidConfig for a profile that cannot be read.
    """

    device_name = "emulated"
    exact = True

    def __init__(self, config: WorkerConfig) -> None:
        profile = load_profile(config.profile)
        if config.weights_cache_bytes:
            profile = replace(profile, weights_cache_bytes=config.weights_cache_bytes)
        self._profile = profile
        self.gpus = tuple(
            GpuInfo(i, profile.name, profile.pages, profile.page_bytes) for i in range(config.gpus)
        )
        noise = replace(config.noise, seed=config.noise.seed * _PORTS + config.port)
        self.devices = emulated_gpus(profile, noise, config.gpus, preemptive=config.preempt)
        self._preemptive = config.preempt
        self.loadable = tuple(sorted(profile.models))
        self._echo = Echo()

    def describe(self) -> str:
        profile = self._profile
        return (
            f"{len(self.gpus)} emulated GPU(s), profile {profile.name}, {profile.pages} pages each"
        )

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        done(prepare_emulated(self._profile, effect, now_ns=now_ns(), preemptive=self._preemptive))

    def warm_up(self, event: ModelPrepared) -> bool:
        return True

    def release(self, effect: ReleaseModel) -> None:
        pass

    def evict(self, gpu_id: int, model_id: int) -> None:
        pass

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        self._echo.keep(action_id, frames)

    def drop_inputs(self, action_id: int) -> None:
        self._echo.drop(action_id)

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        marks = self._echo.take(action_id, sizes)
        given = [size for size in sizes if size]
        return [mark.ljust(size, b"\0") for mark, size in zip(marks, given, strict=True)]

    def close(self) -> None:
        pass
