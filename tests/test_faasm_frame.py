"""The frame of Faasm's experiments: cells, resumed runs, reports, and what a run must not leave behind."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import made_experiment
import slosched.analysis
from slosched.errors import InvalidConfig, MissingPackage, RunDirectoryInUse, SloschedError
from slosched.faasm import frame_run
from slosched.faasm.frame import Frame
from slosched.faasm.frame_leaks import Leaked, watched
from slosched.faasm.frame_processes import below, read_process
from slosched.faasm.frame_results import RESULTS, append_cell, read_results
from slosched.faasm.frame_run import Order, report_again, run_experiment
from slosched.faasm.frame_table import EXPERIMENTS, Experiment
from slosched.faasm.frame_tables import markdown_text, shown, table_text, tsv_text
from slosched.faasm.names import REPLACED
from slosched.functions.state.folders import PREFIX_VARIABLE
from slosched.functions.state.state import State
from slosched.telemetry.manifest import read_manifest

TESTS = Path(__file__).parent


@pytest.fixture(autouse=True)
def _made(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(EXPERIMENTS, "sgd", EXPERIMENTS["sgd"])  # undoes what `offer` adds, too
    before = dict(EXPERIMENTS)
    made_experiment.offer()
    yield
    EXPERIMENTS.clear()
    EXPERIMENTS.update(before)
    while made_experiment.kept:
        made_experiment.kept.pop().close()


def order(out: Path, *, fault: str = "", **more: Any) -> Order:
    options = made_experiment.Options(fault=fault)
    return replace(Order(experiment="made", options=options, scale="quick", out=out), **more)


def run(made: Order) -> Frame:
    return run_experiment(made, say=lambda line: None, show=lambda text: None)


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


# ------------------------------------------------------------------------------------------ runs


def test_a_run_leaves_records_tables_figures_and_a_page(tmp_path: Path) -> None:
    lines: list[str] = []
    shown_texts: list[str] = []
    frame = run_experiment(order(tmp_path / "out"), say=lines.append, show=shown_texts.append)
    assert frame.directory == tmp_path / "out"
    assert [each["value"] for each in frame.records()] == [10, 20, 40]
    assert [each["key"] for each in frame.records()] == ["workers=1", "workers=2", "workers=4"]
    assert any(line.startswith("[2/3] workers=2") for line in lines)
    assert any("left" in line for line in lines)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is True and manifest["kind"] == "faasm made"
    assert manifest["config"]["workers"] == [1, 2, 4] and manifest["seeds"] == {"seed": 3}
    assert manifest["versions"]["numpy"] and manifest["host"]["cpu_usable"]
    page = (tmp_path / "out" / "report.md").read_text()
    assert REPLACED in page and "| 4 | 40 |" in page and "EMULATED: all of it" in page
    assert "figures/values.png" in page and "3 cells, scale quick" in page
    assert shown_texts == [
        "values\nworkers  value\n      1     10\n      2     20\n      4     40\nEMULATED: all of it\n"
    ]
    assert (
        tmp_path / "out" / "tables" / "values.tsv"
    ).read_text() == "workers\tvalue\n1\t10\n2\t20\n4\t40\n"
    assert REPLACED in (tmp_path / "out" / "tables" / "values.txt").read_text()


def test_a_second_run_changes_nothing_of_the_first(tmp_path: Path) -> None:
    first = run(order(tmp_path / "out"))
    before = digests(first.directory)
    second = run(order(tmp_path / "out"))
    assert second.directory == tmp_path / "out" / "run-002"
    after = digests(first.directory)
    assert {name: after[name] for name in before} == before
    assert first.namespace != second.namespace


def test_a_failed_run_keeps_its_cells_and_is_resumed(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ValueError, match="the cell is broken"):
        run(order(out, fault="raise"))
    manifest = read_manifest(out)
    assert manifest["complete"] is False
    assert manifest["outcome"] == {"cells": 1, "ended_by": "the cell is broken"}
    assert [*read_results(out / RESULTS)] == ["workers=1"]
    with pytest.raises(InvalidConfig, match="another fault; give the same options"):
        run(order(out, resume=True))
    broken = order(out, fault="raise", resume=True)
    with pytest.raises(ValueError, match="the cell is broken"):
        run(broken)
    assert (out / "made.txt").read_text().split() == [
        "1",
        "2",
        "2",
    ]  # the first cell was not made again
    made_experiment.run.__globals__["_misbehave"], kept = (
        lambda *_: None,
        made_experiment._misbehave,
    )
    try:
        frame = run(broken)
    finally:
        made_experiment.run.__globals__["_misbehave"] = kept
    assert frame.directory == out and len(frame.cells) == 3
    assert (out / "made.txt").read_text().split() == ["1", "2", "2", "2", "4"]
    manifest = read_manifest(out)
    assert manifest["complete"] is True and len(manifest["sessions"]) == 3


def test_only_a_run_of_the_same_kind_is_resumed(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="holds no run of made to resume"):
        run(order(tmp_path / "nothing", resume=True))
    run(order(tmp_path / "out"))
    with pytest.raises(InvalidConfig, match="another scale"):
        run(order(tmp_path / "out", resume=True, scale="published"))


def test_two_processes_do_not_share_a_run(tmp_path: Path) -> None:
    from slosched.experiment.campaign import alone_in

    run(order(tmp_path / "out"))
    with alone_in(tmp_path / "out"), pytest.raises(RunDirectoryInUse):
        run(order(tmp_path / "out", resume=True))


def test_a_report_is_made_again_from_the_records_alone(tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(order(out))
    before = digests(out)
    for path in (out / "report.md", *(out / "tables").iterdir(), *(out / "figures").iterdir()):
        path.unlink()
    frame = report_again(out, show=lambda text: None, layout="faasm")
    assert not frame.measures
    after = digests(out)
    assert {name: after[name] for name in before} == before
    folders = sorted((out / "sgd_reuters_svm").iterdir())
    assert [each.name for each in folders] == [
        f"SYSTEM_FAASM_WORKERS_{workers}_INTERVAL_60000_logs" for workers in (1, 2, 4)
    ]
    with pytest.raises(InvalidConfig, match="does not hold a run of `slosched exp`"):
        report_again(tmp_path, show=lambda text: None)


def test_an_experiment_that_is_not_installed_says_what_is_missing(tmp_path: Path) -> None:
    EXPERIMENTS["made"] = Experiment(
        module="slosched.faasm.made.run", options="", published="", summary=""
    )
    with pytest.raises(MissingPackage, match=r"made is not in this installation"):
        run(order(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------------------- cells


@pytest.fixture
def frame(tmp_path: Path) -> Iterator[Frame]:
    with watched("test") as leaks:
        yield Frame(
            tmp_path,
            "made",
            scale="quick",
            say=lambda line: None,
            show=lambda text: None,
            leaks=leaks,
        )


def test_a_cell_is_written_when_it_ends_and_made_once(frame: Frame, tmp_path: Path) -> None:
    with frame.cell("a") as cell:
        assert cell and not frame.has("a")
        cell.row({"x": 1})
        frame.row("a", {"x": 2})
        assert not (tmp_path / RESULTS).exists()
    assert frame.has("a")
    with frame.cell("a") as cell:
        assert not cell
        with pytest.raises(InvalidConfig, match="there already"):
            cell.row({"x": 3})
    assert frame.records("a") == [{"key": "a", "x": 1}, {"key": "a", "x": 2}]
    frame.row("b", {"x": 4})
    assert [each["x"] for each in frame.records()] == [1, 2, 4]
    assert frame.records("missing") == []


def test_the_time_that_is_left_is_estimated_before_and_corrected_by_what_cells_took(
    frame: Frame, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    time_s = 0
    monkeypatch.setattr(frame, "_say", lines.append)
    monkeypatch.setattr("slosched.faasm.frame.now_ns", lambda: time_s * 10**9)
    frame.row("a", {"x": 1})
    frame.expect({"a": 600.0, "b": 100.0, "c": 1800.0, "d": 3600.0 * 4})
    assert lines[-1] == "3 of 4 cells are to be made: about 4.5 h, by an estimate"
    for key, took_s, left in (("b", 200, " 6.5 h"), ("c", 3600, " 7.8 h")):
        with frame.cell(key) as cell:
            time_s += took_s
            cell.row({"x": 1})
        assert lines[-1] == f"{key}: done in {took_s:.1f} s; about{left} left"
    frame.row("d", {"x": 1})
    assert "left" not in lines[-1]


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in Path(slosched.analysis.__path__[0]).glob("faasm_*.py"))
)
def test_without_matplotlib_a_drawing_is_not_even_imported(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summaries look at the import: what fails later than that fails the run, and all of it was measured."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for module in ("slosched.analysis.style", f"slosched.analysis.{name}"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.delattr("slosched.analysis.style", raising=False)
    with pytest.raises(MissingPackage, match=r"slosched\[plot\]"):
        import_module(f"slosched.analysis.{name}")


def test_wrong_cells_are_refused(frame: Frame) -> None:
    with frame.cell("a") as cell:
        cell.row({"x": 1})
        with pytest.raises(InvalidConfig, match="begins within 'a'"), frame.cell("b"):
            pass
        with pytest.raises(InvalidConfig, match="within the cell 'a'"):
            frame.row("b", {"x": 1})
    with pytest.raises(InvalidConfig, match="ended without a record"), frame.cell("c"):
        pass
    for key in ("", "x" * 201, "a\nb"):
        with pytest.raises(InvalidConfig, match="printable characters"), frame.cell(key):
            pass
    with pytest.raises(InvalidConfig, match="the field 'records'"):
        frame.row("d", {"records": 1})
    with pytest.raises(InvalidConfig, match="does not fit into JSON"):
        frame.row("d", {"x": object()})
    assert frame.cells == ["a"]
    for name in ("", "../x", "a/b", "x" * 81):
        with pytest.raises(InvalidConfig, match="does not name a file"):
            frame.table(name, [])


def test_a_cell_that_was_cut_off_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / RESULTS
    append_cell(path, "a", [{"x": 1}, {"x": 2}])
    append_cell(path, "b", [{"x": 3}, {"x": 4}, {"x": 5}])
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        found = read_results(path)
        assert [*found] in (["a", "b"][:n] for n in range(3))
        assert [each["x"] for each in found.get("a", [])] in ([], [1, 2])
        assert "b" not in found or [each["x"] for each in found["b"]] == [3, 4, 5]
        # It is made again behind what is left.
        append_cell(path, "b", [{"x": 6}, {"x": 7}])
        again = read_results(path)
        assert [each["x"] for each in again["b"]] == [6, 7] and ("a" in again) == ("a" in found)


def test_numbers_of_numpy_and_nan_are_written_as_json(frame: Frame) -> None:
    import numpy as np

    frame.row("a", {"x": np.float32(2), "y": float("nan"), "z": np.arange(3), "n": np.int64(5)})
    assert frame.records() == [{"key": "a", "x": 2.0, "y": None, "z": [0, 1, 2], "n": 5}]


def test_tables_show_what_people_read_and_keep_what_programs_read() -> None:
    rows: list[dict[str, object]] = [
        {"name": "a", "x": 1234567},
        {"name": "b|c", "y": 0.123456, "x": None},
        {"x": float("nan"), "ok": True},
    ]
    assert table_text(rows) == (
        "name          x       y  ok\na     1,234,567       -  -\n"
        "b|c           -  0.1235  -\n-             -       -  yes"
    )
    assert tsv_text(rows).splitlines() == [
        "name\tx\ty\tok",
        "a\t1234567\t\t",
        "b|c\t\t0.123456\t",
        "\t\t\tTrue",
    ]
    assert markdown_text(rows).splitlines()[3] == r"| b\|c | - | 0.1235 | - |"
    assert table_text([]) == "(no rows)"
    assert [shown(value) for value in (1e-9, 12345.6, 1e12, float("inf"))] == [
        "1.000e-09",
        "12,346",
        "1.000e+12",
        "inf",
    ]


# ----------------------------------------------------------------------------------------- leaks


def gone(pid: int) -> bool:
    process = read_process(pid)
    return process is None or process.ended


@pytest.mark.processes
@pytest.mark.parametrize("fault", ["process", "orphan"])
def test_a_process_that_is_left_fails_the_run_and_is_ended(fault: str, tmp_path: Path) -> None:
    before = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        with pytest.raises(Leaked, match=r"1 thing\(s\) behind") as caught:
            run(order(tmp_path / "out", fault=fault))
        assert before.poll() is None  # what was there before the run stays
    finally:
        before.kill()
        before.wait(10)
    pid = int((tmp_path / "out" / "left.txt").read_text())
    assert f"process {pid} (" in caught.value.left[0] and "time.sleep(60)" in caught.value.left[0]
    assert gone(pid)
    manifest = read_manifest(tmp_path / "out")
    assert manifest["complete"] is False and "left" in manifest["outcome"]["ended_by"]
    assert len(read_results(tmp_path / "out" / RESULTS)) == 3


def test_shared_memory_that_is_left_fails_the_run_and_is_removed(tmp_path: Path) -> None:
    with pytest.raises(Leaked, match="shared memory /dev/shm/made-experiment"):
        run(order(tmp_path / "out", fault="memory"))
    assert not Path((tmp_path / "out" / "left.txt").read_text().strip()).exists()


def test_shared_memory_of_another_program_stays() -> None:
    stamp = time.time_ns()
    other, held = (Path("/dev/shm") / f"{name}-of-this-run-{stamp}" for name in ("not", "file"))
    with watched("exp-test") as leaks, held.open("wb"):
        other.write_bytes(b"another program's")
        try:
            with pytest.raises(Leaked, match=rf"1 thing\(s\).*shared memory {held}$"):
                leaks.check()
            assert other.exists() and str(other) in leaks.unknown
            assert not held.exists()
        finally:
            other.unlink()


def test_state_that_is_left_fails_the_run_and_is_removed(tmp_path: Path) -> None:
    with pytest.raises(Leaked, match=r"state in /dev/shm/slosched-exp-|namespace exp-made-"):
        run(order(tmp_path / "out", fault="state"))
    assert not [*Path("/dev/shm").glob(f"slosched-exp-{os.getpid()}-*")]
    assert PREFIX_VARIABLE not in os.environ


def test_state_that_is_closed_is_not_left(tmp_path: Path) -> None:
    with watched("exp-test") as leaks:
        frame = Frame(tmp_path, "made", scale="quick", namespace="exp-test", leaks=leaks)
        with State(frame.new_namespace(), own=True) as state:
            state.array("weights", 4)
            assert [*Path("/dev/shm").glob(f"slosched-exp-{os.getpid()}-*/*")]
        leaks.check()
    assert not [*Path("/dev/shm").glob(f"slosched-exp-{os.getpid()}-*")]


def test_a_namespace_that_is_left_in_redis_fails_the_run_and_is_dropped(tmp_path: Path) -> None:
    from slosched.functions.state.opening import open_store
    from slosched.functions.state.server import Server
    from ssh_rig import _free_port
    from test_state import redis_program  # skips where there is none

    with Server(_free_port(), program=redis_program()) as server, watched("exp-test") as leaks:
        frame = Frame(tmp_path, "made", scale="quick", namespace="exp-test", leaks=leaks)
        leaks._before |= {each.identity for each in below([os.getpid()])}  # the server
        others = State("others", server.address, own=True)
        left = State(frame.new_namespace(server.address), server.address, own=True)
        left.array("weights", 4)
        with pytest.raises(Leaked, match="namespace exp-test-1 of redis://"):
            leaks.check()
        assert [*open_store(server.address).namespaces()] == ["others"]
        others.close()
        left.close()


def test_state_of_emulated_hosts_is_looked_for_and_a_server_that_ended_is_not(
    tmp_path: Path,
) -> None:
    with watched("exp-test") as leaks:
        frame = Frame(tmp_path, "made", scale="quick", namespace="exp-test", leaks=leaks)
        frame.new_namespace("redis://127.0.0.1:1")  # nothing listens there
        host = Path("/dev/shm") / f"{leaks.state_folder}-host1"
        (host / "left").mkdir(parents=True)
        with pytest.raises(Leaked, match=r"1 thing\(s\).*state in /dev/shm/.*-host1"):
            leaks.check()
        assert not host.exists()


def test_what_killed_runs_left_in_memory_and_among_temporary_files_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for place in (Path("/dev/shm"), tmp_path):
        old = place / f"slosched-exp-{ended.pid}-0000"
        old.mkdir()
        (old / "weights.npy").touch()
        mine = place / f"slosched-exp-{os.getpid()}-0000"
        mine.mkdir()
        try:
            with watched("exp-test"):
                assert not old.exists() and mine.exists()
        finally:
            mine.rmdir()


# -------------------------------------------------------------------------------------- the process


def test_a_signal_that_comes_twice_at_once_is_one_and_a_later_one_ends_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 5 * 10**9
    monkeypatch.setattr(frame_run, "monotonic_ns", lambda: now)
    cleared = False
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler, f"a test before this one left {before}"
    with pytest.raises(KeyboardInterrupt) as last, frame_run._signals():
        try:
            signal.raise_signal(signal.SIGINT)
        except frame_run.Interrupted as first:
            assert first.number == signal.SIGINT
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
            cleared = True
            now += 10**9
            signal.raise_signal(signal.SIGINT)
    assert cleared and not isinstance(last.value, frame_run.Interrupted)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_signal_ends_a_run_that_can_be_resumed(
    number: signal.Signals, code: int, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [
        sys.executable,
        "-c",
        made_experiment.PROGRAM,
        "made",
        "--out",
        str(out),
        "--fault",
        "wait",
    ]
    env = os.environ | {"PYTHONPATH": str(TESTS)}
    with (tmp_path / "stderr").open("wb") as log:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=env)
    try:
        for _ in range(600):
            if "waiting" in (tmp_path / "stderr").read_text():
                break
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(60) == code
    finally:
        process.kill()
        process.wait(10)
    text = (tmp_path / "stderr").read_text()
    assert f"--out {out} --resume` continues" in text and "Traceback" not in text
    manifest = read_manifest(out)
    assert manifest["outcome"] == {"cells": 1, "ended_by": number.name}
    lines = (out / RESULTS).read_text().splitlines()
    assert [json.loads(line)["key"] for line in lines] == ["workers=1"]
    assert "waiting" in (out / "run.log").read_text()


def test_errors_of_the_frame_are_deliberate() -> None:
    assert issubclass(Leaked, SloschedError) and Leaked(["x"]).exit_code == 1
