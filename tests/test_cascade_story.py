"""A finished run of a cascade: its stages in the trace, in `slosched explain` and in the report."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from made_cascade_run import MS, START_NS, Made, S, mixed_run, write_run
from slosched.analysis.explain import explain
from slosched.analysis.report import write_report
from slosched.analysis.report_cascade import measure_cascades
from slosched.analysis.stage_rows import read_stages
from slosched.analysis.trace import Window, write_trace
from slosched.codes import Verdict
from slosched.config import SchedulerConfig
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry import request_log, stage_log
from slosched.workloads import parse_workload
from slosched.workloads.cascades import load_cascade


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty seconds of a cascade on two GPUs, which are too few."""
    spec = load_cascade("sdturbo")
    sim = SimSpec(
        workload=parse_workload("cascade", ["sdturbo", "fixed_4"]),
        scheduler=SchedulerConfig(policy="CASCADE", cascades=(spec,)),
        profiles=(spec.profile(memory_bytes=80 * 10**9, page_bytes=16 * 2**20),),
        gpus=2,
        duration_ns=40 * S,
    )
    out = tmp_path_factory.mktemp("cascade") / "run"
    simulate(sim, out=out)
    return out


def first_with(run_dir: Path, verdict: Verdict) -> int:
    """The number of a request with a stage that ended so."""
    log = stage_log.read_stage_log(run_dir / stage_log.FILE_NAME)
    return int(log["request_id"][log["verdict"] == verdict][0])


# --------------------------------------------------------------------------------- single requests


def test_every_row_belongs_to_one_request(run_dir: Path) -> None:
    requests = request_log.read_request_log(run_dir / request_log.FILE_NAME)
    arrivals = (requests["t"] - requests["latency"]).tolist()
    known = list(zip(requests["request_id"].tolist(), arrivals, strict=True))
    found = read_stages(run_dir, known)
    rows = len(stage_log.read_stage_log(run_dir / stage_log.FILE_NAME))
    assert sum(map(len, found.values())) == rows > len(found) > 100
    assert all(
        [stage.stage for stage in stages] == list(range(len(stages))) for stages in found.values()
    )
    wrong = [(request_id, arrival + 1) for request_id, arrival in known]
    assert read_stages(run_dir, wrong) == {}


def test_a_request_is_explained_with_its_stages(run_dir: Path) -> None:
    (told,) = explain(run_dir, first_with(run_dir, Verdict.HEAVY))
    light, heavy = told.stages
    assert light.startswith("sdturbo, light model 0 on worker ") and light.endswith(": deferred")
    assert " below " in light and "in a batch of " in light
    assert heavy.startswith("sdturbo, heavy model 1 on worker ") and heavy.endswith(
        ", the heavy answer"
    )
    place = told.lines.index(f"  stage 1    {light}")
    assert told.lines[place - 1].startswith("  deadline") and heavy in told.lines[place + 1]


def test_a_request_that_waited_in_vain_is_explained(run_dir: Path) -> None:
    (told,) = explain(run_dir, first_with(run_dir, Verdict.INSTEAD))
    assert told.stages[-1].startswith("sdturbo, heavy model 1: waited ")
    assert told.stages[-1].endswith(" in vain, the light answer instead, as it no longer fitted")


def test_a_run_without_stages_is_explained_as_before(run_dir: Path, tmp_path: Path) -> None:
    for path in run_dir.iterdir():
        if path.is_file() and path.name != stage_log.FILE_NAME:
            (tmp_path / path.name).write_bytes(path.read_bytes())
    number = first_with(run_dir, Verdict.HEAVY)
    (told,), (full,) = explain(tmp_path, number), explain(run_dir, number)
    assert told.stages == [] and told.lines == [x for x in full.lines if "  stage " not in x]


# ------------------------------------------------------------------------------------------ trace


def events_of(run_dir: Path, out: Path, **options: Any) -> list[dict[str, Any]]:
    write_trace(run_dir, out, Window(0, 40 * S), **options)
    document = json.loads(out.read_text())
    return [event for event in document["traceEvents"] if event.get("cat") == "request"]


def test_a_trace_has_a_slice_for_each_wait_and_run_of_a_stage(
    run_dir: Path, tmp_path: Path
) -> None:
    events = events_of(run_dir, tmp_path / "t.json", requests=10_000)
    names = Counter(event["name"] for event in events if event["ph"] == "b")
    verdicts = stage_log.read_stage_log(run_dir / stage_log.FILE_NAME)["verdict"].tolist()
    for verdict in (Verdict.ACCEPTED, Verdict.DEFERRED, Verdict.HEAVY):
        said = f", {verdict.name.lower()}"
        runs = sum(n for name, n in names.items() if " runs, " in name and name.endswith(said))
        assert runs == verdicts.count(verdict) > 0
    assert names["heavy waits in vain, instead"] == verdicts.count(Verdict.INSTEAD) > 0
    deferred = next(e for e in events if e["name"].endswith("deferred") and e["ph"] == "b")
    assert deferred["args"]["verdict"] == "deferred" and deferred["args"]["stage"] == "light"
    assert deferred["args"]["cascade"] == "sdturbo"
    assert 0 <= deferred["args"]["score"] < deferred["args"]["threshold"]


