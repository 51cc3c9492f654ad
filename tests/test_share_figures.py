"""Figures of shared GPUs: what they plot is what the files and values say, also with one point or none."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from slosched.analysis import style
from slosched.analysis.legends import percent, short, short_all
from slosched.analysis.share_bars import Bar, draw_bars
from slosched.analysis.share_bars import Panel as BarPanel
from slosched.analysis.share_cdfs import MOST_CURVES, Latencies, draw_cdfs, draw_segments
from slosched.analysis.share_figures import (
    MOST_BARS,
    MOST_STEPS,
    Lane,
    Pause,
    Phase,
    Queued,
    draw_jct,
    draw_lanes,
    draw_power,
    draw_queues,
    queue_lines,
    read_jct,
)
from slosched.analysis.share_points import (
    TRADEOFF_COLUMNS,
    Alone,
    Fit,
    Mixes,
    TradeOff,
    draw_knob,
    draw_mixes,
    draw_overhead,
    draw_tradeoff,
    fit_line,
)
from slosched.errors import InvalidConfig


@pytest.fixture(autouse=True)
def coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few pixels and no second document: what is plotted does not depend on them."""
    save = style.save

    def quick(figure: Any, out: Path, stem: str, **more: Any) -> list[Path]:
        return save(figure, out, stem, dpi=30, **{"forms": ("png",), **more})

    monkeypatch.setattr(style, "save", quick)


HEADER = (
    "start_timestamp_ns,end_timestamp_ns,jct_ms,"
    "max_allocated_gpu_memory_allocated_byte,max_reserved_gpu_memory_byte"
)


def deft_file(path: Path, rows: list[tuple[int, int, float]]) -> Path:
    lines = [f"{start},{end},{ms},1,2" for start, end, ms in rows]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return path


def test_deft_picture_leaves_the_warm_up_out_and_counts_from_the_first_end(tmp_path: Path) -> None:
    base = 5 * 10**15
    second = 10**9
    a = deft_file(
        tmp_path / "model_A.csv",
        [(base, base + second, 900.0)]
        + [(base + n * second, base + (n + 1) * second, 100.0 + n) for n in (1, 2, 3)],
    )
    b = deft_file(
        tmp_path / "model_B.csv",
        [(base, base + second, 500.0), (base + 2 * second, base + 5 * second // 2, 45.5)],
    )
    drawn = draw_jct(a, b, tmp_path / "figures")
    assert [file.name for file in drawn.files] == ["jct_vs_t.jpg", "jct_vs_t.png"]
    assert drawn.files[0].read_bytes()[:2] == b"\xff\xd8"
    assert drawn.numbers == {
        "Model A (model_A)": {"end_s": [0.0, 1.0, 2.0], "latency_ms": [101.0, 102.0, 103.0]},
        "Model B (model_B)": {"end_s": [0.5], "latency_ms": [45.5]},
    }
    assert read_jct(a)[1] == [900.0, 101.0, 102.0, 103.0]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a,b\n1,2\n", "no column start_timestamp_ns"),
        (f"{HEADER}\n1,x,3,1,1\n", "line 2"),
        (f"{HEADER}\n1,2,nan,1,1\n", "line 2: the latency is nan"),
        (f"{HEADER}\n1,2,1e308,1,1\n", "line 2: the latency is 1e\\+308"),
        (f"{HEADER}\n1,2,-3,1,1\n", "line 2: the latency is -3"),
        (f"{HEADER}\n1,{10**30},3,1,1\n", "line 2: the end is not within 0..2\\^63 ns"),
        (f"{HEADER}\n1,2\n", "line 2"),
        ("", "no column"),
    ],
)
def test_a_file_that_is_not_of_deft_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(InvalidConfig, match=says):
        read_jct(path)


