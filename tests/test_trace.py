"""`slosched trace`: valid Trace Event Format, true to the log, for live and simulated runs alike."""

from __future__ import annotations

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from slosched.analysis.intervals import Gpu
from slosched.analysis.trace import Window, parse_gpus, write_trace
from slosched.cli.app import app
from slosched.errors import InvalidConfig
from slosched.telemetry import action_log, request_log

GOLDEN = Path(__file__).parent / "golden"
RUNS = ("slo-exp-1", "noise-and-jitter", "cold-closed-loops")
START_NS = 1_700_000_000_000_000_000
MS = 1_000_000

Event = dict[str, Any]


def events_of(path: Path) -> list[Event]:
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    assert isinstance(events, list)
    return events


def action(number: int, type_: int, sent_ms: float, result_ms: float, **more: float) -> str:
    """A row of an action log: an Infer or load that was predicted as it went, but for `more` (ms)."""
    values = dict.fromkeys(action_log.COLUMNS, 0)
    sent, result = round(sent_ms * MS), round(result_ms * MS)
    values |= {
        "t": START_NS + result,
        "action_id": number,
        "action_type": type_,
        "batch_size": 1,
        "controller_result_enqueue": result - sent,
    }
    whole = ("status", "worker_id", "gpu_id", "model_id", "batch_size", "requests_queued")
    for name, value in more.items():
        values[name] = round(value) if name in whole else round(value * MS)
    return "\t".join(str(value) for value in values.values())


def infer(number: int, sent_ms: float, end_ms: float, took_ms: float, **more: float) -> str:
    told: dict[str, float] = {
        "expected_exec_duration": took_ms,
        "worker_exec_duration": took_ms,
        "goodput": took_ms,
        "expected_exec_complete": end_ms - sent_ms,
        "worker_exec_complete": end_ms - sent_ms,
    }
    return action(number, 2, sent_ms, end_ms + 0.25, **(told | more))


def run_of(path: Path, *rows: str) -> Path:
    path.mkdir(exist_ok=True)
    text = "\n".join([action_log.HEADER, *rows]) + "\n"
    (path / action_log.FILE_NAME).write_text(text, encoding="utf-8")
    return path


SMALL = (
    action(
        1,
        1,
        0,
        9,
        worker_exec_duration=8.33,
        worker_exec_complete=8.5,
        expected_exec_duration=8,
        expected_exec_complete=8.2,
    ),  # a load
    infer(2, 9, 12, 2.6, requests_queued=1),
    infer(3, 9, 15.8, 3.8, batch_size=2, goodput=1.9, requests_queued=4),
    infer(4, 12, 18.4, 2.6, goodput=0, requests_queued=3, expected_exec_complete=6),
    action(
        5, 2, 15, 19, status=81, expected_exec_duration=2.6, expected_exec_complete=6.2, model_id=1
    ),  # refused by the worker: too late
    action(6, 3, 20, 20.5, model_id=1),  # an eviction
    infer(7, 20, 23, 2.6, worker_id=1, model_id=2),
)


def check_format(events: list[Event]) -> None:
    """What the Trace Event Format asks of each event and of each track."""
    needed = {
        "X": {"name", "cat", "ts", "dur", "pid", "tid"},
        "i": {"name", "ts", "pid", "tid", "s"},
        "s": {"name", "cat", "ts", "pid", "tid", "id"},
        "f": {"name", "cat", "ts", "pid", "tid", "id", "bp"},
        "b": {"name", "cat", "ts", "pid", "id"},
        "e": {"name", "cat", "ts", "pid", "id"},
        "C": {"name", "ts", "pid", "args"},
        "M": {"name", "pid", "args"},
    }
    tracks: dict[tuple[object, ...], list[Event]] = defaultdict(list)
    for event in events:
        assert needed[event["ph"]] <= set(event), event
        if event["ph"] != "M":
            tracks[event["pid"], event.get("tid"), event["ph"] == "C" and event["name"]].append(
                event
            )
    for track in tracks.values():
        assert all(a["ts"] <= b["ts"] for a, b in pairwise(track))
        slices = [event for event in track if event["ph"] == "X"]
        # A ns of tolerance: us as binary fractions.
        assert all(a["ts"] + a["dur"] <= b["ts"] + 1e-3 for a, b in pairwise(slices))
    flows: dict[int, list[Event]] = defaultdict(list)
    for event in events:
        if event["ph"] in "sf":
            flows[event["id"]].append(event)
    for ends in flows.values():
        start, finish = sorted(ends, key=lambda event: event["ph"], reverse=True)
        assert (start["ph"], finish["ph"]) == ("s", "f")
        assert start["ts"] <= finish["ts"]
        assert (start["pid"], start["tid"]) != (finish["pid"], finish["tid"])
    named = {(e["pid"], e["tid"]) for e in events if e["name"] == "thread_name"}
    assert {(e["pid"], e["tid"]) for e in events if e["ph"] in "Xisf"} <= named


