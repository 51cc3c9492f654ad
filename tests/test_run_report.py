"""`slosched report`: its numbers against independent counts, what it says of half a run, and its errors."""

from __future__ import annotations

import json
import random
from pathlib import Path

import msgspec
import numpy as np
import pytest
from typer.testing import CliRunner, Result

from report_runs import mix_run
from slosched.analysis import report_data
from slosched.analysis.report import write_report
from slosched.analysis.report_actions import measure_actions
from slosched.analysis.report_data import bounds, read_report
from slosched.analysis.report_figures import page_svg
from slosched.analysis.report_words import _meaning
from slosched.analysis.tables import CLIENT_VIEW, CONTROLLER_VIEW
from slosched.analysis.windows import nice_width_ns
from slosched.cli.app import app
from slosched.cli.report import parse_window
from slosched.codes import ActionType, Code
from slosched.errors import InvalidConfig, InvalidDuration, RunDirectoryInUse
from slosched.loadgen.verdict import Outcome, judge
from slosched.telemetry.manifest import finish_manifest, write_manifest
from slosched.telemetry.table import MalformedLog
from synthetic_run import (
    MS,
    START_NS,
    S,
    action,
    client,
    request,
    sweep,
    write_actions,
    write_clients,
    write_requests,
)

REQUESTS, ACTIONS, CLIENTS = (
    "clockwork_request_log.tsv",
    "clockwork_action_log.tsv",
    "client_log.tsv",
)


def whole_run(directory: Path, *, seed: int = 1) -> Path:
    """A sweep with both sides' logs, and one action for each request that was served."""
    records = sweep(seed=seed)
    write_requests(directory / REQUESTS, records)
    write_clients(directory / CLIENTS, [client(record, 300_000) for record in records])
    served = [r for r in records if r.code == 0]
    actions = [
        action(
            r.departure_ns - START_NS, 2 * MS, number=n, gpu=n % 2, duration_error_ns=(n % 5) * 1000
        )
        for n, r in enumerate(served)
    ]
    write_actions(directory / ACTIONS, actions)
    write_manifest(directory, "simulation", {"policy": "INFER5"}, {}, {"workload": "a sweep"})
    finish_manifest(directory, {"complete": True})
    return directory


def run(*words: object) -> Result:
    return CliRunner().invoke(app, ["report", *map(str, words)])


# -------------------------------------------------------------------------------------- numbers


def test_the_headline_counts_what_a_loop_counts(tmp_path: Path) -> None:
    report = read_report(whole_run(tmp_path))
    records = sweep(seed=1)
    good = [
        r for r in records if r.code == 0 and r.departure_ns - r.arrival_ns + 300_000 <= r.slo_ns
    ]
    h = report.headline
    assert (h.judge, h.requests, h.in_time) == (CLIENT_VIEW, len(records), len(good))
    latencies = [r.departure_ns - r.arrival_ns + 300_000 for r in records if r.code == 0]
    assert h.latency_ns["p50"] == pytest.approx(float(np.median(latencies)))
    assert h.latency_ns["p99"] == pytest.approx(float(np.quantile(latencies, 0.99)))
    assert h.offered_rps == pytest.approx(100, rel=0.1)
    assert h.low < h.satisfaction < h.high
    assert report.is_sweep and len(report.verdicts) == 5
    assert {step.view for step in report.steps} == {CLIENT_VIEW, CONTROLLER_VIEW}


def test_over_time_counts_each_request_when_it_was_sent(tmp_path: Path) -> None:
    report = read_report(whole_run(tmp_path))
    numbers = report.over_time
    assert numbers is not None
    sent = [r.arrival_ns - 300_000 for r in sweep(seed=1)]
    first = sum(1 for at in sent if at - min(sent) < numbers.width_s * S)
    assert numbers.offered_rps[0] == pytest.approx(first / numbers.width_s)
    lost = sum(sum(values) for values in numbers.lost_rps.values())
    gap = sum(numbers.offered_rps) - sum(numbers.in_time_rps)
    assert lost == pytest.approx(gap)
    reasons = {reason.name: reason.count for reason in report.reasons}
    refused = sum(1 for r in sweep(seed=1) if r.code == 8)
    assert reasons["could not start in time"] == refused
    assert sum(reasons.values()) == report.headline.requests - report.headline.in_time


