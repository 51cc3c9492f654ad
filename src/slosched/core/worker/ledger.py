"""The book of a worker: its GPUs, its instances, what is not answered yet, and what goes out.

Every answer leaves through `answer` or `fail`, which take the action off the book, so an action cannot
be answered twice, and what stands on the book when all is quiet was forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence

from slosched.core.worker import results
from slosched.core.worker.interface import DropInputs, Effect, EvictPages, ToController
from slosched.core.worker.link import Link
from slosched.core.worker.state import GpuState, Instance, PendingAction
from slosched.messages import GpuInfo, Infer, Result


class Ledger:
    """Shared by the brain, which accepts actions, and the pipeline, which carries them out."""

    def __init__(self, gpus: Sequence[GpuInfo], link: Link) -> None:
        self.link = link
        self.gpus = {info.gpu_id: GpuState(info) for info in gpus}
        self.instances: dict[int, Instance] = {}  # by model id
        self.unanswered: dict[int, PendingAction] = {}  # by key, in the order of arrival
        self.effects: list[Effect] = []
        self.errors = 0
        self._seq = 0

    def next_seq(self) -> int:
        """A number that was never used: keys, op ids and the order in queues."""
        self._seq += 1
        return self._seq

    def take_effects(self) -> list[Effect]:
        effects, self.effects = self.effects, []
        return effects

    def answer(self, action: PendingAction, message: Result, output_of: int | None = None) -> None:
        del self.unanswered[action.key]
        self.effects.append(ToController(action.peer, message, output_of))

    def fail(self, action: PendingAction, code: int, reason: str, now_ns: int) -> None:
        self.errors += 1
        self.release_use(action)
        if isinstance(action.message, Infer):
            self.effects.append(DropInputs(action.key))
        self.answer(action, results.failed(action, self.link.clock, code, reason, now_ns=now_ns))

    def release_use(self, action: PendingAction) -> None:
        if action.uses is not None and action.instance is not None:
            action.uses.release(action.instance.model_id)
            action.uses = None

    def evict(self, gpu: GpuState, model_id: int) -> None:
        gpu.cache.evict(model_id)
        self.effects.append(EvictPages(gpu.gpu_id, model_id))
