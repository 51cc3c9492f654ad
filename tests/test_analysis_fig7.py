"""Figure 7: the published windows against an independent count, and drawings that hold something."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from slosched.analysis.fig7 import plot_fig7
from slosched.analysis.fig7_published import (
    WINDOW_NS,
    drawn_width_ns,
    published_windows,
    slo_changes,
)
from slosched.errors import InvalidConfig
from slosched.telemetry.manifest import write_manifest
from slosched.telemetry.request_log import read_request_log
from slosched.telemetry.run_dir import CLIENT_MANIFEST
from synthetic_run import MS, S, client, request, sweep, write_clients, write_requests

REQUESTS = "clockwork_request_log.tsv"


def _windows_by_the_book(text: str) -> tuple[list[int], list[float]]:
    """The plotter's rule, straight from its description, on the file's text."""
    rows = [line.split() for line in text.split("\n")[:-1]][1:-1]
    first = min(int(row[0]) for row in rows)
    xs: list[int] = []
    ys: list[float] = []
    window: list[tuple[int, int]] = []
    for row in rows:
        window.append((int(row[8]), int(row[0]) - first))
        times = [t for _, t in window]
        if max(times) - min(times) > 4_000_000_000:
            xs.append(int(row[0]) - first)
            ys.append(1 - sum(1 for met, _ in window if met == 0) / len(window))
            window = []
    return xs, ys


@pytest.mark.parametrize("seed", range(4))
def test_published_windows(tmp_path: Path, seed: int) -> None:
    path = tmp_path / REQUESTS
    write_requests(path, sweep(seed=seed, rate=40, period_ns=5 * S))
    curve = published_windows(read_request_log(path))
    xs, ys = _windows_by_the_book(path.read_text())
    assert len(xs) >= 4
    assert curve.at_ns == xs
    assert curve.satisfaction == pytest.approx(ys, abs=1e-12)
    assert 0 < min(ys) < max(ys)  # the check would be empty on a flat curve


@pytest.mark.parametrize("period_s", [1, 4, 30])
def test_the_picture_shows_each_step_s_satisfaction_above_its_own_slo(
    tmp_path: Path, period_s: int
) -> None:
    """No request of the first step is in time and all later ones are: the curve rises between the two."""
    path = tmp_path / REQUESTS
    n, gap_ns = 4 * period_s * 50, S // 50
    rows = [
        request(i * gap_ns, MS if i >= n // 4 else 20 * MS, factor=2.0 ** (4 * i // n), user=0)
        for i in range(n)
    ]
    write_requests(path, rows)
    log = read_request_log(path)
    width_ns = drawn_width_ns(log)
    assert width_ns <= WINDOW_NS and width_ns < period_s * S / 5
    curve = published_windows(log, width_ns)
    _, second, *_ = [at for at, _ in slo_changes(log)]
    for at_ns, share in zip(curve.middles_ns, curve.satisfaction, strict=True):
        if abs(at_ns - second) > width_ns:
            assert share == (at_ns > second), (
                f"{share} at {at_ns / S} s, the SLO changes at {second / S}"
            )


def test_published_windows_do_not_need_rows_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / REQUESTS
    write_requests(path, sweep(seed=11, rate=30, period_ns=5 * S))
    header, *rows = path.read_text().splitlines()
    rows[10], rows[60] = rows[60], rows[10]
    path.write_text("\n".join([header, *rows, ""]))
    curve = published_windows(read_request_log(path))
    assert (curve.at_ns, curve.satisfaction) == _windows_by_the_book(path.read_text())


def test_a_torn_line_is_the_one_that_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / REQUESTS
    write_requests(path, sweep(seed=12, rate=30, period_ns=5 * S))
    whole = published_windows(read_request_log(path))
    path.write_bytes(path.read_bytes()[:-3])
    assert published_windows(read_request_log(path)) == whole


def test_slo_changes_are_those_of_user_0(tmp_path: Path) -> None:
    path = tmp_path / REQUESTS
    write_requests(
        path,
        [
            request(0, MS, factor=1.0, user=1),
            request(1 * S, MS, factor=1.0, user=0),
            request(2 * S, MS, factor=2.25, user=1),
            request(3 * S, MS, factor=2.25, user=0),
            request(4 * S, MS, factor=2.25, user=0),
            request(5 * S, MS, factor=11.390625, user=0),
            request(9 * S, MS, factor=99.0, user=0),  # the last row is never read
        ],
    )
    changes = slo_changes(read_request_log(path))
    assert changes == [(1 * S, " 1.0"), (3 * S, " 2.2"), (5 * S, "11.4")]


def _columns(path: Path) -> dict[str, list[str]]:
    names, *rows = [line.split("\t") for line in path.read_text().splitlines()]
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def test_published_files(tmp_path: Path) -> None:
    directories = []
    for rate, period_ns in ((60, 5 * S), (120, 4 * S)):
        directory = tmp_path / f"r{rate}"
        write_requests(directory / REQUESTS, sweep(seed=rate, rate=rate, period_ns=period_ns))
        spec = {"copies": 12, "rate": rate * 10.0}
        write_manifest(directory, "client", spec, name=CLIENT_MANIFEST)
        directories.append(directory)
    paths = plot_fig7(directories[::-1], tmp_path / "out", published=True)
    assert [p.name for p in paths] == [
        "fig7_dist=poisson.png",
        "fig7_dist=poisson.pdf",
        "fig7_dist=poisson_slo_multiplier_changes.tsv",
        "fig7_dist=poisson_workload_satisfaction.tsv",
    ]
    width, height = Image.open(paths[0]).size
    assert 1400 < width < 1800  # 10 x 2.5 inches at 180 dots, cropped to what is drawn
    assert 400 < height < 600
    assert len(_colours(paths[0])) > 100
    changes = _columns(paths[2])
    assert list(changes) == ["SLO_multiplier_TS", "SLO_multiplier_val"]
    assert changes["SLO_multiplier_val"] == [" 1.0", " 1.5", " 2.2", " 3.4", " 5.1"]
    curves = _columns(paths[3])
    assert list(curves) == ["N=12_R=600_TS", "N=12_R=600_WS", "N=12_R=1200_TS", "N=12_R=1200_WS"]
    xs, ys = _windows_by_the_book((directories[0] / REQUESTS).read_text())
    assert [int(x) for x in curves["N=12_R=600_TS"]] == xs
    assert [float(y) for y in curves["N=12_R=600_WS"]] == ys
    # The shorter run's columns end in empty cells; the original fails here.
    assert curves["N=12_R=1200_TS"][-1] == ""


def _colours(path: Path) -> set[tuple[int, ...]]:
    pixels = np.asarray(Image.open(path).convert("RGB")).reshape(-1, 3)
    assert pixels.std() > 5, "an empty drawing"
    return {tuple(map(int, pixel)) for pixel in np.unique(pixels, axis=0)}


def test_the_default_figure(tmp_path: Path) -> None:
    records = sweep(seed=21)
    write_requests(tmp_path / "run" / REQUESTS, records)
    write_clients(tmp_path / "run" / "client_log.tsv", [client(r, 400_000) for r in records])
    write_requests(tmp_path / "other" / REQUESTS, sweep(seed=22, rate=150))
    png, pdf = plot_fig7([tmp_path / "run", tmp_path / "other"], tmp_path / "out")
    assert (png.name, pdf.name) == ("fig7.png", "fig7.pdf")
    assert png.stat().st_size > 20_000
    assert pdf.read_bytes().startswith(b"%PDF")
    assert pdf.stat().st_size > 5_000
    assert Image.open(png).size == (1620, 1296)
    seen = _colours(png)
    assert {(0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00)} <= seen  # one colour for each run


def test_drawing_again_gives_the_same_bytes(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=23))
    for out in ("a", "b"):
        plot_fig7([tmp_path], tmp_path / out)
    for name in ("fig7.png", "fig7.pdf"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


@pytest.mark.parametrize("published", [False, True])
def test_absolute_slos_and_a_missing_step_can_be_drawn(tmp_path: Path, published: bool) -> None:
    records = [
        request(
            i * S // 20, 3 * MS, factor=0.0, slo_ns=(5 if i < 100 else 20) * MS, code=8 * (i < 100)
        )
        for i in range(200)
    ]
    write_requests(tmp_path / REQUESTS, records)
    for path in plot_fig7([tmp_path], tmp_path / "out", published=published):
        assert path.stat().st_size > 0


def test_one_request_is_enough_for_the_default_form(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, [request(0, MS)])
    assert len(plot_fig7([tmp_path], tmp_path / "out")) == 2
    with pytest.raises(InvalidConfig, match="no run is longer than one window"):
        plot_fig7([tmp_path], tmp_path / "out", published=True)


def test_a_partial_run_is_drawn_and_says_so(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=24)[:50])
    write_manifest(tmp_path, "client", {"copies": 3, "rate": 100.0}, name=CLIENT_MANIFEST)
    _, pdf = plot_fig7([tmp_path], tmp_path / "out")
    assert pdf.exists()


def test_nothing_to_draw(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="at least one run directory"):
        plot_fig7([], tmp_path)
    write_requests(tmp_path / REQUESTS, [])
    with pytest.raises(InvalidConfig, match="hold no requests"):
        plot_fig7([tmp_path], tmp_path / "out")
    write_clients(tmp_path / "c" / "client_log.tsv", [client(request(0, MS), 0)])
    with pytest.raises(InvalidConfig, match="has no request log"):
        plot_fig7([tmp_path / "c"], tmp_path / "out", published=True)
    assert not (tmp_path / "out").exists()


def test_an_output_directory_that_cannot_be(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=25))
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidConfig, match=r"cannot write .*Not a directory"):
        plot_fig7([tmp_path], tmp_path / "file" / "out")


@pytest.mark.parametrize("hidden", ["matplotlib"])
def test_without_matplotlib_the_numbers_work_and_figures_say_what_to_install(
    tmp_path: Path, hidden: str
) -> None:
    write_requests(tmp_path / REQUESTS, sweep(seed=26))
    code = f"""
import sys
sys.modules[{hidden!r}] = None
from pathlib import Path
from slosched.analysis.fig7 import plot_fig7
from slosched.analysis.tables import summarise_steps
from slosched.errors import MissingPackage
run = Path(sys.argv[1])
assert len(summarise_steps(run)) == 5
try:
    plot_fig7([run], run / "out")
except MissingPackage as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert "pip install 'slosched[plot]'" in done.stdout


def test_percentiles_are_nan_not_zero_where_nothing_succeeded(tmp_path: Path) -> None:
    from slosched.analysis.tables import summarise_steps

    write_requests(tmp_path / REQUESTS, [request(i * MS, 50_000, code=8) for i in range(9)])
    (step,) = summarise_steps(tmp_path)
    assert math.isnan(step.p50_ns)
    assert step.satisfaction == 0
