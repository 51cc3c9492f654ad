"""A worker in virtual time: the live worker's brain, stepper and emulated GPUs, without its sockets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

from slosched.config import EmulationNoise, GpuProfile
from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.calls import MOST_CALLS
from slosched.core.worker.emulated import Echo, EmulatedGpu, emulated_gpus, prepare_emulated
from slosched.core.worker.emulated_calling_gpu import CallingGpu
from slosched.core.worker.emulated_calls import EmulatedHost
from slosched.core.worker.interface import (
    Device,
    DropInputs,
    Effect,
    EndCall,
    FromController,
    PrepareModel,
    ToController,
)
from slosched.core.worker.lanes import gpu_lanes
from slosched.core.worker.stepping import Stepper
from slosched.messages import (
    Call,
    ChildReply,
    ControllerToWorker,
    GpuInfo,
    InferResult,
    WorkerToController,
)
from slosched.sim.hosts import HostPlan, OnBegin, SimHost
from slosched.sim.marks import Framed, Payload
from slosched.units import NS_PER_S
from slosched.version import __version__

#: The peer name of the controller that the simulation is about.
OURS = b"controller"


class WorkerClock:
    """A worker's own clock: off by `offset_ns` and faster by `drift_ppb` (parts per 10^9)."""

    __slots__ = ("_offset_ns", "_since_ns", "drift_ppb")

    def __init__(self, offset_ns: int = 0, drift_ppb: int = 0, *, since_ns: int = 0) -> None:
        self._offset_ns = offset_ns
        self.drift_ppb = drift_ppb
        self._since_ns = since_ns  # true time from which it drifts

    def local_ns(self, true_ns: int) -> int:
        drifted_ns = (true_ns - self._since_ns) * self.drift_ppb // NS_PER_S
        return true_ns + self._offset_ns + drifted_ns

    def true_ns(self, local_ns: int) -> int:
        """The first true time at which the clock shows at least `local_ns`."""
        undrifted_ns = local_ns - self._offset_ns - self._since_ns
        guess_ns = self._since_ns + undrifted_ns * NS_PER_S // (NS_PER_S + self.drift_ppb)
        while self.local_ns(guess_ns) >= local_ns:
            guess_ns -= 1
        while self.local_ns(guess_ns) < local_ns:
            guess_ns += 1
        return guess_ns

    def jump(self, by_ns: int) -> None:
        """Put the clock forward (or back) by `by_ns`."""
        self._offset_ns += by_ns


class WorkerWatch(Protocol):
    """An observer of what a worker process really does (truth.py)."""

    def devices(self, gpus: Mapping[int, EmulatedGpu]) -> Mapping[int, Device]:
        """What the worker drives instead of `gpus`."""

    def heard(self, message: ControllerToWorker, local_ns: int, clock_error_ns: int) -> None:
        """`message` is about to be handled at `local_ns` of the worker's clock, which states this error."""

    def accepted(self, key: int, message: ControllerToWorker, clock_error_ns: int) -> None:
        """An action was taken; its ops have `key`, its window was converted with that error at most."""

    def performed(self, effect: Effect) -> None: ...

    def stepped(self, brain: WorkerBrain) -> None:
        """Everything that was due is done."""

    def jumped(self, by_ns: int) -> None: ...


