"""Every real GPU's worker is a process of its own: a parent that starts them and looks after them.

A process that starts GPU work at exact times can hold one busy Python thread, so n GPUs are n
processes; and whatever ends one, a lost GPU, a crash in a model's code, a bug, ends that one alone. The
parent only waits: it passes on what the children say and forwards the signal that ends them. A child that
ended by itself is started again (blame.py says when), on the same port, cores and device. A model that
ended its worker twice is put aside: children started from then on do not offer it.
"""

from __future__ import annotations

import os
import select
import selectors
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace

import msgspec

from slosched.child_processes import end, end_with_parent, on_signals, ready_port, start
from slosched.clock import now_ns
from slosched.config import WorkerConfig
from slosched.daemon.backends.devices import count_gpus
from slosched.daemon.backends.opening import device_kind
from slosched.daemon.blackbox import VARIABLE, Blackbox
from slosched.daemon.blame import (
    ENDS_ALLOWED,
    Blame,
    RestartRule,
    can_be_mended,
    culprit,
    how_it_ended,
    out_of_memory_kills,
    was_told_to_end,
)
from slosched.daemon.housekeeping import check_core
from slosched.daemon.traceback_file import INTERNAL_ERROR, keep_traceback
from slosched.errors import (
    AddressInUse,
    DeviceLost,
    InvalidConfig,
    MissingPackage,
    SloschedError,
)
from slosched.units import NS_PER_S, format_duration

__all__ = ["RestartRule", "child_argv", "run_workers", "supervise"]

#: Children drain for at most 2 s; what is left after this is killed.
_END_WITHIN_NS = 4 * NS_PER_S
_LOOK_S = 0.2
_ERROR = "error: "
_READ_BYTES = 65536
#: Limit of reads from the pipe of a child that has ended.
_LAST_READS = 64
_ERRORS = {
    kind.exit_code: kind for kind in (InvalidConfig, MissingPackage, AddressInUse, DeviceLost)
}


@dataclass(slots=True)
class _Child:
    config: WorkerConfig
    process: subprocess.Popen[bytes]
    box: Blackbox
    kills: int  # for want of memory, counted when it was started
    restarts: list[int] = field(default_factory=list)  # when it ended by itself lately
    restart_ns: int | None = None  # it has ended, and is started again then
    partial: bytes = b""
    error: str = ""  # what it said was wrong, last
    ready: bool = False
    was_ready: bool = False  # in some life
    ended: bool = False

    @property
    def name(self) -> str:
        return f"worker {self.config.device} on port {self.config.port}"


def child_argv(config: WorkerConfig) -> list[str]:
    """The command of the child that serves `config`: this module, with the config as JSON."""
    try:
        text = msgspec.json.encode(config).decode()
    except UnicodeEncodeError:
        raise InvalidConfig(
            "a path in the worker's configuration is not UTF-8, so it cannot be passed to its processes; "
            "move the file to a directory whose name is"
        ) from None
    return [sys.executable, "-m", "slosched.daemon.supervisor", text]


