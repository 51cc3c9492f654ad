"""Shedding: what the controller refuses unread when its own core is short.

The core is modelled here: a step costs what it costs, and that takes `1 / cores` of it in real time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from made_messages import a_load_result
from slosched import clock
from slosched.clients.aio import AsyncClient
from slosched.clients.inference import Model
from slosched.codes import Code
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.core.scheduler.delays import Delays
from slosched.core.scheduler.door import NO_LIMIT, Door, fair_parts
from slosched.core.scheduler.state import Instance, ModelState, Request
from slosched.daemon.controller import ControllerServer
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    InferReply,
    InferRequest,
    Refused,
    StatusReply,
    StatusRequest,
    Welcome,
)
from slosched.transport.bundles import NotTaken, ReplyBundle, RequestBundle
from slosched.transport.codec import decode_for_client, encode
from slosched.transport.sockets import Dealer
from slosched.units import NS_PER_MS, NS_PER_S

# ----------------------------------------------------------------------------------- delays


def test_a_clock_that_is_elsewhere_is_no_delay() -> None:
    for offset_ns in (-(2**61), 0, 2**61):
        delays = Delays()
        waited = [
            delays.queued_ns(sent_ns=at * NS_PER_MS + offset_ns, now_ns=at * NS_PER_MS + 300_000)
            for at in range(100)
        ]
        assert waited == [0] * 100


def test_what_a_queue_adds_is_seen_and_a_slow_clock_is_forgotten() -> None:
    delays = Delays()
    assert delays.queued_ns(sent_ns=0, now_ns=1_000) == 0
    assert delays.queued_ns(sent_ns=5_000, now_ns=9_006_000) == 9_000_000
    # 500 us a second for an hour: what was least at first would be seconds away.
    worst = 0
    for at_s in range(1, 3600):
        sent_ns = at_s * NS_PER_S
        now_ns = sent_ns + at_s * 500_000
        worst = max(worst, delays.queued_ns(sent_ns=sent_ns, now_ns=now_ns))
    assert worst <= 21 * 500_000


def test_whatever_a_message_says_of_its_sending_has_a_bound() -> None:
    delays = Delays()
    for sent_ns in (2**62, -(2**62), 0, 1):
        assert 0 <= delays.queued_ns(sent_ns=sent_ns, now_ns=10**18) <= 60 * NS_PER_S


# ------------------------------------------------------------------------------------- door

_SERVE_NS, _REFUSE_NS, _STEP_NS = 50_000, 2_000, 100_000
_SLO_NS = 100 * NS_PER_MS


class _Core:
    """A controller's loop on `cores` of a core, offered `rate` requests each second."""

    def __init__(self, cores: float, *, shedding: bool = True) -> None:
        self.door = Door()
        self.cores, self.shedding = cores, shedding
        self.now_ns = self.cpu_ns = 0
        self._arrivals: list[int] = []
        self._next_ns = 0.0
        self._rng = random.Random(7)

    def run(self, rate: float, seconds: float) -> dict[str, float]:
        """Per second: requests in time, late and refused."""
        end_ns = self.now_ns + int(seconds * NS_PER_S)
        counts = {"good": 0, "late": 0, "refused": 0}
        self._next_ns = float(self.now_ns)
        while self.now_ns < end_ns:
            self._arrive(rate)
            if not self._arrivals:
                self.now_ns = int(self._next_ns) + 1
                continue
            self._step(counts)
        return {name: count / seconds for name, count in counts.items()}

    def _arrive(self, rate: float) -> None:
        while self._next_ns <= self.now_ns:
            self._arrivals.append(int(self._next_ns))
            self._next_ns += self._rng.expovariate(rate) * NS_PER_S

    def _step(self, counts: dict[str, int]) -> None:
        limit = self.door.limit if self.shedding else NO_LIMIT
        waiting, self._arrivals = self._arrivals, []
        taken = waiting[max(0, len(waiting) - limit) :]
        refused = len(waiting) - len(taken)
        waited_ns = self.now_ns - waiting[0]
        cost_ns = _STEP_NS + _SERVE_NS * len(taken)
        self.cpu_ns += cost_ns
        self.now_ns += int((cost_ns + _REFUSE_NS * refused) / self.cores)
        counts["refused"] += refused
        for arrival_ns in taken:
            in_time = self.now_ns + 10 * NS_PER_MS - arrival_ns <= _SLO_NS
            counts["good" if in_time else "late"] += 1
        self.door.step_ended(
            now_ns=self.now_ns,
            cpu_ns=self.cpu_ns,
            took=len(taken),
            waited_ns=waited_ns,
            slo_ns=_SLO_NS,
        )