def test_steps_that_were_sent_late_have_no_verdict(tmp_path: Path) -> None:
    records = sweep(seed=1)
    late = [
        msgspec.structs.replace(
            client(r, 0), issue_delay_ns=5 * MS if r.arrival_ns < START_NS + 3 * S else 0
        )
        for r in records
    ]
    write_clients(tmp_path / CLIENTS, late)
    verdicts = [verdict for _, verdict in read_report(tmp_path).verdicts]
    assert verdicts[0] is None and None not in verdicts[1:]
    text = write_report([tmp_path]).path.read_text()
    assert "no verdict at 1x" in text and "too late" not in text and "<td>sent late</td>" in text


def test_models_add_up(tmp_path: Path) -> None:
    report = read_report(whole_run(tmp_path))
    assert report.of_models == len(report.models) == 3
    assert sum(m.requests for m in report.models) == report.headline.requests
    assert sum(m.in_time for m in report.models) == report.headline.in_time


@pytest.mark.parametrize("seed", range(4))
def test_bounds_are_where_the_verdict_changes(seed: int) -> None:
    chance = random.Random(seed)
    sent = chance.randrange(10, 3_000)
    late = chance.randrange(1, sent)
    low, high = bounds(sent, late)
    assert low < 1 - late / sent < high
    verdicts = [
        judge(sent, late, percentile=share).outcome
        for share in (low - 1e-6, low + 1e-6, high - 1e-6, high + 1e-6)
    ]
    assert verdicts == [Outcome.HOLDS, Outcome.UNDECIDED, Outcome.UNDECIDED, Outcome.FAILS]


def test_bounds_at_the_ends() -> None:
    assert bounds(100, 0)[1] == 1.0 and bounds(100, 0)[0] == pytest.approx(0.01 ** (1 / 100))
    assert bounds(100, 100)[0] == 0.0 and bounds(100, 100)[1] == pytest.approx(
        1 - 0.01 ** (1 / 100)
    )


def test_widths_are_round_and_cover_the_span() -> None:
    assert [nice_width_ns(span, 100) // MS for span in (1, 150 * MS, 48 * S, 3600 * S)] == [
        1,
        2,
        500,
        50_000,
    ]


def test_utilisation_spreads_work_over_the_time_it_took(tmp_path: Path) -> None:
    """Ten inferences of 100 ms that follow each other on one GPU, and none on the other's second half."""
    busy = [action(S + n * 100 * MS, 100 * MS, number=n, gpu=0) for n in range(10)]
    half = [action(S + n * 100 * MS, 100 * MS, number=n, gpu=1) for n in range(5)]
    load = [action(S + 500 * MS, 50 * MS, kind=ActionType.LOAD_WEIGHTS, number=99, gpu=1)]
    write_actions(tmp_path / ACTIONS, [*busy, *half, *load])
    numbers, excerpt = measure_actions(tmp_path, START_NS, None, [], lambda text: None)
    assert numbers is not None and excerpt is not None
    used = numbers.utilisation
    assert [str(gpu) for gpu in used.gpus] == ["W0-GPU0", "W1-GPU0"]
    span = used.edges_s[-1] - used.edges_s[0]
    assert used.exec_share == pytest.approx([1.0 / span, 0.5 / span])
    assert used.load_share == pytest.approx([0.0, 0.05 / span])
    assert used.exec.max() <= 1 + 1e-9
    later = np.searchsorted(used.edges_s, 1.4)
    assert used.exec[1][later:].max() == 0 and used.exec[0][later:].min() > 0.99
    assert (numbers.infers, numbers.loads, numbers.evictions) == (15, 1, 0)
    assert [len(lanes) for _, lanes in excerpt.gpus] == [1, 2]


