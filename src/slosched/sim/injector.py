"""Carries a fault plan out on a simulated cluster and its client."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, Protocol

from slosched.core.invariants import InvariantViolated
from slosched.core.scheduler.interface import FromClient
from slosched.messages import PROTOCOL_VERSION, ClientHello, DrainWorkerRequest, Goodbye
from slosched.sim.cluster import SimCluster
from slosched.sim.faults import Fault, FaultPlan
from slosched.sim.intruder import Intruder
from slosched.sim.node import WorkerNode

_OPERATOR = b"operator"
#: Incarnations of second controllers begin here, far from the first controller's.
_INTRUDERS = 1_000_000_000


class Pausable(Protocol):
    """A client that can stand still."""

    def pause(self) -> None: ...

    def resume(self) -> None: ...


class Injector:
    """Arms `plan` on the kernel of `cluster`, whose time 0 is now.

    `new_node` makes the process that follows a crash of the worker of that number; its second argument
    counts the crashes. `log` gets a line for each fault that begins or ends.
    """

    def __init__(
        self,
        plan: FaultPlan,
        cluster: SimCluster,
        client: Pausable,
        *,
        new_node: Callable[[int, int], WorkerNode],
        log: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._cluster = cluster
        self._client = client
        self._kernel = cluster.kernel
        self._new_node = new_node
        self._log = log
        self._crashes = self._intruders = 0
        self._down: dict[str, int] = {}  # process -> how many faults keep it down
        self._gpu_faults: dict[tuple[int, int], list[Fault]] = {}  # by (worker, GPU)
        self._links: dict[str, _Disturbed] = {}
        for name, wire in cluster.wires.items():
            # It stays for the whole run: also what is sent later must wait behind what is late.
            link = self._links[name] = _Disturbed(
                Random(f"{plan.seed}/{name}"), lambda: self._kernel.now_ns
            )
            wire.disturb = link
        self._epoch_ns = start_ns = self._kernel.now_ns
        for fault in plan.faults:
            self._kernel.at(start_ns + fault.at_ns, self._begin, fault)

    def _begin(self, fault: Fault) -> None:
        self._log(f"begins: {fault.text().strip()}")
        end = _ACTS[fault.kind](self, fault)
        if end is not None:
            self._kernel.at(self._epoch_ns + fault.end_ns, self._end, (fault, end))

    def _end(self, what: tuple[Fault, Callable[[], None]]) -> None:
        fault, end = what
        self._log(f"ends: {fault.text().strip()}")
        end()

    # -------------------------------------------------------------------------- processes

    def _crash(self, fault: Fault) -> Callable[[], None]:
        self._cluster.workers[fault.worker_id].kill()
        return self._down_until_last(fault.target, self._next_process(fault.worker_id))

    def _next_process(self, worker_id: int) -> Callable[[], None]:
        worker = self._cluster.workers[worker_id]

        def again() -> None:
            self._crashes += 1
            worker.start(self._new_node(worker_id, self._crashes))
            for gpu_id in range(worker.gpu_count):
                self._disturb_gpu(worker_id, gpu_id)

        return again

    def _leave(self, fault: Fault) -> Callable[[], None]:
        worker = self._cluster.workers[fault.worker_id]
        worker.leave()
        again = self._next_process(fault.worker_id)

        def end() -> None:
            worker.kill()  # if what it runs takes longer than its supervisor waits
            again()

        return self._down_until_last(fault.target, end)

    def _intrude(self, fault: Fault) -> Callable[[], None]:
        self._intruders += 1
        incarnation = _INTRUDERS + self._intruders
        return Intruder(self._kernel, self._cluster.workers[fault.worker_id], incarnation).stop

    def _drain(self, fault: Fault) -> Callable[[], None]:
        """It ends well, unless it dies before. A worker is drained by an operator, and taken back."""
        if fault.worker_id >= 0:
            self._operate(fault.worker_id, undo=False)
            return lambda: self._operate(fault.worker_id, undo=True)
        controller = self._cluster.controller
        life = controller.life
        controller.drain()

        def end() -> None:
            if not life or controller.life != life:
                return  # the fault that killed it starts the next one
            if controller.answers:
                controller.abandon()
                left = controller.scheduler.arrived - controller.scheduler.answered
                if left:
                    raise InvariantViolated(
                        f"a drained controller leaves {left} requests unanswered"
                    )
            controller.kill()
            self._cluster.start_controller()

        return end

    def _operate(self, worker_id: int, *, undo: bool) -> None:
        """An operator is there for this one question. One whose controller is gone says nothing to the next."""
        controller = self._cluster.controller
        operators = controller.scheduler.cluster.config.operators
        for message in (
            ClientHello(PROTOCOL_VERSION, 1, operators[0] if operators else ""),
            DrainWorkerRequest(1, str(worker_id), undo),
            Goodbye(),
        ):
            controller.receive(FromClient(_OPERATOR, message))

    def _restart(self, fault: Fault) -> Callable[[], None]:
        self._cluster.controller.kill()
        return self._down_until_last(fault.target, self._cluster.start_controller)

    def _down_until_last(self, process: str, again: Callable[[], None]) -> Callable[[], None]:
        self._down[process] = self._down.get(process, 0) + 1

        def end() -> None:
            self._down[process] -= 1
            if not self._down[process]:
                again()

        return end

    def _pause(self, fault: Fault) -> Callable[[], None]:
        """The first to wake it does, and a process that died meanwhile is not there to be woken."""
        if fault.target == "client":
            self._client.pause()
            return self._client.resume
        if fault.target == "controller":
            controller = self._cluster.controller
            life = controller.pause()
            return lambda: controller.resume(life)
        worker = self._cluster.workers[fault.worker_id]
        node = worker.pause()
        return lambda: worker.resume(node)

    # ------------------------------------------------------------------- GPUs and clocks

    def _on_gpu(self, fault: Fault) -> Callable[[], None]:
        faults = self._gpu_faults.setdefault((fault.worker_id, fault.gpu_id), [])
        faults.append(fault)
        self._disturb_gpu(fault.worker_id, fault.gpu_id)

        def end() -> None:
            faults.remove(fault)
            self._disturb_gpu(fault.worker_id, fault.gpu_id)

        return end

    def _disturb_gpu(self, worker_id: int, gpu_id: int) -> None:
        """The fault is the GPU's, so the process that comes next has it too."""
        node = self._cluster.workers[worker_id].node
        if node is None:
            return
        faults = self._gpu_faults.get((worker_id, gpu_id), [])
        for gpu in node.disturbed(gpu_id):
            gpu.slowdown = max((f.factor for f in faults if f.kind == "slow"), default=1.0)
            gpu.failing = max((f.probability for f in faults if f.kind == "raise"), default=0.0)
            gpu.ending = max((f.probability for f in faults if f.kind == "end"), default=0.0)
            gpu.spoiling = max((f.probability for f in faults if f.kind == "spoil"), default=0.0)

    def _jump(self, fault: Fault) -> None:
        self._cluster.workers[fault.worker_id].jump(fault.by_ns)

    # ------------------------------------------------------------------------------ links

    def _partition(self, fault: Fault) -> Callable[[], None]:
        ends = [self._on_link(f"{way} {fault.target}", fault) for way in ("to", "from")]

        def end() -> None:
            for each in ends:
                each()

        return end

    def _link(self, fault: Fault) -> Callable[[], None]:
        return self._on_link(fault.target, fault)

    def _on_link(self, name: str, fault: Fault) -> Callable[[], None]:
        active = self._links[name].active
        entry = (fault, self._epoch_ns + fault.end_ns)
        active.append(entry)
        return lambda: active.remove(entry)


