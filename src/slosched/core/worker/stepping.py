"""One step of a worker: what has finished, what is decided on it, what is started, until all is quiet.

The live loop and the simulator both drive a brain and its devices through this class, and both in
event time: `run_until` steps at each armed time in order with `now` = that time. An emulated GPU is
therefore exact: what ended at t frees its executor at t, and the next action starts at t, also if the
host process was woken a millisecond later. A real device's loop calls `step` with the clock's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.interface import Device, Effect, Event, Launch


class Stepper:
    """Drives `brain` and its `devices` (by GPU id). `perform` gets every effect other than Launch.

    `perform(effect, now_ns)` may answer a PrepareModel at once by calling `handle`.
    """

    def __init__(
        self,
        brain: WorkerBrain,
        devices: Mapping[int, Device],
        perform: Callable[[Effect, int], None],
    ) -> None:
        self._brain = brain
        self._devices = dict(devices)
        self._pollable = tuple(devices.values())
        self._perform = perform
        self._handled = False
        self.now_ns = 0  # of the last step; never goes back

    def handle(self, event: Event, *, now_ns: int) -> int | None:
        """Hand a fact to the brain; `step` or `run_until` must follow. Returns the brain's key."""
        self._handled = True
        return self._brain.handle(event, now_ns=max(now_ns, self.now_ns))

    def next_due_ns(self) -> int | None:
        """The next time at which something ends or may start."""
        due_ns = self._brain.next_wakeup_ns()
        for device in self._pollable:
            event_ns = device.next_event_ns()
            if event_ns is not None and (due_ns is None or event_ns < due_ns):
                due_ns = event_ns
        return due_ns

    def run_until(self, until_ns: int) -> None:
        """Step at every armed time up to `until_ns`, in order. Does not step at `until_ns` itself."""
        due_ns = self.next_due_ns()
        while due_ns is not None and due_ns <= until_ns:
            self.step(due_ns)
            due_ns = self.next_due_ns()

    def step(self, now_ns: int) -> None:
        """Everything that can happen at `now_ns`, including what follows from it without delay."""
        now_ns = self.now_ns = max(now_ns, self.now_ns)
        again = True
        while again:
            self._handled = False
            again = False
            for effect in self._brain.schedule(now_ns=now_ns):
                if isinstance(effect, Launch):
                    self._devices[effect.op.gpu_id].launch(effect.op, now_ns=now_ns)
                else:
                    self._perform(effect, now_ns)
            for device in self._pollable:
                event_ns = device.next_event_ns()
                if event_ns is not None and event_ns <= now_ns:
                    for done in device.poll(now_ns=now_ns):
                        self._brain.handle(done, now_ns=now_ns)
                        again = True
            again = again or self._handled
