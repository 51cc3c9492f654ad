"""What commands write: whole or not at all, and never in place of a device, a pipe or a directory."""

from __future__ import annotations

import errno
import gzip
import os
import re
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

import slosched
from slosched.analysis.trace_file import TraceFile
from slosched.cli.app import app
from slosched.errors import InvalidConfig, OutOfResources, OutputExists
from slosched.output_files import check_folder, make_folder, new_file, write_file

_PACKAGE = Path(slosched.__file__).parent
_MIX = Path(__file__).parent.parent / "workloads" / "plan-example.toml"


def names(folder: Path) -> set[str]:
    return {entry.name for entry in folder.iterdir()}


def test_a_file_is_made_with_its_folders_and_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / ("n" * 255)
    write_file(path, b"first")
    path.chmod(0o640)
    with new_file(path) as file:
        file.write(b"sec")
        assert path.read_bytes() == b"first"
        file.write(b"ond")
    assert path.read_bytes() == b"second" and names(path.parent) == {path.name}
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    with pytest.raises(OutputExists, match="not overwritten"):
        write_file(path, b"third", replacing=False)
    write_file(tmp_path / "new", b"1", replacing=False, durable=True)
    assert (tmp_path / "new").read_bytes() == b"1" and path.read_bytes() == b"second"


def test_of_two_that_make_a_file_only_one_does(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with (
        pytest.raises(OutputExists, match="not overwritten"),
        new_file(path, replacing=False) as file,
    ):
        file.write(b"late")
        path.write_bytes(b"early")
    assert path.read_bytes() == b"early" and names(tmp_path) == {"f"}


def test_without_links_a_new_file_is_claimed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", refused)
    write_file(tmp_path / "f", b"1", replacing=False)
    assert (tmp_path / "f").read_bytes() == b"1" and names(tmp_path) == {"f"}


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_what_an_error_leaves_is_taken_away(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "f"
    path.write_bytes(b"old")
    expected: type[BaseException] = (
        OutOfResources if isinstance(error, OSError) else KeyboardInterrupt
    )
    with pytest.raises(expected), new_file(path) as file:
        file.write(b"half")
        raise error
    assert path.read_bytes() == b"old" and names(tmp_path) == {"f"}


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _directory(path: Path) -> None:
    path.mkdir()


def _link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/full")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(path))


def _loop(path: Path) -> None:
    path.symlink_to(path)


@pytest.mark.parametrize("make", [_fifo, _directory, _link_to_a_device, _socket, _loop])
def test_only_regular_files_are_replaced(tmp_path: Path, make: Callable[[Path], None]) -> None:
    path = tmp_path / "x"
    make(path)
    before = os.lstat(path)
    for write in (lambda: write_file(path, b"1"), lambda: TraceFile(path, {}).__enter__()):
        with pytest.raises(InvalidConfig, match=f"cannot write {path}"):
            write()
    assert os.lstat(path).st_ino == before.st_ino and names(tmp_path) == {"x"}


@pytest.mark.parametrize("name", ["/dev/null", "/dev/full", "/dev/tty"])
def test_devices_are_left_alone(name: str) -> None:
    with pytest.raises(InvalidConfig, match=r"is a device, and only a regular file is replaced"):
        write_file(Path(name), b"1")
    assert Path(name).is_char_device()


def test_a_link_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    target = tmp_path / "real" / "file"
    link = tmp_path / "link"
    link.symlink_to("real/file")
    for data in (b"made", b"replaced"):
        write_file(link, data)
        assert link.is_symlink() and target.read_bytes() == data
    assert names(tmp_path / "real") == {"file"}


def test_the_name_of_stdout_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidConfig, match="'-' is not taken"):
        write_file(Path("-"), b"1")
    assert not names(tmp_path)


_SWEEP = ("slo-exp-1", "resnet50_v2", "1", "poisson", "50", "10", "11", "1", "add", "1")


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    result = CliRunner().invoke(app, ["simulate", "INFER5", *_SWEEP, "--out", str(out)])
    assert result.exit_code == 0, result.output
    return out


_COMMANDS = {
    "trace": ("trace", "RUN", "--out"),
    "report": ("report", "RUN", "--force", "--out"),
    "fig7": ("plot", "fig7", "RUN", "--out"),
    "simulate": ("simulate", "INFER5", *_SWEEP, "--out"),
    "compare": ("compare", "INFER5,FIFO", *_SWEEP, "--seeds", "1", "--out"),
    "plan": (
        "plan",
        "--models",
        str(_MIX),
        "--rate",
        "500",
        "--slo",
        "50ms",
        "--gpus",
        "1..2",
        "--duration",
        "2s",
        "--out",
    ),
    "azure-trace": ("azure-trace", "--rows", "5", "--minutes", "5", "--out"),
    "profile": ("profile", "resnet50", "--device", "cpu", "--out"),
    "demo": ("demo", "--seconds", "6", "--out"),
}


@pytest.mark.parametrize("command", _COMMANDS)
@pytest.mark.parametrize("out", ["-", "pipe"])
def test_every_command_refuses_what_is_no_place_for_its_output(
    command: str, out: str, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    words = [str(run_dir) if word == "RUN" else word for word in _COMMANDS[command]]
    result = CliRunner().invoke(app, [*words, out])
    assert result.exit_code in (2, 7), result.output
    assert out in result.output and result.output.count("\n") <= 2, result.output
    assert names(tmp_path) == {"pipe"} and stat.S_ISFIFO(Path("pipe").stat().st_mode)


def test_a_packed_trace_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "trace.json.gz"
    with TraceFile(path, {"a": 1}) as file:
        file.add("{}")
    whole = path.read_bytes()
    assert b'"traceEvents":[\n{}\n]}' in gzip.decompress(whole)
    with pytest.raises(OutOfResources, match="No space left"), TraceFile(path, {"a": 1}) as file:

        def full(_: bytes) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(file, "_write", full)
        file.add("{}")
    assert path.read_bytes() == whole and names(tmp_path) == {path.name}


def test_nothing_else_writes_or_renames_files() -> None:
    """Logs and shared state lie in directories of their own; everything else goes through output_files."""
    pattern = re.compile(
        r"\.(write_text|write_bytes|replace\(self\._path|rename)\(|os\.(rename|replace)\(|savefig\(paths"
    )
    allowed = {"output_files.py", "traceback_file.py", "zygote.py"}
    found = {
        path.name
        for path in _PACKAGE.rglob("*.py")
        if pattern.search(path.read_text()) and path.name not in allowed
        if path.parent != _PACKAGE / "functions" / "state"
    }
    assert not found


def test_many_writers_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "f"
    threads = [
        threading.Thread(target=write_file, args=(path, bytes([65 + n]) * 100_000))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    data = path.read_bytes()
    assert len(data) == 100_000 and len(set(data)) == 1 and names(tmp_path) == {"f"}


def test_a_folder_that_cannot_be_written_is_told_before_long_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "a" / "b")
    make_folder(tmp_path / "a" / "b")
    check_folder(tmp_path / "not" / "there" / "yet")
    (tmp_path / "file").write_text("kept")
    for wrong in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/none"), Path("-")):
        with pytest.raises(InvalidConfig):
            make_folder(wrong)
    assert (tmp_path / "file").read_text() == "kept"
    # A superuser may write everywhere, so a read-only folder is one that the system calls so.
    monkeypatch.setattr(os, "access", lambda path, _mode: path != tmp_path / "a")
    with pytest.raises(InvalidConfig, match="cannot be written"):
        check_folder(tmp_path / "a" / "new")