def run_workers(
    config: WorkerConfig,
    argv_of_child: Callable[[WorkerConfig], Sequence[str]] = child_argv,
    *,
    announce: Callable[[str], None],
    gpus: int | None = None,
    stop: threading.Event | None = None,
) -> int:
    """Serve `config` on this host's GPUs until SIGINT, SIGTERM or `stop`; returns the exit code.

    Device auto or cuda: a child per GPU, on `config.port`, +1, ... (port 0: any ports), and on the cores
    `config.cpu`, +1, ... if that is given. `gpus` says how many; None means `config.gpus` if that is above
    1, else all. Device cuda:N: one child. All other devices, and auto without a GPU, which takes the CPU,
    are served in this process. Raises what run_worker and supervise raise, and InvalidConfig if
    there are fewer GPUs, or cores, than were asked for. Returns 1 if each of several children died by itself.
    """
    kind = device_kind(config.device)
    there = count_gpus() if config.device in ("auto", "cuda") else 0
    wanted = gpus if gpus is not None else (config.gpus if config.gpus > 1 else max(there, 1))
    if not kind.process_each or (config.device == "auto" and not there and wanted == 1):
        from slosched.daemon.worker import run_worker

        return run_worker(replace(config, gpus=wanted), announce=announce, stop=stop)
    if wanted > max(there, 1):
        found = max(there, int(":" in config.device))  # cuda:N is one
        raise InvalidConfig(
            f"{wanted} GPUs were asked for and {found} found; take fewer "
            "--gpus, or --device emulated"
        )
    if wanted == 1:
        check_core(config.cpu)
        configs = [replace(config, gpus=1)]
        return supervise(configs, argv_of_child, announce=announce, stop=stop, alone=True)
    configs = [
        replace(
            config,
            gpus=1,
            device=f"cuda:{i}",
            port=config.port + i if config.port else 0,
            cpu=config.cpu + i if config.cpu >= 0 else -1,
            name=f"{config.name}-{i}" if config.name else "",
            slots=config.slots or max(1, len(os.sched_getaffinity(0)) // wanted),
        )
        for i in range(wanted)
    ]
    for each in configs:
        check_core(each.cpu)
    return supervise(configs, argv_of_child, announce=announce, stop=stop)


def supervise(
    configs: Sequence[WorkerConfig],
    argv_of_child: Callable[[WorkerConfig], Sequence[str]] = child_argv,
    *,
    announce: Callable[[str], None],
    stop: threading.Event | None = None,
    restarts: RestartRule | None = None,
    alone: bool = False,
) -> int:
    """Start a child for each config and wait; see run_workers. All have ended when it returns.

    A child that ends by itself is started again by the rule `restarts`, unless that cannot help: its
    options are wrong, a package lacks, its port is taken. With `alone` there is one config, its child's
    lines are passed on as they are, and an end for good is raised as the error that the child said.
    """
    stopping = stop or threading.Event()
    with _signals_set(stopping), selectors.DefaultSelector() as selector:
        supervisor = _Supervisor(argv_of_child, restarts or RestartRule(), announce, selector)
        supervisor.alone = alone
        try:
            for each in configs:
                supervisor.start(each)
            while not stopping.is_set() and not supervisor.all_ended:
                supervisor.turn()
            died = supervisor.all_ended
        finally:
            supervisor.end()
    if not died or stopping.is_set():
        return 0
    return supervisor.verdict()


class _Supervisor:
    """The children of one `supervise`, and what is known of those that ended."""

    def __init__(
        self,
        argv_of_child: Callable[[WorkerConfig], Sequence[str]],
        rule: RestartRule,
        announce: Callable[[str], None],
        selector: selectors.BaseSelector,
    ) -> None:
        self._argv_of_child, self._rule = argv_of_child, rule
        self._announce, self._selector = announce, selector
        self._blame = Blame()
        self._said_ready = False
        self._children: list[_Child] = []
        self.alone = False

    @property
    def all_ended(self) -> bool:
        return all(child.ended for child in self._children)

    def start(self, config: WorkerConfig) -> None:
        """Raises SloschedError if it cannot be started."""
        kills = out_of_memory_kills()
        child = _Child(config, *_start(self._argv_of_child(config)), kills)
        self._children.append(child)
        self._listen(child)

    def turn(self) -> None:
        """Pass on what was said, see who has ended, start again who is due; waits 0.2 s at most."""
        self._pass_on()
        for child in self._children:
            if not child.ended and child.restart_ns is None and child.process.poll() is not None:
                self._read_rest(child)
                self._has_ended(child, child.process.returncode)
            if child.restart_ns is not None and now_ns() >= child.restart_ns:
                self._start_again(child)
        if not self.alone:
            self._say_when_ready()

    def verdict(self) -> int:
        """All ended by themselves: the exit code. With `alone`, raises what the child said, if it did."""
        child = self._children[0]
        code = child.process.returncode
        if not self.alone or code == 0:
            return int(code != 0)
        kind = _ERRORS.get(code, SloschedError)
        raise kind(child.error or f"{child.name} ended with {how_it_ended(code)}")

    # ------------------------------------------------------------------------ ends and restarts

    def _has_ended(self, child: _Child, code: int) -> None:
        work = child.box.read()
        if was_told_to_end(code, work):
            self._for_good(child, code, "")
            return
        if not can_be_mended(code, work, ever_ready=child.was_ready):
            self._for_good(child, code, "")
            return
        what = (
            "lost its device"
            if code == DeviceLost.exit_code
            else f"ended with {how_it_ended(code)}"
        )
        if child.error:
            what += f" ({child.error})"
        starved = 0 <= child.kills < out_of_memory_kills()
        name = culprit(code, work, out_of_memory=starved)
        if name and self._blame.note(name, code):
            ends = self._blame.count(name)
            aside = "; it is put aside" if ends >= ENDS_ALLOWED else ""
            child.restart_ns = now_ns()
            self._announce(
                f"{child.name} {what} while the model {name!r} was at work ({ends} of at most "
                f"{ENDS_ALLOWED} times{aside}) and starts again at once"
            )
            return
        now = now_ns()
        pause_ns = self._rule.pause_ns(child.restarts, now)
        most = f"{self._rule.at_most} times in {format_duration(self._rule.within_ns)}"
        if pause_ns is None:
            self._for_good(child, code, f" (it {what}; it was started again {most})")
            return
        child.restart_ns = now + pause_ns
        when = f"in {format_duration(pause_ns)}" if pause_ns else "at once"
        self._announce(
            f"{child.name} {what} and starts again {when} ({len(child.restarts)} of at most {most})"
        )

    def _for_good(self, child: _Child, code: int, why: str) -> None:
        child.ended = True
        if self.alone and code != 0 and not why:
            return  # `verdict` says it
        left = sum(not other.ended for other in self._children)
        others = f"; {left} of {len(self._children)} go on" if not self.alone else ""
        self._announce(f"{child.name} ended with {how_it_ended(code)}{why}{others}")

    def _start_again(self, child: _Child) -> None:
        self._stop_listening(child)
        child.box.close()
        child.config = replace(child.config, put_aside=self._blame.put_aside())
        child.kills = out_of_memory_kills()
        child.process, child.box = _start(self._argv_of_child(child.config))
        child.restart_ns, child.ready, child.partial, child.error = None, False, b"", ""
        self._listen(child)

    # ------------------------------------------------------------------------ what they say

    def _listen(self, child: _Child) -> None:
        assert child.process.stdout is not None
        self._selector.register(child.process.stdout, selectors.EVENT_READ, child)

    def _stop_listening(self, child: _Child) -> None:
        """To a process that has ended."""
        output = child.process.stdout
        assert output is not None
        with suppress(KeyError):  # it is off already once it was read to its end
            self._selector.unregister(output)
        output.close()

    def _pass_on(self) -> None:
        for key, _ in self._selector.select(_LOOK_S):
            if not self._read(key.data, key.fd):
                self._selector.unregister(key.fileobj)

    def _read_rest(self, child: _Child) -> None:
        """What an ended child said last. Its own children may hold the pipe, so no end is waited for."""
        output = child.process.stdout
        if output is None or output not in self._selector.get_map():
            return  # it was read to its end
        for _ in range(_LAST_READS):
            if not select.select([output], [], [], 0)[0] or not self._read(child, output.fileno()):
                return

    def _read(self, child: _Child, fd: int) -> bool:
        """False at the end of what the child says."""
        data = os.read(fd, _READ_BYTES)
        *lines, child.partial = (child.partial + data).split(b"\n")
        if len(child.partial) > _READ_BYTES:  # not a line that a worker prints
            lines, child.partial = [*lines, child.partial], b""
        for line in lines:
            self._take_line(child, line.decode(errors="replace"))
        return bool(data)

    def _take_line(self, child: _Child, line: str) -> None:
        port = ready_port(line)
        if port is not None:
            child.ready = child.was_ready = True
            child.config = replace(child.config, port=port)
        elif line.startswith(_ERROR):
            child.error = line.removeprefix(_ERROR)
            if self.alone:
                return  # it is said with the end
        self._announce(line if self.alone else f"{child.config.device}: {line}")

    def _say_when_ready(self) -> None:
        """One line, once, when every child that lives is ready."""
        alive = [child for child in self._children if not child.ended]
        if self._said_ready or not alive or not all(child.ready for child in alive):
            return
        self._said_ready = True
        ports = ", ".join(str(child.config.port) for child in alive)
        self._announce(
            f"slosched: {len(alive)} of {len(self._children)} workers ready on ports {ports}"
        )

    # ------------------------------------------------------------------------------ the end

    def end(self) -> None:
        """End every child: SIGTERM, at most 4 s of draining, SIGKILL."""
        children = self._children
        for child in children:
            if child.process.poll() is None:
                child.process.terminate()
        give_up_ns = now_ns() + _END_WITHIN_NS
        while any(child.process.poll() is None for child in children) and now_ns() < give_up_ns:
            self._pass_on()  # also keeps their pipes from filling up
            if not self._selector.get_map():
                break
        for child in children:
            left_s = max(0.1, (give_up_ns - now_ns()) / NS_PER_S)
            if not end(child.process, within_s=left_s, ask=False):
                self._announce(f"{child.name} did not end in time and was killed")
            if child.process.stdout is not None:
                child.process.stdout.close()
            child.box.close()


def _start(argv: Sequence[str]) -> tuple[subprocess.Popen[bytes], Blackbox]:
    """The child and the page into which it writes what it does."""
    box: Blackbox | None = None
    try:
        box = Blackbox.create()
        process = start(
            argv,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[box.fd],
            env={**os.environ, VARIABLE: str(box.fd)},
        )
    except OSError as error:
        if box is not None:
            box.close()
        raise SloschedError(f"cannot start {argv[0]}: {error.strerror}") from None
    return process, box


@contextmanager
def _signals_set(event: threading.Event) -> Iterator[None]:
    """SIGINT and SIGTERM set `event`; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with on_signals((signal.SIGINT, signal.SIGTERM), lambda number: event.set()):
        yield


def _child_main(argv: Sequence[str]) -> int:
    """What `child_argv` starts. Lines go to stdout, which is a pipe to the parent."""
    from slosched.daemon.worker import run_worker

    end_with_parent(signal.SIGTERM)
    blackbox = Blackbox.inherited()
    config = msgspec.json.decode(argv[0], type=WorkerConfig)

    def say(line: str) -> None:
        with suppress(OSError):  # the parent is gone, and the kernel ends us too
            os.write(1, f"{line}\n".encode())

    try:
        return run_worker(config, announce=say, blackbox=blackbox)
    except SloschedError as error:
        say(f"{_ERROR}{error}")
        if isinstance(error, DeviceLost):
            os._exit(error.exit_code)  # taking a dead CUDA context down may never end
        return error.exit_code
    except Exception as error:  # a bug of slosched or of a model
        where = keep_traceback()
        text = " ".join(str(error).split())
        say(f"{_ERROR}internal error: {type(error).__name__}: {text}; {where}")
        return INTERNAL_ERROR


if __name__ == "__main__":
    sys.exit(_child_main(sys.argv[1:]))
