"""Lanes: what runs where and when, from the queue to the end of each step.

A GPU has four lanes (Clockwork §4.2): load, input, exec, output. Each runs as many ops at a time as it is wide
(one on a GPU) and keeps the other actions in a queue by (earliest, arrival). The slots of a host, for calls of
functions, are an exec lane of their number with a load lane. The host lane belongs to the worker; models are
prepared there.

The kinds of actions (kinds/) say which steps an action takes; here nothing knows a kind. An action never begins
before its `earliest` nor after its `latest`; nothing is checked against its end. A device that arms is handed
each exec a moment ahead and starts it exactly at its time, in the order of lane_order.py, without waiting for a
decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Any

from slosched.codes import Code
from slosched.core.worker.interface import Launch, ModelPrepared, Op, OpDone, Withdraw, late_reason
from slosched.core.worker.lanes import Role
from slosched.core.worker.ledger import Ledger
from slosched.core.worker.state import Lane, PendingAction, Step

#: Urgent ops that a device is given beside those that its slots hold.
URGENT_AT_ONCE = 1


class Pipeline:
    """Moves the actions on the ledger through the lanes."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.closing = False  # set: no exec begins any more
        self._dirty: list[Lane] = []  # may have something to start
        self._wake: list[tuple[int, int, Lane]] = []  # (time, seq, lane)
        self._ops: dict[int, tuple[Lane, PendingAction[Any]]] = {}  # launched, by op id

    # ------------------------------------------------------------------------------- verbs

    @property
    def idle(self) -> bool:
        """True if no device works."""
        return not self._ops

    def next_wakeup_ns(self) -> int | None:
        return self._wake[0][0] if self._wake else None

    def run_due(self, now_ns: int) -> None:
        """Start everything whose time has come."""
        if not self._dirty and (not self._wake or self._wake[0][0] > now_ns):
            return
        wake, dirty = self._wake, self._dirty
        while wake and wake[0][0] <= now_ns:
            time_ns, _, lane = heappop(wake)
            if lane.wake_ns == time_ns:
                lane.wake_ns = None
            self._touch(lane)
        # A lane can make another one ready (never itself), so the list may grow while it is read.
        for lane in dirty:
            lane.dirty = False
            self._run(lane, now_ns)
        dirty.clear()

    def _run(self, lane: Lane, now_ns: int) -> None:
        """Start what may start; arrange a wake-up for what may not yet."""
        queue, started = lane.queue, lane.started
        due_ns = now_ns + lane.ahead_ns
        if lane.spec.preemptive:
            self._run_urgent(lane, now_ns)
        while queue and queue[0][0] <= due_ns and len(started) < lane.slots:
            action = heappop(queue)[2]
            action.step.start(action, now_ns)
        if queue and len(started) < lane.slots:
            earliest_ns = queue[0][0] - lane.ahead_ns
            if lane.wake_ns is None or earliest_ns < lane.wake_ns:
                lane.wake_ns = earliest_ns
                heappush(self._wake, (earliest_ns, self.ledger.next_seq(), lane))

    def _run_urgent(self, lane: Lane, now_ns: int) -> None:
        """Hand the device what may interrupt what runs, beside what the slots hold, the most urgent first.

        Nothing interrupts a call.
        """
        queue, started, due_ns = lane.queue, lane.started, now_ns + lane.ahead_ns
        if any(each.call is not None for each in started):
            return
        while len(started) < lane.slots + URGENT_AT_ONCE:
            running = max([each.priority for each in started], default=0)
            due = [entry for entry in queue if entry[0] <= due_ns and entry[2].priority > running]
            if not due:
                return
            entry = min(due, key=lambda each: (-each[2].priority, each[0], each[1]))
            queue.remove(entry)
            heapify(queue)
            entry[2].step.start(entry[2], now_ns)

    def _touch(self, lane: Lane) -> None:
        if not lane.dirty:
            lane.dirty = True
            self._dirty.append(lane)

    # --------------------------------------------------------------------- what the kinds call

    def enqueue(self, lane: Lane, earliest_ns: int, action: PendingAction[Any], step: Step) -> None:
        """Let the action wait in `lane`, of the role of `step`, until `earliest_ns`."""
        action.step = step
        heappush(lane.queue, (earliest_ns, self.ledger.next_seq(), action))
        self._touch(lane)

    def launch(self, lane: Lane, action: PendingAction[Any], op: Op) -> None:
        """Give `op` to the device; the action takes a slot of `lane` until the op is done."""
        lane.started.append(action)
        self._ops[op.op_id] = (lane, action)
        self.ledger.effects.append(Launch(op))

    def take_back(self, action: PendingAction[Any]) -> None:
        """The action, which waits in a lane of its GPU, is no longer to start."""
        assert action.gpu is not None
        queue = action.gpu.lanes[action.step.role].queue
        queue[:] = [entry for entry in queue if entry[2] is not action]
        heapify(queue)

    def late(self, action: PendingAction[Any], code: Code, now_ns: int) -> bool:
        """True, and the action has failed, if its window is over."""
        if now_ns <= action.latest_ns:
            return False
        self.ledger.fail(action, code, late_reason(now_ns - action.latest_ns), now_ns)
        return True

    # -------------------------------------------------------------------------------- ends

    def op_done(self, done: OpDone, now_ns: int) -> None:
        """The device finished an op, or gives an armed one back: free its slot, and go on."""
        action = self.op_over(done.op_id)
        action.step.ended(action, done, now_ns)

    def op_over(self, op_id: int) -> PendingAction[Any]:
        """The op takes its slot no longer; returns its action."""
        entry = self._ops.pop(op_id, None)
        if entry is None:
            raise KeyError(f"the device reports op {op_id}, which does not run")
        lane, action = entry
        lane.started.remove(action)
        self._touch(lane)
        return action

    def prepared(self, event: ModelPrepared, now_ns: int) -> None:
        """The host lane finished a preparation."""
        host = self.ledger.host
        action = next((each for each in host.started if each.key == event.action_id), None)
        if action is None:
            raise KeyError(f"model preparation {event.action_id} ended, but does not run")
        host.started.remove(action)
        self._touch(host)
        action.step.ended(action, event, now_ns)

    # --------------------------------------------------------------------------- host lane

    @property
    def preparing(self) -> int:
        """LoadModels that were taken and are not answered."""
        host = self.ledger.host
        return len(host.queue) + len(host.started)

    def activity(self) -> str:
        """A sentence that names the model being prepared; empty if none is."""
        host = self.ledger.host
        if not host.started:
            return ""
        waiting = len(host.queue)
        more = f" ({waiting} more waiting)" if waiting else ""
        return f"preparing {host.started[0].prepares}{more}"

    # -------------------------------------------------------------------------- cancelling

    def cancel_queued(self, reason: str, now_ns: int) -> None:
        """Fail what has not begun, and the preparations; take armed ops back."""
        ledger = self.ledger
        reason = f"cancelled: {reason}"
        for lane in self._lanes():
            if lane.spec.role is Role.OUTPUT:
                continue  # it ran; only its answer is missing
            for action in lane.drain():
                ledger.fail(action, Code.CANCELLED, reason, now_ns)
            if lane.ahead_ns:
                self._withdraw(lane)
        for action in ledger.host.started:
            if action.key in ledger.unanswered:
                ledger.fail(action, Code.CANCELLED, reason, now_ns)

    def _lanes(self) -> Iterator[Lane]:
        yield self.ledger.host
        for gpu in self.ledger.gpus.values():
            yield from gpu.lanes.values()

    def _withdraw(self, lane: Lane) -> None:
        """Ask the device for what it has not begun; what it gives back fails like the queue did."""
        assert lane.gpu is not None
        for op_id, (owner, _) in self._ops.items():
            if owner is lane:
                self.ledger.effects.append(Withdraw(op_id, lane.gpu.gpu_id))
