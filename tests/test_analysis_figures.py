"""Figures 5, 6, 8, 9, 10 and 11: their numbers against independent counts, and drawings that hold something."""

from __future__ import annotations

import json
import random
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from slosched.analysis.fig5 import plot_fig5
from slosched.analysis.fig6 import plot_fig6
from slosched.analysis.fig8 import plot_fig8
from slosched.analysis.fig9 import plot_fig9
from slosched.analysis.fig10 import plot_fig10
from slosched.analysis.fig11 import plot_fig11
from slosched.analysis.tails import named_quantiles, tail
from slosched.analysis.windows import Windows, closing_rows
from slosched.cli.app import app
from slosched.codes import ActionType
from slosched.core.scheduler.interface import RequestRecord
from slosched.errors import InvalidConfig
from slosched.telemetry.manifest import write_manifest
from synthetic_run import MS, S, action, request, write_actions, write_requests

REQUESTS, ACTIONS = "clockwork_request_log.tsv", "clockwork_action_log.tsv"


def written(directory: Path, requests: list[RequestRecord], actions: list[Any] = []) -> Path:  # noqa: B006
    write_requests(directory / REQUESTS, requests)
    if actions:
        write_actions(directory / ACTIONS, actions)
    return directory


def drawn_well(files: list[Path], stem: str) -> None:
    assert [path.name for path in files] == [f"{stem}.png", f"{stem}.pdf"]
    pixels = np.asarray(Image.open(files[0]).convert("RGB")).reshape(-1, 3)
    assert pixels.std() > 5, "an empty drawing"
    assert files[1].read_bytes().startswith(b"%PDF")


# ------------------------------------------------------------------------------------- windows


def test_windows_count_what_a_loop_counts() -> None:
    chance = random.Random(3)
    times = [chance.randrange(10_000) for _ in range(2_000)]
    values = [chance.randrange(500) for _ in times]
    chosen = [chance.random() < 0.5 for _ in times]
    windows = Windows(np.array(times), 700, 1_000, 9_000)
    assert windows.count == 11  # 8,000 / 700; the rest is less than a window
    assert Windows(np.array(times), 700, 1_000, 9_390).count == 12  # that much is
    mask, numbers = np.array(chosen), np.array(values)
    (median,) = windows.quantiles(numbers, [0.5], mask)
    for index in range(windows.count):
        low = 1_000 + 700 * index
        inside = [
            v for t, v, c in zip(times, values, chosen, strict=True) if low <= t < low + 700 and c
        ]
        assert windows.counts(mask)[index] == len(inside)
        assert windows.sums(numbers, mask)[index] == sum(inside)
        assert windows.distinct(numbers, mask)[index] == len(set(inside))
        assert median[index] == pytest.approx(float(np.median(inside)))


def test_windows_say_what_is_too_short_and_too_many() -> None:
    with pytest.raises(InvalidConfig, match="5s, is shorter than one window of 10s"):
        Windows(np.array([0]), 10 * S, 0, 5 * S)
    with pytest.raises(InvalidConfig, match="too many to draw"):
        Windows(np.array([0]), 1, 0, 10**9)


@pytest.mark.parametrize("seed", range(3))
def test_closing_rows_follow_the_published_rule(seed: int) -> None:
    chance = random.Random(seed)
    times = sorted(chance.randrange(100 * S) for _ in range(90_000))
    times[500], times[40_000] = times[40_000], times[500]
    expected, opened = [], []
    for row, time in enumerate(times):
        opened.append(time)
        low, high = min(opened[0], time), max(opened[0], time)
        opened = [low, high] if len(opened) == 1 else [min(low, *opened), max(high, *opened)]
        if opened[1] - opened[0] > 7 * S:
            expected.append(row)
            opened = []
    assert closing_rows(np.array(times), 7 * S) == expected
    assert len(expected) >= 10


def test_a_tail_ends_with_the_largest() -> None:
    nines, quantiles = tail(np.arange(1, 1001))
    assert nines[0] == 0 and quantiles[0] == 1
    assert nines[-1] == pytest.approx(3) and quantiles[-1] == 1000
    assert quantiles == sorted(quantiles)
    assert list(named_quantiles(np.arange(100))) == ["p50", "p90", "p99", "max"]
    assert tail(np.array([7.0]))[1] == [7, 7]


# ------------------------------------------------------------------------------------- figure 5


