"""Several policies on the same arrivals: the estimates, the table, the figure and the command."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from slosched.analysis.compare import (
    ALL_STEPS,
    Comparison,
    Estimate,
    compare_runs,
    comparison_text,
    draw_comparison,
)
from slosched.cli.app import app
from slosched.errors import InvalidConfig
from slosched.loadgen.results import RunResult, StepResult
from slosched.telemetry.request_log import FILE_NAME, read_request_log
from slosched.units import NS_PER_MS, NS_PER_S


def step(
    index: int,
    in_time: int,
    *,
    sent: int = 1000,
    p99_ms: float = 5.0,
    group: str = "",
    factor: float | None = None,
    slo_ns: int = 10 * NS_PER_MS,
) -> StepResult:
    factor = 1.5 ** (index + 1) if factor is None else factor
    return StepResult(
        index=index,
        slo=f"{factor:.3g}x" if factor else "10ms",
        group=group,
        slo_factor=factor,
        slo_ns=slo_ns,
        duration_ns=10 * NS_PER_S,
        sent=sent,
        in_time=in_time,
        met=in_time,
        codes={"ok": in_time},
        latency_p50_ns=NS_PER_MS,
        latency_p99_ns=round(p99_ms * NS_PER_MS),
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
    )


def run(*steps: StepResult, workload: str = "a workload") -> RunResult:
    return RunResult(
        workload=workload,
        steps=steps,
        complete=True,
        problem="",
        issue_delay_p50_ns=0,
        issue_delay_p99_ns=0,
        inputs=False,
        random_weights=True,
        elapsed_ns=1,
    )


def two_policies() -> Comparison:
    """Seeds differ much, the policies on one seed little."""
    return compare_runs(
        {
            "INFER5": {
                1: run(step(0, 900), step(1, 1000)),
                2: run(step(0, 700), step(1, 1000)),
                3: run(step(0, 500), step(1, 1000)),
            },
            "FIFO": {
                1: run(step(0, 800, p99_ms=10), step(1, 990)),
                2: run(step(0, 610, p99_ms=10), step(1, 980)),
                3: run(step(0, 390, p99_ms=10), step(1, 970)),
            },
        }
    )


# ---------------------------------------------------------------------------------- estimates


def test_an_estimate_is_a_mean_and_students_interval() -> None:
    estimate = Estimate.of([1.0, 2.0, 3.0])
    assert estimate is not None and estimate.half is not None
    assert estimate.mean == 2.0
    assert math.isclose(estimate.half, 4.303 / math.sqrt(3), rel_tol=1e-3)  # t(2) x s / sqrt(3)
    many = Estimate.of([0.0, 1.0] * 50)
    assert many is not None and many.half is not None
    assert math.isclose(many.half, 1.984 * math.sqrt(0.25 * 100 / 99) / 10, rel_tol=2e-3)


def test_one_value_has_no_interval_and_none_no_estimate() -> None:
    assert Estimate.of([4.0]) == Estimate(4.0, None)
    assert Estimate.of([]) is None


def test_policies_are_compared_seed_by_seed() -> None:
    first = two_policies().steps[0]
    ours, fifo = first.cells
    assert (ours.policy, fifo.policy) == ("INFER5", "FIFO")
    assert math.isclose(ours.satisfaction.mean, 0.7) and math.isclose(fifo.satisfaction.mean, 0.6)
    assert ours.satisfaction.half is not None and ours.satisfaction.half > 0.4
    assert fifo.lead is not None and fifo.lead.half is not None
    assert math.isclose(fifo.lead.mean, -0.1)
    assert fifo.lead.half < 0.03, "what the arrivals have in common cancels out"
    assert fifo.goodput_rps.mean == pytest.approx(60) and fifo.goodput_ratio == pytest.approx(6 / 7)
    assert fifo.p99_ratio == pytest.approx(2.0)
    assert (ours.lead, ours.goodput_ratio) == (Estimate(0.0, 0.0), 1.0)


def test_the_last_row_sums_the_steps_up() -> None:
    comparison = two_policies()
    assert [s.slo for s in comparison.steps] == ["1.5x", "2.25x", ALL_STEPS]
    assert [s.index for s in comparison.swept] == [0, 1]
    total = comparison.steps[-1].cells[1]
    assert total.satisfaction.mean == pytest.approx((0.6 + 0.98) / 2)
    assert total.goodput_rps.mean == pytest.approx((60 + 98) / 2)
    assert total.p99_ns is None and total.p99_ratio is None
    one = compare_runs({"FIFO": {1: run(step(0, 5))}})
    assert [s.index for s in one.steps] == [0], "one step is its own sum"


def test_groups_of_streams_are_kept_apart() -> None:
    result = run(step(0, 10, group="fg"), step(0, 20, group="bg"), step(1, 30, group="fg"))
    comparison = compare_runs({"FIFO": {1: result}})
    places = [(s.slo, s.group) for s in comparison.steps]
    assert places == [("1.5x", "bg"), ("1.5x", "fg"), ("2.25x", "fg"), ("all", "bg"), ("all", "fg")]


def test_a_policy_that_served_nothing_has_a_zero_and_no_ratio() -> None:
    dead = replace(step(0, 0), latency_p99_ns=0)
    comparison = compare_runs({"EDF": {1: run(dead)}, "FIFO": {1: run(step(0, 10))}})
    edf, fifo = comparison.steps[0].cells
    assert (edf.satisfaction.mean, edf.p99_ns) == (0.0, None)
    assert (fifo.goodput_ratio, fifo.p99_ratio) == (None, None)


def test_runs_that_cannot_be_compared_say_so() -> None:
    with pytest.raises(InvalidConfig, match="no runs"):
        compare_runs({})
    with pytest.raises(InvalidConfig, match=r"FIFO was run with seeds \[1\], not \[1, 2\]"):
        compare_runs(
            {"EDF": {1: run(step(0, 1)), 2: run(step(0, 1))}, "FIFO": {1: run(step(0, 1))}}
        )
    with pytest.raises(InvalidConfig, match="FIFO ran 'another', not 'a workload'"):
        compare_runs(
            {"EDF": {1: run(step(0, 1))}, "FIFO": {1: run(step(0, 1), workload="another")}}
        )


# --------------------------------------------------------------------------- table and document


def test_the_table_has_ratios_to_the_first_policy() -> None:
    lines = comparison_text(two_policies()).splitlines()
    assert len(lines) == 7
    assert lines[0].split()[:2] == ["policy", "step"] and "points to INFER5" in lines[0]
    fifo = lines[2].split()
    assert fifo[:5] == ["FIFO", "1.5x", "10ms", "no", "60.00"]
    assert fifo[6] == "-10.00" and fifo[8:] == ["60.0", "0.86", "10.00", "2.00"]


def test_with_one_seed_the_table_has_no_intervals() -> None:
    text = comparison_text(compare_runs({"FIFO": {7: run(step(0, 10))}}))
    assert "+-" not in text and "1.00" in text


def test_the_document_says_what_the_table_says() -> None:
    document = two_policies().as_dict()
    assert document["policies"] == ["INFER5", "FIFO"] and document["seeds"] == [1, 2, 3]
    first, *_, last = document["steps"]
    assert first["policies"]["FIFO"]["satisfaction_lead"]["mean"] == pytest.approx(-0.1)
    assert last["step"] == ALL_STEPS and last["policies"]["FIFO"]["p99_ns"] is None


# --------------------------------------------------------------------------------------- figure


def texts(figure_dir: Path, comparison: Comparison) -> bytes:
    png, pdf = draw_comparison(comparison, figure_dir)
    assert png.name == "compare.png" and pdf.name == "compare.pdf"
    assert png.read_bytes().startswith(b"\x89PNG")
    return png.read_bytes()


def test_the_figure_is_drawn_for_sweeps_single_steps_groups_and_other_workloads(
    tmp_path: Path,
) -> None:
    pytest.importorskip("matplotlib")
    sweep = two_policies()
    one = compare_runs({"A": {1: run(step(0, 100))}, "B": {1: run(step(0, 900))}})
    grouped = compare_runs(
        {"A": {1: run(*(step(i, 100 * i, group=g) for i in range(3) for g in ("bg", "fg")))}}
    )
    steps = compare_runs({"A": {1: run(*(step(i, 500, factor=0.0, slo_ns=0) for i in range(40)))}})
    drawn = [
        texts(tmp_path / str(place), comparison)
        for place, comparison in enumerate((sweep, one, grouped, steps))
    ]
    assert len(set(drawn)) == 4
    assert texts(tmp_path / "again", sweep) == drawn[0], "the same bytes each time"


# -------------------------------------------------------------------------------------- command

#: Two copies on one GPU, 50/s, a second: a run takes a tenth of a second.
WORDS = ("slo-exp-1", "resnet50_v2", "2", "poisson", "50", "2", "4", "2", "mul", "0.5")
SMALL = ("--gpus", "1", "--profile", "fig7")


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["compare", *args])


def test_the_command_runs_each_policy_and_seed_and_says_what_came_of_it(tmp_path: Path) -> None:
    out = tmp_path / "cmp"
    result = invoke("INFER5,INFER5:paper,EDF", *WORDS, *SMALL, "--seeds", "2", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert "INFER5:paper" in result.stdout and "points to INFER5" in result.stdout
    runs = sorted(str(path.parent.relative_to(out)) for path in out.rglob("manifest.json"))
    assert runs == [
        f"{policy}/seed={seed}" for policy in ("EDF", "INFER5-paper", "INFER5") for seed in (0, 1)
    ]
    document = json.loads((out / "compare.json").read_text())
    assert document["policies"] == ["INFER5", "INFER5:paper", "EDF"]
    assert document["options"] == {"gpus": 1, "profile": "fig7"}
    assert [step["step"] for step in document["steps"]] == [0, 1, "all"]
    assert (out / "compare.png").is_file()
    # The same arrivals for each policy, others for each seed.
    arrivals = {run: read_request_log(out / run / FILE_NAME)["t"].size for run in runs}
    assert arrivals["EDF/seed=0"] == arrivals["INFER5/seed=0"] == arrivals["INFER5-paper/seed=0"]
    assert arrivals["EDF/seed=1"] == arrivals["INFER5/seed=1"] != arrivals["EDF/seed=0"]


def test_complete_runs_are_not_run_again_but_others_are(tmp_path: Path) -> None:
    def manifests() -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted(tmp_path.rglob("manifest.json"))}

    first = invoke("FIFO", *WORDS, *SMALL, "--seeds", "1", "--out", str(tmp_path), "--json")
    assert first.exit_code == 0, first.output
    before = manifests()
    more = invoke("FIFO,AIMD", *WORDS, *SMALL, "--seeds", "1", "--out", str(tmp_path), "--json")
    assert more.exit_code == 0, more.output
    after = manifests()
    assert len(before) == 1 and len(after) == 2
    assert all(after[path] == before[path] for path in before)
    fifo, again = (json.loads(r.stdout)["steps"][0]["policies"]["FIFO"] for r in (first, more))
    assert fifo == again
    other = invoke(
        "FIFO", *WORDS, *SMALL, "--latency", "1ms", "--seeds", "1", "--out", str(tmp_path)
    )
    assert other.exit_code == 0 and len(manifests()) == 3, "another spec is another run"


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ("INFER5,INFER9", "unknown scheduler TYPE 'INFER9' (did you mean INFER5?); known: AIMD"),
        ("INFER5:exact", "unknown fidelity 'exact'"),
        ("EDF,EDF", "the TYPE EDF is named twice"),
        ("EDF,", "commas between"),
    ],
)
def test_wrong_policies_are_named_and_nothing_runs(
    policies: str, said: str, tmp_path: Path
) -> None:
    result = invoke(policies, *WORDS, "--out", str(tmp_path / "cmp"))
    assert result.exit_code == 2 and said in result.stderr
    assert not (tmp_path / "cmp").exists()


def test_a_workload_that_never_ends_needs_a_duration(tmp_path: Path) -> None:
    args = ("EDF,FIFO", "spam", "resnet50_v2", *SMALL, "--seeds", "1", "--out", str(tmp_path))
    result = invoke(*args)
    assert result.exit_code == 2 and "--duration" in result.stderr