@pytest.mark.parametrize("cores", [1.0, 0.4, 0.1])
def test_goodput_holds_at_two_to_five_times_what_a_core_carries(cores: float) -> None:
    most = cores * NS_PER_S / _SERVE_NS
    peak = 0.9 * most
    assert _Core(cores).run(peak, 5)["good"] > 0.99 * peak
    for times in (2, 3, 5):
        core = _Core(cores)
        core.run(times * peak, 1)  # until the overload is noticed, and what it left is gone
        counts = core.run(times * peak, 5)
        assert counts["good"] > 0.8 * peak, f"{times}x: {counts}"
        without = _Core(cores, shedding=False)
        without.run(times * peak, 1)
        assert without.run(times * peak, 5)["good"] < 0.05 * peak


def test_below_what_the_core_carries_nothing_is_refused() -> None:
    for share in (0.3, 0.6, 0.8):
        counts = _Core(0.1).run(share * 2_000, 20)
        assert counts["refused"] == counts["late"] == 0, share


def test_after_an_overload_the_door_is_open_again() -> None:
    core = _Core(0.1)
    assert core.run(10_000, 3)["refused"] > 0
    core.run(1_000, 2)
    assert core.door.limit == NO_LIMIT
    assert core.run(1_000, 5)["refused"] == 0


def test_a_burst_and_a_pause_of_the_process_are_served() -> None:
    door = Door()
    now_ns = cpu_ns = 0
    for step in range(2_000):
        now_ns += NS_PER_MS if step % 100 else 45 * NS_PER_MS
        cpu_ns += 500_000
        waited_ns = 44 * NS_PER_MS if step % 100 == 0 else 6 * NS_PER_MS * (step % 100 < 3)
        door.step_ended(now_ns=now_ns, cpu_ns=cpu_ns, took=5, waited_ns=waited_ns, slo_ns=_SLO_NS)
        assert door.limit == NO_LIMIT


@pytest.mark.parametrize("cost_us, share", [(200, 1.0), (200, 0.4), (400, 0.3)])
@pytest.mark.parametrize("messages", [48, 512])
def test_clients_that_keep_some_requests_open_are_served(
    cost_us: int, share: float, messages: int
) -> None:
    """80 calls are open, each answer is followed by the next call, and others may share the busy core."""
    door = Door()
    now_ns = cpu_ns = 0
    unread = [0] * 80  # when each was sent
    for step in range(3_000):
        taken, unread = unread[:messages], unread[messages:]
        waited_ns = now_ns - taken[0]
        cost_ns = _STEP_NS + cost_us * 1_000 * len(taken)
        cpu_ns += cost_ns
        now_ns += int(cost_ns / share)
        unread += [now_ns] * len(taken)
        door.step_ended(
            now_ns=now_ns,
            cpu_ns=cpu_ns,
            took=len(taken),
            waited_ns=waited_ns,
            slo_ns=NS_PER_S,
        )
        assert door.limit == NO_LIMIT, f"step {step}: {waited_ns / NS_PER_MS:.0f} ms"


def test_a_wait_that_takes_most_of_the_slo_is_an_overload_though_few_requests_stand() -> None:
    for slo_ms, is_one in ((1_000, False), (100, False), (50, True)):
        door = Door()
        for step in range(1, 200):
            door.step_ended(
                now_ns=step * 10 * NS_PER_MS,
                cpu_ns=step * 10 * NS_PER_MS,
                took=4,
                waited_ns=40 * NS_PER_MS,
                slo_ns=slo_ms * NS_PER_MS,
            )
        assert (door.limit < NO_LIMIT) is is_one, slo_ms


def test_models_are_taken_whole_in_turn_and_of_the_last_one_the_newest() -> None:
    door = Door()
    models = [5, 7, 5, 9, 7, 5, 9, 9]

    def chosen(most: int) -> list[int]:
        return [place for place, taken in enumerate(door.choose(models, most)) if taken]

    assert chosen(4) == [0, 2, 4, 5]  # model 5, and the newest of 7
    assert chosen(4) == [3, 5, 6, 7]  # then 9 is first, and the newest of 5
    assert chosen(2) == [1, 4]  # and 7
    assert chosen(0) == []
    assert chosen(8) == chosen(99) == list(range(8))