def test_files_of_warm_ups_alone_have_nothing_to_draw(tmp_path: Path) -> None:
    path = deft_file(tmp_path / "a.csv", [(1, 2, 3.0)])
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_jct(path, path, tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_lanes_show_a_part_that_can_be_read(tmp_path: Path) -> None:
    busy = [0.1 * n for n in range(1000)]
    lanes = [
        Lane("busy", busy, busy, [at + 0.1 for at in busy], [Pause(20.02, 20.05)]),
        Lane("rare", [20.0, 60.0], [20.1, 60.1], [20.2, 60.2]),
        Lane("never", [], [], []),
    ]
    drawn = draw_lanes(lanes, tmp_path, "lanes", title="A run")
    shown = drawn.numbers["lanes"]
    assert list(shown) == ["busy", "rare"]
    # From the first request of the rarest lane, and a tenth before it.
    assert 19.0 < drawn.numbers["from_s"] < 20.0 and shown["rare"] == [(20.0, 20.1, 20.2)]
    assert MOST_BARS <= len(shown["busy"]) <= 1.2 * MOST_BARS
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_lanes(lanes[2:], tmp_path, "none", title="A run")


def test_power_has_the_mean_of_each_phase(tmp_path: Path) -> None:
    times = [-2.0, -1.0, 0.5, 1.5, 2.5]
    phases = [
        Phase("idle", -2, -0.5),
        Phase("window", 0, 2),
        Phase("cool-down", 2, 3),
        Phase("x", 8, 9),
    ]
    drawn = draw_power(times, [70, 80, 300, 500, 100], phases, tmp_path, "power", title="Power")
    means = drawn.numbers["mean_watts"]
    assert means["idle"] == 75 and means["window"] == 400 and means["cool-down"] == 100
    assert math.isnan(means["x"])
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_power([], [], [], tmp_path, "none", title="Power")


def test_cdfs_sort_latencies_and_leave_out_jobs_without_any(tmp_path: Path) -> None:
    jobs = [Latencies("a", {"tm": [3.0, 1.0], "mps": []}), Latencies("b", {"tm": []})]
    drawn = draw_cdfs(jobs, tmp_path, "cdf", title="Latencies")
    assert drawn.numbers == {"a": {"tm": [1.0, 3.0], "mps": []}}


# ----------------------------------------------------------------------------------------- points


def test_a_line_is_fitted_with_students_intervals() -> None:
    # Deft's own fit, 0.0115 ms a wait + 2.92 ms, with errors of +-0.1 ms that have no slope.
    x = [100.0, 200.0, 300.0, 400.0]
    y = [
        0.0115 * each + 2.92 + error for each, error in zip(x, (0.1, -0.1, -0.1, 0.1), strict=True)
    ]
    fit = fit_line(x, y)
    assert fit is not None
    slope, at_zero = np.polyfit(x, y, 1)
    assert fit.a == pytest.approx(slope) and fit.b == pytest.approx(at_zero)
    # Residuals +-0.1: variance 0.04 / 2; sum of squares about the mean 50000; t(0.975, 2) = 4.303.
    assert fit.a_half == pytest.approx(4.303 * math.sqrt(0.02 / 50_000), rel=1e-3)
    assert fit.b_half == pytest.approx(
        4.303 * math.sqrt(0.02 * (1 / 4 + 250**2 / 50_000)), rel=1e-3
    )
    assert fit_line([1.0, 1.0], [1.0, 2.0]) is None and fit_line([1.0], [2.0]) is None
    two = fit_line([0.0, 2.0], [1.0, 5.0])
    assert two is not None and (two.a, two.b) == (2.0, 1.0) and math.isnan(two.a_half)


def test_overhead_prints_its_fit(tmp_path: Path) -> None:
    drawn = draw_overhead([0, 100, 200, math.nan], [1, 2, 3, 4], tmp_path, "fit", job="low")
    assert drawn.text.splitlines()[0].startswith("10 ± ")
    assert drawn.numbers["boundaries"] == [0, 100, 200]
    assert drawn.numbers["fit"]["a_ms"] == pytest.approx(0.01)
    one = draw_overhead([10], [1], tmp_path, "one", job="low")
    assert one.text.startswith("no line") and "fit" not in one.numbers
    assert isinstance(fit_line([0, 1, 2], [0, 1, 2]), Fit)


def test_a_trade_off_is_absolute_and_relative_with_deft_columns(tmp_path: Path) -> None:
    points = [
        TradeOff(name="every=4", high_ms=44.0, low_ms=121.0, high_sem=1.1, low_sem=2.2, knob=4),
        TradeOff(name="every=1", high_ms=42.0, low_ms=132.0, knob=1),
        TradeOff(name="lost", high_ms=math.nan, low_ms=100.0),
    ]
    alone = Alone(40.0, 110.0)
    drawn = draw_tradeoff(points, alone, tmp_path, "jct", high="B", low="A")
    assert list(drawn.numbers) == ["every=4", "every=1"]
    four = drawn.numbers["every=4"]
    assert [four["xvals"], four["yvals"]] == pytest.approx([0.1, 0.1])
    assert [four["xerrs"], four["yerrs"]] == pytest.approx([1.1 / 40, 2.2 / 110])
    rows = list(csv.reader((tmp_path / "jct.csv").read_text().splitlines()))
    assert tuple(rows[0]) == TRADEOFF_COLUMNS
    assert rows[1][:3] == ["4", "44.0", "121.0"] and rows[2][3] == ""

    knob = draw_knob(points, alone, tmp_path, "knob", knob="every", high="B", low="A")
    assert knob.numbers["knob"] == [1, 4]
    assert knob.numbers["high"] == pytest.approx([0.05, 0.1])
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_tradeoff(points[2:], alone, tmp_path, "none", high="B", low="A")
    lone = draw_tradeoff(points[:1], Alone(), tmp_path, "lone", high="B", low="A")
    assert math.isnan(lone.numbers["every=4"]["xvals"])


def test_mixes_put_ours_before_the_published(tmp_path: Path) -> None:
    series = [
        Mixes("then", {"a+b": (1.6, 0.9), "a+b+c": (1.7, math.nan)}, published=True),
        Mixes("now", {"a+b": (1.9, 0.8)}),
        Mixes("empty", {"z": (math.nan, math.nan)}),
    ]
    drawn = draw_mixes(series, tmp_path, "mixes", title="Then and now")
    assert list(drawn.numbers) == ["now", "then"] and drawn.numbers["now"] == {"a+b": [1.9, 0.8]}
    assert drawn.text.splitlines()[1].split()[:2] == ["a+b", "now"]
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_mixes(series[2:], tmp_path, "none", title="None")
    # Without an energy, as on a CPU, its panel is left out.
    alone = draw_mixes([Mixes("cpu", {"a+b": (1.9, math.nan)})], tmp_path, "cpu", title="Here")
    widths = [Image.open(each.files[0]).width for each in (drawn, alone)]
    assert widths[1] < 0.7 * widths[0]


def test_bars_leave_out_panels_without_a_value(tmp_path: Path) -> None:
    known = BarPanel("Known", "s", ["x", "y"], {"one": [Bar(1.0, 0.1), Bar()]})
    unknown = BarPanel("Unknown", "s", ["x", "y"], {"one": [Bar(), Bar()]})
    drawn = draw_bars([known, unknown], tmp_path, "bars", title="Bars", columns=2)
    assert drawn.numbers["left_out"] == ["Unknown"]
    assert drawn.numbers["Known"]["one"]["x"] == [1.0, 0.1]
    with pytest.raises(InvalidConfig, match="nothing to draw"):
        draw_bars([unknown], tmp_path, "none", title="Bars")


def test_long_names_stay_apart_when_they_are_cut() -> None:
    names = [f"a-very-long-name-of-a-model-{n}-with-an-equal-end" for n in range(3)]
    cut = short_all(names, 20)
    assert len(set(cut)) == 3 and all(len(name) <= 20 for name in cut)
    assert short("bert", 4) == "bert" and len(short("fasterrcnn_resnet50_fpn", 10)) == 10
    assert [percent(share) for share in (0.125, 12.0, 0.0)] == ["12.5 %", "1,200 %", "0 %"]


def test_a_queue_is_drawn_step_by_step_or_as_its_means(tmp_path: Path) -> None:
    short = Queued("A", [0.0, 1.0, 3.0], [1, 3, 0])
    assert (short.mean(4.0), short.most) == (7 / 4, 3)
    # Up for a tenth of each ms.
    many = 4 * MOST_STEPS
    times = [at for n in range(many) for at in (n * 1e-3, n * 1e-3 + 1e-4)]
    dense = Queued("B", times, [2, 0] * many)
    drawn = draw_queues([short, dense], many * 1e-3, tmp_path, "queue", title="Queues")
    assert drawn.numbers["A"] == {"time_s": [0.0, 1.0, 3.0], "waiting": [1, 3, 0]}
    (edges, means), shade = queue_lines(dense, many * 1e-3)
    assert shade is not None and len(edges) == MOST_STEPS + 1 == len(means)
    assert means == pytest.approx([0.2] * len(means)) and set(shade[1]) == {2}
    assert queue_lines(short, 4.0) == (([0.0, 0.0, 1.0, 3.0, 4.0], [0, 1, 3, 0, 0]), None)
    row = next(line.split() for line in drawn.text.splitlines() if line.startswith("B"))
    assert row[1:] == ["0.2", "2", "0"]
    for queues, end_s in (([], 1.0), ([short], 0.0)):
        with pytest.raises(InvalidConfig, match="nothing to draw"):
            draw_queues(queues, end_s, tmp_path, "queue", title="Queues")


def test_segments_are_drawn_as_a_distribution(tmp_path: Path) -> None:
    segments = {"low": [1.0, 3.0, 2.0, 2.0], "none": []}
    drawn = draw_segments(segments, tmp_path, "segments", title="Segments")
    assert drawn.numbers == {"low": [1.0, 2.0, 2.0, 3.0]}
    row = next(line.split() for line in drawn.text.splitlines() if line.startswith("low"))
    assert row == ["low", "4", "2", "2.97", "3"]
    assert [file.name for file in drawn.files] == ["segments.png"]
    many = {f"job {n}": [n + 1.0] for n in range(MOST_CURVES + 1)}
    drawn = draw_segments(many, tmp_path, "many", title="Segments")
    assert drawn.numbers == many and len(drawn.text.splitlines()) == MOST_CURVES + 2
    with pytest.raises(InvalidConfig, match="no job of the run has segments"):
        draw_segments({"none": []}, tmp_path, "segments", title="Segments")
