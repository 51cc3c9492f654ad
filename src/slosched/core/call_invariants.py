"""What must hold of calls of functions after every step; a part of invariants.py, which tells the story.

- The body of a call begins at most once: one that may have begun is sent again only if its function is
  idempotent, and then once.
- A call goes alone, to a device that serves its function, and a child only while its parent runs or awaits, or
  while the children of calls that ended are being taken back.
- Each child that a call asks for is answered at most once, and only while its parent is outstanding.
- Each call that is answered has one CallDone, right before its RequestDone.
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import ActionType
from slosched.core.scheduler.chains import UNSTARTED
from slosched.core.scheduler.interface import ActionRecord, CallRecord
from slosched.core.scheduler.scheduler import Scheduler
from slosched.core.scheduler.state import Gpu
from slosched.messages import Call, ChildReply

#: Fails with words, and the story of the requests with these keys.
Fail = Callable[[str, tuple[int, ...]], None]


class CallInvariants:
    """Watches the calls of one scheduler. `live` has the keys of unanswered requests."""

    def __init__(self, scheduler: Scheduler, live: dict[int, int], fail: Fail) -> None:
        self._scheduler, self._live, self._fail = scheduler, live, fail
        self._begun: dict[
            int, int
        ] = {}  # by unanswered key: actions in which its body may have begun
        self._answered: dict[
            int, set[int]
        ] = {}  # by outstanding action: children that have an answer
        self._done: int | None = None  # the key of the last CallDone, until its RequestDone

    def sent(self, call: Call, keys: tuple[int, ...], gpu: Gpu | None) -> None:
        """`call` is being sent to `gpu` (None: that was lost within the same step)."""
        what = f"action {call.action_id}"
        if keys != (call.call_id,):
            self._fail(f"{what} is a call of {call.call_id} and carries {keys}", keys)
        instance = self._scheduler.cluster.models.get(call.model_id)
        function = None if instance is None else instance.function
        if instance is None or function is None:
            self._fail(f"{what} calls {call.model_id}, which is not a function", keys)
            return
        if gpu is not None and not gpu.serves(instance):
            self._fail(
                f"{what} calls {instance.name!r} on {gpu.name}, which does not serve it", keys
            )
        begun = self._begun.get(call.call_id, 0)
        if begun > function.idempotent:
            self._fail(f"{what} may run the body of a call a second time", keys)
        under_way = call.parent_id < 0 or self._live.get(call.parent_id, -1) >= 0
        if not under_way and not self._scheduler.chains.taking_back:
            self._fail(f"{what} calls a child of {call.parent_id}, which is not under way", keys)
        self._answered[call.action_id] = set()

    def has_host_part(self, call: Call) -> bool:
        """Whether `call` ran on the host before it had the lane."""
        instance = self._scheduler.cluster.models.get(call.model_id)
        function = None if instance is None else instance.function
        return function is not None and function.prepare_ns > 0

    def ended(self, record: ActionRecord, key: int, *, reported: bool) -> None:
        """The action of a call ended: its worker `reported` that, or was lost."""
        self._answered.pop(record.action_id, None)
        if record.code and (not reported or record.code not in UNSTARTED):
            self._begun[key] = self._begun.get(key, 0) + 1

    def replied(self, reply: ChildReply, keys: tuple[int, ...]) -> None:
        """A child is being answered."""
        answered = self._answered.get(reply.action_id)
        what = f"child {reply.child} of action {reply.action_id}"
        if answered is None:
            self._fail(f"{what} is answered, and that action has ended", keys)
        elif reply.child in answered:
            self._fail(f"{what} is answered a second time", keys)
        else:
            answered.add(reply.child)

    def call_done(self, record: CallRecord) -> None:
        """Telemetry has the call; its RequestDone must be next."""
        if self._done is not None:
            self._fail(f"call {self._done} has a record, and no answer", (self._done,))
        self._done = record.key
        if record.start_ns > record.end_ns or min(record.exec_ns, record.suspended_ns) < 0:
            self._fail(f"the record of call {record.key} has times that cannot be", (record.key,))

    def request_done(self, key: int) -> None:
        done, self._done = self._done, None
        if done is not None and done != key:
            self._fail(f"call {done} has a record, and request {key} is answered next", (done, key))
        self._begun.pop(key, None)

    def recount(self) -> None:
        """Compare with the scheduler's state: each suspended call is an outstanding action."""
        cluster = self._scheduler.cluster
        for gpu in cluster.gpus.values():
            for action_id, action in gpu.suspended.items():
                if cluster.actions.get(action_id) is not action or action in gpu.exec.outstanding:
                    self._fail(f"action {action_id} is suspended on {gpu.name}, and is not", ())
            for action in gpu.prepare.outstanding:
                if action.action_id not in gpu.suspended:
                    self._fail(f"action {action.action_id} prepares on {gpu.name}, and is not", ())
        calls = [i for i, a in cluster.actions.items() if a.action_type is ActionType.CALL]
        if calls != list(self._answered):
            self._fail(f"calls {calls} are outstanding, effects leave {list(self._answered)}", ())
        for key, child in self._scheduler.arrivals.children.items():
            if key not in self._live or child.parent is None:
                self._fail(f"child {key} is kept, and has an answer", (key,))
