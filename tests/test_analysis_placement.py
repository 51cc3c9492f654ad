"""analysis/placement.py: its cells can be made, the rules are told apart, and the table says so."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))

placement: Any = importlib.import_module("placement")


def test_each_cell_has_a_name_and_a_workload_of_its_own() -> None:
    cells = placement.cells()
    assert len({str(cell) for cell in cells}) == len(cells) == 63
    for cell in cells:
        assert cell.workload().models()[0].copies == cell.copies
        profile = placement.profile_that_holds(cell.fit)
        pages = -(-profile.models["resnet50"].weights_bytes // profile.page_bytes)
        assert profile.weights_cache_bytes == cell.fit * pages * profile.page_bytes


def test_the_rule_that_is_named_is_the_one_that_runs() -> None:
    cell = placement.Cell(400, 25, 5)
    found = {rule: placement.simulated(cell, rule, 0.5, 1) for rule in placement.RULES}
    assert found["gain"].requests == found["lru"].requests == found["demand"].requests
    assert found["gain"].in_time > found["lru"].in_time and found["gain"].loads > 20
    assert len({(outcome.in_time, outcome.loads) for outcome in found.values()}) == 3
    assert placement.simulated(cell, "gain", 0.5, 1) == found["gain"]


def outcome(in_time: float) -> Any:
    return placement.Outcome(1000, in_time, 50, 0.4)


def test_the_table_says_where_our_rule_is_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cell = placement.Cell(400, 25, 15)
    ahead = placement.Row(
        cell,
        {
            "gain": [outcome(0.9), outcome(0.91)],
            "demand": [outcome(0.8)] * 2,
            "lru": [outcome(0.9)] * 2,
        },
    )
    behind = placement.Row(
        cell,
        {
            "gain": [outcome(0.9), outcome(0.9)],
            "demand": [outcome(0.8)] * 2,
            "lru": [outcome(0.95)] * 2,
        },
    )
    assert placement.verdict(ahead) == "" and placement.verdict(behind) == "behind lru"
    assert ahead.percent("gain") == pytest.approx(90.5)
    assert ahead.error("gain") == pytest.approx(0.5) == ahead.error("demand")
    text = placement.table([ahead, behind])
    assert "zipf:  30 % fit, 400/s, 25 ms" in text and text.endswith("behind lru")
    monkeypatch.setattr(placement, "OUT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["placement.py"])
    options = type("Options", (), {"seeds": 2, "seconds": 1.0, "jobs": 1})()
    placement._keep([ahead, behind], text, options, 3.0)
    document = json.loads((tmp_path / "placement.json").read_text())
    assert document["rows"][0]["percent_in_time"] == {"gain": 90.5, "demand": 80.0, "lru": 90.0}
    assert "# Weight placement, simulated" in (tmp_path / "placement.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "placement.json",
        "placement.md",
        "placement.png",
    ]
