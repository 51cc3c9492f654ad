"""Commands whose standard streams are closed or full, or that may open few files: words and a code."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from slosched.cli import output
from slosched.cli.guard import guarded
from slosched.descriptors import require_descriptors
from slosched.errors import OutOfResources
from slosched.transport.sockets import Dealer

pytestmark = pytest.mark.processes

_SWEEP = ("slo-exp-1", "resnet50_v2", "1", "poisson", "50", "10", "11", "1", "add", "1")


def command(
    *words: str, closed: tuple[int, ...] = (), full: tuple[int, ...] = (), files: int = 0
) -> subprocess.CompletedProcess[str]:
    """Run a command with standard streams closed or on a full disk, and at most `files` open."""

    def prepare() -> None:
        for number in full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), number)
        for number in closed:
            os.close(number)
        if files:
            resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))

    return subprocess.run(
        [sys.executable, "-m", "slosched", *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        preexec_fn=prepare,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_closed_streams_count_as_dev_null(closed: tuple[int, ...], tmp_path: Path) -> None:
    ended = command("simulate", "INFER5", *_SWEEP, "--out", str(tmp_path / "run"), closed=closed)
    assert ended.returncode == 0, ended.stderr
    assert (1 in closed) == (not ended.stdout) and (2 in closed) == (not ended.stderr)
    # Sockets, which would have got the numbers 0 to 2: libzmq aborted the process.
    ended = command("status", "127.0.0.1:1", closed=closed)
    assert ended.returncode == 5, ended.stderr


@pytest.mark.parametrize("words", [("--help",), ("--version",), ("simulate", "INFER5", *_SWEEP)])
def test_a_full_disk_behind_stdout_is_said(words: tuple[str, ...], tmp_path: Path) -> None:
    if words[0] == "simulate":
        words = (*words, "--out", str(tmp_path / "run"))
    ended = command(*words, full=(1,))
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert last.startswith("slosched: error: No space left on device; make room"), ended.stderr
    assert "internal" not in ended.stderr and "Traceback" not in ended.stderr


def test_a_full_disk_behind_stderr_ends_nothing(tmp_path: Path) -> None:
    ended = command("simulate", "INFER5", *_SWEEP, "--out", str(tmp_path / "run"), full=(2,))
    assert ended.returncode == 0 and "written to" in ended.stdout
    assert command("nonsense", full=(2,)).returncode == 2


@pytest.mark.parametrize("files", [8, 12, 16, 20])
@pytest.mark.parametrize("words", [("status", "127.0.0.1:1"), ("worker", "--device", "emulated")])
def test_few_open_files_are_said(words: tuple[str, ...], files: int) -> None:
    ended = command(*words, files=files)
    assert ended.returncode == 1
    assert ended.stderr == (
        "slosched: error: too many open files; allow this process more of them, as with `ulimit -n 4096`\n"
    )


def test_a_socket_without_room_is_an_error_and_no_abort() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    probe = os.dup(2)
    os.close(probe)
    resource.setrlimit(resource.RLIMIT_NOFILE, (probe + 4, hard))
    try:
        with pytest.raises(OutOfResources, match="too many open files"):
            Dealer("127.0.0.1:1")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    require_descriptors(20)
    Dealer("127.0.0.1:1").close()


def _raise(error: Exception) -> Callable[[], None]:
    def run() -> None:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.EMFILE, "x"), "too many open files"),
        (OSError(errno.ENFILE, "x"), "too many open files"),
        (OSError(errno.ENOSPC, "x", "/a/b"), "No space left on device (/a/b); make room"),
        (OSError(errno.EDQUOT, "x"), "quota"),
        (OSError(errno.EROFS, "x"), "Read-only file system; write to another disk"),
        (MemoryError(), "out of memory"),
    ],
)
def test_errors_of_the_system_are_no_bugs(
    error: Exception, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        guarded(_raise(error))
    assert ended.value.code == 1
    assert words in capsys.readouterr().err
    with pytest.raises(SystemExit) as ended:
        guarded(_raise(OSError(errno.EINVAL, "x")))
    assert ended.value.code == 70


def test_a_warning_that_cannot_be_written_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    abandoned: list[int] = []
    monkeypatch.setattr(typer, "echo", full)
    monkeypatch.setattr(output, "abandon", abandoned.append)
    output.warn("something")
    assert abandoned == [2]
