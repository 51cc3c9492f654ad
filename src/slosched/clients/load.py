"""The open-loop load driver: every request is sent when it is due, whatever became of the others.

A timerfd wakes the event loop at each arrival. After a stall the driver does not shift its
schedule: it sends everything that is due, and each request keeps its own scheduled time, from which
its latency counts. So a driver or machine that stands still is charged for it, and not the system
under test (MLPerf LoadGen's rule; "coordinated omission").
"""

from __future__ import annotations

import asyncio
import gc
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import numpy as np

from slosched.clients.session import OnReply
from slosched.clock import Clock, Timer, now_ns, set_timer_slack
from slosched.codes import Code
from slosched.errors import ConnectionLost, InvalidConfig
from slosched.messages import InferReply, ModelInfo
from slosched.telemetry.client_log import NO_ANSWER, ClientRecord
from slosched.transport.codec import Frame
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads.base import Arrival

#: Answers are awaited for the largest SLO sent and this much longer.
GRACE_NS = 2 * NS_PER_S
_START_AFTER_NS = 50 * NS_PER_MS
_POLL_S = 0.2
_DRAIN_POLL_S = 0.02
#: Requests sent in one go after a stall, before answers are read again.
_BURST = 256
_POOL_BYTES = 16 * 1024 * 1024
_POOL_ARRAYS = 32


class Submitter(Protocol):
    """The cheap path of AsyncClient: `submit` and `cancel`."""

    def submit(
        self,
        model_id: int,
        *,
        slo_factor: float,
        slo_ns: int,
        user_id: int,
        frame: Frame | None,
        on_reply: OnReply,
    ) -> int: ...

    def cancel(self, request_id: int) -> None: ...


class InputPool:
    """Random inputs, made once and sent again and again without a copy.

    Floats are standard normal, integers within 0..255, as a model's input shape and dtype ask.
    Models of equal shape and dtype share their arrays. Raises InvalidConfig for a dtype that numpy
    has not.
    """

    def __init__(self, models: Sequence[ModelInfo], *, seed: int = 0) -> None:
        self._frames: dict[int, list[memoryview]] = {}
        made: dict[tuple[tuple[int, ...], str], list[memoryview]] = {}
        generator = np.random.default_rng(seed)
        for info in models:
            key = (info.input_shape, info.input_dtype)
            if key not in made:
                made[key] = _random_frames(info, generator)
            self._frames[info.model_id] = made[key]

    def frame(self, model_id: int, seq: int) -> memoryview:
        """The input of the `seq`-th request: bytes in C order."""
        frames = self._frames[model_id]
        return frames[seq % len(frames)]


