"""`slosched gateway` beside a real Triton: the same answers to 306 requests, except for listed differences.

Triton's are in golden/triton_answers.json (benchmarks/triton_server/conformance.py made them), the differences
with their reasons in golden/gateway_differences.toml and in a table of docs/gateway.md.
"""

from __future__ import annotations

import shutil
import sys
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("tritonclient.grpc")
pytest.importorskip("torch")

TESTS = Path(__file__).parent
sys.path[:0] = [str(TESTS.parent / "benchmarks" / "triton_server")]

import conformance  # noqa: E402
import torch_models  # noqa: E402
import triton_models  # noqa: E402

import live_gateway  # noqa: E402
from slosched import clock  # noqa: E402

GOLDEN = conformance.read_golden(TESTS / "golden" / "triton_answers.json")
DIFFERENCES: list[dict[str, Any]] = tomllib.loads(
    (TESTS / "golden" / "gateway_differences.toml").read_text(encoding="utf-8")
)["difference"]
LISTED = {case: each for each in DIFFERENCES for case in each["cases"]}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """What a gateway answers in front of the same models on the CPU."""
    folder = tmp_path_factory.mktemp("conformance")
    shutil.copy(Path(torch_models.__file__), folder / "torch_models.py")
    (folder / "worker.toml").write_text(torch_models.WORKER, encoding="utf-8")
    worker = ("--device", "cpu", "--config", str(folder / "worker.toml"))
    gateway = ("--model-control", "explicit", "--load", ",".join(triton_models.LOADED))
    with live_gateway.serving(folder, worker=worker, gateway=gateway) as serving:
        ports = [int(each.rpartition(":")[2]) for each in (serving.http, serving.grpc)]
        for _ in range(600):
            if all(conformance.is_ready(ports[0], name) for name in triton_models.LOADED):
                break
            clock.sleep_ns(50_000_000)
        yield conformance.ask(*ports)


@pytest.mark.processes
@pytest.mark.torch
def test_each_answer_is_tritons_or_a_listed_difference(answers: dict[str, Any]) -> None:
    differ = conformance.differences(answers, GOLDEN)
    assert {name: found for name, found in differ.items() if name not in LISTED} == {}
    assert set(LISTED) - set(differ) == set(), (
        "these do not differ any more: take them off the list"
    )
    assert answers.keys() == GOLDEN.keys()


@pytest.mark.processes
@pytest.mark.torch
def test_a_listed_difference_is_the_one_that_is_described(answers: dict[str, Any]) -> None:
    wrong = {
        name: answers[name]
        for name, each in LISTED.items()
        if answers[name]["status"] not in each["status"]
    }
    assert wrong == {}


def test_a_case_is_listed_once_and_is_asked() -> None:
    counts = Counter(case for each in DIFFERENCES for case in each["cases"])
    assert [case for case, count in counts.items() if count > 1] == []
    assert set(counts) <= set(GOLDEN)


def test_the_page_has_a_row_for_each_difference() -> None:
    page = (TESTS.parent / "docs" / "gateway.md").read_text(encoding="utf-8")
    for each in DIFFERENCES:
        row = f"| {each['what']} | {each['triton']} | {each['slosched']} | {each['reason']} |"
        assert row in page, f"docs/gateway.md lacks: {row}"
    assert f"{len(GOLDEN)} requests, right and wrong" in page
    assert f"texts to {len(GOLDEN) - len(LISTED)} of them" in page
    assert f"The other {len(LISTED)}:" in page


def test_two_readers_of_the_same_numbers_agree() -> None:
    assert torch_models.SLOW_S == triton_models.SLOW_S
    for name in [each.name for each in triton_models.MODELS]:
        assert f"[models.{name}]" in torch_models.WORKER