def test_errors_of_a_class_and_the_worst_actions(tmp_path: Path) -> None:
    actions = [
        action(n * 50 * MS + S, 4 * MS, batch=2, number=n, completion_error_ns=n * 1000 - 50_000)
        for n in range(101)
    ]
    actions.append(
        action(9 * S, 30 * MS, number=500, duration_error_ns=20 * MS, completion_error_ns=15 * MS)
    )
    actions.append(action(9 * S, 30 * MS, number=501, code=81))
    write_actions(tmp_path / ACTIONS, actions)
    numbers, _ = measure_actions(tmp_path, START_NS, None, [], lambda text: None)
    assert numbers is not None
    ones, twos = numbers.classes
    assert (twos.name, twos.actions, twos.requests) == ("batch 2", 101, 202)
    assert twos.completion_p50_ns == pytest.approx(25_000, abs=1000)
    assert twos.completion_p99_ns == pytest.approx(50_000, abs=1000)
    assert ones.duration_p50_ns == 20 * MS
    worst = numbers.mispredicted[0]
    assert (worst.action_id, worst.behind_ns, worst.took_ns) == (500, 15 * MS, 30 * MS)
    assert numbers.slowest[0].action_id == 500
    assert numbers.failed == [("exec too late", 1)]


def test_the_timeline_takes_the_busiest_window_or_the_one_that_is_asked_for(tmp_path: Path) -> None:
    sparse = [action(n * 500 * MS + S, 4 * MS, number=n) for n in range(40)]
    dense = [action(n * 5 * MS + 12 * S, 4 * MS, number=100 + n) for n in range(60)]
    write_actions(tmp_path / ACTIONS, [*sparse, *dense])
    _, excerpt = measure_actions(tmp_path, START_NS, None, [], lambda text: None)
    assert excerpt is not None and 12 * S <= excerpt.start_ns < 12 * S + 300 * MS
    window = (3 * S, 700 * MS)
    _, excerpt = measure_actions(tmp_path, START_NS, window, [], lambda text: None)
    assert excerpt is not None and (excerpt.start_ns, excerpt.end_ns) == (3 * S, 3700 * MS)
    assert excerpt.chosen and len(excerpt.gpus[0][1][0].rows["t"]) == 2
    with pytest.raises(InvalidConfig, match=r"no action from 60s to 61s .* the run is"):
        measure_actions(tmp_path, START_NS, (60 * S, S), [], lambda text: None)


# ----------------------------------------------------------------------------------------- page


