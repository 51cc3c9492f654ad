"""Long replies of the controller's shell: made between steps, in turn, and never for a client that is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from big_controller import big_controller
from scheduler_rig import T0
from slosched.core.scheduler.interface import FromClient, StatusAsked
from slosched.core.scheduler.scheduler import Scheduler
from slosched.daemon import long_replies
from slosched.daemon.in_slices import Slice
from slosched.daemon.long_replies import LongReplies
from slosched.daemon.status import status_parts
from slosched.messages import (
    PROTOCOL_VERSION,
    ClientHello,
    Goodbye,
    ListModelsReply,
    Message,
    StatusReply,
)
from slosched.transport.codec import decode_for_client, encode

Sent = list[tuple[bytes, Message]]


def controller(instances: int = 2_000) -> Scheduler:
    scheduler, _ = big_controller(gpus=3, instances=instances)
    scheduler.handle(FromClient(b"c", ClientHello(PROTOCOL_VERSION, 1, "c")), now_ns=T0)
    scheduler.schedule(now_ns=T0)
    return scheduler


def made(scheduler: Scheduler, begin: Callable[[LongReplies], object]) -> tuple[Sent, list[str]]:
    """What was sent for the replies that `begin` asks for, and the errors."""
    sent: Sent = []
    errors: list[str] = []

    def send(client: bytes, message: Message, encoded: bytes) -> None:
        assert encoded == encode(message)
        sent.append((client, decode_for_client(encoded)))

    async def work() -> None:
        replies = LongReplies(scheduler, send=send, failed=lambda e: errors.append(str(e)))
        replies.counted = lambda: {"in_time": 7}
        begin(replies)
        await replies.finish(within_s=10)

    asyncio.run(work())
    return sent, errors


def test_a_short_status_overtakes_a_long_one() -> None:
    def begin(replies: LongReplies) -> None:
        replies.status(StatusAsked(b"c", 1, False))
        replies.status(StatusAsked(b"c", 2, True))

    sent, errors = made(controller(), begin)
    reports = [message for _, message in sent if isinstance(message, StatusReply)]
    assert not errors and [reply.request_id for reply in reports] == [2, 1]
    full: Any = reports[1].report
    assert len(full["models"]) == full["model_instances"] == 2_000
    assert full["counted"] == {"in_time": 7}


def test_all_replies_share_the_slices_of_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """A turn of the loop makes one part, however many clients ask."""
    parts = turns = 0

    def counted(*given: Any, **options: Any) -> Any:
        nonlocal parts
        for part in status_parts(*given, **options):
            parts += 1
            yield part

    async def ticking() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    monkeypatch.setattr(long_replies, "status_parts", counted)
    monkeypatch.setattr(Slice, "is_over", lambda slice_: True)
    tickers: list[asyncio.Task[None]] = []

    def begin(replies: LongReplies) -> None:
        tickers.append(asyncio.get_running_loop().create_task(ticking()))
        for request_id in range(20):
            replies.status(StatusAsked(b"c", request_id, True))

    sent, errors = made(controller(10), begin)
    assert not errors and len(sent) == 20 and turns >= parts > 60


def test_a_client_that_left_meanwhile_is_sent_nothing() -> None:
    scheduler = controller()

    def begin(replies: LongReplies) -> None:
        replies.status(StatusAsked(b"c", 1, False))
        replies.status(StatusAsked(b"nobody", 2, False))
        loop = asyncio.get_running_loop()
        loop.call_soon(lambda: scheduler.handle(FromClient(b"c", Goodbye()), now_ns=T0))

    assert made(scheduler, begin) == ([], [])


def test_an_error_in_a_part_is_handed_on() -> None:
    def begin(replies: LongReplies) -> None:
        replies.encode(b"c", ListModelsReply(5, (object(),) * 60, ()))  # type: ignore[arg-type]

    sent, errors = made(controller(10), begin)
    assert not sent and len(errors) == 1 and "object" in errors[0]


def test_nothing_is_sent_once_it_is_closed() -> None:
    def begin(replies: LongReplies) -> None:
        replies.status(StatusAsked(b"c", 1, False))
        replies.close()

    assert made(controller(), begin) == ([], [])
