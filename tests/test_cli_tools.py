"""`slosched plot` passes its words on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slosched.analysis.fig7
import slosched.analysis.tables
from slosched.cli.app import app


def test_plot_passes_its_words_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[list[Path], Path, bool]] = []

    def plot_fig7(run_dirs: Sequence[Path], out: Path, *, published: bool) -> list[Path]:
        calls.append((list(run_dirs), out, published))
        return [out / "fig7.png"]

    monkeypatch.setattr(slosched.analysis.fig7, "plot_fig7", plot_fig7)
    monkeypatch.setattr(slosched.analysis.tables, "summarise_steps", lambda run_dir: [])
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    b.mkdir()
    result = CliRunner().invoke(app, ["plot", "fig7", str(a), str(b), "--published", "--out", "o"])
    assert result.exit_code == 0, result.output
    assert "wrote o/fig7.png" in result.stdout
    result = CliRunner().invoke(app, ["plot", "fig7", str(b), "--json"])
    assert json.loads(result.stdout)["files"] == [str(b / "figures" / "fig7.png")]
    assert calls == [([a, b], Path("o"), True), ([b], b / "figures", False)]
