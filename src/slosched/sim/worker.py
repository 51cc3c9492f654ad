"""A worker's shell in virtual time: it steps its node when something arrives or is due."""

from __future__ import annotations

from collections.abc import Callable

from slosched.core.scheduler.interface import FromWorker
from slosched.messages import (
    ControllerToWorker,
    HeartbeatAck,
    WorkerToController,
    WorkerWelcome,
)
from slosched.sim.kernel import Kernel
from slosched.sim.marks import Framed
from slosched.sim.network import SMALL_MESSAGE_BYTES, Wire
from slosched.sim.node import OURS, WorkerNode
from slosched.units import NS_PER_MS

#: A process that was asked to end refuses actions for at least this long, as the live one does.
_REFUSES_NS = 100 * NS_PER_MS
#: A worker keeps a controller that it heard within a second of its own clock. It certainly keeps one that it
#: heard within this true time, unless its clock was made to jump.
_SURELY_KEPT_NS = 700 * NS_PER_MS


class SimWorker:
    """The place `worker_id` in the controller's list of workers, where a node may be running.

    `to_controller` must be set before anything is received.
    """

    def __init__(self, kernel: Kernel, worker_id: int, node: WorkerNode | None) -> None:
        self.worker_id = worker_id
        self.node = node
        self.to_controller: Wire | None = None
        #: By peer: what delivers the worker's messages to a controller other than ours.
        self.others: dict[bytes, Callable[[WorkerToController], None]] = {}
        #: When our controller answered a heartbeat of the open session; -1: it did not.
        self._heard_ns = -1
        self._serves_ours = False
        self._leaves_ns = -1  # from when it may end, if it was asked to; -1: it was not
        self._kernel = kernel
        self._due_ns = -1  # time of the armed wake-up; -1: there is none
        #: Messages that wait while the process is paused; None: it is not.
        self._held: list[tuple[ControllerToWorker | Framed, bytes]] | None = None

    def receive(self, message: ControllerToWorker | Framed, peer: bytes = OURS) -> None:
        """A message of a controller arrives. It is lost while no node runs."""
        if self._held is not None:
            self._held.append((message, peer))
        elif self.node is not None:
            self._receive(self.node, message, peer)
            self._step(self.node)

    def _receive(self, node: WorkerNode, message: ControllerToWorker | Framed, peer: bytes) -> None:
        now_ns = self._kernel.now_ns
        if peer == OURS and type(message) is HeartbeatAck and self._serves_ours:
            self._heard_ns = max(self._heard_ns, message.sent_ns)
        node.receive(message, now_ns=now_ns, peer=peer)

    def ours_silent_ns(self) -> int | None:
        """How long ago our controller answered a heartbeat. None: too long, or the worker serves another."""
        silent_ns = self._kernel.now_ns - self._heard_ns
        recent = self._serves_ours and self._heard_ns >= 0 and silent_ns < _SURELY_KEPT_NS
        return silent_ns if recent else None

    @property
    def answers(self) -> bool:
        """True if a process runs here and is not paused."""
        return self.node is not None and self._held is None

    @property
    def leaves(self) -> bool:
        """True if the process was asked to end: it refuses every action."""
        return self._leaves_ns >= 0

    @property
    def gpu_count(self) -> int:
        """Its GPUs, and its host's slots, which are one more device."""
        return 0 if self.node is None else self.node.device_count

    def kill(self) -> None:
        """The process vanishes, with everything that it had not sent."""
        self.node = self._held = None
        self._due_ns = self._leaves_ns = self._heard_ns = -1
        self._serves_ours = False

    def leave(self) -> None:
        """The process is asked to end: it says goodbye, and ends as soon as it has nothing left to do."""
        if self.node is None or self._leaves_ns >= 0:
            return
        self.node.leave(now_ns=self._kernel.now_ns)
        self._leaves_ns = self._kernel.now_ns + _REFUSES_NS
        self._kernel.at(self._leaves_ns, self._end, self.node)
        if self._held is None:
            self._step(self.node)

    def _end(self, node: WorkerNode) -> None:
        if node is self.node and self._held is None and node.brain.idle:
            self.kill()

    def pause(self) -> WorkerNode | None:
        """Pause the process: messages to it wait, and its GPUs finish what they run.

        Returns it; None: there is none.
        """
        if self.node is not None and self._held is None:
            self._held = []
        return self.node

    def resume(self, node: WorkerNode | None) -> None:
        """The process `node` continues, unless it has died or was resumed already."""
        if node is None or node is not self.node or self._held is None:
            return
        held, self._held = self._held, None
        for message, peer in held:
            self._receive(node, message, peer)
        self._step(node)

    def jump(self, by_ns: int) -> None:
        """Put the clock of the process that runs here forward by `by_ns`, or back."""
        if self.node is None:
            return
        self.node.jump(by_ns)
        self._heard_ns = -1
        if self._held is None:
            self._step(self.node)

    def start(self, node: WorkerNode) -> None:
        """A (new) process answers here from now on."""
        self.node, self._held = node, None
        self._due_ns = self._leaves_ns = self._heard_ns = -1
        self._serves_ours = False
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
            if type(message) is WorkerWelcome:
                self._serves_ours = True
            if type(message) is Framed:
                result, frames = message
                framed = Framed(FromWorker(self.worker_id, result), frames)
                wire.send(framed, SMALL_MESSAGE_BYTES + sum(map(len, frames)))
            else:
                wire.send(FromWorker(self.worker_id, message))  # type: ignore[arg-type]
        if node.sent_elsewhere:
            sent, node.sent_elsewhere = node.sent_elsewhere, []
            for peer, message in sent:
                self.others[peer](message)
                if type(message) is WorkerWelcome:
                    self._serves_ours = False
        if 0 <= self._leaves_ns <= self._kernel.now_ns and node.brain.idle:
            self.kill()
            return
        due_ns = node.next_wakeup_ns()
        if due_ns is not None and (self._due_ns < 0 or due_ns < self._due_ns):
            self._due_ns = due_ns
            self._kernel.at(due_ns, self._wake, due_ns)
