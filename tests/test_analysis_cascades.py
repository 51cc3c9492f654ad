"""The recipe of cascades: a small one is made and kept, and the committed table says what is promised."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # its programs import one another as a program's neighbours

import cascades  # noqa: E402


def test_a_small_one_leaves_its_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cascades, "HERE", tmp_path)
    monkeypatch.setattr(cascades, "MAIN", (("sdturbo", "fixed_2"),))
    monkeypatch.setattr(cascades, "POLICIES", ("CASCADE", "DIFFSERVE", "CLIPPER-LIGHT"))
    arguments = ["--only", "main", "--seeds", "1", "--jobs", "1", "--tables"]
    arguments += ["--out", str(tmp_path / "runs")]
    assert cascades.main(arguments) == 0
    page = (tmp_path / "cascades" / "cascades.md").read_text()
    assert "| less diffserve |" in page and "| sdturbo, fixed_2 | clipper-light |" in page
    document = json.loads((tmp_path / "cascades" / "cascades.json").read_text())
    (systems,) = document["sections"]["Systems"].values()
    assert systems["policies"]["clipper-light"]["estimates"]["fid"]["mean"] == pytest.approx(22.77)


def _committed() -> dict[str, Any]:
    document: dict[str, Any] = json.loads((ANALYSIS / "cascades" / "cascades.json").read_text())
    sections: dict[str, Any] = document["sections"]
    return sections


def test_ours_has_fewer_violations_and_a_better_fid_than_the_published_policy_in_every_row() -> (
    None
):
    for caption, row in _committed()["Systems"].items():
        ours, theirs = (
            {cell["seed"]: cell for cell in row["policies"][name]["cells"]}
            for name in ("cascade", "diffserve")
        )
        assert len(ours) == 5, caption
        for seed, cell in ours.items():
            assert cell["violation_ratio"] <= 0.002, (caption, seed)
            assert cell["violation_ratio"] < theirs[seed]["violation_ratio"], (caption, seed)


def test_the_goals_of_quality_are_met() -> None:
    rows = _committed()["Systems"]
    for caption, most in (("sdturbo, 4to32", 17.0), ("sdxs, 4to32", 17.5)):
        estimates = rows[caption]["policies"]["cascade"]["estimates"]
        assert estimates["fid"]["mean"] <= most and estimates["violation_ratio"]["mean"] <= 0.002
