"""LogWriter: whole lines only, whatever the disk and the process do."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slosched.errors import InvalidConfig, RunDirectoryInUse
from slosched.telemetry.writer import LogWriter, Rotation

HEADER = "a\tb"


def _wait(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def _no_error(text: str) -> None:
    raise AssertionError(text)


class FullDisk:
    """os.write on a disk that has room for `room` bytes."""

    def __init__(self, room: int) -> None:
        self.room = room

    def __call__(self, fd: int, data: bytes | memoryview) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = os.write(fd, data[: self.room])
        self.room -= written
        return written


def test_rows_arrive_in_order_without_close(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=_no_error)
    rows = [f"{i}\t{i * i}" for i in range(2000)]
    for row in rows:
        log.append(row)
    whole = "\n".join([HEADER, *rows, ""])
    _wait(lambda: path.read_text() == whole)
    counts = log.close()
    assert (counts.written, counts.dropped, counts.error) == (2000, 0, "")
    assert path.read_text() == whole


def test_an_idle_log_has_its_header(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    LogWriter(path, HEADER, on_error=_no_error).close()
    assert path.read_text() == HEADER + "\n"


def test_close_is_idempotent_and_later_rows_count_as_dropped(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=_no_error)
    log.append("1\t1")
    assert log.close() == log.close()
    log.append("2\t2")
    assert (log.counts().written, log.counts().dropped) == (1, 1)
    assert path.read_text() == f"{HEADER}\n1\t1\n"


def test_rows_of_other_threads_are_not_lost(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=_no_error)

    def fill() -> None:
        for _ in range(20_000):
            log.append("7\t7")

    threads = [threading.Thread(target=fill) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert log.close().written == 60_000
    assert path.read_bytes().count(b"7\t7\n") == 60_000


@pytest.mark.parametrize("room", [0, 1, 3, 4, 5, 10, 12, 13, 27, 28, 29])
def test_a_full_disk_leaves_whole_lines_and_is_told_once(tmp_path: Path, room: int) -> None:
    path = tmp_path / "log.tsv"
    told: list[str] = []
    disk = FullDisk(room)
    log = LogWriter(path, HEADER, on_error=told.append, write=disk)
    for i in range(5):
        log.append(f"{i}\t100")
    _wait(lambda: log.counts().dropped > 0)
    log.append("8\t100")
    log.append("9\t100")
    counts = log.close()
    whole = HEADER + "\n" + "".join(f"{i}\t100\n" for i in range(5))
    kept = whole[:room].rpartition("\n")
    assert path.read_text() == kept[0] + kept[1]
    assert counts.written + counts.dropped == 7
    assert counts.written == max(0, path.read_text().count("\n") - 1)
    assert len(told) == 1
    assert "No space left on device" in told[0]
    assert str(path) in told[0]


@pytest.mark.parametrize("room", [0, 2, 9])
def test_rows_are_written_again_once_there_is_room(tmp_path: Path, room: int) -> None:
    path = tmp_path / "log.tsv"
    told: list[str] = []
    disk = FullDisk(room)
    log = LogWriter(path, HEADER, on_error=told.append, write=disk)
    log.append("1\t100")
    _wait(lambda: log.counts().dropped == 1)
    disk.room = 10**9
    log.append("2\t100")
    counts = log.close()
    assert path.read_text() == f"{HEADER}\n2\t100\n"
    assert (counts.written, counts.dropped, len(told)) == (1, 1, 1)


def test_a_tear_that_cannot_be_cut_at_once_is_cut_before_the_next_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "log.tsv"
    truncate = os.ftruncate
    broken = threading.Event()
    broken.set()

    def failing(fd: int, size: int) -> None:
        if broken.is_set():
            raise OSError(errno.EIO, "Input/output error")
        truncate(fd, size)

    monkeypatch.setattr(os, "ftruncate", failing)
    disk = FullDisk(6)
    log = LogWriter(path, HEADER, on_error=lambda text: None, write=disk)
    log.append("1\t100")
    _wait(lambda: log.counts().dropped == 1)
    assert path.read_text() == "a\tb\n1\t"  # torn: the disk did not even take the cut
    disk.room = 10**9
    log.append("2\t100")
    _wait(lambda: log.counts().dropped == 2)  # nothing may follow a torn line
    broken.clear()
    log.append("3\t100")
    log.close()
    assert path.read_text() == "a\tb\n3\t100\n"


def test_a_disk_that_hangs_bounds_memory_and_close(tmp_path: Path) -> None:
    told: list[str] = []
    release = threading.Event()

    def hang(fd: int, data: bytes | memoryview) -> int:
        release.wait(30)
        return os.write(fd, data)

    log = LogWriter(tmp_path / "log.tsv", HEADER, on_error=told.append, max_rows=10, write=hang)
    begin = time.monotonic()
    for _ in range(25):
        log.append("1\t1")
    assert time.monotonic() - begin < 5  # append never waits for the disk
    assert log.counts().dropped == 15
    assert len(told) == 1
    assert "10 rows wait" in told[0]
    counts = log.close(timeout_s=0.3)
    assert counts.dropped == 25
    assert "did not take" in counts.error
    release.set()


def test_a_file_that_exists_is_never_touched(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    path.write_text("precious")
    with pytest.raises(RunDirectoryInUse, match="never overwritten"):
        LogWriter(path, HEADER, on_error=_no_error)
    assert path.read_text() == "precious"


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfig, match="cannot make the log"):
        LogWriter(tmp_path / "absent" / "log.tsv", HEADER, on_error=_no_error)


_CHILD = """
import signal, sys, time
from pathlib import Path
from slosched.telemetry.writer import LogWriter
log = LogWriter(Path(sys.argv[1]), "a\\tb", on_error=lambda text: print("TOLD", text, flush=True))
{body}
"""


def _child(path: Path, body: str) -> subprocess.Popen[str]:
    code = _CHILD.format(body=body)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.processes
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_log_is_complete_after_a_signal(tmp_path: Path, number: signal.Signals) -> None:
    """The writer's own atexit hook is enough where the program ends through the interpreter."""
    path = tmp_path / "log.tsv"
    body = """
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
signal.signal(signal.SIGINT, lambda *_: sys.exit(0))
for i in range(30000): log.append(f"{i}\\t{i}")
print("READY", flush=True)
time.sleep(60)
"""
    child = _child(path, body)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "READY\n"
        child.send_signal(number)
        assert child.wait(30) == 0
    finally:
        child.kill()
        child.communicate()
    assert path.read_text().splitlines()[1:] == [f"{i}\t{i}" for i in range(30000)]


