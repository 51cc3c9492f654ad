"""The recipe of overload: a small one is made and kept, and the committed table says what is promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # its programs import one another as a program's neighbours

import overload  # noqa: E402


def test_a_small_one_leaves_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overload, "HERE", tmp_path)
    monkeypatch.setattr(overload, "PROFILES", ("fig7", "v100"))
    monkeypatch.setattr(overload, "COPIES", (2,))
    monkeypatch.setattr(overload, "SLOS_MS", (25,))
    monkeypatch.setattr(overload, "LOADS", (0.5, 10.0, 20.0))
    command = ["overload.py", "--gpus", "1", "--tables", "--out", str(tmp_path / "runs")]
    monkeypatch.setattr(sys, "argv", command)
    assert overload.main() == 0
    kept = tmp_path / "overload"
    assert sorted(p.name for p in kept.iterdir()) == [
        "overload.json",
        "overload.md",
        "overload.png",
    ]
    document = json.loads((kept / "overload.json").read_text())
    assert document["gpus"] == 1 and len(document["curves"]) == 2
    for curve in document["curves"]:
        assert len(curve["client"]) == 3 and 0.3 < curve["client"][0] < 0.6 < curve["client"][1]
    assert "fig7 N=2 25ms" in (kept / "overload.md").read_text()
    assert Image.open(kept / "overload.png").mode == "P"
    assert "kept" in capsys.readouterr().out


#: Cells that keep less, which is what early refusal costs there: (profile, copies, SLO in ms).
BELOW = {("fig7", 48, 100)}


def test_the_committed_table_keeps_95_per_cent_at_ten_times_the_capacity() -> None:
    document = json.loads((ANALYSIS / "overload" / "overload.json").read_text())
    ten = document["loads"].index(10.0)
    assert len(document["curves"]) == 12
    below = set()
    for curve in document["curves"]:
        for count in ("client", "controller"):
            kept = curve[count][ten] / max(curve[count][: ten + 1])
            if kept < 0.95:
                below.add((curve["profile"], curve["copies"], curve["slo_ms"]))
            assert kept >= 0.93, curve
    assert below == BELOW, "other cells than those that are known"
