"""The load driver: sends what a workload's engine says is due, and counts what became of it.

It has no timer, socket or event loop. A shell calls `issue_due` at the time it was told (live:
`slosched.clients.load`; in virtual time: `slosched.sim`), so a live run and a simulated one send and
count with the same code. After a stall the driver does not shift its schedule: it sends everything
that is due, and each request keeps its own scheduled time, from which its latency counts. So a driver
or machine that stands still is charged for it, and not the system under test (MLPerf LoadGen's rule;
"coordinated omission").
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from slosched.codes import Code
from slosched.errors import ConnectionLost
from slosched.loadgen.results import StepTally
from slosched.messages import InferReply, ModelInfo
from slosched.telemetry.client_log import NO_ANSWER, ClientRecord
from slosched.units import NS_PER_MS
from slosched.workloads.base import Arrival
from slosched.workloads.engine import Engine

Clock = Callable[[], int]
#: Requests sent in one go after a stall, before answers are read again.
_BURST = 256
#: A closed loop continues after this time if a request failed whose deadline is not known.
_RETRY_NS = 100 * NS_PER_MS


class Answered(Protocol):
    """Called with a request's answer and with the output behind it, if any."""

    def __call__(self, reply: InferReply, output: object = None, /) -> None: ...


class Submitter(Protocol):
    """What sends one request. `on_reply` is called with its answer, never from within `submit`."""

    def submit(
        self,
        model: ModelInfo,
        arrival: Arrival,
        on_reply: Answered,
    ) -> int:
        """Send the request and return its id. Raises ConnectionLost if it cannot go out.

        It may wait for others that are due, until `flush`.
        """

    def flush(self) -> Sequence[int]:
        """Send what waits. Returns the ids of those that could not go out."""

    def cancel(self, request_id: int) -> None:
        """Forget the request; its answer is not wanted any more."""


