"""The recipe of sharing one GPU in virtual time: a small one is made; the committed tables are whole."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # its programs import one another as a program's neighbours

import share  # noqa: E402


def test_a_small_one_leaves_its_page_figures_and_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    columns = {"deft-demo": share.COLUMNS["deft-demo"]}
    figures = [each for each in share.FIGURES if each[1] == "lanes"]
    monkeypatch.setattr(share, "HERE", tmp_path)
    monkeypatch.setattr(share, "COLUMNS", columns)
    monkeypatch.setattr(share, "FIGURES", figures)
    arguments = ["--window", "2", "--tables", "--quiet", "--out", str(tmp_path / "runs")]
    assert share.main(arguments) == 0
    kept = tmp_path / "share"
    assert {file.name for file in kept.iterdir()} == {
        "share.md",
        "demo_lanes.png",
        "deft-demo.csv",
    }
    text = (kept / "share.md").read_text()
    assert text in capsys.readouterr().out and "Nothing here was measured" in text
    assert "| gate-sync-20 |" in text


def test_the_committed_tables_have_every_point_and_the_page_every_figure() -> None:
    kept = ANALYSIS / "share"

    def rows(name: str) -> list[dict[str, str]]:
        with (kept / f"{name}.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    assert [len(rows(name)) for name in share.COLUMNS] == [13, 11, 4 + 10 * 4]
    assert all(row["status"] == "ok" for name in share.COLUMNS for row in rows(name))
    text = (kept / "share.md").read_text()
    for *_, stem in share.FIGURES:
        assert f"![]({stem})" in text and (kept / stem).stat().st_size > 10_000


def test_committed_runs_say_what_a_gate_brings() -> None:
    with (ANALYSIS / "share" / "deft-demo.csv").open(newline="") as file:
        high = {row["method"]: float(row["job1_inflation"]) for row in csv.DictReader(file)}
    # As Deft found: a gate does not help unless what is in flight is bounded.
    assert high["gate-event-2"] < high["gate-sync-20"] < high["gate-off"] < high["gate-unbounded"]
    assert high["gate-event-2"] < 0.1