def closed_loop_run(directory: Path, slo_ms: int, policy: str, served: int) -> Path:
    """100 requests/s for 30 s; of each hundred `served` are in time, ten late and the rest refused."""
    records = []
    for i in range(3_000):
        place = i % 100
        latency, code = 5 * MS, 0
        if place >= served:
            latency, code = (slo_ms * MS + MS, 0) if place < served + 10 else (100_000, 8)
        records.append(
            request(i * 10 * MS, latency, factor=0.0, slo_ns=slo_ms * MS, code=code, number=i)
        )
    written(directory, records)
    write_manifest(directory, "simulation", {"scheduler": {"policy": policy, "fidelity": "best"}})
    return directory


def test_figure_5_counts_the_window_alone(tmp_path: Path) -> None:
    runs = [
        closed_loop_run(tmp_path / f"{policy}-{slo}", slo, policy, served)
        for policy, served in (("INFER5", 80), ("FIFO", 20))
        for slo in (25, 100)
    ]
    drawn = plot_fig5(runs, tmp_path / "out", window_ns=20 * S, margin_ns=5 * S)
    drawn_well(drawn.files, "fig5")
    by_run = {(run["policy"], run["slo_ns"]): run for run in drawn.numbers["runs"]}
    best = by_run["INFER5", 25 * MS]
    assert best["requests"] == pytest.approx(2000, abs=11)
    assert best["goodput_rps"] == pytest.approx(80, abs=0.5)
    assert best["throughput_rps"] == pytest.approx(90, abs=0.6)
    assert best["latency_ms"]["p50"] == 5 and best["latency_ms"]["max"] == 26
    assert by_run["FIFO", 100 * MS]["goodput_rps"] == pytest.approx(20, abs=0.5)
    assert "INFER5" in drawn.text and "100ms" in drawn.text


