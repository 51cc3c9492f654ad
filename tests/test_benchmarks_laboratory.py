"""The laboratory's page: it is what the committed results give, and a limit that is missed is said."""

from __future__ import annotations

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))  # its programs import one another as a program's neighbours

import laboratory  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    assert laboratory.PAGE.read_text(encoding="utf-8") == laboratory.page()


def test_limits_that_are_missed_are_said() -> None:
    case = {
        "what": "a run",
        "limits": {"limit_s": 60.0, "speed": 0.1, "limit_mib": 10.0},
        "wall_s": 90.0,
        "cpu_s": 80.0,
        "cpu_us_per_request": 5.0,
        "speed": 0.3,
        "peak_mib": 20.0,
    }
    document = {"cases": {"run": case}, "date": "2026-01-01", "machine": "somewhere"}
    text = laboratory.simulator(document)
    assert "1.50 of 60 s: **missed**; 3.0 x the 0.1 asked: met; 2.00 of 10 MiB: **missed**" in text
    rows = [{"part": "read", "cpu_s": 61.0, "wall_s": 70.0, "peak_bytes": 2**30}]
    target = {"s": 60.0, "bytes": 6 * 2**30}
    host = {"cpu_model": "C", "cpu_count": 2, "python": "3.11"}
    said = laboratory.log_reading({"rows": 10, "results": rows, "target": target, "host": host})
    assert "| read | 1.02 | 0.17 | **missed** |" in said
