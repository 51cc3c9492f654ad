"""A worker's shell in virtual time: it steps its node when something arrives or is due."""

from __future__ import annotations

from slosched.core.scheduler.interface import FromWorker
from slosched.messages import ControllerToWorker
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES, Wire
from slosched.sim.node import WorkerNode


class SimWorker:
    """The place `worker_id` in the controller's list of workers, where a node may be running.

    `to_controller` must be set before anything is received.
    """

    def __init__(self, kernel: Kernel, worker_id: int, node: WorkerNode | None) -> None:
        self.worker_id = worker_id
        self.node = node
        self.to_controller: Wire | None = None
        self._kernel = kernel
        self._due_ns = -1  # of the armed wake-up; -1: none is
        self._held: list[ControllerToWorker | Framed] | None = (
            None  # a list: the process stands still
        )

    def receive(self, message: ControllerToWorker | Framed) -> None:
        """A message of the controller arrives. Nobody hears it while no node runs."""
        if self._held is not None:
            self._held.append(message)
        elif self.node is not None:
            self.node.receive(message, now_ns=self._kernel.now_ns)
            self._step(self.node)

    @property
    def gpu_count(self) -> int:
        return 0 if self.node is None else len(self.node.gpus)

    def kill(self) -> None:
        """The process vanishes, with everything that it had not sent."""
        self.node = self._held = None
        self._due_ns = -1

    def pause(self) -> WorkerNode | None:
        """The process stands still, and what reaches it waits; its GPUs end what they run.

        Returns it; None: there is none.
        """
        if self.node is not None and self._held is None:
            self._held = []
        return self.node

    def resume(self, node: WorkerNode | None) -> None:
        """The process `node` goes on, unless it has died or went on already."""
        if node is None or node is not self.node or self._held is None:
            return
        held, self._held = self._held, None
        for message in held:
            node.receive(message, now_ns=self._kernel.now_ns)
        self._step(node)

    def jump(self, by_ns: int) -> None:
        """Put the clock of the process that runs here forward by `by_ns`, or back."""
        if self.node is None:
            return
        self.node.jump(by_ns)
        if self._held is None:
            self._step(self.node)

    def start(self, node: WorkerNode) -> None:
        """A (new) process answers here from now on."""
        self.node, self._held = node, None
        self._due_ns = -1
        self._step(node)

    def _wake(self, due_ns: int) -> None:
        if due_ns == self._due_ns and self.node is not None:
            self._due_ns = -1
            if self._held is None:
                self._step(self.node)

    def _step(self, node: WorkerNode) -> None:
        wire = self.to_controller
        assert wire is not None
        for message in node.step(now_ns=self._kernel.now_ns):
            if type(message) is Framed:
                result, frames = message
                framed = Framed(FromWorker(self.worker_id, result), frames)
                wire.send(framed, SMALL_MESSAGE_BYTES + sum(map(len, frames)))
            else:
                wire.send(FromWorker(self.worker_id, message))  # type: ignore[arg-type]
        due_ns = node.next_wakeup_ns()
        if due_ns is not None and (self._due_ns < 0 or due_ns < self._due_ns):
            self._due_ns = due_ns
            self._kernel.at(due_ns, self._wake, due_ns)
