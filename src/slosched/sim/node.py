"""A worker in virtual time: the live worker's brain, stepper and emulated GPUs, without its sockets."""

from __future__ import annotations

from slosched.config import EmulationNoise, GpuProfile
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.emulated import EmulatedGpu, prepare_emulated
from slosched.core.worker.interface import Effect, FromController, PrepareModel, ToController
from slosched.core.worker.stepping import Stepper
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
        self._sent: list[WorkerToController] = []
        devices = {g: EmulatedGpu(profile, noise, gpu_id=g) for g in range(gpus)}
        brain = WorkerBrain(
            [GpuInfo(g, profile.name, profile.pages, profile.page_bytes) for g in range(gpus)],
            list(profile.models),
            incarnation=incarnation,
            version=__version__,
            host="virtual",
            pid=incarnation,
            device="emulated",
        )
        self._stepper = Stepper(brain, devices, self._perform)

    def _perform(self, effect: Effect, now_ns: int) -> None:
        if isinstance(effect, ToController):
            self._sent.append(effect.message)
        elif isinstance(effect, PrepareModel):
            prepared = prepare_emulated(self._profile, effect, now_ns=now_ns)
            self._stepper.handle(prepared, now_ns=now_ns)

    def receive(self, message: ControllerToWorker, *, now_ns: int) -> None:
        """A message arrives; `step` must follow."""
        sizes = tuple(size for size in getattr(message, "input_sizes", ()) if size)
        self._stepper.handle(FromController(_PEER, message, sizes), now_ns=now_ns)

    def step(self, *, now_ns: int) -> list[WorkerToController]:
        """Do everything that is due; returns what is sent to the controller."""
        self._stepper.step(now_ns)
        sent, self._sent = self._sent, []
        return sent

    def next_wakeup_ns(self) -> int | None:
        return self._stepper.next_due_ns()
