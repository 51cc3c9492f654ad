"""The process that children are forked from: it runs one thread, and none of their code.

It reaps children and says how each ended, ends what they left behind (it is the subreaper of what they fork),
and passes on what they print: bounded, since a child may print for ever.
It ends when the other end of its socket is closed, and takes everything that it started with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import fcntl
import io
import os
import select
import signal
import socket
import sys
import traceback
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from slosched.child_processes import end_with_parent
from slosched.clock import now_ns
from slosched.daemon.backends.broods import packets
from slosched.units import NS_PER_S

_PR_SET_CHILD_SUBREAPER = 36
_PIPE_BYTES = 1 << 20
#: Limits of one child's output: characters per line, and lines per second. The rest is dropped and counted.
_LINE_AT_MOST = 400
_LINES_PER_S = 20
#: Children that end are killed first when memory runs out (0: like any process, 1000: always first).
_OOM_SCORE = "800"
#: Generations of processes left behind that are ended at once; what remains goes with the next child's end.
_ROUNDS = 64

Serve = Callable[[socket.socket], None]


def prctl(option: int, value: int) -> None:
    """Linux's prctl; elsewhere nothing happens."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def become_subreaper() -> None:
    """Become the parent of every descendant whose parent ends. Linux only."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


class Lines:
    """What a child prints, cut into lines that are safe to show: bounded in length and in number."""

    def __init__(self) -> None:
        self._rest = b""
        self._second = -1
        self._lines_passed = self._dropped = 0

    def feed(self, data: bytes, *, now_ns: int, last: bool = False) -> list[str]:
        """The lines that `data` completes; `last`: and what is left."""
        if not data and not last:
            return []
        pieces = (self._rest + data).replace(b"\r", b"\n").split(b"\n")
        self._rest = b"" if last else pieces.pop()[: 4 * _LINE_AT_MOST]
        lines: list[str] = []
        if now_ns // NS_PER_S != self._second:
            self._second, self._lines_passed = now_ns // NS_PER_S, 0
            lines += self._dropped_words()
        for place, piece in enumerate(pieces):
            if self._lines_passed >= _LINES_PER_S:
                self._dropped += sum(1 for each in pieces[place:] if each)
                break
            if text := plain(piece.decode(errors="replace")):
                lines.append(text)
                self._lines_passed += 1
        if last:
            lines += self._dropped_words()
        return lines

    def _dropped_words(self) -> list[str]:
        dropped, self._dropped = self._dropped, 0
        return [f"({dropped:,} more lines were dropped)"] if dropped else []


def plain(text: str) -> str:
    """`text` without control characters, cut to a line's length."""
    kept = "".join(
        c if unicodedata.category(c)[0] != "C" else " " for c in text[: 2 * _LINE_AT_MOST]
    )
    return kept.strip()[:_LINE_AT_MOST]