def test_figure_5_says_that_a_run_is_too_short(tmp_path: Path) -> None:
    run = closed_loop_run(tmp_path / "run", 25, "INFER5", 50)
    with pytest.raises(
        InvalidConfig, match=r"lasted 30s; .* 600s that end 60s before.* --window 20s"
    ):
        plot_fig5([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------- figures 6 and 9


def bursty_run(directory: Path) -> Path:
    """User 9 alone for 20 s at 10/s; then users 0.. join, one each second, 50/s in turn, for 30 s."""
    records = [
        request(i * 100 * MS, 4 * MS, factor=0.0, slo_ns=100 * MS, user=9) for i in range(500)
    ]
    for i in range(1_500):
        at_ns = 20 * S + i * 20 * MS
        user = 10 + i % (1 + i // 50)
        late = i % 5 == 0
        records.append(
            request(
                at_ns,
                150 * MS if late else 8 * MS,
                factor=0.0,
                slo_ns=100 * MS,
                user=user,
                cold=i % 50 == 0,
            )
        )
    actions = [
        action(20 * S + i * 100 * MS, 40 * MS, gpu=i % 2, in_time=0.5, batch=1 + i % 4)
        for i in range(300)
    ]
    actions += [
        action(20 * S + i * S, 8 * MS, kind=ActionType.LOAD_WEIGHTS, gpu=i % 2) for i in range(30)
    ]
    actions += [action(20 * S + i * S, 99 * MS, code=81) for i in range(30)]
    return written(directory, records, actions)


def test_figure_6_by_hand(tmp_path: Path) -> None:
    drawn = plot_fig6(bursty_run(tmp_path / "run"), tmp_path / "out", window_ns=10 * S)
    drawn_well(drawn.files, "fig6")
    numbers = drawn.numbers
    assert numbers["minor"] == 9 and numbers["slo_ms"] == 100
    assert numbers["start_s"] == [0, 10, 20]
    assert numbers["goodput_minor_rps"] == pytest.approx([10] * 3, abs=0.2)
    assert numbers["goodput_major_rps"] == pytest.approx([40] * 3, abs=0.2)
    assert numbers["latency_max_ms"] == [150] * 3
    assert numbers["latency_p50_ms"] == [8] * 3
    assert numbers["coldstart_percent"] == pytest.approx([100 / 60] * 3, abs=0.1)
    # 10 infers of 40 ms and a load of 8 ms each second, over two GPUs; what failed does not count.
    assert numbers["gpu_percent"] == pytest.approx([20] * 3, abs=0.5)
    assert numbers["gpu_goodput_percent"] == pytest.approx([10] * 3, abs=0.3)
    assert numbers["pci_percent"] == pytest.approx([0.4] * 3, abs=0.05)
    assert numbers["major_models_so_far"] == [10, 20, 30]


def test_figure_6_needs_two_streams(tmp_path: Path) -> None:
    run = written(tmp_path, [request(i * S, MS) for i in range(40)], [action(S, MS)])
    with pytest.raises(InvalidConfig, match=r"no requests but those of user 0.*bursty_experiment"):
        plot_fig6(run, tmp_path / "out")


def test_figure_9_by_hand(tmp_path: Path) -> None:
    run = bursty_run(tmp_path / "run")
    drawn = plot_fig9(run, tmp_path / "out", window_ns=5 * S, skip_ns=20 * S)
    drawn_well(drawn.files, "fig9")
    numbers = drawn.numbers
    assert len(numbers["start_s"]) == 6
    assert numbers["throughput_rps"][1:] == pytest.approx([60] * 5, abs=0.5)
    assert numbers["goodput_rps"][1:] == pytest.approx([50] * 5, abs=0.5)
    assert numbers["latency_p99_ms"] == [150] * 6
    assert numbers["cold_models"] == [5] * 6 or numbers["coldstarts_per_s"][1:] == [1] * 5
    # Batches of 1 to 4 in turn: 30 / 10.
    assert numbers["batch_size"] == pytest.approx([3] * 6, abs=0.15)
    assert numbers["totals"]["served_late"] == 300
    assert "300 served late" in drawn.text


def test_figure_9_says_that_a_run_is_too_short(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match=r"lasted 50.*leaves out the first 600s.*--skip 5s"):
        plot_fig9(bursty_run(tmp_path / "run"), tmp_path / "out")


# ------------------------------------------------------------------------------------- figure 8


def foreground_run(directory: Path) -> Path:
    """Two foreground users, 20/s for 60 s, in time from the 30th s on; user 2 behind, 50/s in time."""
    records = [
        request(
            i * 50 * MS,
            3 * MS if i >= 600 else 9 * MS,
            factor=1.0 if i < 600 else 4.0,
            slo_ns=5 * MS,
            user=i % 2,
        )
        for i in range(1_200)
    ]
    records += [request(i * 20 * MS, 3 * MS, factor=0.0, slo_ns=S, user=2) for i in range(3_000)]
    written(directory, records)
    write_manifest(directory, "simulation", {"foreground": {"copies": 2}, "copies_bg": 1})
    return directory


def test_figure_8_by_hand(tmp_path: Path) -> None:
    run = foreground_run(tmp_path / "run")
    drawn = plot_fig8([run, run], tmp_path / "out")
    drawn_well(drawn.files, "fig8")
    curves = drawn.numbers["runs"][0]
    assert curves["foreground"] == 2 and curves["label"] == "M=1"
    assert (curves["foreground_requests"], curves["foreground_in_time"]) == (1_200, 600)
    assert set(curves["satisfaction"]) >= {0, 1}
    ends = curves["foreground_at_s"]
    assert all(5 < later - sooner < 5.2 for sooner, later in pairwise(ends))
    assert curves["background_rps"] == pytest.approx([50] * 11, rel=0.01)
    assert [text for _, text in curves["slo_changes_s"]] == ["1.0", "4.0"]
    assert curves["slo_changes_s"][1][0] == pytest.approx(30, abs=0.1)


def test_figure_8_needs_a_foreground(tmp_path: Path) -> None:
    run = foreground_run(tmp_path / "run")
    with pytest.raises(InvalidConfig, match=r"no requests of users below 0.*--foreground"):
        plot_fig8([run], tmp_path / "out", foreground=0)
    with pytest.raises(InvalidConfig, match="shorter than one window of 100s"):
        plot_fig8([run], tmp_path / "out", window_ns=100 * S)


# ------------------------------------------------------------------------------------ figure 10


def test_figure_10_has_the_sign_right(tmp_path: Path) -> None:
    slow = [action(i * 30 * MS, 3 * MS, duration_error_ns=MS, number=i) for i in range(75)]
    quick = [action(i * 30 * MS, 3 * MS, duration_error_ns=-2 * MS, number=i) for i in range(25)]
    early = [action(i * 30 * MS, 3 * MS, completion_error_ns=-4 * MS, number=i) for i in range(20)]
    failed = [action(i * 30 * MS, 3 * MS, code=81, duration_error_ns=9 * MS) for i in range(9)]
    write_actions(tmp_path / ACTIONS, slow + quick + early + failed)
    drawn = plot_fig10(tmp_path, tmp_path / "out")
    drawn_well(drawn.files, "fig10")
    sides = {(s["error"], s["side"]): s for s in drawn.numbers["sides"]}
    under, over = sides["duration", "under-predicted"], sides["duration", "over-predicted"]
    # It took 1 ms longer than expected: the prediction was too low.
    assert (under["actions"], under["error_ms"]["max"]) == (75, 1)
    assert (over["actions"], over["error_ms"]["max"]) == (25, 2)
    assert under["share"] == 75 / 120
    assert sides["duration", "exactly"]["actions"] == 20
    assert sides["completion", "over-predicted"]["error_ms"]["p50"] == 4
    assert ("completion", "under-predicted") not in sides


def test_figure_10_needs_actions_that_succeeded(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, [request(0, MS)])
    with pytest.raises(
        InvalidConfig, match=r"has no clockwork_action_log\.tsv; it is one of the controller's logs"
    ):
        plot_fig10(tmp_path, tmp_path / "out")
    write_actions(tmp_path / ACTIONS, [action(30 * MS, MS, code=81)])
    with pytest.raises(InvalidConfig, match="no load and no inference succeeded"):
        plot_fig10(tmp_path, tmp_path / "out")


# ------------------------------------------------------------------------------------ figure 11


def ramp_run(directory: Path, gpus: int, most_rps: int) -> Path:
    """10, 20, 40, 80 requests/s for 5 s each; at most `most_rps` of them are in time."""
    records, actions = [], []
    for step, rate in enumerate((10, 20, 40, 80)):
        for i in range(5 * rate):
            at_ns = step * 5 * S + i * S // rate
            good = i % rate < most_rps
            records.append(
                request(at_ns, 4 * MS, factor=0.0, slo_ns=100 * MS, code=0 if good else 8)
            )
            actions.append(action(at_ns, 2 * MS, gpu=i % gpus, batch=2))
    return written(directory, records, actions)


def test_figure_11_by_hand(tmp_path: Path) -> None:
    runs = [
        ramp_run(tmp_path / f"n{gpus}-{trial}", gpus, 10 * gpus + trial)
        for gpus in (1, 2, 4)
        for trial in (0, 2, 3)
    ]
    drawn = plot_fig11(runs, tmp_path / "out", window_ns=5 * S)
    drawn_well(drawn.files, "fig11")
    assert drawn.numbers["at"] == 4
    best = drawn.numbers["median_best_goodput_rps"]
    assert best == {
        "1": pytest.approx(12, abs=0.5),
        "2": pytest.approx(22, abs=0.5),
        "4": pytest.approx(42, abs=1),
    }
    trial = next(t for t in drawn.numbers["trials"] if t["gpus"] == 2)
    assert trial["offered_rps"] == pytest.approx([10, 20, 40, 80], abs=0.5)
    assert trial["batch_size"] == [2, 2, 2, 2]
    with pytest.raises(InvalidConfig, match="no run has 3 GPUs; --at takes one of 1, 2, 4"):
        plot_fig11(runs, tmp_path / "out", window_ns=5 * S, at=3)


# ------------------------------------------------------------------------------------- commands


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["fig5", "--window", "20s", "--margin", "0"], "runs"),
        (["fig6"], "goodput_major_rps"),
        (["fig8", "--foreground", "10"], "runs"),
        (["fig9", "--window", "2s", "--skip", "0s"], "totals"),
        (["fig10"], "sides"),
        (["fig11", "--window", "2s"], "trials"),
    ],
)
def test_the_commands_draw_and_print_their_numbers(
    tmp_path: Path, arguments: list[str], key: str
) -> None:
    run = bursty_run(tmp_path / "run")
    name, *options = arguments
    done = CliRunner().invoke(app, ["plot", name, str(run), *options, "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["files"] == [str(run / "figures" / f"{name}.{kind}") for kind in ("png", "pdf")]
    assert all(Path(file).stat().st_size > 3_000 for file in document["files"])
    assert document[key]
    again = CliRunner().invoke(
        app, ["plot", name, str(run), *options, "--out", str(tmp_path / "o")]
    )
    assert again.exit_code == 0 and f"wrote {tmp_path / 'o' / name}.png" in again.output
    assert len(again.output.splitlines()) > 4
    assert (tmp_path / "o" / f"{name}.png").read_bytes() == Path(document["files"][0]).read_bytes()


@pytest.mark.parametrize("name", ["fig5", "fig6", "fig8", "fig9", "fig10", "fig11"])
def test_a_directory_without_a_run_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / "empty").mkdir()
    for place, words in (
        (tmp_path / "empty", "has no"),
        (tmp_path / "absent", "is not a directory"),
    ):
        done = CliRunner().invoke(app, ["plot", name, str(place)])
        assert done.exit_code != 0
        assert words in str(done.exception) + done.output
