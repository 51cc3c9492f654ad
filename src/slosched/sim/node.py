"""A worker in virtual time: the worker's brain round emulated GPUs. The live worker's brain and GPUs."""

from __future__ import annotations

from slosched.config import EmulationNoise, GpuProfile
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu, prepare_emulated
from slosched.core.worker.interface import (
    FromController,
    Launch,
    PrepareModel,
    ToController,
)
from slosched.messages import ControllerToWorker, GpuInfo, WorkerToController
from slosched.version import __version__

_PEER = b"controller"


class WorkerNode:
    """One worker process with `gpus` emulated GPUs of `profile`."""

    def __init__(
        self,
        profile: GpuProfile,
        gpus: int,
        *,
        noise: EmulationNoise | None = None,
        incarnation: int = 1,
    ) -> None:
        self._profile = profile
        self.devices = {g: EmulatedGpu(profile, noise, gpu_id=g) for g in range(gpus)}
        infos = [GpuInfo(g, profile.name, profile.pages, profile.page_bytes) for g in range(gpus)]
        self.brain = WorkerBrain(
            infos,
            list(profile.models),
            incarnation=incarnation,
            version=__version__,
            host="virtual",
            pid=incarnation,
            device="emulated",
        )

    def receive(self, message: ControllerToWorker, *, now_ns: int) -> None:
        sizes = tuple(size for size in getattr(message, "input_sizes", ()) if size)
        self.brain.handle(FromController(_PEER, message, sizes), now_ns=now_ns)

    def step(self, *, now_ns: int) -> list[WorkerToController]:
        """Do everything that is due; returns what is sent to the controller."""
        sent: list[WorkerToController] = []
        progress = True
        while progress:
            progress = False
            for device in self.devices.values():
                for done in device.poll(now_ns=now_ns):
                    self.brain.handle(done, now_ns=now_ns)
                    progress = True
            for effect in self.brain.schedule(now_ns=now_ns):
                progress = True
                if isinstance(effect, ToController):
                    sent.append(effect.message)
                elif isinstance(effect, Launch):
                    self.devices[effect.op.gpu_id].launch(effect.op, now_ns=now_ns)
                elif isinstance(effect, PrepareModel):
                    prepared = prepare_emulated(self._profile, effect, now_ns=now_ns)
                    self.brain.handle(prepared, now_ns=now_ns)
        return sent

    def next_wakeup_ns(self) -> int | None:
        times = [d.next_event_ns() for d in self.devices.values()]
        times.append(self.brain.next_wakeup_ns())
        return min((t for t in times if t is not None), default=None)