class LoadDriver:
    """Sends the requests of `engine` through `submitter` and makes a ClientRecord of each.

    `models` are the workload's instances, in its order. `on_record` gets every request once: when it
    is answered, or as NO_ANSWER at the end. `on_due` is called with an absolute time when an answer
    makes a request due sooner than the shell was told (closed loops). Times in ns on `clock`.
    """

    def __init__(
        self,
        submitter: Submitter,
        models: Sequence[ModelInfo],
        engine: Engine,
        *,
        clock: Clock,
        on_record: Callable[[ClientRecord], None] | None = None,
        on_due: Callable[[int], None] | None = None,
    ) -> None:
        self._submitter = submitter
        self._models = models
        self._engine = engine
        self._clock = clock
        self._on_record = on_record
        self._on_due = on_due
        #: request id -> (arrival, scheduled, sent)
        self._outstanding: dict[int, tuple[Arrival, int, int]] = {}
        self._failed_sends = 0
        self._groups = len(engine.groups)
        #: By step, and within a step by group.
        self.tallies = [StepTally() for _ in range(len(engine.steps) * self._groups)]
        self.sent = 0
        self.max_slo_ns = 0
        self.start_ns = 0
        self.step = 0

    @property
    def unanswered(self) -> int:
        return len(self._outstanding)

    def start(self, at_ns: int) -> int | None:
        """Anchor the schedule at `at_ns`, once and for all; return when the first request is due."""
        self.start_ns = at_ns
        return self.next_due_ns()

    @property
    def end_ns(self) -> int:
        """When the workload ends: nothing is due at or after it."""
        return self.start_ns + self._engine.end_ns

    def next_due_ns(self) -> int | None:
        """When the next request is due. None: not before one is answered, or never again."""
        due_ns = self._engine.next_ns()
        return None if due_ns is None else self.start_ns + due_ns

    def issue_due(self) -> int | None:
        """Send what is due and return when the next request is, as `next_due_ns`.

        After a stall that is a bounded burst; the time returned has then passed already.
        """
        try:
            for _ in range(_BURST):
                due_ns = self.next_due_ns()
                if due_ns is None:
                    break
                sent_ns = self._clock()
                if due_ns > sent_ns:
                    break
                # It is removed before it is sent, so that an error while sending cannot repeat it for ever.
                self._issue(self._engine.take(), due_ns, sent_ns)
        finally:
            for request_id in self._submitter.flush():
                self.lost(request_id)
        return self.next_due_ns()

    def _slo_ns(self, arrival: Arrival) -> int:
        """The request's SLO as far as it is known here; 0: the controller's default."""
        return arrival.slo_ns or round(arrival.slo_factor * self._models[arrival.instance].b1_ns)

    def _tally(self, arrival: Arrival) -> StepTally:
        if self._groups == 1:
            return self.tallies[arrival.step]
        return self.tallies[arrival.step * self._groups + self._engine.group(arrival)]

    def _issue(self, arrival: Arrival, scheduled_ns: int, sent_ns: int) -> None:
        model = self._models[arrival.instance]
        tally = self._tally(arrival)
        self.step = arrival.step
        self.sent += 1
        tally.sent += 1
        tally.issue_delays.append(sent_ns - scheduled_ns)
        slo_ns = arrival.slo_ns or round(arrival.slo_factor * model.b1_ns)
        if slo_ns > self.max_slo_ns:
            self.max_slo_ns = slo_ns
        if not tally.slo_ns:
            tally.slo_ns = slo_ns
        try:
            request_id = self._submitter.submit(model, arrival, self._on_reply)
        except Exception as error:
            # Whatever it was, the request counts as sent, so it needs an outcome.
            self._failed_sends += 1
            self._no_answer(-self._failed_sends, (arrival, scheduled_ns, sent_ns))
            if not isinstance(error, ConnectionLost):
                raise
            self._follow(arrival, sent_ns, False, sent_ns + (slo_ns or _RETRY_NS))
            return
        self._outstanding[request_id] = (arrival, scheduled_ns, sent_ns)

    def _on_reply(self, reply: InferReply, output: object = None, /) -> None:
        pending = self._outstanding.pop(reply.request_id, None)
        if pending is None:
            return  # a second answer, of a network that duplicates
        arrival, scheduled_ns, sent_ns = pending
        now_ns = self._clock()
        latency_ns = now_ns - scheduled_ns
        code = reply.code
        tally = self._tally(arrival)
        slo_ns = reply.slo_ns or self._slo_ns(arrival)
        in_time = code == 0 and latency_ns <= slo_ns
        tally.codes[code] = tally.codes.get(code, 0) + 1
        tally.in_time += in_time
        tally.met += reply.deadline_met
        if not tally.slo_ns:  # the controller's default, as its answer states
            tally.slo_ns = slo_ns
        if slo_ns > self.max_slo_ns:
            self.max_slo_ns = slo_ns
        if code == Code.OK:
            tally.latencies.append(latency_ns)
        if self._on_record is not None:
            self._on_record(
                ClientRecord(
                    scheduled_ns,
                    sent_ns - scheduled_ns,
                    latency_ns,
                    reply.request_id,
                    arrival.user_id,
                    reply.model_id,
                    arrival.slo_factor,
                    slo_ns,
                    code,
                    in_time,
                    reply.latency_ns,
                    reply.deadline_met,
                    reply.batch_size,
                    reply.worker_id,
                    reply.gpu_id,
                    reply.cold,
                    reply.predicted_exec_ns,
                    reply.exec_ns,
                )
            )
        self._follow(arrival, now_ns, code == Code.OK, sent_ns + (slo_ns or _RETRY_NS))

    def _follow(self, arrival: Arrival, now_ns: int, ok: bool, deadline_ns: int) -> None:
        start_ns = self.start_ns
        due_ns = self._engine.answered(
            arrival, at_ns=now_ns - start_ns, ok=ok, deadline_ns=deadline_ns - start_ns
        )
        if due_ns is not None and self._on_due is not None:
            self._on_due(start_ns + due_ns)

    def _no_answer(self, request_id: int, pending: tuple[Arrival, int, int]) -> None:
        arrival, scheduled_ns, sent_ns = pending
        tally = self._tally(arrival)
        tally.codes[NO_ANSWER] = tally.codes.get(NO_ANSWER, 0) + 1
        if self._on_record is not None:
            self._on_record(
                ClientRecord(
                    scheduled_ns=scheduled_ns,
                    issue_delay_ns=sent_ns - scheduled_ns,
                    latency_ns=self._clock() - scheduled_ns,
                    request_id=request_id,
                    user_id=arrival.user_id,
                    model_id=self._models[arrival.instance].model_id,
                    slo_factor=arrival.slo_factor,
                    slo_ns=self._slo_ns(arrival) or tally.slo_ns,
                    code=NO_ANSWER,
                    in_time=False,
                )
            )

    def lost(self, request_id: int) -> None:
        """It will not be answered any more: it counts as NO_ANSWER, and a closed loop continues."""
        pending = self._outstanding.pop(request_id, None)
        if pending is None:
            return
        self._no_answer(request_id, pending)
        arrival, _, sent_ns = pending
        deadline_ns = sent_ns + (self._slo_ns(arrival) or _RETRY_NS)
        self._follow(arrival, self._clock(), False, deadline_ns)

    def give_up(self) -> None:
        """Count everything unanswered as NO_ANSWER, and have it forgotten."""
        outstanding, self._outstanding = self._outstanding, {}
        for request_id, pending in outstanding.items():
            self._submitter.cancel(request_id)
            self._no_answer(request_id, pending)