@pytest.mark.parametrize("name", RUNS)
def test_simulated_runs_are_valid_traces(tmp_path: Path, name: str) -> None:
    traced = write_trace(GOLDEN / name, tmp_path / "trace.json")
    events = events_of(traced.path)
    check_format(events)
    assert len(events) == traced.events
    # Every action that ran is one slice; what did not run is a mark; requests open and close.
    log = action_log.read_action_log(GOLDEN / name / action_log.FILE_NAME)
    ran = [e for e in events if e["ph"] == "X" and e["cat"] == "actual"]
    assert len(ran) == int((log["worker_exec_duration"] > 0).sum())
    assert len([e for e in events if e["ph"] == "i"]) == len(log) - len(ran)
    opened = sorted(e["id"] for e in events if e["ph"] == "b")
    assert opened == sorted(e["id"] for e in events if e["ph"] == "e")
    assert len(opened) == traced.requests > 0


def test_a_small_trace_to_the_byte(tmp_path: Path) -> None:
    """One of each: a load, inferences in time, partly late and late, a refusal, an eviction."""
    run = run_of(tmp_path / "small", *SMALL)
    traced = write_trace(run, tmp_path / "trace.json")
    check_format(events_of(traced.path))
    assert traced.path.read_text(encoding="utf-8") == (GOLDEN / "trace.json").read_text("utf-8")
    assert not list(tmp_path.glob(".trace*"))


def test_slices_say_what_the_rows_say(tmp_path: Path) -> None:
    events = events_of(write_trace(run_of(tmp_path / "r", *SMALL), tmp_path / "trace.json").path)
    done = {e["args"]["action"]: e for e in events if e.get("cat") == "actual"}
    assert [done[n]["name"] for n in range(1, 8)] == [
        "model 0",
        "model 0, batch 1",
        "model 0, batch 2 partly late",
        "model 0, batch 1 late",
        "model 1, batch 1 failed: exec too late",
        "evict model 1",
        "model 2, batch 1",
    ]
    late = done[4]
    assert (late["ts"], late["dur"], late["cname"]) == (15_800, 2_600, "bad")
    assert late["args"]["ended_after_prediction_us"] == 400
    due = {e["args"]["action"]: e for e in events if e.get("cat") == "predicted"}
    assert (due[4]["ts"], due[4]["dur"]) == (15_400, 2_600)
    assert (done[5]["ph"], done[5]["ts"]) == ("i", 19_000)
    # The prediction of 4 overlaps that of 3, which was older: a lane of its own.
    assert due[4]["tid"] != due[3]["tid"]
    arrows = {(e["id"], e["ph"]): e for e in events if e.get("cat") == "prediction"}
    assert arrows[4, "s"]["tid"] == due[4]["tid"]
    assert arrows[4, "f"]["tid"] == late["tid"]
    assert (5, "s") not in arrows
    processes = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert sorted(processes.values()) == ["controller", "worker 0", "worker 1"]
    assert processes[done[7]["pid"]] == "worker 1"


def test_slices_that_overlap_by_the_workers_clock_are_clipped(tmp_path: Path) -> None:
    rows = (infer(1, 0, 5, 2.6), infer(2, 0, 7, 2.6), infer(3, 0, 6.5, 0.2))
    traced = write_trace(run_of(tmp_path / "r", *rows), tmp_path / "trace.json")
    events = events_of(traced.path)
    check_format(events)
    done = {e["args"]["action"]: e for e in events if e.get("cat") == "actual"}
    assert traced.clipped == 2
    assert (done[2]["ts"], done[2]["dur"], done[2]["args"]["clipped_us"]) == (5_000, 2_000, 600)
    assert done[2]["args"]["exec_us"] == 2_600
    assert done[3]["dur"] == 0  # wholly within another


