"""`--fidelity paper` against two other models of the published INFER5.

The table of analysis/oracle_paper.py comes from one that we did not write; published_infer5.py is the
other, in a few lines, and agrees with ours on every single request.

Margins. One run's standard deviation, from 16 seeds of 5 s: 1.3 points where most of the requests miss a
tight SLO at R=2,400 (factors 2.25 to 5.06), 0.7 at 7.6x, 0.3 at 11.4x, 0.5 at 1.5x and R=1,200, less
elsewhere; it grows as 1/sqrt(seconds). The reference is itself the mean of 3 such runs. So a cell of the
committed table (3 seeds of 5 s) is off by chance by about 1 point where it is worst, and one of the shorter
runs here by about 1.7. Shorter steps also count more of the first requests, which find empty queues:
+1.3 points from 5 s to 2 s at 3.4x and 10 ms ahead, less elsewhere. Runs are seeded: what passes once
passes always.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from published_infer5 import OK, TIMED_OUT, PublishedInfer5, Setting
from slosched.config_file import load_profile
from slosched.units import NS_PER_MS

_RECIPE = Path(__file__).parent.parent / "analysis" / "oracle_paper.py"
_POINTS = 3.0


def recipe() -> ModuleType:
    """analysis/oracle_paper.py, which is a program and in no package."""
    name = "oracle_paper"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, _RECIPE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return sys.modules[name]


oracle = recipe()
FACTORS = oracle.FACTORS


@pytest.mark.parametrize(
    ("copies", "rate", "ahead_ms", "factor"),
    [
        (12, 2400, 5, 3.375),
        (48, 2400, 5, 7.59375),
        (48, 2400, 10, 5.0625),
        (12, 4800, 5, 11.390625),
    ],
)
def test_every_request_fares_as_in_a_second_model_of_the_published_code(
    copies: int, rate: int, ahead_ms: int, factor: float
) -> None:
    row, seconds = oracle.Row(copies, rate, ahead_ms), 0.7
    exec_ns = load_profile("fig7").model("resnet50").exec_ns
    model = PublishedInfer5(Setting(dict(exec_ns), copies, ahead_ns=ahead_ms * NS_PER_MS))
    demands = row.demands(factor, seconds, seed=5)
    slo_ns = round(exec_ns[1] * factor)
    expected = model.run([(d.at_ns, d.index, slo_ns) for d in demands])
    outcome = oracle.simulate_cell(row, factor, seconds=seconds, seed=5)
    requests = sorted(outcome.requests, key=lambda r: r.key)
    found = [(int(r.code), r.departure_ns - r.arrival_ns) for r in requests]
    assert found == [
        (code, at_ns - d.at_ns) for (code, at_ns), d in zip(expected, demands, strict=True)
    ]
    assert {code for code, _ in found} == {OK, TIMED_OUT}
    for request in requests:
        in_time = request.departure_ns - request.arrival_ns <= slo_ns
        assert request.deadline_met == (request.code == OK and in_time)


def test_short_slos_share_one_schedule_because_of_the_floor() -> None:
    row = oracle.Row(12, 2400, 5)
    departures = {
        factor: [
            (r.request_id, r.departure_ns - r.arrival_ns)
            for r in oracle.simulate_cell(row, factor, seconds=0.5, seed=2).requests
        ]
        for factor in (1.0, 5.0625, 7.59375)
    }
    assert departures[1.0] == departures[5.0625] != departures[7.59375]


TIGHT, LOOSER = FACTORS[:5], FACTORS[5:7]


@pytest.mark.parametrize(
    ("copies", "rate", "ahead_ms", "factors", "seconds", "seeds"),
    [
        (12, 600, 5, TIGHT, 2.0, (1,)),
        (12, 1200, 5, TIGHT, 2.0, (1,)),
        (12, 2400, 5, TIGHT, 2.0, (1, 2)),
        (12, 2400, 5, LOOSER, 1.0, (1,)),
        (48, 600, 5, TIGHT, 2.0, (1,)),
        (48, 1200, 5, TIGHT, 2.0, (1,)),
        (48, 2400, 5, TIGHT, 2.0, (1, 2)),
        (48, 2400, 5, LOOSER, 1.0, (1,)),
        (12, 2400, 10, TIGHT, 2.0, (1, 2)),
        (48, 2400, 10, LOOSER, 1.0, (1,)),
    ],
)
def test_figure_7_is_the_published_one_within_3_points(
    copies: int,
    rate: int,
    ahead_ms: int,
    factors: tuple[float, ...],
    seconds: float,
    seeds: tuple[int, ...],
) -> None:
    row = oracle.Row(copies, rate, ahead_ms)
    runs = [oracle.satisfaction_row(row, factors, seconds=seconds, seed=seed) for seed in seeds]
    reference = dict(zip(FACTORS, oracle.REFERENCE[row], strict=True))
    differences = {
        factor: round(sum(cell) / len(seeds) - reference[factor], 2)
        for factor, cell in zip(factors, zip(*runs, strict=True), strict=True)
    }
    assert max(map(abs, differences.values())) <= _POINTS, differences


def test_the_committed_table_is_whole_and_within_3_points() -> None:
    document = json.loads((_RECIPE.parent / "oracle" / "paper.json").read_text())
    assert (document["seeds"], document["seconds"]) == (3, 5.0)
    assert tuple(document["factors"]) == FACTORS
    rows = {oracle.Row(r["copies"], r["rate"], r["ahead_ms"]): r["ours"] for r in document["rows"]}
    assert rows.keys() == oracle.REFERENCE.keys()
    for row, cells in rows.items():
        for factor, ours, theirs in zip(FACTORS, cells, oracle.REFERENCE[row], strict=True):
            assert abs(ours - theirs) <= _POINTS, f"{row} at {factor}x: {ours} against {theirs}"