def test_slices_of_stages_lie_within_their_request_and_after_each_other(
    run_dir: Path, tmp_path: Path
) -> None:
    events = events_of(run_dir, tmp_path / "t.json")
    assert [e["ts"] for e in events] == sorted(e["ts"] for e in events)
    open_: dict[int, list[str]] = {}
    for event in events:
        stack = open_.setdefault(event["id"], [])
        if event["ph"] == "b":
            assert len(stack) == (0 if event["name"].startswith("request") else 1)
            stack.append(event["name"])
        else:
            assert stack.pop() == event["name"]
    assert open_ and not any(open_.values())


def test_a_stage_that_ran_by_its_workers_clock_before_it_arrived_is_clipped(
    run_dir: Path, tmp_path: Path
) -> None:
    for path in run_dir.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    log = tmp_path / stage_log.FILE_NAME
    header, *rows = log.read_text().splitlines()
    place = header.split("\t").index("start")
    moved = [row.split("\t") for row in rows]
    for cells in moved:
        cells[place] = str(-S)
    log.write_text("\n".join([header, *("\t".join(cells) for cells in moved)]) + "\n")
    events = events_of(tmp_path, tmp_path / "t.json")
    begun: dict[tuple[int, str], float] = {}
    for event in events:
        if event["ph"] == "b":
            begun[event["id"], event["name"]] = event["ts"]
        else:
            assert begun[event["id"], event["name"]] <= event["ts"]


# ----------------------------------------------------------------------------------------- report


def test_the_report_counts_what_each_request_came_to(tmp_path: Path) -> None:
    (numbers,) = measure_cascades(mixed_run(tmp_path / "run"), START_NS + S)
    assert dict(numbers.verdicts) == {1: 1, 2: 5, 3: 1, 4: 1, 5: 2, 8: 1, 9: 1}
    assert (numbers.light, numbers.heavy) == (4, 2)


def test_the_report_has_threshold_and_light_share_by_window(tmp_path: Path) -> None:
    ends = [(0, 100 * second + 50) for second in range(100)]
    made = [
        Made(begin, end, [(0, end, Verdict.ACCEPTED if n % 2 else Verdict.DEFERRED, 0.5)])
        if n < 50
        else Made(begin, end, [(1, end, Verdict.BLIND_HEAVY, -1)])
        for n, (begin, end) in enumerate(ends)
    ]
    (numbers,) = measure_cascades(write_run(tmp_path / "run", made, threshold=0.25), START_NS)
    assert numbers.over_time is not None
    over = numbers.over_time
    assert over.width_s == 0.1 and len(over.middle_s) == 99
    assert over.threshold[:50] == [0.25] * 50 and all(map(math.isnan, over.threshold[50:]))
    light = [share for share in over.light_share[:50] if not math.isnan(share)]
    assert light == [1.0] * 25 and over.light_share[50:] == [0.0] * 49


def test_times_of_stages_are_those_of_the_rows(run_dir: Path) -> None:
    (numbers,) = measure_cascades(run_dir, START_NS)
    log = stage_log.read_stage_log(run_dir / stage_log.FILE_NAME)
    heavy = log["verdict"] == Verdict.HEAVY
    (_, stage) = numbers.stages
    assert (stage.name, stage.runs) == ("heavy", int(heavy.sum()))
    assert stage.exec_ns[0] == np.median(log["exec"][heavy])
    assert stage.whole_ns[0] == np.median(log["waited"][heavy])
    where = set(zip(log["worker_id"][heavy], log["gpu_id"][heavy], strict=True))
    assert stage.gpus == len(where) >= 1
    assert stage.mean_batch == pytest.approx(log["batch_size"][heavy].mean())
    assert math.isnan(stage.wait_ns[1]), "too few for a p99"


def test_the_page_has_a_section_of_the_cascade_only_with_stages(
    run_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "with.html"
    assert "cascade" in write_report([run_dir], out).figures
    page = out.read_text()
    for said in (
        "Stages of the cascade sdturbo",
        "Answers from the light program",
        "outranked",
        " ms</td>",
    ):
        assert said in page
    plain = write_run(tmp_path / "plain", [Made(place * MS, place * MS + 5) for place in range(9)])
    out = tmp_path / "without.html"
    assert "cascade" not in write_report([plain], out).figures
    assert "cascade" not in out.read_text().lower()


def test_a_run_that_is_too_short_for_a_figure_has_the_tables(tmp_path: Path) -> None:
    made = [Made(0, 1, [(0, 1, Verdict.ACCEPTED, 0.5)]), Made(0, 2, [(0, 1, Verdict.FORCED, 0.1)])]
    written = write_report([write_run(tmp_path / "run", made)], tmp_path / "r.html")
    assert "cascade" not in written.figures and "Verdicts" in (tmp_path / "r.html").read_text()


def test_stages_of_no_cascade_are_no_part_of_a_report(tmp_path: Path) -> None:
    made = [Made(0, 1, [(0, 1, Verdict.NONE, -1)])]
    assert measure_cascades(write_run(tmp_path / "run", made), START_NS) == []
    assert measure_cascades(tmp_path, START_NS) == []
