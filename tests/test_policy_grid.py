"""The grid of the policy study in short: the default policy keeps what it reaches there."""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "analysis"))

import policy_cases
import policy_figures
import policy_grid

BY_NAME = {row.name: row for row in policy_grid.GRID}
#: Overload and one GPU; test_sim_clusters.py has the others.
CELLS = (
    ("12/4800", 2.25),
    ("12/4800", 5.0625),
    ("12/9600", 3.375),
    ("one GPU, 1/1200", 10),
    ("one GPU, 1/1200", 25),
)


@pytest.mark.parametrize(("name", "slo"), CELLS)
def test_cells_of_the_grid(name: str, slo: float) -> None:
    """Two seconds of each: three points are more than five standard errors of so short a run."""
    row = replace(BY_NAME[name], seconds=2.0)
    target = row.targets[row.slos.index(slo)]
    found = policy_grid.run_cell(row, slo, seed=1)
    assert found.satisfied > target - 3
    assert found.late == 0  # exec times are known exactly


def test_with_noise_few_are_late_although_both_batches_of_a_gpu_may_take_longer() -> None:
    row = replace(BY_NAME["12/2400, noise"], seconds=3.0)
    found = policy_grid.run_cell(row, 1.5, seed=1)
    assert found.satisfied > 66 and 0 < found.late <= 0.3


def test_a_cell_below_its_target_says_so() -> None:
    cells = [
        {
            "slo": 1.5,
            "satisfied": 70.99,
            "interval": 0.1,
            "late": 0.0,
            "requests": 9,
            "target": 71.0,
            "refused_late": 71.2,
        },
        {
            "slo": 2.25,
            "satisfied": 87.2,
            "interval": 0.1,
            "late": 0.0,
            "requests": 9,
            "target": 87.0,
        },
    ]
    line = policy_grid.line_of({"name": "12/2400", "one_gpu": False, "cells": cells})
    assert "70.99 ±0.10 / 71 MISSED; refused late 71.20" in line and "87.20 ±0.10 / 87 |" in line
    page = policy_grid.page([{"name": "12/2400", "one_gpu": False, "cells": cells}], 5)
    rows = [text for text in page.splitlines() if text.startswith("|")]
    assert len({text.count("|") for text in rows}) == 1


def test_the_interval_is_students() -> None:
    assert policy_grid.interval([1.0, 3.0]) == pytest.approx(12.71)
    assert math.isnan(policy_grid.interval([1.0]))


def test_a_case_in_which_another_is_ahead_says_so() -> None:
    satisfied = {policy: [1.0, 1.0, 1.0] for policy in policy_cases.POLICIES}
    satisfied |= {"INFER5": [90.0, 91.0, 90.5], "FIFO": [95.0, 96.0, 95.4]}
    cell = policy_cases.Cell("zipf", 1200, "10", satisfied)
    assert cell.best_other == "FIFO" and cell.behind
    assert "**behind**" in policy_cases.page([cell], 3)
    close = replace(cell, satisfied={"INFER5": [90.0, 91.0], "FIFO": [90.5, 90.4]})
    assert not close.behind


def test_every_case_is_a_run_that_can_be_made() -> None:
    for case in policy_cases.CASES:
        for rate, slo in case.cells:
            for policy in policy_cases.POLICIES:
                spec = case.spec(rate, slo, policy, 1)
                assert spec.workload.duration_ns is not None


def test_the_timeline_shows_batches_and_refusals() -> None:
    outcome, start_ns = policy_figures.timeline_run()
    shown = [
        r
        for r in outcome.requests
        if policy_figures.FROM_MS <= (r.arrival_ns - start_ns) / 1e6 <= policy_figures.TO_MS
    ]
    assert {0} < {r.code for r in shown}  # some are served, some are not
    assert max(a.batch_size for a in outcome.actions) >= 4


def test_the_capacity_is_that_of_the_largest_batch_that_fits() -> None:
    found = [round(policy_figures.capacity_rps(f)) for f in (1.0, *policy_grid.FACTORS[:4])]
    assert found == [0, 2069, 2791, 3871, 4615]  # policy study
