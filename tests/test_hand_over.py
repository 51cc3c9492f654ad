"""A worker's session between two: the old one is over as soon as its controller has given it up."""

from __future__ import annotations

from slosched.messages import (
    PROTOCOL_VERSION,
    ControllerHello,
    GetWorkerState,
    LoadWeightsResult,
    WorkerWelcome,
)
from slosched.units import NS_PER_MS
from worker_rig import WEIGHTS_NS, VirtualWorker


def test_a_session_that_was_given_up_takes_nothing_while_its_last_work_runs() -> None:
    worker = VirtualWorker().serving(loaded=False)
    worker.load_weights()
    worker.run(NS_PER_MS)
    worker.answers()
    beats, dropped = len(worker.beats), worker.brain.dropped
    worker.give(ControllerHello(PROTOCOL_VERSION, 7, times_lost=1))
    worker.give(GetWorkerState(worker.session, 90))
    worker.load_weights(model_id=1)
    assert worker.answers() == [] and worker.brain.dropped == dropped + 2
    worker.run(WEIGHTS_NS)
    ended, welcome = worker.answers()
    assert isinstance(ended, LoadWeightsResult) and isinstance(welcome, WorkerWelcome)
    assert {beat.session for beat in worker.beats[beats:]} <= {welcome.session}
    worker.run(WEIGHTS_NS)
    assert worker.answers() == [] and worker.brain.free_pages(0) == 10
