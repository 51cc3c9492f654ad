"""What benchmarks/gateway_cost.py compares and prints. No process is started here."""

from __future__ import annotations

import json
import sys
from mmap import mmap
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("torch")

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "triton_server")]

import gateway_cost  # noqa: E402
import gateway_page  # noqa: E402
import torch  # noqa: E402
from gateway_cost import Checker, Served  # noqa: E402
from sums_model import SUMS, Sums  # noqa: E402

MS = 1_000_000
SIZE = 4 * SUMS


def served(outputs: mmap) -> Served:
    answers = [bytes([number]) * SIZE for number in range(gateway_cost._INPUTS)]
    nothing: Any = None
    return Served(
        children={},
        http_port=1,
        grpc_port=2,
        client=nothing,
        models={},
        inputs={"small": [bytes(4 * gateway_cost.SIZES["small"])] * gateway_cost._INPUTS},
        expected={"small": answers},
        regions={"out": outputs},
    )


def test_every_way_is_compared_with_the_native_answer() -> None:
    outputs = mmap(-1, SIZE * gateway_cost._SLOTS)
    checker = Checker(served(outputs), "small")
    right, wrong = bytes([3]) * SIZE, bytes([4]) * SIZE

    class Answer:
        raw_output_contents = (right,)

    checker.native(3, right)
    checker.http(11, b'{"outputs": []}' + right)  # inputs repeat after eight
    checker.rpc(19, Answer())
    outputs[SIZE * 27 : SIZE * 28] = right
    checker.shared(27, None)
    assert (checker.compared, checker.wrong) == (4, 0)
    checker.native(3, wrong)
    checker.http(3, b"{}")
    checker.shared(28, None)
    assert (checker.compared, checker.wrong) == (7, 3)


def test_requests_name_their_own_part_of_the_memory() -> None:
    messages = gateway_cost.http_shared("small")
    documents = [json.loads(each.partition(b"\r\n\r\n")[2]) for each in messages]
    places = [each["outputs"][0]["parameters"]["shared_memory_offset"] for each in documents]
    assert places == [SIZE * slot for slot in range(gateway_cost._SLOTS)]
    inputs = {each["inputs"][0]["parameters"]["shared_memory_offset"] for each in documents}
    assert inputs == {1024 * number for number in range(gateway_cost._INPUTS)}
    rpc = gateway_cost.rpc_messages(served(mmap(-1, 1)), "small", shared=True)
    there = [each.outputs[0].parameters["shared_memory_offset"].int64_param for each in rpc]
    assert there == places


def test_sums_are_exact_in_any_batch() -> None:
    x = torch.randint(0, 256, (5, 3 * 224 * 224)).float()
    whole = Sums()(x)
    assert torch.equal(whole, x.double().reshape(5, SUMS, -1).sum(2).float())
    assert all(torch.equal(Sums()(x[i : i + 1])[0], whole[i]) for i in range(5))


def run_of(way: str, number: int, p50_ns: int, **cpu: float) -> dict[str, Any]:
    return {
        "way": way,
        "model": "small",
        "round": number,
        "sent": 10,
        "answered": 10,
        "compared": 10,
        "p50_ns": p50_ns,
        "p99_ns": 2 * p50_ns,
        "cpu_us": cpu,
        "void": [],
        "voids": [["a stall"], []],
    }


def test_differences_are_those_of_the_same_round(tmp_path: Path) -> None:
    document = {
        "slosched": "1",
        "commit": "",
        "machine": "a machine",
        "rate": 300,
        "seconds": 60.0,
        "runs": [
            run_of("native", 1, 5 * MS, controller=200.0, worker=100.0, client=50.0),
            run_of("native", 0, 1 * MS, controller=100.0, worker=100.0, client=50.0),
            run_of("http", 0, 2 * MS, gateway=100.0, controller=100.0, worker=100.0, client=9.0),
            run_of("http", 1, 6 * MS, gateway=300.0, controller=200.0, worker=100.0, client=9.0),
        ],
    }
    path = tmp_path / "page.md"
    path.write_text(f"before\n{gateway_page.BEGIN}\nold\n{gateway_page.END}\nafter\n")
    text = gateway_page.page(document, path)
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "old" not in text
    assert "| 1 kB | http | 1.75 | 200 | 150 | 100 | 9 | 1.00 | 2.00 | 4.00 | 8.00 |" in text
    assert "| 1 kB | native | 1.00 | - | 150 | 100 | 50 | - | - | 3.00 | 6.00 |" in text
    assert "40 of 40 requests answered and 40 answers compared" in text
    with pytest.raises(ValueError, match="must have one"):
        gateway_page.page(document, Path(__file__))


def test_the_committed_page_has_a_place_for_the_tables() -> None:
    text = (BENCHMARKS / "gateway.md").read_text()
    assert text.count(gateway_page.BEGIN) == text.count(gateway_page.END) == 1