class WorkerNode:
    """One worker process with `gpus` emulated GPUs of `profile`. Times are true, unless `clock` differs.

    With a `host` it runs calls of functions as well, on the device behind its GPUs, and `on_begin` is
    called when one begins.
    """

    def __init__(
        self,
        profile: GpuProfile,
        gpus: int,
        *,
        noise: EmulationNoise | None = None,
        incarnation: int = 1,
        clock: WorkerClock | None = None,
        watch: WorkerWatch | None = None,
        preemptive: bool = False,
        host: HostPlan | None = None,
        on_begin: OnBegin | None = None,
    ) -> None:
        self._profile, self._preemptive = profile, preemptive
        self._watch = watch
        self._sent: list[WorkerToController | Framed] = []
        #: Messages to other controllers than ours; the caller of `step` takes them out.
        self.sent_elsewhere: list[tuple[bytes, WorkerToController]] = []
        self._echo = Echo()
        self.clock = clock
        infos = [GpuInfo(g, profile.name, profile.pages, profile.page_bytes) for g in range(gpus)]
        self.host = None
        if host is not None:
            infos.append(host.info(gpus))
            self.host = SimHost(host, gpus, tag=incarnation, on_begin=on_begin, noise=noise)
        self.brain = WorkerBrain(
            infos,
            [*profile.models, *(host.names if host else ())],
            incarnation=incarnation,
            version=__version__,
            host="virtual",
            pid=incarnation,
            device="emulated",
            lanes=gpu_lanes(preemptive=preemptive),
            functions=host.names if host else (),
            most_calls=host.most_calls if host else MOST_CALLS,
        )
        self.gpus = emulated_gpus(profile, noise, gpus, preemptive=preemptive)
        devices: dict[int, Device] = {**(self.gpus if watch is None else watch.devices(self.gpus))}
        if self.host is not None:
            devices[gpus] = self.host.device
            for gpu_id, calls in self.host.on_gpus.items():
                devices[gpu_id] = CallingGpu(devices[gpu_id], calls)
        self._stepper = Stepper(self.brain, devices, self._perform)

    def _perform(self, effect: Effect, now_ns: int) -> None:
        if self._watch is not None and not isinstance(effect, PrepareModel):
            self._watch.performed(effect)
        if isinstance(effect, ToController):
            if effect.peer != OURS:
                self.sent_elsewhere.append((effect.peer, effect.message))
                return
            message, frames = effect.message, []
            if effect.output_of is not None:
                frames = self._frames(effect.output_of, message)
            self._sent.append(Framed(message, frames) if frames else message)
        elif isinstance(effect, PrepareModel):
            prepared = None
            if self.host is not None:
                prepared = self.host.prepare(effect, now_ns=now_ns)
            if prepared is None:
                prepared = prepare_emulated(
                    self._profile, effect, now_ns=now_ns, preemptive=self._preemptive
                )
            self._stepper.handle(prepared, now_ns=now_ns)
        elif isinstance(effect, DropInputs):
            self._echo.drop(effect.action_id)
            if self.host is not None:
                self.host.device.drop_inputs(effect.action_id)
        elif isinstance(effect, EndCall) and self.host is not None:
            self.host.device.end(effect.action_id, effect.reason, now_ns=now_ns)

    def _frames(self, action_id: int, message: WorkerToController) -> list[Payload]:
        """What follows a message about the action."""
        if self.host is not None and not isinstance(message, InferResult):
            return self.host.frames(action_id, message)
        sizes: Sequence[int] = getattr(message, "output_sizes", ())
        marks = self._echo.take(action_id, sizes)
        given = [size for size in sizes if size]
        return [Payload(mark, size) for mark, size in zip(marks, given, strict=True)]

    @property
    def device_count(self) -> int:
        """The GPUs, and the host's slots behind them."""
        return len(self.gpus) + (self.host is not None)

    def disturbed(self, gpu_id: int) -> list[EmulatedGpu | EmulatedHost]:
        """What faults of that device disturb."""
        host = self.host
        if host is not None and gpu_id == len(self.gpus):
            return [host.device]
        calls = None if host is None else host.on_gpus.get(gpu_id)
        return [self.gpus[gpu_id]] if calls is None else [self.gpus[gpu_id], calls]

    @property
    def inputs_kept(self) -> int:
        """Actions whose inputs are kept here, and other frames of calls."""
        return self._echo.kept + (self.host.device.frames_kept if self.host is not None else 0)

    def jump(self, by_ns: int) -> None:
        """Put its clock forward by `by_ns`, or back; `step` must follow."""
        if self.clock is None:
            self.clock = WorkerClock()
        self.clock.jump(by_ns)
        if self._watch is not None:
            self._watch.jumped(by_ns)

    def leave(self, *, now_ns: int) -> None:
        """The process is asked to end, at true time `now_ns`; `step` must follow."""
        if self.clock is not None:
            now_ns = self.clock.local_ns(now_ns)
        self.brain.shutdown(now_ns=now_ns)

    def receive(
        self, message: ControllerToWorker | Framed, *, now_ns: int, peer: bytes = OURS
    ) -> None:
        """A message arrives; `step` must follow."""
        if self.clock is not None:
            now_ns = self.clock.local_ns(now_ns)
        frames: Sequence[Payload] = ()
        if isinstance(message, Framed):
            frames = message.frames
            message = cast(ControllerToWorker, message.message)
        sizes = tuple(map(len, frames))
        if self._watch is not None and peer == OURS:
            self._watch.heard(message, now_ns, self.brain.clock_error_ns)
        key = self._stepper.handle(FromController(peer, message, sizes), now_ns=now_ns)
        if self.host is not None and key is not None and isinstance(message, Call | ChildReply):
            self.host.arrived(key, message, frames)
        elif frames and key is not None:
            self._echo.keep(key, [frame.mark for frame in frames])
        if self._watch is not None and key is not None and peer == OURS:
            self._watch.accepted(key, message, self.brain.clock_error_ns)

    def step(self, *, now_ns: int) -> list[WorkerToController | Framed]:
        """Do everything that is due; returns what is sent to the controller."""
        if self.clock is not None:
            now_ns = self.clock.local_ns(now_ns)
        self._stepper.step(now_ns)
        if self._watch is not None:
            self._watch.stepped(self.brain)
        sent = self._sent
        if sent:
            self._sent = []
        return sent

    def waiting_since_ns(self) -> int | None:
        """When the oldest action arrived that has no result yet, in true time. None: there is none."""
        since_ns = self.brain.waiting_since_ns
        return since_ns if since_ns is None or self.clock is None else self.clock.true_ns(since_ns)

    def next_wakeup_ns(self) -> int | None:
        """The true time of the next `step`, if nothing arrives before."""
        due_ns = self._stepper.next_due_ns()
        if due_ns is None or self.clock is None:
            return due_ns
        return self.clock.true_ns(due_ns)
