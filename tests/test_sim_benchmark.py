"""benchmarks/simulator.py: which part a file belongs to, and what is printed. Nothing is timed here."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import simulator


@pytest.mark.parametrize(
    ("path", "part"),
    [
        ("/x/src/slosched/core/worker/brain.py", "worker"),
        ("/x/src/slosched/core/scheduler/scheduler.py", "scheduler"),
        ("/x/src/slosched/sim/run_files.py", "telemetry"),
        ("/x/src/slosched/sim/kernel.py", "kernel and network"),
        ("/x/src/slosched/loadgen/driver.py", "load driver"),
        ("/x/src/slosched/workloads/engine.py", "load driver"),
        ("/usr/lib/python3.11/heapq.py", "other"),
    ],
)
def test_files_belong_to_parts(path: str, part: str) -> None:
    assert simulator.part_of(path) == part


def test_a_case_is_measured_and_printed_ratios_first() -> None:
    case = replace(simulator.CASES[0], workload=simulator._sweep(200, "0.02"))
    found = simulator.measure(case)
    assert found["requests"] > 20 and found["events"] > 3 * found["requests"]
    assert abs(sum(found["parts"].values()) - 1.0) < 1e-9
    assert {"scheduler", "worker", "load driver", "telemetry"} <= set(found["parts"])
    first, *rest = simulator.lines(case.name, found, case)
    assert first.startswith("sweep: ") and "of the 60 s allowed; " in first
    assert "us of CPU a request: " in rest[1]


def test_quick_cases_have_no_targets_of_time() -> None:
    for case in map(simulator.quick, simulator.CASES):
        assert case.limit_s is None and case.speed is None and case.duration_ns == 1_000_000_000
