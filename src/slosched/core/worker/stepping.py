"""One step of a worker: take in what has finished, decide, start what follows, until nothing more follows.

The live loop and the simulator both drive a brain and its devices through this class, and both in event time:
`run_until` steps at each armed time in order with `now` = that time. An emulated GPU is therefore exact: an
op that ended at t frees its slot at t, and the next action starts at t, even if the host process was woken a
millisecond later. A real device's loop calls `step` with the clock's time.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from heapq import heappop, heappush

from slosched.core.worker.brain import WorkerBrain
from slosched.core.worker.interface import Device, Effect, Event, Launch, Withdraw


class Stepper:
    """Drives `brain` and its `devices` (by GPU id). `perform` gets every effect but Launch and Withdraw.

    `perform(effect, now_ns)` may answer a PrepareModel at once by calling `handle`. A steady device is asked
    for its next event only after a launch or a poll; any other device is asked each time.
    """

    def __init__(
        self,
        brain: WorkerBrain,
        devices: Mapping[int, Device],
        perform: Callable[[Effect, int], None],
    ) -> None:
        self._brain = brain
        brain.skip_empty_copies(
            {gpu_id for gpu_id, device in devices.items() if device.free_copies}
        )
        for gpu_id, device in devices.items():
            brain.arm_ahead(gpu_id, device.arm_ahead_ns)
        self._devices = tuple(devices.values())
        self._place = {gpu_id: place for place, gpu_id in enumerate(devices)}
        self._unsteady = [p for p, device in enumerate(self._devices) if not device.steady]
        #: Next events of the steady devices: (time, place), and the valid time of each place.
        self._events: list[tuple[int, int]] = []
        self._event_ns: list[int | None] = [None] * len(self._devices)
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
        events, valid_ns = self._events, self._event_ns
        while events:
            event_ns, place = events[0]
            if valid_ns[place] == event_ns:
                if due_ns is None or event_ns < due_ns:
                    due_ns = event_ns
                break
            heappop(events)
        for place in self._unsteady:
            asked_ns = self._devices[place].next_event_ns()
            if asked_ns is not None and (due_ns is None or asked_ns < due_ns):
                due_ns = asked_ns
        return due_ns

    def run_until(self, until_ns: int) -> None:
        """Step at every armed time up to `until_ns`, in order. Does not step at `until_ns` itself."""
        due_ns = self.next_due_ns()
        while due_ns is not None and due_ns <= until_ns:
            self.step(due_ns)
            due_ns = self.next_due_ns()

    def step(self, now_ns: int) -> None:
        """Do everything that can happen at `now_ns`, including what follows from it without delay."""
        now_ns = self.now_ns = max(now_ns, self.now_ns)
        brain = self._brain
        again = True
        while again:
            self._handled = again = False
            for effect in brain.schedule(now_ns=now_ns):
                if isinstance(effect, Launch):
                    place = self._place[effect.op.gpu_id]
                    device = self._devices[place]
                    done = device.launch(effect.op, now_ns=now_ns)
                    if done is not None:
                        brain.handle(done, now_ns=now_ns)
                        again = True
                    elif device.steady:
                        self._note(place, device.next_event_ns())
                elif isinstance(effect, Withdraw):
                    done = self._devices[self._place[effect.gpu_id]].withdraw(effect.op_id)
                    if done is not None:
                        brain.handle(done, now_ns=now_ns)
                        again = True
                else:
                    self._perform(effect, now_ns)
            events = self._events
            if not self._unsteady and (not events or events[0][0] > now_ns):
                again = again or self._handled
                continue
            for place in self._due_devices(now_ns):
                device = self._devices[place]
                for event in device.poll(now_ns=now_ns):
                    brain.handle(event, now_ns=now_ns)
                    again = True
                if device.steady:
                    self._note(place, device.next_event_ns())
            again = again or self._handled

    def _note(self, place: int, event_ns: int | None) -> None:
        if event_ns != self._event_ns[place]:
            self._event_ns[place] = event_ns
            if event_ns is not None:
                heappush(self._events, (event_ns, place))

    def _due_devices(self, now_ns: int) -> list[int]:
        """Places of the devices that have events to report, ascending."""
        events, due = self._events, []
        while events and events[0][0] <= now_ns:
            event_ns, place = heappop(events)
            if self._event_ns[place] == event_ns:
                self._event_ns[place] = None
                due.append(place)
        for place in self._unsteady:
            asked_ns = self._devices[place].next_event_ns()
            if asked_ns is not None and asked_ns <= now_ns:
                due.append(place)
        due.sort()
        return due
