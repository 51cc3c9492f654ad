"""The slots of a simulated worker's host: which functions it offers, and what their calls do.

A frame of a call is a Payload that begins with the call's mark, as that of an inference does (marks.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from slosched.config import PAGE_BYTES, EmulationNoise
from slosched.core.worker.calls import MOST_CALLS
from slosched.core.worker.emulated_calls import EmulatedFunction, EmulatedHost, prepare_function
from slosched.core.worker.interface import ModelPrepared, PrepareModel
from slosched.errors import InvalidConfig
from slosched.messages import Call, CallResult, ChildReply, ChildRequest, GpuInfo
from slosched.sim.marks import Payload

#: Is called when a body begins, with the function and the mark of the call's arguments.
OnBegin = Callable[[str, bytes], None]


@dataclass(frozen=True)
class HostPlan:
    """`slots` calls run at a time on each worker, and `most_calls` are unfinished; its memory has `pages`.

    Raises InvalidConfig for what cannot be.
    """

    functions: tuple[EmulatedFunction, ...]
    slots: int = 1
    most_calls: int = MOST_CALLS
    pages: int = 1024

    def __post_init__(self) -> None:
        names = [each.name for each in self.functions]
        if len(set(names)) < len(names):
            raise InvalidConfig(f"two functions have one name: {', '.join(sorted(names))}")
        if min(self.slots, self.most_calls) < 1 or self.pages < 0:
            raise InvalidConfig("a host needs at least one slot, one call and no page")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(each.name for each in self.functions)

    def info(self, gpu_id: int) -> GpuInfo:
        return GpuInfo(
            gpu_id=gpu_id,
            name="host",
            pages=self.pages,
            page_bytes=PAGE_BYTES,
            slots=self.slots,
            host=True,
        )


class SimHost:
    """The host of one worker process: its device, and the frames of its calls. `tag` is the process's.

    Functions for GPUs run on each of the `gpus`, whose devices are the numbers below that of the host.
    """

    def __init__(
        self,
        plan: HostPlan,
        gpus: int,
        *,
        tag: int,
        on_begin: OnBegin | None = None,
        noise: EmulationNoise | None = None,
    ) -> None:
        self.plan = plan
        self._on_begin = on_begin
        on_host = [each for each in plan.functions if not each.info.gpu]
        on_gpus = [each for each in plan.functions if each.info.gpu]
        self.device = EmulatedHost(
            on_host, plan.slots, gpus, tag=tag, on_begin=self._begins, noise=noise
        )
        #: What runs calls on each GPU, by its number.
        self.on_gpus = {
            gpu_id: EmulatedHost(
                on_gpus,
                1,
                gpu_id,
                tag=tag,
                on_begin=self._begins,
                beside=self.device,
                noise=noise,
            )
            for gpu_id in range(gpus)
            if on_gpus
        }

    def _begins(self, function: str, mark: bytes) -> None:
        """A body begins. Raises AssertionError if that is one too many."""
        if self.device.unfinished > self.plan.most_calls:
            raise AssertionError(f"{self.device.unfinished} calls are unfinished")
        if self._on_begin is not None:
            self._on_begin(function, mark)

    @property
    def running(self) -> int:
        """Calls in slots of the host and on GPUs."""
        return sum(each.running for each in (self.device, *self.on_gpus.values()))

    def prepare(self, effect: PrepareModel, *, now_ns: int) -> ModelPrepared | None:
        """The answer, if the effect is about one of its functions."""
        function = next((each for each in self.plan.functions if each.name == effect.name), None)
        return None if function is None else prepare_function(function, effect, now_ns=now_ns)

    def arrived(self, key: int, message: object, frames: Sequence[Payload]) -> None:
        """A message with this key was taken: keep what came behind it."""
        mark = frames[0].mark if frames else None
        if isinstance(message, ChildReply):
            self.device.deliver(
                key, message.child, code=message.code, reason=message.reason, mark=mark
            )
        elif isinstance(message, Call) and mark is not None:
            self.device.keep_inputs(key, mark)

    def frames(self, key: int, message: object) -> list[Payload]:
        """What follows a message about the call `key`."""
        if isinstance(message, ChildRequest):
            mark, size = self.device.payload(key, message.child), message.input_size
            return [Payload(mark, size)] if size else []
        if isinstance(message, CallResult):
            return [Payload(self.device.take_result(key), *message.output_sizes)]
        return []
