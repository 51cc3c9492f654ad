"""The backend of the device "none"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

from slosched.core.worker.interface import Device, ModelPrepared, PrepareModel, ReleaseModel
from slosched.daemon.backends.base import Frame, Plain
from slosched.messages import GpuInfo


class NoModels(Plain):
    """A backend without models and GPUs, for a worker that runs functions in the slots of its host alone."""

    device_name = "none"
    exact = False
    gpus: Sequence[GpuInfo] = ()
    devices: Mapping[int, Device] = MappingProxyType({})
    loadable: Sequence[str] = ()

    def describe(self) -> str:
        return ""

    def prepare(self, effect: PrepareModel, *, done: Callable[[ModelPrepared], None]) -> None:
        raise AssertionError("there is no model to prepare")

    def warm_up(self, event: ModelPrepared) -> bool:
        return True

    def release(self, effect: ReleaseModel) -> None:
        pass

    def evict(self, gpu_id: int, model_id: int) -> None:
        pass

    def keep_inputs(self, action_id: int, frames: Sequence[Frame]) -> None:
        pass

    def drop_inputs(self, action_id: int) -> None:
        pass

    def take_outputs(self, action_id: int, sizes: Sequence[int]) -> Sequence[Frame]:
        return ()

    def close(self) -> None:
        pass
