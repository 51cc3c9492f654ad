"""What benchmarks/functions counts and prints. No process is started here."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "functions")]

import bench_functions  # noqa: E402
import bench_page  # noqa: E402
from bench_kills import Counts, Load, begun_twice, is_ours, latest_processes, marked  # noqa: E402
from bench_parts import PARTS, QUICK, WrongAnswer, no_op  # noqa: E402
from bench_systems import OnEngine, opened  # noqa: E402

MS = 1_000_000


def run_of(system: str, repeat: int, p50_ns: int, rate: float, **more: Any) -> dict[str, Any]:
    found = {
        "system": system,
        "part": "no_op",
        "repeat": repeat,
        "p50_ns": p50_ns,
        "p99_ns": 2 * p50_ns,
    }
    return found | {"calls_per_s": rate, "load": 0.0} | more


def document(*runs: dict[str, Any]) -> dict[str, Any]:
    return {
        "date": "2026-01-01",
        "slots": 2,
        "seconds": 1.0,
        "machine": "a machine",
        "versions": {"slosched": "1"},
        "runs": list(runs),
        "state": {},
        "kills": {},
    }


def test_ratios_are_those_of_the_same_repeat() -> None:
    found = document(
        run_of("slosched", 1, MS // 2, 3000.0),
        run_of("slosched", 0, MS // 2, 1000.0),
        run_of("dask-threads", 0, 5 * MS, 500.0),
        run_of("dask-threads", 1, 10 * MS, 600.0),
    )
    assert bench_page.ratio(found, "dask-threads", "no_op", "calls_per_s") == (2.0 + 5.0) / 2
    assert bench_page.ratio(found, "slosched", "no_op", "calls_per_s") is None


def test_dasks_best_is_the_best_of_its_forms_in_each_repeat() -> None:
    hurried = {"p50_ns": MS, "p99_ns": MS, "calls_per_s": 100.0, "bare_per_s": 2000.0}
    found = document(
        run_of("slosched", 0, MS // 2, 3000.0, refused=0),
        run_of("dask-processes", 0, 5 * MS, 500.0, bare_per_s=900.0),
        run_of("dask-threads", 0, 5 * MS, 600.0, bare_per_s=1000.0, hurried=hurried),
    )
    assert bench_page.best_dask_ratio(found, ["calls"]) == 5.0
    assert bench_page.best_dask_ratio(found, ["calls", "bare tasks"]) == 3.0
    text = bench_page.tables(found)
    assert "5 times the same calls on Dask (met), 3 times its best with bare tasks (met)" in text
    assert "1.5 times that of a patched Dask" in text


def test_times_are_rounded_up_and_rates_down() -> None:
    assert bench_page._ms(999_100) == "1"
    assert bench_page._ms(1_000_001) == "1.01"
    assert bench_page._whole(2999.9) == "2,999"


def test_the_page_keeps_its_words(tmp_path: Path) -> None:
    path = tmp_path / "page.md"
    path.write_text(f"before\n{bench_page.BEGIN}\nold\n{bench_page.END}\nafter\n")
    text = bench_page.page(document(run_of("slosched", 0, MS, 10.0)), path)
    assert text.startswith("before\n") and text.endswith("\nafter\n")
    assert "old" not in text and "| slosched |" in text
    path.write_text("no place")
    with pytest.raises(ValueError, match="must have one"):
        bench_page.page(document(), path)


def test_the_committed_page_has_a_place_for_tables() -> None:
    text = (BENCHMARKS / "functions.md").read_text()
    assert text.count(bench_page.BEGIN) == text.count(bench_page.END) == 1


@pytest.mark.parametrize("part", [*PARTS])
def test_each_part_checks_the_answers_of_the_local_engine(part: str) -> None:
    with opened("local", 2) as system:
        found = PARTS[part](system, QUICK)
    assert all(
        value >= 0 for name, value in found.items() if name.endswith("ns") and "turn" not in name
    )


def test_a_wrong_value_ends_the_benchmark() -> None:
    class Wrong:
        name = "wrong"

        def one(self, function: Any, *args: Any) -> Any:
            return 0

        def many(self, function: Any, calls: Any) -> list[Any]:
            return [0] * len(calls)

    with pytest.raises(WrongAnswer, match="wrong values"):
        no_op(Wrong(), QUICK)


def test_bodies_that_begin_twice_are_counted(tmp_path: Path) -> None:
    notes = tmp_path / "begun"
    assert begun_twice(notes) == (0, 0)
    assert latest_processes(notes) == []
    for token in ("t1", "t1.0", "t1.1", "t1.0"):
        bench_functions.note_begin(str(notes), token)
    assert begun_twice(notes) == (3, 1)
    assert latest_processes(notes) == [os.getpid()]


def test_no_process_without_the_mark_is_ended() -> None:
    with marked():
        assert not is_ours(os.getpid())
        assert not is_ours(os.getppid())


def test_the_load_of_kills_knows_right_answers(tmp_path: Path) -> None:
    with opened("local", 2) as system:
        assert isinstance(system, OnEngine)
        load = Load(system, tmp_path / "begun", seed=1)
        for _ in range(60):
            load._send()
        while load._open:
            load._take(*load._open.popleft(), 2**62)
    counts: Counts = load.counts
    assert (counts.wrong, counts.unanswered) == (0, 0)
    assert counts.returned + sum(counts.failed.values()) == 60
    assert set(counts.failed) <= {"call raised"}
    assert begun_twice(tmp_path / "begun")[1] == 0
