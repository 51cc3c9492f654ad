"""benchmarks/gpu/gpu_preemption.py: its loops end and its figures are right, on a GPU in virtual time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

GPU = Path(__file__).parent.parent / "benchmarks" / "gpu"
sys.path[:0] = [str(GPU.parent), str(GPU)]  # its programs import one another as neighbours

import gpu_preemption as preemption  # noqa: E402
import preemption_page as pages  # noqa: E402

from test_cuda_preemption import LONG_NS, SHORT_NS, Rig  # noqa: E402

LONG = preemption.Long("long", 1, arrivals=40, runs=20, slower=0.02)


class FakeBed(preemption.Bed):
    """The bed on the rig of the tests."""

    def __init__(self, rig: Rig) -> None:
        self.device = rig.device
        self.backend: Any = SimpleNamespace(
            _driver=rig.driver,
            _exec_stream=rig.driver.stream(-2),
            _programs={"long": rig.long, "short": rig.short},
            _urgent_streams=object(),
        )
        self.notes, self.ids = [], {"long": 0, "short": 1}
        self._ops, self._actions = 1000, 1000


@pytest.fixture
def bed(monkeypatch: pytest.MonkeyPatch) -> FakeBed:
    rig = Rig()
    monkeypatch.setattr(preemption, "now_ns", rig.clock)
    monkeypatch.setattr("slosched.clock.now_ns", rig.clock)
    monkeypatch.setattr(preemption, "URGENT", "short")
    monkeypatch.setattr(preemption, "_ROWS", 1)
    return FakeBed(rig)


def test_every_figure_of_a_model(bed: FakeBed) -> None:
    found = preemption.measure(bed, LONG, 0.5)
    alone, streams = found["alone"], found["streams"]
    assert SHORT_NS <= alone["p50"] < SHORT_NS + 100_000 and alone["n"] == 20
    assert streams["n"] == 20 and streams["interrupted"] == 0
    one, two = found["in_flight_1"], found["in_flight_2"]
    assert one["interrupted"] > 5 and two["interrupted"] > 5
    assert one["p50"] >= SHORT_NS and one["p99"] <= one["p99_wanted_at_most_ns"] and one["p99_met"]
    assert two["boundary_ns"] > one["boundary_ns"]
    assert one["run_ns"] == pytest.approx(LONG_NS, rel=0.02)
    assert one["slower"] == one["run_ns"] / one["whole_ns"] - 1


def test_answers_are_compared_and_a_table_is_made(bed: FakeBed) -> None:
    found = preemption.answers(bed, LONG, 30)
    assert found["wrong"] == 0 and found["long"] >= 30 and found["urgent"] >= 3
    assert found["different_answers"] == preemption._BATCHES + preemption._SINGLES
    shown = {"p50": 1, "p99": 2}
    more = {"p99_wanted_at_most_ns": 3, "run_ns": 4, "whole_ns": 4, "slower": 0.0, "interrupted": 1}
    row: dict[str, Any] = {"alone": shown, "streams": shown, "answers": found, "segments": 9}
    row |= {"longest_segment_ns": 1, "tuned_in_flight": 2, "slower_wanted_at_most": 0.02}
    row |= {"in_flight_1": shown | more, "in_flight_2": shown | more}
    document = {"models": {"long": row, "other": {"failed": "not cut"}}, "notes": ["a note"]}
    lines = pages.table(document).splitlines()
    assert len(lines) == 2 + 4 + 1 and "not cut" in lines[-1]
    page = pages.page(document | {"measured_on": "a GPU", "seconds": 1.0})
    assert f"| long | {found['long']} | {found['urgent']} | 0 |" in page and "    a note\n" in page


def test_the_committed_page_is_that_of_the_results() -> None:
    document = json.loads(pages.RESULTS.read_text(encoding="utf-8"))
    assert pages.page(document) == pages.PAGE.read_text(encoding="utf-8")


def test_a_class_that_was_not_cut_is_said(bed: FakeBed) -> None:
    with pytest.raises(preemption.Failed, match="not cut"):
        preemption.measure(bed, preemption.Long("long", 2, 1, 1, 0.1), 1.0)