def test_a_page_holds_everything_and_asks_for_nothing(tmp_path: Path) -> None:
    written = write_report([whole_run(tmp_path / "run")])
    assert written.path == tmp_path / "run" / "report.html"
    text = written.path.read_text()
    assert written.figures == [
        "sweep",
        "over-time",
        "lost",
        "latency",
        "errors",
        "batches",
        "utilisation",
        "timeline",
    ]
    for word in ("http:", "https:", "<script", "<link", "@import", "src="):
        assert word not in text, word
    assert text.count("<svg") == len(written.figures) == text.count('role="img"')
    assert "could not start in time" in text and "no plan could meet its deadline" in text
    assert written.bytes == len(text.encode()) < 1_000_000
    ids = [part.partition('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids)), "an id is there twice"


def test_the_same_run_gives_the_same_bytes(tmp_path: Path) -> None:
    run_dir = whole_run(tmp_path / "run")
    pages = [write_report([run_dir], tmp_path / f"{n}.html").path.read_bytes() for n in range(2)]
    assert pages[0] == pages[1]


def test_what_a_manifest_says_is_text_and_no_markup(tmp_path: Path) -> None:
    run_dir = whole_run(tmp_path / "a&b")
    write_manifest(run_dir, "simulation", {}, {}, {"workload": "<script>alert(1)</script>"})
    text = write_report([run_dir]).path.read_text()
    assert "<script" not in text and "&lt;script&gt;" in text and "a&amp;b" in text


def test_several_runs_are_compared(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / name, seed=seed) for seed, name in enumerate(("one", "two"))]
    written = write_report(runs, tmp_path / "both.html")
    assert written.figures[0] == "compared" and "r1-sweep" in written.figures
    assert written.figures.count("r2-timeline") == 1
    text = written.path.read_text()
    assert "The runs side by side" in text
    ids = [part.partition('"')[0] for part in text.split(' id="')[1:]]
    assert len(ids) == len(set(ids))


def test_without_a_clients_log_the_controller_judges(tmp_path: Path) -> None:
    whole_run(tmp_path)
    (tmp_path / CLIENTS).unlink()
    report = read_report(tmp_path)
    assert report.headline.judge == CONTROLLER_VIEW
    assert any("no client log" in notice for notice in report.notices)
    text = write_report([tmp_path]).path.read_text()
    assert "99 % in time (controller)" in text and "(client)" not in text


def test_a_clients_log_alone_is_enough(tmp_path: Path) -> None:
    write_clients(tmp_path / CLIENTS, [client(record, 0) for record in sweep(seed=1)])
    report = read_report(tmp_path)
    assert report.actions is None and report.excerpt is None
    assert any("no manifest" in notice for notice in report.notices)
    assert write_report([tmp_path]).figures == ["sweep", "over-time", "lost", "latency"]


def test_a_run_without_an_answer_and_one_request(tmp_path: Path) -> None:
    refused = [request(n * MS, 100_000, code=8, number=n) for n in range(500)]
    write_requests(tmp_path / "refused" / REQUESTS, refused)
    assert write_report([tmp_path / "refused"]).figures == ["over-time", "lost"]
    write_requests(tmp_path / "one" / REQUESTS, [request(0, MS)])
    assert write_report([tmp_path / "one"]).figures == ["latency"]
    assert "too few were served to say" in (tmp_path / "one" / "report.html").read_text()


def test_exact_predictions_are_said_and_not_drawn(tmp_path: Path) -> None:
    write_requests(tmp_path / REQUESTS, [request(n * MS, MS, number=n) for n in range(50)])
    write_actions(tmp_path / ACTIONS, [action(n * 5 * MS, 2 * MS, number=n) for n in range(50)])
    written = write_report([tmp_path])
    assert "errors" not in written.figures
    assert "Every prediction came true" in written.path.read_text()


def test_more_actions_and_gpus_than_can_be_shown(tmp_path: Path) -> None:
    actions = [
        action(n // 70 * 3 * MS + S, 2 * MS, number=n, gpu=n % 70, completion_error_ns=n % 7 * 1000)
        for n in range(70 * 400)
    ]
    write_requests(tmp_path / REQUESTS, [request(n * MS, MS, number=n) for n in range(1_000)])
    write_actions(tmp_path / ACTIONS, actions)
    written = write_report([tmp_path], window=(1 * S, 1 * S))
    text = written.path.read_text()
    assert "The first 64 of 70 GPUs are shown" in text and "The first 10 of 70 GPUs" in text
    assert "The window is cut where there were too many actions" in text
    assert written.bytes < 2_500_000


def test_ids_of_a_figure_are_its_own() -> None:
    document = '<?xml?><svg viewBox="0 0 1 1"><g id="a" style="font: 9px x, y"><use xlink:href="#a"/></g></svg>'
    made = page_svg(document, "k", "A & B")
    assert '<g id="k-a" style="font: 9px var(--font)"><use href="#k-a"/>' in made
    assert 'aria-label="A &amp; B"' in made


# --------------------------------------------------------------------------------------- errors


def test_errors_name_what_is_wrong(tmp_path: Path) -> None:
    assert "does not exist" in run(tmp_path / "none").output
    (tmp_path / "file").write_text("")
    assert "is not a directory" in run(tmp_path / "file").output
    (tmp_path / "other").mkdir()
    result = run(tmp_path / "other")
    assert result.exit_code == 2 and "holds no run" in result.output
    write_requests(tmp_path / "empty" / REQUESTS, [])
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / REQUESTS).write_text("")
    for name in ("empty", "killed"):
        result = run(tmp_path / name)
        assert result.exit_code == 2 and "hold no requests yet" in result.output
    whole = whole_run(tmp_path / "whole")
    with (whole / ACTIONS).open("a") as log:
        log.write("nonsense\n")
    with pytest.raises(MalformedLog, match=r"action_log\.tsv, line \d+"):
        write_report([whole])
    assert not list(whole.glob("*.html"))
    with pytest.raises(InvalidConfig, match="name at least one"):
        write_report([])


def test_a_page_is_not_replaced_unless_told_to(tmp_path: Path) -> None:
    run_dir = whole_run(tmp_path / "run")
    out = tmp_path / "deep" / "page.html"
    assert run(run_dir, "-o", out).exit_code == 0
    before = out.read_bytes()
    result = run(run_dir, "--out", out)
    assert result.exit_code == RunDirectoryInUse.exit_code and "--force" in result.output
    assert out.read_bytes() == before
    result = run(run_dir, "--out", out, "--force", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["bytes"] == out.stat().st_size
    (tmp_path / "blocked").write_text("")
    result = run(run_dir, "--out", tmp_path / "blocked" / "page.html")
    assert result.exit_code == 2 and "cannot write" in result.output


@pytest.mark.parametrize("content", ["", '{"format": 1, "kin'])
def test_a_damaged_manifest_is_said(tmp_path: Path, content: str) -> None:
    whole_run(tmp_path)
    (tmp_path / "manifest.json").write_text(content)
    report = read_report(tmp_path)
    assert any("manifest.json is empty or damaged" in notice for notice in report.notices)
    assert "empty or damaged" in write_report([tmp_path]).path.read_text()


def test_an_unfinished_run_is_said(tmp_path: Path) -> None:
    whole_run(tmp_path)
    write_manifest(tmp_path, "simulation", {})
    with (tmp_path / REQUESTS).open("a") as log:
        log.write("160000")
    said = " ".join(read_report(tmp_path).notices)
    assert "had not ended" in said and "the request log ends within a line" in said
    finish_manifest(tmp_path, {"complete": False, "problem": "the controller went away"})
    assert any("the controller went away" in notice for notice in read_report(tmp_path).notices)


def test_an_empty_action_log_is_said(tmp_path: Path) -> None:
    whole_run(tmp_path)
    write_actions(tmp_path / ACTIONS, [])
    report = read_report(tmp_path)
    assert report.actions is None
    assert any("holds no actions" in notice for notice in report.notices)


def test_windows_are_read_from_words() -> None:
    assert parse_window("12s,100ms") == (12 * S, 100 * MS)
    assert parse_window("0, 2") == (0, 2 * S)
    for wrong in ("12s", "12s,", "x,1s", "1s,0", "1s,-1s"):
        with pytest.raises(InvalidDuration, match="--window"):
            parse_window(wrong)


def test_progress_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    write_report([whole_run(tmp_path)], say=said.append)
    assert said[0].startswith("reading the requests") and said[-1].startswith("writing")


def test_the_simulators_own_count_agrees(tmp_path: Path) -> None:
    run_dir = mix_run(tmp_path / "mix")
    manifest = json.loads((run_dir / "manifest.json").read_text())
    report = report_data.read_report(run_dir)
    assert report.headline.requests == manifest["outcome"]["sent"]
    share = manifest["outcome"]["satisfaction_client_from_scheduled_send"]
    assert report.headline.satisfaction == pytest.approx(share)
    assert report.actions is not None and report.actions.loads > 20
    assert report.workload == manifest["workload"]


@pytest.mark.parametrize("code", [each for each in Code if each >= Code.PROCESS_ENDED])
def test_a_reason_that_is_ours_is_not_blamed_on_the_worker(code: Code) -> None:
    """A refusal at the controller's door was told as "The worker refused its action"."""
    assert _meaning(code) != _meaning(Code.EXEC_TOO_LATE)
