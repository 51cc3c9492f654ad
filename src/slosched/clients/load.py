"""A load in real time: a timerfd wakes the event loop whenever a request is due.

What is sent and how it is counted is `slosched.loadgen.driver`'s; here is only the time.
"""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from slosched.clients.inference import Model
from slosched.clients.session import OnLost, OnReply
from slosched.clock import Clock, Timer, now_ns, set_timer_slack
from slosched.loadgen.driver import Answered, LoadDriver
from slosched.loadgen.inputs import InputPool
from slosched.loadgen.progress import FOREVER_NS
from slosched.messages import ModelInfo
from slosched.telemetry.client_log import ClientRecord
from slosched.transport.codec import Frame
from slosched.units import NS_PER_MS, NS_PER_S, format_duration
from slosched.workloads.base import Arrival
from slosched.workloads.engine import Engine

#: Answers are awaited for the largest SLO sent and this much longer.
GRACE_NS = 2 * NS_PER_S
_START_AFTER_NS = 50 * NS_PER_MS
#: A wake-up costs more than a request, here and at the controller. So what is due sooner after one than this,
#: for each request that it sent, waits for the next; its delay is counted like any other. What an answer makes
#: due (closed loops) does not wait.
_APART_NS = 100_000
_APART_AT_MOST_NS = 500_000
_POLL_S = 0.2
_DRAIN_POLL_S = 0.02


class InferClient(Protocol):
    """The cheap path of AsyncClient: `submit`, `flush` and `cancel`, and who hears what is lost."""

    on_lost: OnLost | None

    def submit(
        self,
        model: Model,
        *,
        slo_factor: float,
        slo_ns: int,
        user_id: int,
        frame: Frame | None,
        length: int,
        on_reply: OnReply,
        later: bool,
    ) -> int: ...

    def flush(self) -> Sequence[int]: ...

    def cancel(self, request_id: int) -> None: ...


class _Submitter:
    """Puts a workload's request into the client's words."""

    def __init__(
        self, client: InferClient, models: Sequence[Model], inputs: InputPool | None
    ) -> None:
        self._client, self._inputs = client, inputs
        #: The handles by the ids that the driver knows, which a restarted controller may give to others.
        self._handles = {model.model_id: model for model in models}
        self.cancel = client.cancel
        self.flush = client.flush

    def submit(self, model: ModelInfo, arrival: Arrival, on_reply: Answered) -> int:
        inputs, length, frame = self._inputs, arrival.length, None
        if inputs is not None:
            length = length or max(model.lengths, default=0)
            frame = inputs.frame(model.model_id, arrival.seq, length)
        return self._client.submit(
            self._handles[model.model_id],
            slo_factor=arrival.slo_factor,
            slo_ns=arrival.slo_ns,
            user_id=arrival.user_id,
            frame=frame,
            length=length,
            on_reply=on_reply,
            later=True,
        )


class LiveLoad:
    """Sends the requests of `engine` through `client` when they are due, and counts the answers.

    `models` are the workload's instances, in its order. `on_record` gets every request once.
    `default_slo_ns` is how long the controller gives a request that says nothing (0: not known).
    `clock` stands in for the real one in tests, which call the `driver` themselves.
    """

    def __init__(
        self,
        client: InferClient,
        models: Sequence[Model],
        engine: Engine,
        *,
        inputs: InputPool | None,
        on_record: Callable[[ClientRecord], None] | None = None,
        default_slo_ns: int = 0,
        clock: Clock = now_ns,
    ) -> None:
        self._clock = clock
        self._default_slo_ns = default_slo_ns
        self._endless = engine.end_ns >= FOREVER_NS
        self.driver = LoadDriver(
            _Submitter(client, models, inputs),
            [model.info for model in models],
            engine,
            clock=clock,
            on_record=on_record,
            on_due=self._on_due,
        )
        client.on_lost = lambda request_id, reason: self.driver.lost(request_id)
        #: When the sending ended, after the start; None: at the workload's own end.
        self.sent_until_ns: int | None = None
        self._timer: Timer | None = None
        self._sent_all, self._broken = asyncio.Event(), asyncio.Event()
        self._failure = ""
        self._before = (0, 0)  # (sent, unanswered) at the last look at a load that only waits

    async def run(self, stop: asyncio.Event, *, on_poll: Callable[[], str] = lambda: "") -> str:
        """Send everything, then wait for the answers. Return why it ended early ("" if it did not).

        Setting `stop` ends the sending. `on_poll` is called about five times a second; words from it
        end the sending too, and so does an unexpected error, in words. Answers are awaited
        for the largest SLO sent and 2 s, unless `on_poll` had words.
        """
        driver = self.driver
        loop = asyncio.get_running_loop()
        why = ""
        events = (self._sent_all, stop, self._broken)
        waits = [asyncio.ensure_future(event.wait()) for event in events]
        timer = self._timer = Timer()
        loop.add_reader(timer.fileno(), self._on_timer)
        try:
            start_ns = self._clock() + _START_AFTER_NS
            due_ns = driver.start(start_ns)
            timer.arm(start_ns if due_ns is None else due_ns)
            while not (any(event.is_set() for event in events) or why):
                await asyncio.wait(waits, timeout=_POLL_S, return_when=asyncio.FIRST_COMPLETED)
                why = on_poll()
        finally:
            self._timer = None
            loop.remove_reader(timer.fileno())
            timer.close()
            for wait in waits:
                wait.cancel()
            if self._endless or not self._sent_all.is_set():
                self.sent_until_ns = max(0, self._clock() - driver.start_ns)
        ends_ns = self._clock() + self._patience_ns()
        while driver.unanswered and self._clock() < ends_ns and not why:
            await asyncio.sleep(_DRAIN_POLL_S)
            why = on_poll()
        driver.give_up()
        return why or self._failure or ("" if self._sent_all.is_set() else "stopped")

    def _on_timer(self) -> None:
        timer = self._timer
        assert timer is not None  # it is there as long as the loop calls this
        woke_ns, sent = self._clock(), self.driver.sent
        try:
            due_ns = self.driver.issue_due()
        except Exception as error:
            # Raised further, it would leave the timer readable, and the loop would call again
            # and again.
            timer.clear()
            self._failure = f"sending failed: {type(error).__name__}: {error}"
            self._broken.set()
            return
        if due_ns is None:
            due_ns = self._look_again_ns()
        if due_ns is None:
            timer.clear()
            self._sent_all.set()
        else:
            apart_ns = min(_APART_NS * (self.driver.sent - sent), _APART_AT_MOST_NS)
            # Arming takes the expiry off as well.
            timer.arm(max(due_ns, woke_ns + apart_ns))

    def _look_again_ns(self) -> int | None:
        """Nothing is due before an answer: when to look whether one came. None: it is over."""
        driver, now_ns = self.driver, self._clock()
        if not driver.unanswered or now_ns >= driver.end_ns or self._broken.is_set():
            return None
        seen = (driver.sent, driver.unanswered)
        if seen == self._before:
            waited = format_duration(self._patience_ns())
            self._failure = f"none of the last {seen[1]} requests was answered within {waited}"
            self._broken.set()
            return None
        self._before = seen
        return min(now_ns + self._patience_ns(), driver.end_ns)

    def _patience_ns(self) -> int:
        return max(self.driver.max_slo_ns, self._default_slo_ns) + GRACE_NS

    def _on_due(self, at_ns: int) -> None:
        """An answer made a request due."""
        timer = self._timer
        if timer is not None and (timer.armed_for_ns is None or at_ns < timer.armed_for_ns):
            timer.arm(at_ns)


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
