"""Inferences of a client, from the caller's wish to its one end.

waiting --its model is loaded again, or the controller knows us again--> sent
sent --reply--> answered                     a repeated reply finds nothing, and is counted
sent --refused, and it `waits`--> waiting    once: no model saw it, the controller had forgotten us
sent --refused--> answered, with the code of the refusal
sent --the controller was restarted, or could not be reached--> Failed (LOST): it may have run already
sent --its limit has passed, and it is a call--> sent, up to the limit of its function: it runs on
waiting or sent --its limit has passed--> Failed, and cancelled
waiting or sent --five silent ticks, and its SLO is unknown--> Failed (LOST)
"""

from __future__ import annotations

from collections.abc import Callable

from slosched.codes import Code
from slosched.core.client.alarms import Alarms
from slosched.core.client.interface import Effect, Failed, HeldModel, Infer, Why
from slosched.messages import CancelRequest, InferReply, InferRequest
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

#: A bounded request waits for its answer as long as its SLO and this,
GRACE_NS = 5 * NS_PER_S
#: or, where the controller did not say its default SLO, as long as this in all.
UNKNOWN_SLO_LIMIT_NS = 60 * NS_PER_S
#: How long it waits until its model is loaded again.
LOAD_AGAIN_NS = 60 * NS_PER_S
#: While the controller refuses requests at its door, a message leaves only this often, with all that came
#: meanwhile: it takes a message's cost from what the controller could serve. A full one leaves at once.
_GATHER_NS = 2 * NS_PER_MS
#: How long after its last refusal at the door a controller counts as crowded.
_CROWDED_NS = NS_PER_S
#: The longest round trip that is told: a clock that was set must not teach the controller anything.
_LONGEST_ROUND_TRIP_NS = 10 * NS_PER_S


