"""The synthetic trace: the data set's statistics, the file's form, the same bytes for a seed."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from slosched.errors import InvalidConfig, OutOfResources, OutputExists
from slosched.workloads import azure_synthetic, azure_trace
from slosched.workloads.azure_synthetic import (
    popularity,
    synthetic_rows,
    synthetic_trace,
    write_trace,
)
from slosched.workloads.azure_trace import read_trace


def test_popularity_has_the_published_points_and_mean() -> None:
    rates = popularity(18_000)
    assert sum(rates) / len(rates) == pytest.approx(32.0)
    assert rates == sorted(rates, reverse=True)
    # Shahrad et al.: 45 % at most once an hour, 81 % at most once a minute; those above that have
    # 99.6 % of all calls.
    assert sum(rate <= 1 / 60 for rate in rates) / 18_000 == pytest.approx(0.45, abs=0.005)
    assert sum(rate <= 1 for rate in rates) / 18_000 == pytest.approx(0.81, abs=0.005)
    share = sum(rates[: 18_000 * 186 // 1000]) / sum(rates)
    assert share == pytest.approx(0.996, abs=0.003)
    assert sum(rates[:180]) / sum(rates) == pytest.approx(0.86, abs=0.02)  # the top 1 %


@pytest.mark.parametrize("rows", [1, 7, 100, 3000])
def test_small_traces_have_the_same_mean(rows: int) -> None:
    assert sum(popularity(rows)) / rows == pytest.approx(32.0)


def test_a_trace_has_these_statistics() -> None:
    trace = synthetic_trace(rows=3000, minutes=1440, seed=1)
    totals = [sum(row) for row in trace.rows]
    assert len(totals) == 3000 and trace.intervals == 1440
    # 9,600 requests/s for 18,000 functions; a count is a rate per minute.
    assert sum(totals) / trace.intervals / 60 == pytest.approx(1600, rel=0.02)
    assert sum(totals[:30]) / sum(totals) > 0.8
    assert sum(total <= 24 for total in totals) / 3000 == pytest.approx(0.45, abs=0.04)
    assert sum(total <= 1440 for total in totals) / 3000 == pytest.approx(0.81, abs=0.03)
    by_hour = [
        sum(sum(row[hour * 60 : hour * 60 + 60]) for row in trace.rows[:300]) for hour in range(24)
    ]
    assert 1.2 < max(by_hour) / min(by_hour) < 2.5  # a day's swing
    assert 10 <= by_hour.index(max(by_hour)) <= 18


def test_timers_fire_on_time_and_are_rare() -> None:
    made = list(synthetic_rows(rows=2000, minutes=240, seed=3))
    timers = [counts for trigger, counts in made if trigger == "timer"]
    assert 0.1 < len(timers) / len(made) < 0.25
    for counts in timers:
        at = [minute for minute, count in enumerate(counts) if count]
        assert set(counts) <= {0, 1}
        assert len({b - a for a, b in pairwise(at)}) <= 1


def test_bursty_functions_are_off_for_long() -> None:
    made = [counts for trigger, counts in synthetic_rows(rows=400, minutes=1440, seed=2)]
    busy = [counts for counts in made if 20 * 1440 < sum(counts) < 500 * 1440]
    quiet = [counts for counts in busy if sum(count == 0 for count in counts) > 480]
    assert 0.1 < len(quiet) / len(busy) < 0.45


def test_the_file_reads_back_as_the_trace_in_memory(tmp_path: Path) -> None:
    path = write_trace(tmp_path / "new", 4, rows=60, minutes=90, seed=9)
    assert path.name == "invocations_per_function_md.anon.d04.csv"
    assert read_trace(path) == synthetic_trace(rows=60, minutes=90, seed=9)
    first, second = path.read_text().splitlines()[:2]
    assert first.startswith("HashOwner,HashApp,HashFunction,Trigger,1,2,3,")
    assert [len(cell) for cell in second.split(",")[:3]] == [64, 64, 64]
    with pytest.raises(OutputExists, match="not overwritten"):
        write_trace(tmp_path / "new", 4, rows=60, minutes=90, seed=9)


def test_a_seed_gives_the_same_bytes_under_any_hash_seed(tmp_path: Path) -> None:
    digests = set()
    for hash_seed in ("0", "1"):
        out = tmp_path / hash_seed
        subprocess.run(
            [
                *(sys.executable, "-m", "slosched", "azure-trace", "--out", str(out)),
                *("--rows", "80", "--minutes", "120", "--seed", "5"),
            ],
            env={"PYTHONHASHSEED": hash_seed},
            check=True,
            capture_output=True,
            timeout=60,
        )
        (file,) = out.iterdir()
        digests.add(hashlib.sha256(file.read_bytes()).hexdigest())
    assert len(digests) == 1
    other = write_trace(tmp_path / "other", 1, rows=80, minutes=120, seed=6)
    assert hashlib.sha256(other.read_bytes()).hexdigest() not in digests


@pytest.mark.parametrize(
    ("rows", "minutes", "seed", "words"),
    [(0, 10, 0, "rows"), (10, 0, 0, "minutes"), (10, 1441, 0, "minutes"), (10, 10, -1, "seed")],
)
def test_impossible_traces_are_refused(rows: int, minutes: int, seed: int, words: str) -> None:
    with pytest.raises(InvalidConfig, match=words):
        synthetic_rows(rows=rows, minutes=minutes, seed=seed)  # at once, not with the first row


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_trace_that_is_not_finished_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def broken(kind: str, seed: int, index: int) -> str:
        if index == 5:
            # What was written so far does not have the trace's name.
            assert not list(tmp_path.glob("**/invocations*"))
            assert len(list(tmp_path.glob("**/.slosched-*"))) == 1
            raise error
        return "0"

    monkeypatch.setattr(azure_synthetic, "_hash", broken)
    with pytest.raises((KeyboardInterrupt, OutOfResources)):
        write_trace(tmp_path / "new" / "below", 1, rows=9, minutes=9, seed=0)
    assert not list(tmp_path.iterdir())


def test_a_file_that_came_meanwhile_is_not_overwritten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / azure_trace.file_name(1)

    def other_first(kind: str, seed: int, index: int) -> str:
        path.write_text("another's")
        return "0"

    monkeypatch.setattr(azure_synthetic, "_hash", other_first)
    with pytest.raises(OutputExists, match="not overwritten"):
        write_trace(tmp_path, 1, rows=2, minutes=2, seed=0)
    assert path.read_text() == "another's" and list(tmp_path.iterdir()) == [path]


def test_a_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidConfig, match="cannot write"):
        write_trace(tmp_path / "file" / "below", 1, rows=1, minutes=1, seed=0)
