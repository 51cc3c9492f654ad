"""What benchmarks/triton_server counts and prints, and its client of the protocol against a small server."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("grpc")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "triton_server")]

import beside  # noqa: E402
import beside_page  # noqa: E402
import device_model  # noqa: E402
import oip_client  # noqa: E402
from beside import GATEWAY, HASTY, NATIVE, Cell, Plan, System  # noqa: E402

MS = 1_000_000
EXEC_NS = beside.EXEC_NS.exec_ns
DOCUMENTED = System("triton", 1, *device_model.DOCUMENTED)


# ------------------------------------------------------------------------------------- the client


@contextlib.asynccontextmanager
async def server(*answers: bytes) -> AsyncIterator[int]:
    """Answers each request with the next of `answers`, in pieces; an empty one closes the connection."""
    left = list(answers)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                size = int(head.split(b"\r\ncontent-length:")[1].split(b"\r\n")[0])
                await reader.readexactly(size)
                answer = left.pop(0)
                for start in range(0, len(answer), 7):
                    writer.write(answer[start : start + 7])
                    await writer.drain()
                if not answer:
                    break
        writer.close()

    listening = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with listening:
        yield listening.sockets[0].getsockname()[1]


def answer(status: int, body: bytes = b"{}") -> bytes:
    return b"HTTP/1.1 %d Words\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


def test_each_end_of_a_request_is_counted() -> None:
    message = oip_client.infer_message("m", bytes(8), (1, 2), 25_000)

    bodies: list[tuple[int, bytes]] = []

    def heard(number: int, body: bytes) -> None:
        bodies.append((number, body))

    async def run() -> oip_client.Offered:
        answers = answer(200, b"first"), answer(503), answer(404), b"", answer(200, b"last")
        async with (
            server(*answers) as port,
            oip_client.HttpTarget(port, message, heard=heard) as target,
        ):
            # Far enough apart that each is answered before the next one leaves.
            arrivals = [number * 60 * MS for number in range(len(answers))]
            return await oip_client.offer(target, arrivals, 60_000 * MS)

    found = asyncio.run(run())
    assert found.ends == ["answered", "refused", "failed", "failed", "answered"]
    assert [each >= 0 for each in found.latency_ns] == [True, False, False, False, True]
    assert found.in_time == 2 and found.sent == 5
    assert bodies == [(0, b"first"), (4, b"last")]
    assert found.behind(2).ends == found.ends[2:]


def test_a_request_that_is_never_answered_is_lost() -> None:
    class Silent:
        def send(self, number: int, done: oip_client.Done) -> None:
            if number == 0:
                done(number, oip_client.ANSWERED)

    found = asyncio.run(oip_client.offer(Silent(), [0, MS], 1, patience_s=0.05))
    assert found.ends == ["answered", "lost"]
    assert found.in_time == 0  # the SLO is a nanosecond
    assert found.latency(0.5) > 0


def test_arrivals_are_those_of_the_seed() -> None:
    arrivals = oip_client.poisson(500, 2.0, 7)
    assert arrivals == oip_client.poisson(500, 2.0, 7) != oip_client.poisson(500, 2.0, 8)
    assert arrivals == sorted(arrivals) and arrivals[-1] < 2_000 * MS
    assert 900 < len(arrivals) < 1100


# ------------------------------------------------------------------------------ Triton's settings


def test_timeouts_are_the_slo_less_batches_and_never_nothing() -> None:
    b1, largest, two = device_model.RULES
    by_16, by_4 = device_model.BATCHERS[0], device_model.BATCHERS[3]
    assert b1.timeout_ns(25 * MS, by_16, EXEC_NS) == 25 * MS - 2_600_000
    assert largest.timeout_ns(25 * MS, by_16, EXEC_NS) == 25 * MS - 15_700_000
    assert largest.timeout_ns(25 * MS, by_4, EXEC_NS) == 25 * MS - 5_600_000
    assert two.timeout_ns(25 * MS, by_16, EXEC_NS) == 2_500_000


def test_a_model_has_a_time_for_each_size_of_batch(tmp_path: Path) -> None:
    made = device_model.triton_model(device_model.BATCHERS[1], 2, EXEC_NS, tmp_path)
    assert "@" not in made.config + made.code.replace("@property", "")
    compile(made.code, "model.py", "exec")
    assert 'string_value: "0,2600000,3800000,4700000,5600000,' in made.config
    assert "preferred_batch_size: [ 8, 16 ]" in made.config and "count: 2" in made.config
    assert device_model.lateness(device_model.timeline_of(tmp_path, made.name), 2) == [0] * 6


# --------------------------------------------------------------------------------------- the plan


def plan(**found: dict[str, int]) -> Plan:
    """A plan of two cells that has searched."""
    made = Plan(beside.arguments(["--quick"]), None)
    made.document["search"] = {
        key: {"cell": key.rsplit("|", 4)[0], "system": key.split("|", 2)[2], **record}
        for key, record in found.items()
    }
    return made


def searched(cell: Cell, system: System, in_time: int) -> dict[str, dict[str, int]]:
    return {f"{cell.text}|{system.text}": {"sent": 100, "in_time": in_time}}


def test_what_is_compared_is_the_documented_setting_the_best_of_all_and_the_best_of_the_cell() -> (
    None
):
    light, heavy = Cell(25, 0.6), Cell(25, 1.5)
    other = System("triton", 1, device_model.BATCHERS[2].name, device_model.RULES[1].name)
    third = System("triton", 1, device_model.BATCHERS[3].name, device_model.RULES[2].name)
    two = System("triton", 2, *device_model.DOCUMENTED)
    made = plan(
        **searched(light, DOCUMENTED, 90),
        **searched(light, other, 80),
        **searched(light, third, 95),
        **searched(heavy, DOCUMENTED, 10),
        **searched(heavy, other, 60),
        **searched(heavy, third, 40),
        **searched(light, two, 100),
        **searched(heavy, two, 100),
    )
    assert made.cells == [light, heavy]
    assert made.best(made.cells, 1) == other
    assert made.finals(light) == [GATEWAY, HASTY, NATIVE, DOCUMENTED, other, third, two]
    assert made.finals(heavy) == [GATEWAY, HASTY, NATIVE, DOCUMENTED, other, two]
    assert beside_page.one_setting(made.document, 1) == other.text.split("|", 2)[2]


def compared(cell: Cell, system: System, in_time: int) -> dict[str, Any]:
    return {
        "cell": cell.text,
        "system": system.text,
        "sent": 1000,
        "all_sent": 1100,
        "in_time": in_time,
        "p50_ns": 7 * MS,
        "p99_ns": 20 * MS,
        "issue_delay_p99_ns": MS,
        "cpu_s": {"gateway": 0.11, "client": 0.055},
        "void": [],
        "voids": [["a stall"], []],
        "device_late": [9, 0, 1, 0, 0, 0],
    }


def test_the_page_has_ratios_first_and_keeps_its_words(tmp_path: Path) -> None:
    cell = Cell(25, 1.5)
    made = plan(
        **searched(cell, DOCUMENTED, 30),
        **searched(cell, System("triton", 2, *device_model.DOCUMENTED), 0),
    )
    systems = {
        GATEWAY: 600,
        HASTY: 610,
        NATIVE: 650,
        DOCUMENTED: 300,
        System("triton", 2, *device_model.DOCUMENTED): 0,
    }
    made.document["final"] = {
        f"{cell.text}|{each.text}": compared(cell, each, count) for each, count in systems.items()
    }
    made.document["seconds"] = 60.0
    path = tmp_path / "page.md"
    path.write_text(f"before\n{beside_page.BEGIN}\nformer\n{beside_page.END}\nafter\n")
    text = beside_page.page(made.document, path)
    for block in text.split("\n\n"):
        rows = [line.count("|") for line in block.splitlines() if line.startswith("|")]
        assert len(set(rows)) <= 1, block
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "former" not in text
    assert text.index("as a ratio") < text.index("per cent of all")
    assert "| 25 ms | 1.5 | 2.00 | 2.00 | 2.00 | > 100 | > 100 | > 100 |" in text
    assert "| 25 ms | 1.5 | 60.0 | 61.0 | 65.0 | 30.0 | 30.0 | 30.0 | 0.0 | 0.0 | 0.0 |" in text
    assert (
        "| 25 ms | 1.5 | 7.0 / 20.0 | 7.0 / 20.0 | 7.0 / 20.0 | 7.0 / 20.0 | 7.0 / 20.0 |" in text
    )
    assert "| 1.5 | gateway | 100 | gateway 100 | 50 |" in text
    assert "| 1 | 10 | 90.0 | 90.0 | 100.0 | 100.0 | 100.0 |" in text
    assert "5 disturbed by the machine, of which 0 stand" in text
    with pytest.raises(ValueError, match="must have one"):
        beside_page.page(made.document, Path(__file__).with_name("slow_tests.txt"))


def test_the_committed_page_has_a_place_for_the_tables() -> None:
    text = (BENCHMARKS / "triton.md").read_text()
    assert text.count(beside_page.BEGIN) == text.count(beside_page.END) == 1