def test_a_window_takes_what_lies_in_it_and_a_gpu_its_own(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", *SMALL)

    def actions(window: Window) -> list[int]:
        traced = write_trace(run, tmp_path / "trace.json", window)
        found = [e["args"]["action"] for e in events_of(traced.path) if e.get("cat") == "actual"]
        assert len(found) == traced.actions
        return sorted(found)

    assert actions(Window(0, 9 * MS)) == [1]
    assert actions(Window(9 * MS, 10 * MS)) == [1, 2, 3]
    assert actions(Window(18 * MS, 20 * MS)) == [4, 5]
    assert actions(Window(gpus=(Gpu(1, 0),))) == [7]
    assert actions(Window(gpus=parse_gpus(["w0-gpu0,W1-GPU0"]))) == list(range(1, 8))
    with pytest.raises(InvalidConfig, match=r"no action of W0-GPU3; its GPUs are W0-GPU0, W1-GPU0"):
        actions(Window(gpus=(Gpu(0, 3),)))
    with pytest.raises(InvalidConfig, match=r"no action from 1s to 2s .* the run is 23\.2ms long"):
        actions(Window(10**9, 2 * 10**9))
    with pytest.raises(InvalidConfig, match="ends at 1ms, which is not after its start at 2ms"):
        Window(2 * MS, MS)
    with pytest.raises(InvalidConfig, match="'gpu0' is not a GPU; write it as W0-GPU0"):
        parse_gpus(["gpu0"])


def test_a_long_run_is_cut_where_a_viewer_still_follows(tmp_path: Path) -> None:
    rows = [infer(i, 3 * i, 3 * i + 3, 2.6) for i in range(200)]
    run = run_of(tmp_path / "r", *rows)
    traced = write_trace(run, tmp_path / "trace.json", most_actions=150)
    assert traced.shortened
    assert (traced.end_ns, traced.actions) == (400 * MS, 134)  # whole tenths of a second
    later = write_trace(run, tmp_path / "trace.json", Window(400 * MS), most_actions=150)
    assert not later.shortened
    assert (
        write_trace(run, tmp_path / "trace.json", Window(0, 10**9), most_actions=150).actions == 200
    )


def test_counters_add_up_what_models_say_and_count_goodput(tmp_path: Path) -> None:
    rows = (
        infer(1, 0, 10, 5, requests_queued=4),
        infer(2, 20, 30, 5, requests_queued=3, model_id=1),
        infer(3, 40, 50, 5, requests_queued=1, goodput=2.5),
        infer(4, 190, 200, 5),
    )
    events = events_of(write_trace(run_of(tmp_path / "r", *rows), tmp_path / "trace.json").path)
    counters: dict[str, dict[float, float]] = defaultdict(dict)
    for event in events:
        if event["ph"] == "C":
            (value,) = event["args"].values()
            counters[event["name"]][event["ts"]] = value
    assert counters["queued requests"] == {0: 4, 20_000: 7, 40_000: 4, 190_000: 3}
    # 5 + 5 + 2.5 ms of 100 ms; the last one ends at the edge of the third window.
    assert counters["goodput (GPUs)"] == {0: 0.125, 100_000: 0, 200_000: 0.05}


def test_gzip_is_the_same_trace_and_the_same_bytes(tmp_path: Path) -> None:
    run = run_of(tmp_path / "r", *SMALL)
    plain = write_trace(run, tmp_path / "trace.json").path.read_bytes()
    packed = write_trace(run, tmp_path / "a" / "trace.json.gz").path
    assert gzip.decompress(packed.read_bytes()) == plain
    again = write_trace(run, tmp_path / "b.json.gz").path
    assert again.read_bytes() == packed.read_bytes()


def invoke(*args: str) -> Result:
    return CliRunner().invoke(app, ["trace", *args])


def test_the_command_and_its_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_of(tmp_path / "r", *SMALL)
    (tmp_path / "empty").mkdir()
    run_of(tmp_path / "started")
    monkeypatch.chdir(tmp_path)
    result = invoke("r", "--from", "9ms", "--to", "0.012", "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["path"] == "r/trace.json"
    assert (said["actions"], said["start_ns"], said["end_ns"]) == (3, 9 * MS, 12 * MS)
    damaged = run_of(tmp_path / "d", *SMALL) / request_log.FILE_NAME
    damaged.write_text(f"{request_log.HEADER}\n1\tx\n", encoding="utf-8")
    for args, error in (
        (("r", "--out", "r/trace.json/x.json"), "cannot write r/trace.json/x.json"),
        (("nowhere",), "nowhere does not exist"),
        (
            ("empty",),
            "empty has no clockwork_action_log.tsv; it is one of the controller's logs, and",
        ),
        (("started",), "nothing to show: started/clockwork_action_log.tsv holds no actions yet"),
        (("r", "--from", "soon"), "--from: 'soon' is not a duration"),
        (("d",), f"d/{request_log.FILE_NAME}, line 2: 2 cells where there should be 12"),
    ):
        result = invoke(*args)
        assert result.exit_code == 2
        assert error in result.stderr
