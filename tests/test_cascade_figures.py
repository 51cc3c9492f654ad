"""Figures of cascades: which files, what the curves hold, what the titles say, and the averages."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_cascade_run import Made, mixed_run, small_cascade, write_run
from slosched.analysis import style
from slosched.analysis.cascade_figures import (
    FID,
    THRESHOLD,
    VIOLATIONS,
    Curve,
    Point,
    _over_time,
    _scatter,
    draw_over_time,
    draw_scatter,
)
from slosched.cascade.drawing import PUBLISHED_NOTE, draw_directories, draw_runs, measured_curves
from slosched.cascade.outcome import read_outcome
from slosched.codes import Verdict
from slosched.errors import InvalidConfig

NAMES = ["sdturbo_confidence_threshold", "sdturbo_slo_violation_ratio", "sdturbo_fid"]


def test_curves_are_what_was_measured(tmp_path: Path) -> None:
    cascade = small_cascade()
    curves = measured_curves("ours", read_outcome(mixed_run(tmp_path)), cascade.quality)
    (threshold,) = curves[THRESHOLD]
    assert threshold.values == [0.5, 0.5] + [0.25] * 7 and threshold.steps
    (ratio,) = curves[VIOLATIONS]
    assert ratio.times_s == [2.5] and ratio.values == [3 / 8]
    by_table, pessimistic = curves[FID]
    assert by_table.values == pytest.approx([16 + 2 / 3]) and not by_table.dashed
    assert pessimistic.dashed and pessimistic.name == "ours, pessimistic"
    assert pessimistic.values == pytest.approx([3 / 6 * 22 + 3 / 6 * 50 / 3])


def test_windows_without_requests_are_gaps(tmp_path: Path) -> None:
    made = [Made(at, at + 100, [(0, at + 100, Verdict.ACCEPTED, 0.75)]) for at in (0, 12_000)]
    outcome = read_outcome(write_run(tmp_path, made))
    curves = measured_curves("ours", outcome, small_cascade().quality)
    assert np.isnan(curves[VIOLATIONS][0].values).tolist() == [False, True, False]
    assert curves[FID][0].values[::2] == [22.0, 22.0] and len(curves[FID]) == 1


def test_several_runs_are_drawn_into_three_files(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    drawn = draw_runs({"a": outcome, "b": outcome}, small_cascade(), tmp_path / "figures")
    assert [file.name for file in drawn.files] == [
        f"{name}.{form}" for name in NAMES for form in ("png", "pdf")
    ]
    assert all(file.stat().st_size > 1000 for file in drawn.files)
    assert (
        "average SLO violation ratio 0.3750, average FID 16.67 by the table, 19.33 pessimistic"
        in drawn.text
    )
    assert "FID (table)" in drawn.text and "FID (pessimistic)" in drawn.text
    assert drawn.numbers["runs"]["b"]["violations"] == 3


def test_published_graphs_say_so(tmp_path: Path) -> None:
    made = [
        Made(1000 * at, 1000 * at + 100, [(0, 1000 * at + 100, Verdict.ACCEPTED, 0.75)])
        for at in range(30)
    ]
    run = write_run(tmp_path / "run", made, [(0, 0.25, 0, 1)])
    drawn = draw_directories([run], small_cascade(), tmp_path / "figures", published=True)
    assert PUBLISHED_NOTE in drawn.text
    assert "Mean SLO violation rate: 0.0" in drawn.text and "Mean FID: " in drawn.text
    assert list(drawn.numbers) == ["published"]
    figure = _over_time(f"FID ({PUBLISHED_NOTE})", FID, [Curve("a", [0.0], [20.0])])
    assert PUBLISHED_NOTE in figure.axes[0].get_title()


def test_published_graphs_need_a_quality_curve(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path))
    with pytest.raises(InvalidConfig, match="has no quality curve"):
        draw_runs({"a": outcome}, small_cascade(quality=None), tmp_path, published=True)
    drawn = draw_runs({"a": outcome}, small_cascade(quality=None), tmp_path / "figures")
    assert [file.stem for file in drawn.files[::2]] == NAMES[:2]  # and none of FID


def test_the_scatter(tmp_path: Path) -> None:
    points = [Point("ours", 0.01, 17.0, 0.002, 0.1), Point("theirs", 0.2, 18.0)]
    files = draw_scatter("sdturbo", points, tmp_path, bound_fid=16.8)
    assert [file.name for file in files] == [
        "sdturbo_quality_violations.png",
        "sdturbo_quality_violations.pdf",
    ]
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_scatter("sdturbo", [Point("ours", 0.1, math.nan)], tmp_path)


def test_intervals_of_violations_end_at_0_and_1() -> None:
    points = [Point("few", 0.01, 17.0, 0.13), Point("most", 0.95, 18.0, 0.13), Point("one", 0, 19)]
    (ax,) = _scatter("sdturbo", points, 16.8).axes
    ends = [
        collection.get_segments()[0][:, 0].tolist()
        for container in ax.containers
        for collection in container[2]
    ]
    assert ends == [pytest.approx([0.0, 0.14]), pytest.approx([0.82, 1.0])]
    low, high = ax.get_xlim()
    # Room for half a marker, and no tick below 0.
    assert -0.05 < low < 0 and high > 1.0
    assert min(tick for tick in ax.get_xticks() if tick >= low) == 0


def test_legends_stand_under_the_axes_in_the_order_of_the_policies() -> None:
    points = [Point("ours", 0.0, 17.0, 0.1), Point("theirs", 0.2, 18.0)]
    figure = _scatter("sdturbo", points, 16.8)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["ours", "theirs", "clairvoyant fluid bound"]
    assert figure.axes[0].get_legend() is None
    # Room for rows of long names, one beneath the other.
    long = [
        Curve(f"diffserve-routing=random-queue_term=false-drop-at={at}", [0.0], [1.0])
        for at in range(9)
    ]
    short = [Curve(f"{at}", [0.0], [1.0]) for at in range(9)]
    many, few = (_over_time("", THRESHOLD, curves) for curves in (long, short))
    assert many.get_figheight() > few.get_figheight()
    many.draw_without_rendering()
    assert many.legends[0].get_window_extent().width < many.bbox.width


def test_curves_that_coincide_can_be_told_apart() -> None:
    times = [float(at) for at in range(60)]
    curves = [Curve(f"{at}", times, [0.0] * 60, at) for at in range(9)]
    (ax,) = _over_time("", VIOLATIONS, curves).axes
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines}
    assert len(looks) == 9
    starts = {line.get_markevery()[0] for line in ax.lines}
    assert len(starts) == 9  # no marker lies on that of another curve
    first, *others = ax.lines
    assert all(first.get_zorder() > line.get_zorder() for line in others)
    assert ax.get_ylim()[0] < 0  # 0 is not half behind the axis
    (ax,) = _over_time("", VIOLATIONS, curves[:1]).axes
    assert ax.lines[0].get_marker() in ("", "None", None)


def test_fids_that_are_about_the_same_look_so() -> None:
    (ax,) = _over_time("", FID, [Curve("a", [0.0, 5.0], [16.82, 16.84])]).axes
    assert ax.get_ylim() == pytest.approx((16.33, 17.33))
    (ax,) = _over_time("", FID, [Curve("a", [0.0, 5.0], [16.0, 22.0])]).axes
    low, high = ax.get_ylim()
    assert 15 < low < 16 and 22 < high < 23


def test_titles_fit_into_their_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []

    def keep(figure: Any, *_: object) -> list[Path]:
        figures.append(figure)
        return [tmp_path]

    monkeypatch.setattr(style, "save", keep)
    curves = {kind: [Curve("a", [0.0, 5.0], [0.5, 1.0])] for kind in (THRESHOLD, VIOLATIONS, FID)}
    draw_over_time("sdturbo", curves, tmp_path, note=PUBLISHED_NOTE)
    for figure in figures:
        figure.draw_without_rendering()
        title = figure.axes[0]._left_title
        assert PUBLISHED_NOTE in title.get_text()
        assert title.get_window_extent().x1 < figure.bbox.width
    assert len(figures) == 3


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_over_time("sdturbo", {FID: [Curve("a", [], [])]}, tmp_path)


def test_runs_of_one_policy_are_told_apart_by_their_folders(tmp_path: Path) -> None:
    runs = [mixed_run(tmp_path / name) for name in ("one", "two")]
    drawn = draw_directories(runs, small_cascade(), tmp_path / "figures")
    assert list(drawn.numbers["runs"]) == ["one", "two"]
