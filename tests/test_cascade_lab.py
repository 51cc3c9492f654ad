"""The laboratory of cascades: outcomes, summaries, the artifact's files and transformations, the bound."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import pytest

from made_cascade_run import MS, QUALITY, Made, S, mixed_run, small_cascade, write_run
from slosched.cascade import published_transforms
from slosched.cascade.artifact_logs import artifact_logs, write_artifact_logs
from slosched.cascade.bound import best_cost_ns, fluid_bound, most_heavy
from slosched.cascade.cascade_file import write_cascade
from slosched.cascade.live import options_text
from slosched.cascade.outcome import read_outcome
from slosched.cascade.presets import PRESETS, parse_variants, preset_named
from slosched.cascade.run import Experiment, finish
from slosched.cascade.summary import HEADINGS, read_summary, summarise
from slosched.cascade_spec import CascadeOptions, QualityCurve
from slosched.codes import Code, Verdict
from slosched.errors import InvalidConfig, UnknownName
from slosched.workloads.cascades import load_cascade

# ------------------------------------------------------------------------------------ outcomes


def test_each_request_has_its_outcome(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    assert outcome.arrival_ns.tolist() == [place * 500 * MS for place in range(8)]
    assert outcome.answered.tolist() == [True] * 5 + [False, False, True]
    assert outcome.ok.tolist() == [True] * 4 + [False] * 3 + [True]
    assert outcome.verdict.tolist() == [1, 5, 3, 4, 5, 0, 0, 8]
    assert outcome.stage.tolist() == [0, 1, 0, 0, 1, -1, -1, 0]
    assert outcome.judged.tolist() == [True] * 6 + [False, True]
    assert outcome.deferred.tolist() == [False, True, False, True, True, True, False, True]
    assert outcome.heavy_ns[1] == 600 * MS and outcome.heavy_ns[0] == -1
    assert outcome.score[2] == 0.125 and math.isnan(outcome.score[6])
    assert outcome.seconds == 9  # the last one ends 8 s after the first arrival
    assert not outcome.blind
    # The plan at 4 s is 3 s after the first arrival; before the first plan its own threshold holds.
    at = np.array([-10 * S, 0, 3 * S - 1, 3 * S])
    assert outcome.threshold_at(at).tolist() == [0.5, 0.5, 0.5, 0.25]


def test_rows_of_other_requests_are_left_out(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    log = run / "clockwork_request_log.tsv"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(lines[:3]))
    outcome = read_outcome(run)
    assert outcome.verdict.tolist() == [1, 5] and len(outcome) == 2


def test_a_run_without_stages_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [Made(0, 5)])
    with pytest.raises(InvalidConfig, match=r"has no stages\.tsv.*served no cascade"):
        read_outcome(tmp_path / "run")


def test_a_part_of_a_run(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    part = outcome.part(outcome.arrival_ns < S)
    assert part.verdict.tolist() == [1, 5] and len(part.plans) == 2


# ------------------------------------------------------------------------------------- summary


def test_the_summary_counts_quality_in_both_forms(tmp_path: Path) -> None:
    summary = summarise(read_outcome(mixed_run(tmp_path / "run")), QUALITY)
    assert (summary.requests, summary.answered, summary.violations) == (8, 6, 3)
    assert (summary.late, summary.dropped, summary.violation_ratio) == (1, 2, 3 / 8)
    assert (summary.light, summary.heavy, summary.forced, summary.blind) == (4, 2, 3, 0)
    assert summary.light_share == pytest.approx(4 / 6)
    assert summary.deferred_share == pytest.approx(5 / 7)
    assert summary.forced_share == pytest.approx(3 / 6)
    # Between (0.5, 16) and (0.75, 17) at 2/3.
    assert summary.fid == pytest.approx(16 + 2 / 3)
    # Three forced answers of six count 22, the others by the table at 1 of 3.
    assert summary.pessimistic_fid == pytest.approx(3 / 6 * 22 + 3 / 6 * 50 / 3)
    # Ticks at 1, 2 s have 0.5, those at 3 to 9 s 0.25.
    assert summary.mean_threshold == pytest.approx((2 * 0.5 + 7 * 0.25) / 9)
    assert (summary.gpu_changes, summary.plans, summary.infeasible_plans) == (5, 2, 1)
    assert summary.verdicts == {
        "accepted": 1,
        "forced": 1,
        "instead": 1,
        "heavy": 2,
        "outranked": 1,
    }
    assert len(summary.cells()) == len(HEADINGS)
    assert {"FID (table)", "FID (pessimistic)"} <= set(HEADINGS)


def blind_run(folder: Path) -> Path:
    """Three light answers and one heavy one, which no judge chose."""
    light = [
        Made(place * 100, place * 100 + 50, [(0, place * 100 + 50, Verdict.BLIND_LIGHT, -1)])
        for place in range(3)
    ]
    return write_run(folder, [*light, Made(2500, 4000, [(0, 4000, Verdict.BLIND_HEAVY, -1)])])


def test_blind_answers_count_on_the_line(tmp_path: Path) -> None:
    outcome = read_outcome(blind_run(tmp_path / "run"))
    summary = summarise(outcome, QUALITY)
    assert outcome.blind
    assert summary.fid == pytest.approx(17.0)  # the table at 3/4
    assert summary.pessimistic_fid == pytest.approx(18 + 0.75 * (22 - 18))
    assert summary.deferred_share == 0.25
    assert math.isnan(summary.mean_threshold) and summary.as_dict()["mean_threshold"] is None


def test_random_scores_make_every_answer_blind(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    summary = summarise(outcome, QUALITY, random_scores=True)
    assert summary.blind == 6
    assert summary.pessimistic_fid == pytest.approx(18 + 4 / 6 * 4)


def test_without_a_quality_curve_there_is_no_fid(tmp_path: Path) -> None:
    summary = summarise(read_outcome(mixed_run(tmp_path / "run")), None)
    assert math.isnan(summary.fid) and summary.cells()[4:6] == ["-", "-"]


# ------------------------------------------------------------------------- the artifact's files


def test_the_three_files_byte_for_byte(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    logs = artifact_logs(outcome)
    # Ends after the first arrival (s): 0.1, 2.6, 1.1, 6, late 8, dropped 7.5 and 3, 5.
    assert logs["slo_timeouts_per_second.csv"] == (
        b"succeed,timeout,drop,total\r\n1,0,0,1\r\n1,0,0,1\r\n1,0,0,1\r\n0,0,1,1\r\n0,0,0,0\r\n1,0,0,1\r\n"
        b"1,0,0,1\r\n0,0,1,1\r\n0,1,0,1\r\n"
    )
    assert logs["thres_per_second.csv"] == b"threshold\r\n0.5\r\n0.5\r\n" + b"0.25\r\n" * 7
    # Two arrivals a second for 4 s; deferred at 0.6, 1.6, 2.1, 2.6 and 3.6 s.
    assert logs["query_num_per_second.csv"] == (
        b"sdturbo,sdv15\r\n2,1\r\n2,1\r\n2,2\r\n2,1\r\n" + b"0,0\r\n" * 5
    )


def test_a_run_that_goes_straight_to_the_heavy_program(tmp_path: Path) -> None:
    made = [
        Made(0, 1500, [(0, 1500, Verdict.BLIND_HEAVY, -1)]),
        Made(500, 500, (), Code.COULD_NOT_START_IN_TIME),
    ]
    outcome = read_outcome(write_run(tmp_path / "run", made))
    logs = artifact_logs(outcome)
    assert logs["query_num_per_second.csv"] == b"sdturbo,sdv15\r\n0,2\r\n0,0\r\n"
    assert logs["thres_per_second.csv"] == b"threshold\r\n1.0\r\n1.0\r\n"  # none is known


def test_the_files_replace_those_of_another_run(tmp_path: Path) -> None:
    outcome = read_outcome(mixed_run(tmp_path / "run"))
    for _ in range(2):
        paths = write_artifact_logs(outcome, tmp_path / "logs")
    assert [path.name for path in paths] == list(artifact_logs(outcome))
    assert all(path.read_bytes() == artifact_logs(outcome)[path.name] for path in paths)


# ---------------------------------------------------------------- the artifact's transformations


def test_thresholds_go_through_the_table_and_are_scaled() -> None:
    # Means 0.5 and 0: f = 0.999 and 0; smoothed 0.999, 0.6993, then 0.48951; scaled to 0..1.
    series = published_transforms.threshold_series([0.5] * 5 + [0.0] * 10)
    smoothed = np.array([0.999, 0.6993, 0.48951])
    expected = (smoothed - smoothed.min()) / (smoothed.max() - smoothed.min())
    assert series == pytest.approx(expected)
    assert published_transforms.threshold_series([0.26] * 5).tolist() == [0.0]
    assert published_transforms.threshold_series([0.9] * 400).tolist() == [0.0] * 71


def test_violations_are_moving_averages_that_do_not_count_requests() -> None:
    failed = [1] * 5 + [0] * 25
    series = published_transforms.violation_series(failed, [2] * 5 + [100] * 20 + [0] * 5)
    assert series == pytest.approx([0.1, 0.0])  # 0.5 over five chunks, and then none


def test_the_heavy_share_is_divided_by_its_maximum() -> None:
    quality = QualityCurve(
        (0.0, 0.5, 1.0), (20.0, 16.0, 20.0)
    )  # 20 - 16 x + 16 x^2, fitted exactly
    light, heavy = [10] * 30, [1] * 25 + [2] * 5
    series = published_transforms.fid_series(light, heavy, "sdturbo", quality)
    places = np.linspace(0, 1, 100)

    def fid(share: float) -> float:
        x = places[np.abs(places - share).argmin()]
        return float(20 - 16 * x + 16 * x * x)

    low, high = fid(1 - 0.5 + 0.08), fid(1 - 1.0 + 0.08)
    assert series == pytest.approx([low, (4 * low + high) / 5])
    with pytest.raises(InvalidConfig, match=r"leave --published out"):
        published_transforms.fid_series(light, heavy, "mine", quality)


# --------------------------------------------------------------------------------------- bound


def test_costs_are_those_of_the_best_batch_within_the_slo() -> None:
    exec_ns = {1: 100, 2: 150, 4: 220, 8: 1000}
    assert best_cost_ns(exec_ns, 500) == 55
    assert best_cost_ns(exec_ns, 10_000) == 55
    assert best_cost_ns(exec_ns, 50) == 100  # none is within the SLO


def test_the_bound_by_hand() -> None:
    # One GPU, light 100 ms, heavy 1 s, SLO 5 s; 8 at once: w <= 5 s, so 4 x 1 + 4 x 0.1 fits and 5 does not.
    bound = fluid_bound([0] * 8, small_cascade(), 1)
    assert bound.lost == 0 and bound.heavy_share == 4 / 8
    assert bound.used_heavy_share == 0.5 and bound.fid == 16.0
    # Two GPUs serve all as heavy; the table's best share is half of them.
    bound = fluid_bound([0] * 8, small_cascade(), 2)
    assert bound.heavy_share == 1.0 and bound.used_heavy_share == 0.5 and bound.fid == 16.0
    # 60 at once: 50 light ones fit.
    bound = fluid_bound([0] * 60, small_cascade(), 1)
    assert bound.lost == 10 and bound.heavy_share == 0.0 and bound.fid == 22.0
    assert fluid_bound([], small_cascade(), 1).requests == 0


def _feasible(arrivals: list[int], work: list[int], slo: int) -> bool:
    end = 0
    for at, each in zip(arrivals, work, strict=True):
        end = max(end, at) + each
        if end > at + slo:
            return False
    return True


@pytest.mark.parametrize("seed", range(40))
def test_the_bound_is_the_best_of_all_choices(seed: int) -> None:
    random = Random(seed)
    count = random.randint(1, 9)
    arrivals = sorted(random.randint(0, 40) for _ in range(count))
    light, heavy, slo = random.randint(1, 3), random.randint(4, 9), random.randint(8, 25)
    choices = itertools.product((light, heavy), repeat=count)
    feasible = [c.count(heavy) for c in choices if _feasible(arrivals, list(c), slo)]
    found, lost = most_heavy(arrivals, light, heavy, slo)
    if feasible:
        assert (found, lost) == (max(feasible), 0)
    else:
        assert lost > 0


# ------------------------------------------------------------------------------ settings, files


def test_the_preset_is_the_sanity_simulation() -> None:
    preset = preset_named("sanity")
    assert preset.judge_ns == 0
    assert [(each.name, each.policy, each.options.routing) for each in preset.variants] == [
        ("all-light", "CLIPPER-LIGHT", "random"),
        ("all-heavy", "CLIPPER-HEAVY", "random"),
        ("static", "DIFFSERVE-STATIC", "random"),
        ("random-routing", "DIFFSERVE", "random"),
        ("least-loaded", "DIFFSERVE", "least-loaded"),
    ]
    for each in preset.variants:
        assert (each.options.over_provision, each.options.drop_at) == (1.2, 1.5)
    with pytest.raises(UnknownName, match=r"unknown preset 'sanitz'"):
        preset_named("sanitz")
    assert list(PRESETS) == ["sanity"]


def test_policies_have_options_of_their_own() -> None:
    base = CascadeOptions(over_provision=1.2)
    found = parse_variants("cascade, diffserve:routing=random:queue_term=false:drop-at=0", base)
    assert [each.name for each in found] == [
        "cascade",
        "diffserve-routing=random-queue_term=false-drop-at=0",
    ]
    assert found[0].options == base and found[1].policy == "DIFFSERVE"
    expected = replace(base, routing="random", queue_term=False, drop_at=0.0)
    assert found[1].options == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("cascade,,diffserve", "with commas between"),
        ("cascade,cascade", "named twice"),
        ("diffserve:random", "as NAME=VALUE"),
        ("diffserve:rooting=random", "did you mean routing"),
        ("diffserve:queue_term=perhaps", "must be true or false"),
        ("diffserve:drop_at=x", "must be a number"),
        ("diffserve:routing=any", "routing"),
    ],
)
def test_wrong_policies_are_refused(text: str, problem: str) -> None:
    with pytest.raises(InvalidConfig, match=problem):
        parse_variants(text, CascadeOptions())


@pytest.mark.parametrize("name", ["sdturbo", "sdxs", "sdxlltn"])
def test_a_cascade_survives_its_file(name: str, tmp_path: Path) -> None:
    spec = replace(load_cascade(name), recorded=(0.25, 0.5, 0.75), seed=3, judge_ns=0)
    assert load_cascade(write_cascade(spec, tmp_path)) == spec
    plain = replace(small_cascade(), name="odd \\ name")
    assert load_cascade(write_cascade(plain, tmp_path)) == plain


def test_options_as_a_table() -> None:
    text = options_text(
        {"plan_every_ns": 5, "drop_at": 1.5, "routing": "random", "queue_term": True}
    )
    assert text == (
        '[cascade]\nplan_every = "5ns"\ndrop_at = 1.5\nrouting = "random"\nqueue_term = true\n'
    )


def test_a_run_gets_its_files(tmp_path: Path) -> None:
    run = mixed_run(tmp_path / "run")
    report = finish(Experiment("sdturbo", workers=4), run, kind="simulated", figures=False)
    assert [file.name for file in report.files] == [
        "summary.json",
        *artifact_logs(read_outcome(run)),
    ]
    document = json.loads((run / "summary.json").read_text())
    assert document == read_summary(run)
    assert document["summary"]["violations"] == 3
    assert document["above_bound"]["fid"] == pytest.approx(report.summary.fid - report.bound.fid)
    assert read_summary(tmp_path) is None
    (run / "summary.json").write_text("{")
    with pytest.raises(InvalidConfig, match="remove it to make the run again"):
        read_summary(run)