@pytest.mark.parametrize(
    "waiting, most, parts",
    [
        ({"a": 5, "b": 100}, 20, {"a": 5, "b": 15}),
        ({"a": 100, "b": 100}, 20, {"a": 10, "b": 10}),
        ({"a": 1, "b": 2, "c": 300}, 9, {"a": 1, "b": 2, "c": 6}),
        ({"a": 9, "b": 9}, 1, {"a": 1, "b": 0}),
        ({"a": 9}, 20, {"a": 9}),
        ({}, 20, {}),
    ],
)
def test_who_sends_little_is_taken_whole(
    waiting: dict[str, int], most: int, parts: dict[str, int]
) -> None:
    assert fair_parts(waiting, most) == parts


# ---------------------------------------------------------------------------- the controller


@contextlib.asynccontextmanager
async def _serving(directory: Path) -> AsyncIterator[ControllerServer]:
    """A controller without a worker whose door takes two requests in each step, and a model."""
    config = ControllerConfig(
        SchedulerConfig(),
        bind="127.0.0.1",
        port=0,
        workers=("127.0.0.1:9",),
        http_port=-1,
        log_dir=str(directory / "run"),
    )
    server = ControllerServer(config, announce=lambda line: None)
    await server.start()
    server.scheduler.door.limit = 2
    loaded = a_load_result(1, 1)
    server.scheduler.cluster.models[3] = Instance(3, "net", 0, ModelState.LOADED, result=loaded)
    try:
        yield server
    finally:
        await server.close()


async def _join(server: ControllerServer, name: bytes) -> Dealer:
    dealer = Dealer(f"127.0.0.1:{server.port}", identity=name)
    while not dealer.send([encode(ClientHello(PROTOCOL_VERSION, 7))]):
        await asyncio.sleep(0.002)
    assert isinstance(await _next(dealer), Welcome)
    return dealer


async def _next(dealer: Dealer) -> Any:
    while not (received := dealer.receive()):
        await asyncio.sleep(0.002)
    return decode_for_client(received[0][0])


def _flood(first: int, count: int) -> bytes:
    requests = tuple(
        InferRequest(request_id=first + i, model_id=3, slo_ns=_SLO_NS) for i in range(count)
    )
    return encode(RequestBundle(requests, 10**18))


def _run(work: Any) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def test_the_oldest_are_refused_in_one_message_and_what_else_came_is_handled(
    tmp_path: Path,
) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            dealer = await _join(server, b"c-1")
            client = server.scheduler.clients[b"c-1"]
            client.heard = False
            model = server.scheduler.cluster.models[3]
            waiting = Request(1, client, 11, 0, model.queue, 0.0, _SLO_NS, 0)
            client.requests[11] = waiting  # one that was taken before, and comes again
            dealer.send([_flood(10, 5)])
            refused = await _next(dealer)
            assert refused == NotTaken((10, 12), Code.CONTROLLER_OVERLOADED, refused.reason)
            assert "core" in refused.reason
            assert client.heard and server.scheduler.door.refused == 2
            dealer.send([encode(StatusRequest(99, brief=True))])
            status = await _next(dealer)
            while not isinstance(status, StatusReply):
                assert isinstance(status, ReplyBundle | InferReply)  # of what was taken
                status = await _next(dealer)
            counts: Any = status.report["requests"]
            assert counts["refused_at_door"] == 2
            assert counts["arrived"] + counts["invalid"] == 2
            del client.requests[11]
            dealer.close()

    _run(work())


def test_a_wait_at_the_door_counts_against_the_deadline(tmp_path: Path) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            dealer = await _join(server, b"c-3")
            delays = server.scheduler.clients[b"c-3"].delays
            delays.queued_ns(sent_ns=10**18, now_ns=0)  # and the next has waited for the most
            server.scheduler.arrivals.draining = True
            dealer.send([_flood(10, 1)])
            answer = await _next(dealer)
            assert answer.code == Code.SHUTTING_DOWN and answer.latency_ns >= 60 * NS_PER_S
            dealer.close()

    _run(work())


