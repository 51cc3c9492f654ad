"""The recipe of joining at a step: a small one is made and kept, and the committed numbers keep a promise."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # its programs import one another as a program's neighbours

import joining  # noqa: E402

from slosched.cascade.joining import AT_START, WITH_ROOM  # noqa: E402
from slosched.units import NS_PER_S  # noqa: E402


def test_a_small_one_leaves_its_page_figure_and_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cases = [
        joining.Case("sdturbo", 5, 1, 0.8),
        joining.Case("sdturbo", 5, 1, 1.2),
        joining.Case("sdturbo", 5, 1, 1.2, with_light=True),
        joining.Case("sdturbo", 5, 1, 1.0, day=True),
    ]
    monkeypatch.setattr(joining, "HERE", tmp_path)
    monkeypatch.setattr(joining, "cases", lambda: cases)
    arguments = ["--seeds", "2", "--requests", "100", "--tables", "--out", str(tmp_path / "runs")]
    assert joining.main(arguments) == 0
    kept = tmp_path / "joining"
    assert sorted(each.name for each in kept.iterdir()) == [
        "joining.json",
        "joining.md",
        "joining.png",
    ]
    page = (kept / "joining.md").read_text()
    assert "**SD v1.5, SLO 5 s, 1 GPU**" in page and "## On a day's curve" in page
    assert page in capsys.readouterr().out
    assert joining.main(["--kept", "--tables", "--out", str(tmp_path / "again")]) == 0
    capsys.readouterr()
    document = json.loads((kept / "joining.json").read_text())
    assert [row["load"] for row in document["rows"]] == [0.8, 1.2, 1.2, 1.0]
    for row in document["rows"]:
        for numbers in row["rules"].values():
            assert all(len(values) == 2 for values in numbers.values())
            assert all(0.3 < share <= 1 for share in numbers["in_time"])


def test_the_light_stage_takes_its_part_of_the_time_and_of_the_slo() -> None:
    alone, rate = joining.stage_of(joining.Case("sdxlltn", 15, 8, 1.0))
    assert (alone.slo_ns, alone.light_share) == (15 * NS_PER_S, 0)
    assert rate == pytest.approx(8 * 2 / 10.65)
    behind, fewer = joining.stage_of(joining.Case("sdxlltn", 15, 8, 1.0, with_light=True))
    # Batches of 4 in 1.87 s, for 0.9 heavy answers each.
    assert behind.slo_ns == 13.13 * NS_PER_S
    assert fewer == pytest.approx(8 / (10.65 / 2 + 1.87 / 4 / 0.9))
    assert behind.light_share == pytest.approx(1 - fewer / rate)


def _committed() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((ANALYSIS / "joining" / "joining.json").read_text())[
        "rows"
    ]
    return rows


def test_joining_with_room_serves_no_less_than_batches_formed_at_the_start() -> None:
    rows = _committed()
    assert len(rows) == len(joining.cases())
    for row in rows:
        with_room, at_start = (
            fmean(row["rules"][rule]["in_time"]) for rule in (WITH_ROOM, AT_START)
        )
        assert with_room > at_start - 0.005, row