_ACTS: dict[str, Callable[[Injector, Fault], Callable[[], None] | None]] = {
    "crash": Injector._crash,
    "leave": Injector._leave,
    "intrude": Injector._intrude,
    "restart": Injector._restart,
    "drain": Injector._drain,
    "pause": Injector._pause,
    "slow": Injector._on_gpu,
    "raise": Injector._on_gpu,
    "end": Injector._on_gpu,
    "spoil": Injector._on_gpu,
    "jump": Injector._jump,
    "partition": Injector._partition,
    "hold": Injector._link,
    "lose": Injector._link,
    "late": Injector._link,
    "twice": Injector._link,
}


class _Disturbed:
    """What becomes of each message of one wire (Wire.disturb). `active` has what is wrong now."""

    def __init__(self, draw: Random, now_ns: Callable[[], int]) -> None:
        self.active: list[tuple[Fault, int]] = []  # and when it ends
        self._draw = draw
        self._now_ns = now_ns

    def __call__(self, message: Any) -> tuple[int, ...]:
        delay_ns, again_ns = 0, -1
        for fault, end_ns in self.active:
            if fault.kind == "partition":
                return ()
            if fault.kind == "hold":
                delay_ns = max(delay_ns, end_ns - self._now_ns())
            elif self._draw.random() < fault.probability:
                if fault.kind == "lose":
                    return ()
                by_ns = 1 + int(self._draw.random() * fault.by_ns)
                if fault.kind == "late":
                    delay_ns = max(delay_ns, by_ns)
                else:
                    again_ns = by_ns
        return (delay_ns,) if again_ns < 0 else (delay_ns, delay_ns + again_ns)