def end_in_words(status: int) -> str:
    """A wait status: "exit code 3", "signal 11 (Segmentation fault)"."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        return f"signal {number} ({signal.strsignal(number) or 'unknown'})"
    return f"exit code {os.WEXITSTATUS(status)}"


@dataclass(slots=True)
class _Child:
    number: int
    pid: int
    output: int  # the read end of its standard output and error
    lines: Lines = field(default_factory=Lines)


class Zygote:
    """Serves the worker behind `end`; `serve` is what a child does with its own socket."""

    def __init__(self, end: socket.socket, serve: Serve) -> None:
        self._end, self._serve = end, serve
        self._children: dict[int, _Child] = {}  # by number
        self._by_output: dict[int, _Child] = {}
        self._poll = select.poll()
        self._woken, self._waker = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, _ignore)
        signal.set_wakeup_fd(self._waker, warn_on_full_buffer=False)
        become_subreaper()
        for fd in (self._end.fileno(), self._woken):
            self._poll.register(fd, select.POLLIN)

    def run(self) -> None:
        """Serve until the worker is gone; then end every child."""
        try:
            while True:
                for fd, _ in self._poll.poll(1000):
                    if fd == self._end.fileno() and not self._hear():
                        return
                    if fd in self._by_output:
                        self._read(self._by_output[fd])
                    elif fd == self._woken:
                        with contextlib.suppress(BlockingIOError):
                            os.read(self._woken, 4096)
                self._reap()
        finally:
            for child in self._children.values():
                _kill_group(child.pid)
            self._kill_strays(())

    def _hear(self) -> bool:
        """One order of the worker; False when there is no worker any more."""
        try:
            got = packets.receive(self._end)
        except EOFError:
            return False
        if got is None:
            return True
        packet, fds = got
        message = packets.to_zygote.decode(packet)
        if isinstance(message, packets.Spawn):
            self._spawn(message.number, fds[0])
        elif isinstance(message, packets.Kill) and message.number in self._children:
            _kill_group(self._children[message.number].pid)
        packets.close_all(fds)
        return True

    def _spawn(self, number: int, fd: int) -> None:
        parent = os.getpid()
        pipe: tuple[int, ...] = ()
        try:
            output, far = pipe = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):
                fcntl.fcntl(far, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
            pid = os.fork()
        except OSError as error:  # the host is out of processes or descriptors: the others go on
            packets.close_all(pipe)
            self._tell(packets.Ended(number, f"it could not be started: {error}"))
            return
        if pid == 0:
            code = 70
            try:
                self._become_child(parent, fd, far)
                code = _run(self._serve, socket.socket(fileno=fd))
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(far)
        os.set_blocking(output, False)
        child = _Child(number, pid, output)
        self._children[number] = self._by_output[output] = child
        self._poll.register(output, select.POLLIN)

    def _become_child(self, parent: int, fd: int, output: int) -> None:
        end_with_parent(signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)
        with contextlib.suppress(OSError):
            os.setsid()
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        os.dup2(output, 1)
        os.dup2(output, 2)
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(line_buffering=True)  # what it says last must not be lost
        faulthandler.enable()  # a crash says where, in its last lines
        # The worker's socket and the other children's outputs: a child has no business with them.
        for each in (self._end.fileno(), self._woken, self._waker, output, *self._by_output):
            os.close(each)
        with contextlib.suppress(OSError):
            Path("/proc/self/oom_score_adj").write_text(_OOM_SCORE)

    # -------------------------------------------------------------------------------- ends

    def _reap(self) -> None:
        by_pid = {child.pid: child for child in self._children.values()}
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if found is None:
                return
            child = by_pid.get(found.si_pid)
            if child is not None:  # before its number can be another's
                _kill_group(child.pid)
            _, status = os.waitpid(found.si_pid, 0)
            if child is not None:
                self._gone(child, status)

    def _gone(self, child: _Child, status: int) -> None:
        self._kill_strays({each.pid for each in self._children.values()})
        self._read(child, last=True)
        del self._children[child.number], self._by_output[child.output]
        self._poll.unregister(child.output)
        os.close(child.output)
        self._tell(packets.Ended(child.number, end_in_words(status)))

    def _kill_strays(self, ours: Any) -> None:
        """End what children forked into sessions of its own: it is ours since its parent ended."""
        for _ in range(_ROUNDS):  # each that ends may leave children of its own to us
            strays = set(_own_children()) - set(ours)
            if not strays:
                return
            for pid in strays:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGSTOP)  # so that none starts another while some are ended
            for pid in strays:
                _kill_group(pid)
            for pid in strays:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(pid, 0)

    # ------------------------------------------------------------------------------ output

    def _read(self, child: _Child, *, last: bool = False) -> None:
        data = b""
        for _ in range(4):
            try:
                piece = os.read(child.output, _PIPE_BYTES)
            except BlockingIOError:
                break
            if not piece:
                if not last:  # it closed both; its end is seen otherwise
                    self._poll.modify(child.output, 0)
                break
            data += piece
        for text in child.lines.feed(data, now_ns=now_ns(), last=last):
            self._tell(packets.Said(child.number, text))

    def _tell(self, message: packets.FromZygote) -> None:
        with contextlib.suppress(OSError):  # the worker is gone: the loop will see it
            packets.send(self._end, packets.encode(message))


def _run(serve: Serve, end: socket.socket) -> int:
    """What the child exits with."""
    try:
        serve(end)
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else int(exit.code is not None)
        if exit.code is not None and not isinstance(exit.code, int):
            sys.stderr.write(f"{exit.code}\n")
    except KeyboardInterrupt:  # of its own: Ctrl-C does not reach this session
        sys.stderr.write("KeyboardInterrupt\n")
        code = 128 + signal.SIGINT
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    return code & 0xFF


def _kill_group(pid: int) -> None:
    for kill in (os.killpg, os.kill):  # it may not have become the leader of its group yet
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)


def _own_children() -> list[int]:
    try:
        text = Path(f"/proc/self/task/{os.getpid()}/children").read_text()
    except OSError:  # a kernel that does not list them
        return []
    return [int(word) for word in text.split()]


def _ignore(number: int, frame: FrameType | None) -> None:
    pass