def _random_frames(info: ModelInfo, generator: np.random.Generator) -> list[memoryview]:
    try:
        dtype = np.dtype(info.input_dtype)
    except TypeError:
        raise InvalidConfig(
            f"model {info.name!r} takes {info.input_dtype}, which numpy cannot make; "
            "use --no-inputs"
        ) from None
    nbytes = max(1, int(np.prod(info.input_shape)) * dtype.itemsize)
    count = max(2, min(_POOL_ARRAYS, _POOL_BYTES // nbytes))
    frames = []
    for _ in range(count):
        if dtype.kind == "f":
            values = generator.standard_normal(info.input_shape).astype(dtype)
        else:
            high = 2 if dtype.kind == "b" else 128 if dtype == np.int8 else 256
            values = generator.integers(0, high, info.input_shape).astype(dtype)
        frames.append(memoryview(values.tobytes()))
    return frames


class StepTally:
    """What is counted while the requests of one SLO step are sent and answered."""

    __slots__ = ("codes", "in_time", "issue_delays", "latencies", "met", "sent", "slo_ns")

    def __init__(self) -> None:
        self.sent = 0
        self.in_time = 0  # client: code 0 within the SLO of the scheduled send
        self.met = 0  # controller: within the SLO of the arrival there
        self.slo_ns = 0
        self.codes: dict[int, int] = {}
        self.latencies = array("q")  # of code 0, from the scheduled send
        self.issue_delays = array("q")

    @property
    def answered(self) -> int:
        """Requests that have ended, with an answer or without."""
        return sum(self.codes.values())


class OpenLoopDriver:
    """Sends `arrivals` through `client` and makes a ClientRecord of each.

    `models` are indexed by an arrival's `user_id`. `on_record` gets every request once: when it is
    answered, or as NO_ANSWER at the end. `clock` stands in for the real one in tests, which call
    `issue_due` themselves.
    """

    def __init__(
        self,
        client: Submitter,
        models: Sequence[ModelInfo],
        arrivals: Iterator[Arrival],
        *,
        steps: int,
        inputs: InputPool | None,
        on_record: Callable[[ClientRecord], None] | None = None,
        clock: Clock = now_ns,
    ) -> None:
        self._client = client
        self._models = models
        self._arrivals = arrivals
        self._next: Arrival | None = next(arrivals, None)
        self._inputs = inputs
        self._on_record = on_record
        self._clock = clock
        #: request id -> (arrival, scheduled, sent); times in ns on `clock`
        self._outstanding: dict[int, tuple[Arrival, int, int]] = {}
        self._failed_sends = 0
        self._max_slo_ns = 0
        self.tallies = [StepTally() for _ in range(steps)]
        self.start_ns = 0
        self.step = 0

    @property
    def sent(self) -> int:
        return sum(tally.sent for tally in self.tallies)

    @property
    def unanswered(self) -> int:
        return len(self._outstanding)

    def start(self, at_ns: int) -> int | None:
        """Anchor the schedule at `at_ns`, once and for all; return when the first request is due."""
        self.start_ns = at_ns
        return None if self._next is None else at_ns + self._next.at_ns

    def issue_due(self) -> int | None:
        """Send what is due and return when the next request is, or None after the last one.

        After a stall that is a bounded burst; the time returned has then passed already.
        """
        clock, start_ns = self._clock, self.start_ns
        for _ in range(_BURST):
            arrival = self._next
            if arrival is None:
                return None
            scheduled_ns = start_ns + arrival.at_ns
            sent_ns = clock()
            if scheduled_ns > sent_ns:
                return scheduled_ns
            # Before it is sent: an error on the way must not send the same request for ever.
            self._next = next(self._arrivals, None)
            self._issue(arrival, scheduled_ns, sent_ns)
        return None if self._next is None else start_ns + self._next.at_ns

    def _issue(self, arrival: Arrival, scheduled_ns: int, sent_ns: int) -> None:
        _, seq, user_id, instance, slo_factor, slo_ns, step, _ = arrival
        info = self._models[instance]
        tally = self.tallies[step]
        self.step = step
        tally.sent += 1
        tally.issue_delays.append(sent_ns - scheduled_ns)
        if not tally.slo_ns:
            tally.slo_ns = slo_ns or round(slo_factor * info.b1_ns)
            self._max_slo_ns = max(self._max_slo_ns, tally.slo_ns)
        try:
            request_id = self._client.submit(
                info.model_id,
                slo_factor=slo_factor,
                slo_ns=slo_ns,
                user_id=user_id,
                frame=None if self._inputs is None else self._inputs.frame(info.model_id, seq),
                on_reply=self._on_reply,
            )
        except Exception as error:
            # Whatever it was, the request counts as sent, so it needs an outcome.
            self._failed_sends += 1
            self._no_answer(-self._failed_sends, (arrival, scheduled_ns, sent_ns))
            if not isinstance(error, ConnectionLost):
                raise
            return
        self._outstanding[request_id] = (arrival, scheduled_ns, sent_ns)

    def _on_reply(self, reply: InferReply, output: Frame | None) -> None:
        arrival, scheduled_ns, sent_ns = self._outstanding.pop(reply.request_id)
        latency_ns = self._clock() - scheduled_ns
        code = reply.code
        tally = self.tallies[arrival.step]
        slo_ns = reply.slo_ns or tally.slo_ns
        in_time = code == 0 and latency_ns <= slo_ns
        tally.codes[code] = tally.codes.get(code, 0) + 1
        tally.in_time += in_time
        tally.met += reply.deadline_met
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

    def _no_answer(self, request_id: int, pending: tuple[Arrival, int, int]) -> None:
        arrival, scheduled_ns, sent_ns = pending
        tally = self.tallies[arrival.step]
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
                    slo_ns=tally.slo_ns,
                    code=NO_ANSWER,
                    in_time=False,
                )
            )

    def give_up(self) -> None:
        """Count everything unanswered as NO_ANSWER, and tell the controller to forget it."""
        outstanding, self._outstanding = self._outstanding, {}
        for request_id, pending in outstanding.items():
            self._client.cancel(request_id)
            self._no_answer(request_id, pending)

    async def run(
        self,
        stop: asyncio.Event,
        *,
        on_poll: Callable[[], str] = lambda: "",
    ) -> str:
        """Send everything, then wait for the answers. Return why it ended early ("" if it did not).

        Setting `stop` ends the sending. `on_poll` is called about five times a second; words from it
        end the sending too, and so does an error that nobody foresaw, in words. Answers are awaited
        for the largest SLO sent and 2 s, unless `on_poll` had words.
        """
        loop = asyncio.get_running_loop()
        timer = Timer()
        issued, broken = asyncio.Event(), asyncio.Event()
        failure = ""

        def on_timer() -> None:
            nonlocal failure
            try:
                due_ns = self.issue_due()
            except Exception as error:
                # Raised further, it would leave the timer readable, and the loop would call again
                # and again.
                timer.clear()
                failure = f"sending failed: {type(error).__name__}: {error}"
                broken.set()
                return
            if due_ns is None:
                timer.clear()
                issued.set()
            else:
                timer.arm(due_ns)  # which takes the expiry off as well

        why = ""
        waits = [asyncio.ensure_future(event.wait()) for event in (issued, stop, broken)]
        loop.add_reader(timer.fileno(), on_timer)
        try:
            timer.arm(self.start(self._clock() + _START_AFTER_NS))
            if self._next is None:
                issued.set()
            while not (issued.is_set() or stop.is_set() or broken.is_set() or why):
                await asyncio.wait(waits, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                why = on_poll()
        finally:
            loop.remove_reader(timer.fileno())
            timer.close()
            for wait in waits:
                wait.cancel()
        ends_ns = self._clock() + self._max_slo_ns + GRACE_NS
        while self._outstanding and self._clock() < ends_ns and not why:
            await asyncio.sleep(_DRAIN_POLL_S)
            why = on_poll()
        self.give_up()
        return why or failure or ("" if issued.is_set() else "stopped")


@contextmanager
def steady_process() -> Iterator[None]:
    """Keep what is ours from delaying the sends while a load runs; everything is put back after.

    Timers wake within 1 us and not 50; what exists is taken out of the garbage collector's scans,
    which run seldom; another thread (the log's) hands the interpreter back within 0.1 ms.
    """
    thresholds, interval = gc.get_threshold(), sys.getswitchinterval()
    set_timer_slack(1_000)
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 50, 1_000)
    sys.setswitchinterval(1e-4)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
        gc.unfreeze()
        set_timer_slack(0)  # 0 is the thread's default