def test_the_client_hears_it_and_sends_less_often(tmp_path: Path) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            client = AsyncClient(f"127.0.0.1:{server.port}")
            await client.open()
            answers: list[InferReply] = []

            def on_reply(reply: InferReply, output: object) -> None:
                answers.append(reply)

            from fake_controller import model_info

            model = Model(model_info(3), client.controller.incarnation)

            def submit(count: int) -> None:
                for _ in range(count):
                    client.submit(model, slo_ns=_SLO_NS, on_reply=on_reply, later=True)

            submit(6)
            assert client.flush() == []
            while len(answers) < 6:
                await asyncio.sleep(0.002)
            codes = [reply.code for reply in answers]
            assert codes.count(Code.CONTROLLER_OVERLOADED) == 4
            submit(3)
            assert (
                client.flush() == [] and client._brain.requests.gathered == 3
            )  # they wait for others
            submit(61)
            assert (
                client.flush() == [] and not client._brain.requests.gathered
            )  # no more fit into one message
            while len(answers) < 70:
                await asyncio.sleep(0.002)
            await client.close()

    _run(work())


def test_what_is_taken_keeps_its_own_input(tmp_path: Path) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            dealer = await _join(server, b"c-5")
            kept: dict[int, bytes] = {}
            handle = server.scheduler.handle

            def noted(event: Any, *, now_ns: int) -> None:
                if isinstance(getattr(event, "message", None), InferRequest):
                    frame = server._values.get(event.input)[0]
                    kept[event.message.request_id] = bytes(frame)
                handle(event, now_ns=now_ns)

            server.scheduler.handle = noted  # type: ignore[method-assign]
            server._steps._rested_ns = (
                clock.now_ns() + 200 * NS_PER_MS
            )  # so that one step reads all
            for request_id in range(20, 26):
                request = InferRequest(
                    request_id=request_id,
                    model_id=3,
                    slo_factor=0.0,
                    slo_ns=_SLO_NS,
                    user_id=0,
                    shape=(4,),
                    dtype="float32",
                    sent_ns=10**18,
                )
                dealer.send([encode(request), bytes([request_id]) * 16])
            codes: list[int] = []
            while len(codes) < 6:
                for frames in dealer.receive():
                    answer: Any = decode_for_client(frames[0])
                    for each in getattr(answer, "replies", (answer,)):
                        codes += [each.code] * len(getattr(each, "request_ids", (0,)))
                await asyncio.sleep(0.002)
            assert len(kept) == 2 and server.scheduler.door.refused == 4
            assert all(frame == bytes([number]) * 16 for number, frame in kept.items())
            dealer.close()

    _run(work())


def test_inputs_in_a_bundle_stay_with_their_requests_when_some_are_refused(tmp_path: Path) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            dealer = await _join(server, b"c-6")
            kept: dict[int, bytes] = {}
            handle = server.scheduler.handle

            def noted(event: Any, *, now_ns: int) -> None:
                if isinstance(getattr(event, "message", None), InferRequest):
                    found = server._values.get(event.input)
                    kept[event.message.request_id] = bytes(found[0]) if found else b""
                handle(event, now_ns=now_ns)

            server.scheduler.handle = noted  # type: ignore[method-assign]
            requests = tuple(
                InferRequest(
                    request_id=number, model_id=3, slo_ns=_SLO_NS, shape=(4,), dtype="float32"
                )
                for number in range(20, 26)
            )
            counts = (1, 0, 1, 1, 0, 1)
            inputs = [bytes([number]) * 16 for number in (20, 22, 23, 25)]
            dealer.send([encode(RequestBundle(requests, 10**18, counts)), *inputs])
            refused = await _next(dealer)
            assert isinstance(refused, NotTaken) and len(refused.request_ids) == 4
            assert len(kept) == 2 and not {*kept} & {*refused.request_ids}
            for number, frame in kept.items():
                assert frame == (bytes([number]) * 16 if counts[number - 20] else b"")
            dealer.close()

    _run(work())


def test_each_request_of_a_client_that_is_not_known_is_refused(tmp_path: Path) -> None:
    async def work() -> None:
        async with _serving(tmp_path) as server:
            server.scheduler.door.limit = NO_LIMIT
            dealer = Dealer(f"127.0.0.1:{server.port}", identity=b"c-7")
            while not dealer.send([_flood(10, 5)]):
                await asyncio.sleep(0.002)
            answers: list[Any] = []
            while len(answers) < 2:
                answers += [decode_for_client(frames[0]) for frames in dealer.receive()]
                await asyncio.sleep(0.002)
            ids: list[int] = []
            for answer in answers:
                assert isinstance(answer, NotTaken | Refused)
                assert answer.code == Code.INVALID_REQUEST and "hello" in answer.reason
                ids += answer.request_ids if isinstance(answer, NotTaken) else (answer.request_id,)
            assert sorted(ids) == [10, 11, 12, 13, 14]
            dealer.close()

    _run(work())
