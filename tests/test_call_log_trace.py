"""Calls of functions in `slosched trace`: slots, arrows from parent to child, and what each call did."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from made_call_run import MS, START_NS, a_call, a_part, family, write_calls
from slosched.analysis.intervals import Gpu
from slosched.analysis.trace import Window, write_trace
from slosched.cli.app import app
from slosched.core.scheduler.interface import CallPart, CallRecord
from slosched.errors import InvalidConfig
from slosched.telemetry import action_log

Event = dict[str, Any]


def a_run(directory: Path, calls: Sequence[CallRecord], parts: Sequence[CallPart]) -> Path:
    """A run with one load, which ends after 1 ms, and these calls."""
    values = dict.fromkeys(action_log.COLUMNS, 0)
    values |= {"t": START_NS + MS, "action_type": 1, "controller_result_enqueue": MS}
    row = "\t".join(str(value) for value in values.values())
    (directory / action_log.FILE_NAME).write_text(f"{action_log.HEADER}\n{row}\n")
    write_calls(directory, list(calls), list(parts))
    return directory


def traced(run: Path, **more: Any) -> list[Event]:
    write_trace(run, run / "trace.json", **more)
    events: list[Event] = json.loads((run / "trace.json").read_text())["traceEvents"]
    return events


def slices(events: list[Event]) -> list[Event]:
    return [e for e in events if e.get("cat") == "call" and e["ph"] == "X"]


def test_each_part_is_a_slice_at_its_time(tmp_path: Path) -> None:
    found = slices(traced(a_run(tmp_path, *family())))
    assert [(e["name"], e["ts"], e["dur"]) for e in found] == [
        ("parent", 0, 2000),
        ("leaf", 2500, 4000),
        ("parent", 9000, 1000),
        ("last", 11000, 3000),
        ("parent", 14000, 1000),
    ]
    assert len({(e["pid"], e["tid"]) for e in found}) == 1  # one slot was enough


def test_parts_of_one_track_do_not_overlap(tmp_path: Path) -> None:
    calls = [a_call(n, n, n + 10, start=n, exec=10, worker_id=0, gpu_id=0) for n in range(20)]
    parts = [a_part(n, 0, n, n + 10) for n in range(20)]
    tracks: dict[int, list[Event]] = defaultdict(list)
    for event in slices(traced(a_run(tmp_path, calls, parts))):
        tracks[event["tid"]].append(event)
    assert len(tracks) == 10
    for events in tracks.values():
        for one, other in pairwise(events):
            assert one["ts"] + one["dur"] <= other["ts"]


def test_clocks_that_differ_by_little_need_no_further_track(tmp_path: Path) -> None:
    calls = [a_call(n, n, n + 1, start=n, exec=1, worker_id=0, gpu_id=0) for n in range(3)]
    parts = [a_part(0, 0, 0, 1.01), a_part(1, 0, 1, 2.01), a_part(2, 0, 2, 3)]
    found = slices(traced(a_run(tmp_path, calls, parts)))
    assert [(e["tid"], e["ts"], e["dur"]) for e in found] == [
        (1000, 0, 1010),
        (1000, 1010, 1000),
        (1000, 2010, 990),
    ]


def test_arrows_lead_from_parent_to_child_and_back(tmp_path: Path) -> None:
    events = traced(a_run(tmp_path, *family()))
    arrows = defaultdict(list)
    for event in events:
        if event["ph"] in "sf" and event["cat"] in ("call", "answer"):
            arrows[event["cat"], event["id"]].append((event["ph"], event["ts"]))
    assert dict(arrows) == {
        ("call", 2): [("s", 1000), ("f", 2500)],  # asked for after 1 ms of the run
        ("call", 4): [("s", 10000), ("f", 11000)],  # child 1 ran nothing that is known
        ("answer", 4): [("s", 14000), ("f", 14000)],
    }
    places = {
        (e["pid"], e["tid"]): [(x["ts"], x["ts"] + x["dur"]) for x in slices(events)]
        for e in slices(events)
    }
    for event in events:
        if event["ph"] in "sf" and event["cat"] in ("call", "answer"):
            spans = places[event["pid"], event["tid"]]
            assert any(begin <= event["ts"] <= end for begin, end in spans), event


def test_without_flows_there_are_no_arrows(tmp_path: Path) -> None:
    events = traced(a_run(tmp_path, *family()), flows=False)
    assert not [event for event in events if event["ph"] in "sf"]


def test_the_story_of_a_call_says_how_it_waited_ran_and_was_suspended(tmp_path: Path) -> None:
    events = traced(a_run(tmp_path, *family()))
    story = [
        (e["ph"], e["name"], e["ts"])
        for e in events
        if e["ph"] in "be" and e["cat"] == "call" and e["id"] == 1
    ]
    assert story == [
        ("b", "call, parent", 0),
        ("b", "runs", 0),
        ("e", "runs", 2000),
        ("b", "awaits", 2000),
        ("e", "awaits", 9000),
        ("b", "runs", 9000),
        ("e", "runs", 10000),
        ("b", "awaits", 10000),
        ("e", "awaits", 14000),
        ("b", "runs", 14000),
        ("e", "runs", 15000),
        ("e", "call, parent", 15000),
    ]
    failed = [e["name"] for e in events if e["ph"] == "b" and e["cat"] == "call" and e["id"] == 3]
    assert failed == ["call, leaf failed: call raised", "waits", "runs"]


def test_the_stories_are_at_most_as_many_as_asked_for(tmp_path: Path) -> None:
    calls = [a_call(n, n, n + 1, code=54) for n in range(50)]
    events = traced(a_run(tmp_path, calls, []), requests=7)
    assert len({e["id"] for e in events if e["ph"] == "b" and e["cat"] == "call"}) == 7


def test_the_run_reaches_to_its_last_call(tmp_path: Path) -> None:
    written = write_trace(a_run(tmp_path, *family()), tmp_path / "trace.json")
    assert (written.calls, written.run_ns) == (4, 15 * MS)


def test_a_window_takes_the_calls_that_lie_in_it(tmp_path: Path) -> None:
    run = a_run(tmp_path, *family())
    written = write_trace(run, tmp_path / "trace.json", Window(12 * MS, 13 * MS))
    assert written.calls == 2  # the parent and its last child
    with pytest.raises(InvalidConfig, match="no action from"):
        write_trace(run, tmp_path / "trace.json", Window(16 * MS, 17 * MS))


def test_a_run_with_very_many_calls_is_cut_where_a_viewer_ends(tmp_path: Path) -> None:
    calls = [a_call(n, 100 * n, 100 * n + 1, start=100 * n, exec=1) for n in range(40)]
    run = a_run(tmp_path, calls, [])
    written = write_trace(run, tmp_path / "trace.json", most_actions=10)
    assert written.shortened and written.end_ns == 900 * MS
    assert written.calls == 9


def test_a_device_may_have_calls_and_no_action(tmp_path: Path) -> None:
    calls = [a_call(1, 0, 1, start=0, exec=1, worker_id=3, gpu_id=1)]
    run = a_run(tmp_path, calls, [a_part(1, 0, 0, 1)])
    events = traced(run, window=Window(gpus=(Gpu(3, 1),)))
    assert [e["pid"] for e in slices(events)] == [13]
    names = [e["args"]["name"] for e in events if e["ph"] == "M" and e["name"] == "thread_name"]
    assert names == ["device 1 calls 1"]
    with pytest.raises(InvalidConfig, match="no action of W9-GPU0"):
        write_trace(run, tmp_path / "trace.json", Window(gpus=(Gpu(9, 0),)))


def test_the_command_says_how_many_calls_it_wrote(tmp_path: Path) -> None:
    run = a_run(tmp_path, *family())
    result = CliRunner().invoke(app, ["trace", str(run)])
    assert result.exit_code == 0, result.output
    assert "4 calls of functions" in result.output
