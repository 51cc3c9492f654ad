"""`slosched explain`: reasons and predictions are kept beside the published logs, and told."""

from __future__ import annotations

import codecs
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from slosched.analysis.explain import explain, summary
from slosched.cli.app import app
from slosched.codes import Code
from slosched.config import ControllerConfig, SchedulerConfig
from slosched.core.scheduler.interface import RequestRecord
from slosched.daemon.run_log import RunLog
from slosched.errors import InvalidConfig
from slosched.sim.run_files import RunFiles
from slosched.telemetry.reason_log import FILE_NAME, read_reasons
from slosched.telemetry.table import MalformedLog
from slosched.units import NS_PER_MS

SECOND_NS = 10**9


def record(
    request_id: int, code: int, reason: str, *, met: bool = False, model_id: int = 3
) -> RequestRecord:
    return RequestRecord(
        request_id,
        request_id,
        1,
        model_id,
        code,
        reason,
        0.0,
        25 * NS_PER_MS,
        SECOND_NS,
        SECOND_NS + (10 if code or met else 30) * NS_PER_MS,
        met,
        0,
        1,
        True,
        2,
        0,
        1,
        1,
        4 * NS_PER_MS,
        3 * NS_PER_MS,
        5 * NS_PER_MS if not code else -1,
        6 * NS_PER_MS if not code else 0,
    )


RECORDS = (
    record(1, 0, "", met=True),
    record(2, int(Code.COULD_NOT_START_IN_TIME), "could start in 30ms"),
    record(3, int(Code.RUNTIME_ERROR), "tab\there],[\nand\x1b[31m red"),
    record(4, 0, ""),
    record(2, int(Code.TIMED_OUT), "waited", model_id=4),
)


def live(directory: Path) -> None:
    log = RunLog.open(
        ControllerConfig(
            scheduler=SchedulerConfig(), workers=("127.0.0.1:1",), log_dir=str(directory)
        ),
        announce=lambda text: None,
    )
    for each in RECORDS:
        log.request(each)
    log.close(arrived=5, answered=5, by_code={}, refused_at_door=0, bad_messages=0)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["outcome"]["reason_rows"] == 4 and manifest["complete"]


def simulated(directory: Path) -> None:
    directory.mkdir()
    files = RunFiles(directory)
    for each in RECORDS:
        files.on_request(each)
    assert files.close()["reason_rows"] == 4


@pytest.mark.parametrize("write", [live, simulated])
def test_a_run_keeps_the_reasons_of_what_was_not_in_time(write: object, tmp_path: Path) -> None:
    assert callable(write)
    run = tmp_path / "run"
    write(run)
    rows = list(read_reasons(run / FILE_NAME))
    assert [row.request_id for row in rows] == [2, 3, 4, 2]
    assert rows[1].reason == "tab\there],[\nand\x1b[31m red"
    # Words from outside stay on one line of the file, without control characters.
    lines = (run / FILE_NAME).read_text().splitlines()
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    assert (rows[2].predicted_start, rows[2].predicted_exec) == (4 * NS_PER_MS, 3 * NS_PER_MS)
    assert (rows[2].start, rows[2].exec) == (5 * NS_PER_MS, 6 * NS_PER_MS)

    refused, other = explain(run, 2)
    assert refused.reason == "could start in 30ms" and other.model_id == 4
    text = "\n".join(refused.lines)
    assert "could not start in time (code 8)" in text
    assert "25ms after it arrived; answered after 10ms, 15ms before it" in text
    assert "predicted  start 4ms after it arrived, run for 3ms" in text and "happened" not in text
    [late] = explain(run, 4)
    assert "answered, but late" in late.lines[0]
    assert any(
        "start 5ms" in line and "batch of 2 on worker 0 GPU 1" in line for line in late.lines
    )
    [served] = explain(run, 1)
    assert served.in_time and "answered in time" in served.lines[0]
    counts = {each.code: (each.requests, each.example) for each in summary(run)}
    assert counts == {0: (1, 4), 2: (1, 3), 4: (1, 2), 8: (1, 2)}


def test_what_a_model_said_cannot_move_the_cursor(tmp_path: Path) -> None:
    simulated(tmp_path / "run")
    for words in (["explain", str(tmp_path / "run")], ["explain", str(tmp_path / "run"), "3"]):
        said = CliRunner().invoke(app, words)
        assert said.exit_code == 0 and "\x1b" not in said.output and "red" in said.output


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    simulated(tmp_path / "run")
    with pytest.raises(InvalidConfig, match="has no request 99"):
        explain(tmp_path / "run", 99)
    with pytest.raises(InvalidConfig, match="does not exist"):
        summary(tmp_path / "nowhere")
    path = tmp_path / "run" / FILE_NAME
    path.write_bytes(path.read_bytes()[:-5])  # killed within the last line
    assert len(list(read_reasons(path))) == 3
    path.write_text(path.read_text().replace("[2,", "[true,") + "\n")
    with pytest.raises(MalformedLog, match="line"):
        list(read_reasons(path))


@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_rows_are_read_in_blocks_of_any_size(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("slosched.telemetry.log_lines._BLOCK_BYTES", block_bytes)
    simulated(tmp_path / "run")
    path = tmp_path / "run" / FILE_NAME
    rows = list(read_reasons(path))
    whole = path.read_bytes()
    assert len(rows) == 4
    path.write_bytes(codecs.BOM_UTF8 + whole.replace(b"\n", b"\r\n") + b"[1,")
    assert list(read_reasons(path)) == rows
    lines = whole.splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], b"[]\n", *lines[3:]]))
    with pytest.raises(MalformedLog, match="line 4:"):
        list(read_reasons(path))
    path.write_bytes(b"".join(lines[1:]))
    with pytest.raises(MalformedLog, match="line 1: this is not the header"):
        list(read_reasons(path))
    path.write_bytes(lines[0][:-3])  # killed within the header
    assert list(read_reasons(path)) == []
