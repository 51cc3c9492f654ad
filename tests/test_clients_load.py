"""The load driver on a clock of its own, and over real sockets."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from fake_controller import B1_NS, FakeController, model_info
from slosched.clients.aio import connect
from slosched.clients.inference import Model
from slosched.clients.load import LiveLoad, steady_process
from slosched.clients.session import OnLost, OnReply
from slosched.errors import ConnectionLost, InvalidConfig
from slosched.loadgen.driver import LoadDriver
from slosched.loadgen.inputs import InputPool
from slosched.messages import InferReply, InferRequest
from slosched.telemetry.client_log import ClientRecord
from slosched.transport.codec import Frame
from slosched.workloads.engine import Engine
from slosched.workloads.slo_exp_1 import parse_slo_exp_1

MS = 1_000_000
START = 10**18


class FakeClient:
    """Takes requests; answers when told to. Each send takes `send_ns` on the clock."""

    def __init__(self) -> None:
        self.on_lost: OnLost | None = None
        self.now_ns = START
        self.send_ns = 0
        self.broken = False
        self.bug: Exception | None = None  # raised by each submit
        self.sent: list[tuple[int, int, dict[str, Any]]] = []  # (time, request id, fields)
        self.cancelled: list[int] = []
        self._on_reply: dict[int, OnReply] = {}

    def clock(self) -> int:
        return self.now_ns

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
    ) -> int:
        if self.broken:
            raise ConnectionLost("no connection", code=1)
        if self.bug is not None:
            raise self.bug
        request_id = len(self.sent) + 1
        fields = {
            "model_id": model.model_id,
            "slo_factor": slo_factor,
            "slo_ns": slo_ns,
            "frame": frame,
        }
        self.sent.append((self.now_ns, request_id, fields))
        self._on_reply[request_id] = on_reply
        self.now_ns += self.send_ns
        return request_id

    def flush(self) -> tuple[int, ...]:
        return ()

    def cancel(self, request_id: int) -> None:
        self.cancelled.append(request_id)

    def answer(self, request_id: int, code: int = 0, slo_ns: int = 10 * MS) -> None:
        reply = InferReply(request_id, code, "", 0, slo_ns, 3 * MS, code == 0)
        self._on_reply.pop(request_id)(reply, None)


def make(
    text: str, client: FakeClient, records: list[ClientRecord], *, inputs: bool = False
) -> LoadDriver:
    spec = parse_slo_exp_1(text.split())
    infos = [model_info(i) for i in range(spec.copies)]
    return LiveLoad(
        client,
        [Model(info, 7) for info in infos],
        Engine(spec),
        inputs=InputPool(infos) if inputs else None,
        on_record=records.append,
        clock=client.clock,
    ).driver


def test_each_request_goes_out_when_it_is_due() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 1 fixed-rate 100 10ms 10ms 2 mul 1", client, records)
    due = driver.start(START)
    while due is not None:
        client.now_ns = due
        due = driver.issue_due()
    assert [at - START for at, _, _ in client.sent] == [i * 10 * MS for i in range(1, 100)]
    assert {*driver.tallies[0].issue_delays} == {0}


def test_a_stall_never_moves_the_schedule() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 1 fixed-rate 100 10ms 10ms 2 mul 1", client, records)
    due = driver.start(START)
    client.now_ns = START + 10 * MS
    due = driver.issue_due()
    assert due == START + 20 * MS
    client.now_ns = START + 215 * MS  # the machine stood still for 195 ms
    due = driver.issue_due()
    assert due == START + 220 * MS  # and not 10 ms after it woke
    assert len(client.sent) == 21
    # Everything that fell due went out at once, each with its own delay.
    assert [*driver.tallies[0].issue_delays] == [0] + [(215 - 10 * i) * MS for i in range(2, 22)]
    # Latency counts from the scheduled send: all of it 5 ms after the stall.
    client.now_ns = START + 220 * MS
    client.answer(2)
    client.answer(21)
    assert [(r.scheduled_ns - START, r.latency_ns, r.in_time) for r in records] == [
        (20 * MS, 200 * MS, False),
        (210 * MS, 10 * MS, True),
    ]
    assert all(r.deadline_met for r in records)  # the controller saw nothing of the stall
    assert driver.tallies[0].in_time == 1 and driver.tallies[0].met == 2


def test_a_long_stall_is_worked_off_in_bounded_bursts() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 1 fixed-rate 1000 10ms 10ms 2 mul 10", client, records)
    driver.start(START)
    client.now_ns = START + 5_000 * MS
    due = driver.issue_due()
    assert due is not None and due < client.now_ns  # at once again, after the answers were read
    assert 0 < len(client.sent) < 1000
    while due is not None and due <= client.now_ns:
        due = driver.issue_due()
    assert len(client.sent) == 5000
    assert due == START + 5_001 * MS


def test_a_slow_sender_is_charged_and_not_the_peer() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    client.send_ns = 15 * MS  # longer than the gap of 10 ms
    driver = make("m 1 fixed-rate 100 10ms 10ms 2 mul 0.1", client, records)
    due = driver.start(START)
    while due is not None:
        client.now_ns = max(client.now_ns, due)
        due = driver.issue_due()
    assert [*driver.tallies[0].issue_delays] == [5 * MS * i for i in range(9)]


def test_records_say_who_judges() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 2 fixed-rate 200 1 2 2 mul 0.02", client, records)
    driver.start(START)
    for at in (10, 20, 30):
        client.now_ns = START + at * MS
        driver.issue_due()
    client.now_ns = START + 32 * MS
    client.answer(1, code=8, slo_ns=B1_NS)
    client.answer(6, slo_ns=2 * B1_NS)
    first, last = records
    assert (first.user_id, first.code, first.in_time, first.slo_factor) == (0, 8, False, 1.0)
    assert (last.user_id, last.code, last.in_time, last.slo_factor) == (1, 0, True, 2.0)
    assert last.slo_ns == 2 * B1_NS and last.latency_ns == 2 * MS
    assert driver.tallies[0].codes == {8: 1} and driver.tallies[1].codes == {0: 1}
    assert [*driver.tallies[0].latencies] == []  # a refusal has no latency to boast of


def test_what_is_never_answered_is_counted_as_no_answer() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 1 fixed-rate 100 10ms 10ms 2 mul 0.05", client, records)
    driver.start(START)
    client.now_ns = START + 40 * MS
    assert driver.issue_due() is None
    client.answer(2)
    driver.give_up()
    driver.give_up()
    assert [r.code for r in records] == [0, -1, -1, -1]
    assert client.cancelled == [1, 3, 4] and driver.unanswered == 0
    assert all(not r.in_time and r.slo_ns == 10 * MS for r in records[1:])
    assert driver.tallies[0].codes == {0: 1, -1: 3} and driver.tallies[0].sent == 4


def test_sends_that_fail_are_counted_and_the_run_goes_on() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 1 fixed-rate 100 10ms 10ms 2 mul 0.05", client, records)
    driver.start(START)
    client.broken = True
    client.now_ns = START + 20 * MS
    driver.issue_due()
    client.broken = False
    client.now_ns = START + 30 * MS
    driver.issue_due()
    assert [r.code for r in records] == [-1, -1]
    assert driver.tallies[0].sent == 3 and driver.unanswered == 1


def test_no_error_leaves_the_timer_callback_and_what_was_sent_counts() -> None:
    async def work() -> None:
        client, records = FakeClient(), list[ClientRecord]()
        client.bug = KeyError("no such thing")
        unhandled: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, what: unhandled.append(what))
        spec = parse_slo_exp_1(["m", "1", "fixed-rate", "100", "10ms", "10ms", "2", "mul", "20"])
        live = LiveLoad(
            client, [Model(model_info(0), 7)], Engine(spec), inputs=None, on_record=records.append
        )
        problem = await asyncio.wait_for(live.run(asyncio.Event()), 10)
        driver = live.driver
        assert "KeyError" in problem and "no such thing" in problem
        assert not unhandled
        assert driver.sent == len(records) == 1
        assert driver.tallies[0].codes == {-1: 1}

    asyncio.run(work())


def test_inputs_are_a_pool_of_the_models_shape_and_dtype() -> None:
    client, records = FakeClient(), list[ClientRecord]()
    driver = make("m 2 fixed-rate 200 10ms 10ms 2 mul 0.5", client, records, inputs=True)
    driver.start(START)
    client.now_ns = START + 500 * MS
    driver.issue_due()
    frames = [fields["frame"] for _, _, fields in client.sent]
    arrays = [np.frombuffer(frame, np.float32).reshape(3, 4) for frame in frames]
    assert len({a.tobytes() for a in arrays}) == 32
    assert abs(float(np.mean(arrays))) < 0.3 and 0.7 < float(np.std(arrays)) < 1.3


@pytest.mark.parametrize(
    ("dtype", "low", "high"),
    [("uint8", 0, 255), ("int64", 0, 255), ("int8", 0, 127), ("bool", 0, 1)],
)
def test_integer_inputs_stay_within_their_range(dtype: str, low: int, high: int) -> None:
    pool = InputPool([model_info(3, shape=(500,), dtype=dtype)])
    values = np.frombuffer(pool.frame(3, 0), dtype).astype(np.int64)
    assert values.min() == low and values.max() >= high * 0.9 and values.max() <= high


def test_big_inputs_keep_the_pool_small() -> None:
    pool = InputPool([model_info(0, shape=(3, 1024, 1024))])
    distinct = {id(pool.frame(0, seq).obj) for seq in range(100)}
    assert len(distinct) == 2


def test_a_dtype_that_numpy_has_not() -> None:
    with pytest.raises(
        InvalidConfig, match="float12"
    ):  # bfloat16 is one where ml_dtypes is imported
        InputPool([model_info(0, dtype="float12")])


def test_the_driver_over_real_sockets() -> None:
    async def work() -> None:
        records: list[ClientRecord] = []
        spec = parse_slo_exp_1(["toy", "2", "poisson", "400", "2s", "2s", "2", "mul", "0.5"])
        with FakeController() as controller:
            async with connect(controller.address) as client:
                models = await client.load("toy", 2)
                infos = [model.info for model in models]
                live = LiveLoad(
                    client,
                    models,
                    Engine(spec, seed=1),
                    inputs=InputPool(infos),
                    on_record=records.append,
                )
                with steady_process():
                    assert await live.run(asyncio.Event()) == ""
                driver = live.driver
                expected = [*spec.arrivals(1)]
                assert sorted((r.scheduled_ns - driver.start_ns, r.user_id) for r in records) == [
                    (a.at_ns, a.user_id) for a in expected
                ]
                assert all(r.issue_delay_ns >= 0 for r in records)
                assert {r.code for r in records} == {0}
                requests = controller.of(InferRequest)
                assert len(requests) == len(expected)
                assert all(isinstance(r, InferRequest) and r.shape == (3, 4) for r in requests)

    asyncio.run(asyncio.wait_for(work(), 30))


def test_more_arrivals_at_one_instant_than_a_burst_holds() -> None:
    async def work() -> None:
        spec = parse_slo_exp_1(["toy", "700", "fixed-rate", "7000", "2s", "2s", "2", "mul", "0.25"])
        with FakeController() as controller:
            async with connect(controller.address) as client:
                models = await client.load("toy", 700)
                live = LiveLoad(client, models, Engine(spec), inputs=None)
                assert await live.run(asyncio.Event()) == ""
        assert live.driver.tallies[0].codes == {0: 1400}

    asyncio.run(asyncio.wait_for(work(), 30))