class Requests:
    """The unanswered inferences. Alarms have the keys ("limit", n) and "gather".

    `full` is how many requests one message carries at most. With `from_send`, SLOs count from here, so the
    round trip of each answer is told with a later request.
    """

    def __init__(
        self,
        alarms: Alarms,
        *,
        emit: Callable[[Effect], None],
        address: str,
        full: int,
        grace_ns: int | None,
        from_send: bool,
    ) -> None:
        self._alarms, self._emit = alarms, emit
        self._address = address
        self._full = full
        self._grace_ns = grace_ns
        self._from_send = from_send
        self._sent: dict[int, Infer] = {}
        self._sent_ns: dict[int, int] = {}  # with `from_send` alone
        self._waiting: dict[int, Infer] = {}
        self._tried_again: set[int] = set()
        self._ends_ns: dict[int, int] = {}  # of the callers' own limits
        self._until_silence: dict[int, None] = {}
        self._run_on: set[int] = set()  # calls that were not over at their deadline
        self._later: list[InferRequest] = []  # they leave together
        self._crowded_until_ns = 0
        self._gathering = self._rung = False
        self._round_trip_ns = (
            0  # of the last answer, less its time at the controller; 0: it was told
        )
        self.default_slo_ns = 0
        self.heard = False  # the controller has replied; the brain clears it
        self.repeated = 0  # replies to what is not waited for

    def __len__(self) -> int:
        return len(self._sent) + len(self._waiting)

    def awaits(self, request_id: int) -> bool:
        """True if an answer to it is not thrown away."""
        return request_id in self._sent

    @property
    def gathered(self) -> int:
        """Requests that wait to leave with others."""
        return len(self._later)

    # ------------------------------------------------------------------------------ sending

    def wait(self, request_id: int, event: Infer, now_ns: int) -> None:
        """Keep an inference until its model is loaded again, or the controller knows us again."""
        if event.bounded:
            self._bound(request_id, event, now_ns, ready=False)
        self._waiting[request_id] = event

    def _bound(self, request_id: int, event: Infer, now_ns: int, *, ready: bool) -> None:
        """Set its limit anew: it waits for its model, or it is sent."""
        ends_ns = now_ns + (self._limit_ns(event) if ready else LOAD_AGAIN_NS)
        if event.within_ns:
            ends_ns = min(ends_ns, self._ends_ns.setdefault(request_id, now_ns + event.within_ns))
        self._alarms.set(("limit", request_id), ends_ns)
        if not _slo_ns(event):
            self._until_silence[request_id] = None

    def _limit_ns(self, event: Infer) -> int:
        slo_ns = _slo_ns(event) or self.default_slo_ns
        return slo_ns + self._grace() if slo_ns else UNKNOWN_SLO_LIMIT_NS

    def _grace(self) -> int:
        return GRACE_NS if self._grace_ns is None else self._grace_ns

    def send(self, request_id: int, event: Infer, now_ns: int) -> None:
        """Send an inference: its model is loaded."""
        self._sent[request_id] = event
        if event.bounded:
            self._bound(request_id, event, now_ns, ready=True)
        round_trip_ns = 0
        if self._from_send:
            self._sent_ns[request_id] = now_ns
            round_trip_ns, self._round_trip_ns = self._round_trip_ns, 0
        elif event.bundled and not event.has_input and not event.length:
            self._later.append(  # the cheap case: each further field costs
                InferRequest(
                    request_id=request_id,
                    model_id=event.model.info.model_id,
                    slo_ns=event.slo_ns,
                    slo_factor=event.slo_factor,
                    user_id=event.user_id,
                )
            )
            return
        model = event.model
        message = InferRequest(
            request_id=request_id,
            model_id=model.info.model_id,
            slo_ns=event.slo_ns,
            slo_factor=event.slo_factor,
            user_id=event.user_id,
            sent_ns=0 if event.bundled else now_ns,
            shape=model.shape if event.has_input else (),
            dtype=model.dtype if event.has_input else "",
            length=event.length,
            signature=model.signature if event.has_input else 0,
            round_trip_ns=round_trip_ns,
            near=event.near,
        )
        if event.bundled:
            self._later.append(message)
        else:
            self._emit(message)

    def take_gathered(self, now_ns: int) -> list[InferRequest]:
        """What travels together and leaves now: nothing while the controller is crowded and more may come."""
        later = self._later
        if self._crowded_until_ns and not self._rung and len(later) < self._full:
            if now_ns < self._crowded_until_ns:
                if not self._gathering and later:
                    self._gathering = True
                    self._alarms.set("gather", now_ns + _GATHER_NS)
                return []
            self._crowded_until_ns = 0
        self._gathering = self._rung = False
        self._later = []
        return later

    def gather_no_longer(self) -> None:
        """What has gathered leaves with the next `take_gathered`."""
        self._rung = True

    def sendable_again(self, ready: Callable[[HeldModel], bool], now_ns: int) -> None:
        """Send what waits and can be sent by now."""
        for request_id, event in [*self._waiting.items()]:
            if ready(event.model):
                del self._waiting[request_id]
                self.send(request_id, event, now_ns)

    # ------------------------------------------------------------------------------- ends

    def replied(self, reply: InferReply, now_ns: int) -> None:
        self.heard = True
        request_id = reply.request_id
        event = self._sent.pop(request_id, None)
        if event is None:
            self.repeated += 1
            return
        if self._from_send:
            round_trip_ns = now_ns - self._sent_ns.pop(request_id) - reply.latency_ns
            if 0 < round_trip_ns <= _LONGEST_ROUND_TRIP_NS:
                self._round_trip_ns = round_trip_ns
        if event.bounded:
            self._forget(request_id)
        self._emit(reply)

    def _forget(self, request_id: int) -> None:
        self._alarms.unset(("limit", request_id))
        self._until_silence.pop(request_id, None)
        self._tried_again.discard(request_id)
        self._run_on.discard(request_id)
        self._ends_ns.pop(request_id, None)
        self._sent_ns.pop(request_id, None)

    def overloaded(self, ids: tuple[int, ...], code: int, reason: str, now_ns: int) -> None:
        self._crowded_until_ns = now_ns + _CROWDED_NS
        for request_id in ids:
            self._not_served(request_id, code, reason)

    def refused(self, request_id: int, code: int, reason: str, now_ns: int) -> bool:
        """The controller did not take the request. False if there is none of that id."""
        event = self._sent.get(request_id)
        if event is None:
            return False
        if event.waits and request_id not in self._tried_again:
            self._tried_again.add(request_id)
            del self._sent[request_id]
            self.wait(request_id, event, now_ns)
            return True
        return self._not_served(request_id, code, reason)

    def _not_served(self, request_id: int, code: int, reason: str) -> bool:
        if self._sent.pop(request_id, None) is None:
            return False
        self._forget(request_id)
        self._emit(InferReply(request_id, code, reason, -1, 0, 0, False))
        return True

    def send_failed(self, request_id: int) -> None:
        self._fail(
            request_id,
            Why.LOST,
            f"the controller at {self._address} takes no messages now: there is no connection, or too many "
            "of them wait to be sent",
        )

    def cancel(self, request_id: int) -> None:
        """Its caller gives it up. What was sent is cancelled at the controller as well."""
        if self._waiting.pop(request_id, None) is not None:
            self._forget(request_id)
            return
        if self._sent.pop(request_id, None) is None:
            return
        self._forget(request_id)
        waiting = len(self._later)
        self._later = [each for each in self._later if each.request_id != request_id]
        if len(self._later) == waiting:
            self._emit(CancelRequest(request_id))

    def limit_passed(self, request_id: int, now_ns: int, why_waiting: str) -> None:
        event = self._waiting.get(request_id) or self._sent.get(request_id)
        if event is None:
            return
        name = event.model.info.name
        if event.within_ns and self._ends_ns[request_id] <= now_ns:
            within = format_duration(event.within_ns)
            why, text = (
                Why.LIMIT,
                f"no answer within timeout_s, {within}; the request was cancelled",
            )
        elif request_id in self._waiting:
            why, text = Why.LOST, f"model {name!r} was not loaded again within "
            text += f"{format_duration(LOAD_AGAIN_NS)}{why_waiting}"
        elif request_id in self._run_on:
            why, text = (
                Why.LIMIT,
                f"the call of {name!r} did not end within the limit of its function after its deadline; it "
                "was cancelled",
            )
        elif self._runs_on(request_id, event, now_ns):
            return
        else:
            limit_ns = self._limit_ns(event)
            known = bool(_slo_ns(event) or self.default_slo_ns)
            why, text = (
                Why.LOST,
                (
                    f"the controller at {self._address} did not answer within {format_duration(limit_ns)}"
                    f"{f', the SLO and {format_duration(self._grace())}' if known else ''}; it is gone or "
                    "stands still"
                ),
            )
        self.cancel(request_id)
        self._emit(Failed(request_id, why, text, int(Code.CANCELLED)))

    def _runs_on(self, request_id: int, event: Infer, now_ns: int) -> bool:
        """True for a call that may still run, late as it is: only its function's limit ends it.

        It is waited for as long as the controller is heard.
        """
        function = event.model.info.function
        if function is None:
            return False
        self._run_on.add(request_id)
        self._until_silence[request_id] = None
        ends_ns = now_ns + (function.limit_ns + self._grace() or UNKNOWN_SLO_LIMIT_NS)
        ends_ns = min(ends_ns, self._ends_ns.get(request_id, ends_ns))
        self._alarms.set(("limit", request_id), ends_ns)
        return True

    def silent(self, reason: str) -> None:
        """The controller has fallen silent: requests without a time limit of their own end."""
        for request_id in [*self._until_silence]:
            self._fail(request_id, Why.LOST, reason)

    def withdrawn(self, name: str, reason: str) -> None:
        """What waits for the model `name` has no model any more."""
        for request_id in [i for i, each in self._waiting.items() if each.model.info.name == name]:
            self._fail(request_id, Why.WITHDRAWN, reason)

    def lose_sent(self, reason: str) -> int:
        """The controller that had them is gone; returns how many it had."""
        lost = [*self._sent]
        self._later = []
        for request_id in lost:
            self._fail(request_id, Why.LOST, reason)
        return len(lost)

    def fail_all(self, reason: str) -> None:
        for request_id in [*self._waiting, *self._sent]:
            self._fail(request_id, Why.LOST, reason)
        self._later = []

    def _fail(self, request_id: int, why: Why, reason: str) -> None:
        if self._sent.pop(request_id, None) is None and self._waiting.pop(request_id, None) is None:
            return
        self._forget(request_id)
        self._emit(Failed(request_id, why, reason, int(Code.CANCELLED)))


def _slo_ns(event: Infer) -> int:
    """The SLO as the client knows it; 0: the controller's default."""
    return event.slo_ns or round(event.slo_factor * event.model.info.b1_ns)
