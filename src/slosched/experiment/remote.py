"""The far end of an experiment: what is started on each host, over SSH or (--engine local) here.

    python -m slosched.experiment.remote           with one order, a line of JSON, on standard input

- run: `slosched ARGUMENTS` until it ends. Standard input is the lifeline: when it closes, or brings nothing for
  `silence_s`, the command is told to end, and what is left of it `stop_s` later is killed. So nothing stays
  behind a lost connection, a killed client or a machine that went to sleep. Exits with the command's code.
- pack: writes a folder to standard output, as a compressed tar behind the line `PACK`.
- remove: removes a folder that an experiment made.

The process makes itself the reaper of its descendants (Linux): also those that left the command's process group
are killed before it exits, so that its own end says that all of it has ended.
"""

from __future__ import annotations

import ctypes
import gzip
import os
import select
import shutil
import signal
import subprocess
import sys
import tarfile
from contextlib import suppress
from pathlib import Path
from types import FrameType

import msgspec

from slosched import child_processes
from slosched.clock import now_ns
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import NS_PER_S

#: Folders of experiments begin so; no other is removed.
FOLDER_PREFIX = "slosched-experiment-"
#: What stands before a packed folder: a shell's start-up files may print before it.
PACK = b"SLOSCHED PACK\n"
_ORDER_WITHIN_S = 60.0
_ORDER_BYTES = 1 << 20
#: All that is left is killed within this.
_KILL_WITHIN_S = 5.0
_PR_SET_CHILD_SUBREAPER = 36
_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class Order(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What to do; exactly one of `run`, `pack` and `remove` is given.

    `folder` (made if it is missing; "": none) is where the command runs; a leading ~ is the home directory.
    """

    run: list[str] = []
    pack: str = ""
    remove: str = ""
    folder: str = ""
    stop_s: float = 8.0
    silence_s: float = 30.0

    def line(self) -> bytes:
        return msgspec.json.encode(self) + b"\n"


def main() -> int:
    try:
        order = _read_order()
        if order.run:
            return _run(order)
        if order.pack:
            _pack(_folder(order.pack))
        elif order.remove:
            _remove(_folder(order.remove))
        return 0
    except BrokenPipeError:
        return 1
    except (OSError, SloschedError, msgspec.MsgspecError, tarfile.TarError) as error:
        with suppress(OSError):
            os.write(2, f"slosched: error: {' '.join(str(error).split())}\n".encode())
        return 1


def _read_order() -> Order:
    """The first line of standard input; what follows stays there. Raises InvalidConfig if none comes."""
    line = b""
    deadline_ns = now_ns() + int(_ORDER_WITHIN_S * NS_PER_S)
    while not line.endswith(b"\n"):
        left_s = (deadline_ns - now_ns()) / NS_PER_S
        if left_s <= 0 or len(line) > _ORDER_BYTES or not select.select([0], [], [], left_s)[0]:
            raise InvalidConfig("no order came on standard input; `slosched experiment` sends one")
        byte = os.read(0, 1)
        if not byte:
            raise InvalidConfig("standard input closed before an order came")
        line += byte
    return msgspec.json.decode(line, type=Order)


def _folder(text: str) -> Path:
    return Path(text).expanduser()


# ----------------------------------------------------------------------------------------- run


def _run(order: Order) -> int:
    if order.folder:
        folder = _folder(order.folder)
        folder.mkdir(parents=True, exist_ok=True)
        os.chdir(folder)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    wake, woken = os.pipe()
    for end in (wake, woken):
        os.set_blocking(end, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    asked: list[int] = []

    def on_signal(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGCHLD:
            asked.append(number)

    for number in (*_SIGNALS, signal.SIGCHLD):
        signal.signal(number, on_signal)
    command = [sys.executable, "-m", "slosched.cli.child", str(os.getpid()), *order.run]
    process = child_processes.start(command, stdout=1, stderr=2)
    try:
        _watch(process, wake, order.silence_s, asked)
    finally:
        child_processes.end(process, within_s=order.stop_s)
        _kill_descendants()
    code = process.returncode
    return code if code is not None and code >= 0 else 128 - (code or -signal.SIGKILL)


def _watch(process: subprocess.Popen[bytes], wake: int, silence_s: float, asked: list[int]) -> None:
    """Return when the process has ended, a signal came, or the lifeline closed or fell silent."""
    heard_ns = now_ns()
    while process.poll() is None and not asked:
        left_s = silence_s - (now_ns() - heard_ns) / NS_PER_S
        if left_s <= 0:
            _note(f"nothing came for {silence_s:.0f} s: the connection is taken for lost")
            return
        readable, _, _ = select.select([0, wake], [], [], left_s)
        if wake in readable:
            with suppress(BlockingIOError):
                os.read(wake, 4096)
        if 0 in readable:
            if not os.read(0, 4096):
                return
            heard_ns = now_ns()


def _note(text: str) -> None:
    with suppress(OSError):
        os.write(2, f"slosched: {text}\n".encode())


def _kill_descendants() -> None:
    """Kill and reap what the command left behind. Each that ends gives its children to this process."""
    deadline_ns = now_ns() + int(_KILL_WITHIN_S * NS_PER_S)
    while now_ns() < deadline_ns:
        left = children_of(os.getpid())
        if not left:
            return
        for pid in left:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        select.select([], [], [], 0.01)


def children_of(parent: int) -> list[int]:
    """The processes whose parent is `parent`, from /proc; none where there is no /proc."""
    found = []
    with suppress(OSError):
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with suppress(OSError, ValueError, IndexError):
                    # The name, in parentheses, may hold anything; state and parent follow it.
                    rest = (entry / "stat").read_text(errors="replace").rpartition(")")[2]
                    if int(rest.split()[1]) == parent:
                        found.append(int(entry.name))
    return found


# -------------------------------------------------------------------------------- pack and remove


def _pack(folder: Path) -> None:
    out = sys.stdout.buffer
    out.write(PACK)
    with (
        gzip.GzipFile(fileobj=out, mode="wb", compresslevel=1) as packed,
        # What is linked twice is sent twice: a link within the folder would be none of its files.
        tarfile.open(fileobj=packed, mode="w|", dereference=True) as tar,
    ):
        if folder.is_dir():
            for path in sorted(folder.rglob("*")):
                if path.is_file() and not path.is_symlink():
                    tar.add(path, path.relative_to(folder).as_posix(), recursive=False)
    out.flush()


def _remove(folder: Path) -> None:
    if not folder.name.startswith(FOLDER_PREFIX):
        raise InvalidConfig(f"{folder} is not a folder that an experiment made; it is not removed")
    if folder.is_symlink():
        raise InvalidConfig(f"{folder} is a link; it is not removed")
    if folder.is_dir():
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
