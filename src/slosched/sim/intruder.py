"""A second controller that wants a worker which is in use: what the worker does then, by its own truth.

It says hello as ours does, until it is welcomed, and then behaves as a controller of its own: it loads a model
under an id that ours uses for another, brings its weights to a GPU, and answers heartbeats. What it sends
is of its own session. A worker that heard our controller within the last second must refuse it.
"""

from __future__ import annotations

from typing import Any

from slosched.core.invariants import InvariantViolated
from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    ControllerToWorker,
    Heartbeat,
    HeartbeatAck,
    LoadModel,
    LoadWeights,
    WorkerRefused,
    WorkerToController,
    WorkerWelcome,
)
from slosched.sim.kernel import Kernel
from slosched.sim.worker import SimWorker
from slosched.units import NS_PER_MS, NS_PER_S, format_duration

_HELLO_EVERY_NS = 150 * NS_PER_MS
_WAY_NS = 200_000
_NEVER_NS = 2**62
_MODEL_ID = 0


class Intruder:
    """Asks for `worker` until it is stopped. `incarnation` is not that of any other controller."""

    def __init__(self, kernel: Kernel, worker: SimWorker, incarnation: int) -> None:
        self._kernel, self._worker = kernel, worker
        self._incarnation = incarnation
        self._peer = f"intruder {incarnation}".encode()
        self._session: int | None = None
        self._stopped = self._refused = False
        self._taken = 0
        worker.others[self._peer] = self._receive
        self._say_hello(None)

    def stop(self) -> None:
        """It goes silent."""
        self._stopped = True

    def _say(self, message: ControllerToWorker) -> None:
        self._kernel.at(self._kernel.now_ns + _WAY_NS, self._arrives, message)

    def _arrives(self, message: ControllerToWorker) -> None:
        worker = self._worker
        silent_ns, answers = worker.ours_silent_ns(), worker.answers
        self._refused = False
        worker.receive(message, self._peer)
        if not isinstance(message, ControllerHello) or self._refused:
            return
        # What was not refused was taken, at once or when the worker goes on: only the first tells when.
        self._taken += 1
        if self._taken == 1 and answers and silent_ns is not None:
            raise InvariantViolated(
                f"worker {worker.worker_id} takes another controller {format_duration(silent_ns)} after it "
                "heard ours"
            )

    def _say_hello(self, _: Any) -> None:
        if not self._stopped and self._session is None:
            self._say(ControllerHello(PROTOCOL_VERSION, self._incarnation, times_lost=0))
            self._kernel.at(self._kernel.now_ns + _HELLO_EVERY_NS, self._say_hello)

    def _receive(self, message: WorkerToController) -> None:
        if isinstance(message, WorkerRefused):
            self._refused = True
        elif isinstance(message, WorkerWelcome):
            self._kernel.at(self._kernel.now_ns + _WAY_NS, self._welcomed, message)
        elif isinstance(message, Heartbeat) and not self._stopped:
            now_ns = self._kernel.now_ns
            self._say(HeartbeatAck(message.sent_ns, now_ns + _WAY_NS, now_ns + _WAY_NS))

    def _welcomed(self, message: WorkerWelcome) -> None:
        if self._stopped or self._session is not None:
            return
        self._session = session = message.session
        name = message.loadable[-1]  # ours begins with the first
        latest_ns = self._kernel.now_ns + NS_PER_S
        self._say(
            LoadModel(
                session=session,
                action_id=1,
                name=name,
                model_id=_MODEL_ID,
                copies=2,
                max_batch=8,
                max_exec_ns=NS_PER_S,
                earliest_ns=0,
                latest_ns=_NEVER_NS,
            )
        )
        self._say(
            LoadWeights(
                session=session,
                action_id=2,
                model_id=_MODEL_ID,
                gpu_id=0,
                earliest_ns=0,
                latest_ns=latest_ns,
                expected_duration_ns=NS_PER_MS,
            )
        )