@pytest.mark.processes
def test_a_killed_run_has_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    body = """
i = 0
while True:
    log.append(f"{i}\\t{i}")
    i += 1
    if i % 1000 == 0: time.sleep(0.001)
    if i == 100000: print("READY", flush=True)
    if i > 2000000: time.sleep(60)
"""
    child = _child(path, body)
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "READY\n"
        _wait(lambda: path.stat().st_size > 1000)
    finally:
        child.kill()
        child.communicate()
    lines = path.read_bytes().split(b"\n")
    assert all(line == b"%d\t%d" % (i, i) for i, line in enumerate(lines[1:-1]))


@pytest.mark.processes
def test_the_kernel_s_own_limit_on_file_size(tmp_path: Path) -> None:
    """A real partial write: the kernel takes what fits and then refuses."""
    path = tmp_path / "log.tsv"
    body = """
import resource
sys.dont_write_bytecode = True  # halves of it would be left behind
resource.setrlimit(resource.RLIMIT_FSIZE, (1003, resource.RLIM_INFINITY))
for i in range(300): log.append(f"{i}\\t100")
counts = log.close()
print(counts.written, counts.dropped)
"""
    child = _child(path, body)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 0
    told, counts = out.splitlines()
    assert "File too large" in told
    written, dropped = map(int, counts.split())
    expected = "".join(f"{i}\t100\n" for i in range(written))
    assert path.read_text() == HEADER + "\n" + expected
    assert written + dropped == 300
    assert 100 < written < 300


def test_rows_that_cannot_be_made_are_counted_and_the_log_goes_on(tmp_path: Path) -> None:
    def rows(records: list[str]) -> bytes:
        if "bad" in records:
            raise ValueError("no row")
        return "\n".join(records).encode()

    told: list[str] = []
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=told.append, rows=rows)
    log.append("bad")
    _wait(lambda: bool(told))
    log.append("1\t2")
    _wait(lambda: path.read_text() == f"{HEADER}\n1\t2\n")
    counts = log.close()
    assert (counts.written, counts.dropped) == (1, 1) and "no row" in counts.error
    assert len(told) == 1


def test_many_rows_are_made_by_the_caller_in_order(tmp_path: Path) -> None:
    made_in: set[str] = set()

    def rows(records: list[int]) -> bytes:
        made_in.add(threading.current_thread().name)
        return "\n".join(map(str, records)).encode()

    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=_no_error, rows=rows)
    for number in range(5000):
        log.append(number)
    assert log.close().written == 5000
    assert path.read_text() == "\n".join([HEADER, *map(str, range(5000)), ""])
    assert threading.current_thread().name in made_in


def test_a_log_begins_anew_at_its_bound_and_so_many_parts_stay(tmp_path: Path) -> None:
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=_no_error, rotation=Rotation(40_000, keep=2))
    rows = [f"{i:06}\t{i * i:012}" for i in range(12_000)]
    for begin in range(0, len(rows), 500):
        for row in rows[begin : begin + 500]:
            log.append(row)
        _wait(lambda: log.counts().written == begin + 500)  # noqa: B023
    assert log.close().dropped == 0
    parts = [path.with_name("log.tsv.2"), path.with_name("log.tsv.1"), path]
    assert sorted(tmp_path.iterdir()) == sorted(parts)
    kept: list[str] = []
    for part in parts:
        header, *lines = part.read_text().splitlines()
        assert header == HEADER and part.stat().st_size <= 40_000
        kept += lines
    assert kept == rows[-len(kept) :] and len(kept) > 2_500


def test_a_log_that_cannot_begin_anew_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    path = tmp_path / "log.tsv"
    log = LogWriter(path, HEADER, on_error=said.append, rotation=Rotation(100, keep=1))

    def refused(*names: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refused)
    rows = [f"{i}\t{i}" for i in range(100)]
    for row in rows:
        log.append(row)
        time.sleep(0.001)
    counts = log.close()
    assert (counts.written, counts.dropped) == (100, 0)
    assert path.read_text().splitlines() == [HEADER, *rows]
    assert len(said) <= 1 and all("begin anew" in text for text in said)
