"""The recipes of figures: every run they name can be made, and a small one is made and kept."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from PIL import Image

ANALYSIS = Path(__file__).parent.parent / "analysis"
sys.path.insert(0, str(ANALYSIS))  # its programs import one another as a program's neighbours

import recipes  # noqa: E402

from slosched.analysis.drawn import Drawn  # noqa: E402
from slosched.analysis.fig5 import plot_fig5  # noqa: E402
from slosched.experiment.figures import FIGURES, SCALES, Figure, Part, infer5  # noqa: E402
from slosched.experiment.simulated import spec_of  # noqa: E402
from slosched.units import NS_PER_S  # noqa: E402
from slosched.workloads import parse_workload  # noqa: E402

RUNS = {5: 24, 6: 1, 7: 6, 8: 3, 9: 1, 10: 1, 11: 4}


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("scale", SCALES)
def test_every_run_of_a_recipe_can_be_made(figure: int, scale: str) -> None:
    parts = FIGURES[figure].parts(scale)
    others = {(11, "published"): 45, (11, "smoke"): 2}
    assert len(parts) == others.get((figure, scale), RUNS[figure])
    assert len({part.name for part in parts}) == len(parts)
    for part in parts[:6]:
        name, *values = part.workload.split()
        duration_ns = parse_workload(name, values).duration_ns
        # What ends by itself is not cut short.
        assert duration_ns is None or duration_ns >= part.duration_ns
        assert spec_of(part).gpus == part.gpus


def _small(scale: str) -> list[Part]:
    workload = "simple-parametric 2 2 4 40"
    return [
        Part(name="closed", workload=workload, scheduler=infer5(), duration_ns=2 * NS_PER_S, gpus=1)
    ]


def _draw(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
    return plot_fig5(runs, out, window_ns=NS_PER_S // 20, margin_ns=0)


def test_a_recipe_leaves_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipes, "HERE", tmp_path / "analysis")
    monkeypatch.setattr(sys, "argv", ["figure5.py", "--out", str(tmp_path / "runs"), "--tables"])
    recipe = Figure(number=5, text="A small one.", parts=_small, draw=_draw, left_out=("nines",))
    recipes.main(recipe)
    kept = tmp_path / "analysis" / "figure5"
    assert sorted(path.name for path in kept.iterdir()) == [
        "fig5.png",
        "figure5.json",
        "figure5.md",
    ]
    document = json.loads((kept / "figure5.json").read_text())
    assert (document["kind"], document["scale"], document["runs_reused"]) == (
        "simulated",
        "quick",
        0,
    )
    assert document["runs"][0]["workload"] == "simple-parametric 2 2 4 40"
    (run,) = document["numbers"]["runs"]
    assert run["policy"] == "INFER5" and run["goodput_rps"] > 0 and "nines" not in run
    assert str(tmp_path) not in (kept / "figure5.json").read_text()
    text = (kept / "figure5.md").read_text()
    assert text.startswith("# Figure 5, simulated, scale quick") and "INFER5" in text
    assert Image.open(kept / "fig5.png").mode == "P"
    assert "kept in" in capsys.readouterr().out
    recipes.main(recipe)  # the run is there; only the figure is drawn again
    again = json.loads((kept / "figure5.json").read_text())
    assert again["runs_reused"] == 1 and again["numbers"] == document["numbers"]


def test_a_figure_that_cannot_be_drawn_ends_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["figure5.py", "--out", str(tmp_path / "runs")])

    def draw(parts: Sequence[Part], runs: Sequence[Path], scale: str, out: Path) -> Drawn:
        return plot_fig5(runs, out)

    with pytest.raises(SystemExit, match=r"figure 5: .* lasted .* For a short run give --window"):
        recipes.main(Figure(number=5, text="Too short.", parts=_small, draw=draw))
