"""Results of calls wait for others while calls wait for a slot, and never for long."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from slosched.config import WorkerConfig
from slosched.daemon import worker_performer as module
from slosched.daemon.worker import WorkerServer
from slosched.functions.payload import decode_result, encode, joined
from slosched.messages import Call, CallResult
from slosched.transport.bundles import ActionBundle, ResultBundle
from slosched.transport.codec import Frame, decode_from_worker
from slosched.transport.codec import encode as encoded
from slosched.units import NS_PER_S
from worker_rig import FOREVER_NS, BareController

pytestmark = [pytest.mark.processes]

CALLS = 40
ARGUMENTS = joined(encode((7,), {}))


class Counting(BareController):
    """Notes how many results of calls each message had."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.together: list[int] = []
        receive = self.dealer.receive

        def noted() -> list[list[Frame]]:
            received = receive()
            for frames in received:
                message = decode_from_worker(frames[0])
                results = message.results if isinstance(message, ResultBundle) else (message,)
                count = sum(isinstance(each, CallResult) for each in results)
                self.together += [count] if count else []
            return received

        self.dealer.receive = noted  # type: ignore[method-assign]

    def call(self) -> Call:
        """One of echo(7)."""
        number = self.action_id()
        return Call(
            session=self.session,
            action_id=number,
            model_id=0,
            gpu_id=0,
            call_id=number,
            earliest_ns=0,
            latest_ns=FOREVER_NS,
            deadline_ns=FOREVER_NS,
            expected_duration_ns=0,
            input_size=len(ARGUMENTS),
        )


@pytest.fixture
def controller(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counting]:
    """It serves a worker with one slot, whose results wait for as long as the other rules let them."""
    monkeypatch.setattr(module, "_HELD_NS", 600 * NS_PER_S)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    config = WorkerConfig(
        device="none", port=0, bind="127.0.0.1", functions=("called_functions",), slots=1
    )
    with WorkerServer(config) as server:
        controller = Counting(server.port)
        controller.hello()
        controller.load("echo")
        yield controller
        controller.close()


def test_results_share_messages_while_calls_wait_for_a_slot(controller: Counting) -> None:
    calls = tuple(controller.call() for _ in range(CALLS))
    bundle = ActionBundle(calls, (1,) * CALLS)
    controller.send_frames([encoded(bundle), *[ARGUMENTS] * CALLS])
    ended: list[int] = []
    while len(ended) < CALLS:
        result, frames = controller.receive()
        assert isinstance(result, CallResult), result
        assert decode_result(frames[0]) == 7
        ended.append(result.action_id)
    assert ended == [call.action_id for call in calls]
    assert sum(controller.together) == CALLS
    # A late turn of the loop may end more calls than are held at most, and a heartbeat takes what waits along.
    assert max(controller.together) > 1
    assert len(controller.together) < CALLS // 2


def test_the_result_of_a_call_goes_at_once_when_none_waits(controller: Counting) -> None:
    for _ in range(3):
        controller.send(controller.call(), ARGUMENTS)
        result, frames = controller.receive()
        assert isinstance(result, CallResult) and decode_result(frames[0]) == 7
    assert controller.together == [1, 1, 1]
