"""What a run must not leave behind: processes, shared memory, folders of engines, namespaces of state.

A `LeakCheck` is made when a run begins and asked when it ends. Processes below this one are found also when
their parent has ended, since this process makes itself the one that inherits them (Linux). State in shared
memory goes to a folder that only this run uses. Other new files in /dev/shm count if a process of the run holds
them or they are named after this process. The rest may be another program's: it is named, and stays.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slosched.clock import now_ns, sleep_ns
from slosched.errors import SloschedError
from slosched.faasm.frame_processes import Process, below, command_of, read_process
from slosched.functions.state.folders import PREFIX_VARIABLE
from slosched.functions.state.opening import open_store

_PR_SET_CHILD_SUBREAPER = 36
_PR_GET_CHILD_SUBREAPER = 37
_SHARED_MEMORY = Path("/dev/shm")
#: How folders of a run begin, in shared memory and among temporary files, before its process's number.
RUN_FOLDER = "slosched-exp-"
#: What has just been told to end gets this time.
_GRACE_NS = 2_000_000_000
_LOOK_AGAIN_NS = 20_000_000
_KILL_WITHIN_NS = 5_000_000_000
#: Python's own helper processes, which end with the process that they belong to.
_HELPERS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")


class Leaked(SloschedError):
    """A run left something behind. `left` has a line for each thing; what could be removed was removed."""

    def __init__(self, left: list[str]) -> None:
        super().__init__(
            f"the run left {len(left)} thing(s) behind, now removed: {'; '.join(left)}"
        )
        self.left = left


class LeakCheck:
    """What there was when the run began. Use it as `with watched(namespace) as leaks`."""

    def __init__(self, namespace: str) -> None:
        self.namespace = namespace
        #: New files in shared memory that no process holds, and that the run may or may not have made.
        self.unknown: list[str] = []
        self._stores: dict[str, None] = {}
        self._before = {process.identity for process in below([os.getpid()])}
        self._files = set(_shared_files())
        self._state_folder = f"{RUN_FOLDER}{os.getpid()}-{secrets.token_hex(4)}"

    @property
    def state_folder(self) -> str:
        """The name of the folder of state in shared memory that the run and its children use."""
        return self._state_folder

    def watch_store(self, address: str) -> None:
        """Look into this store, too, for namespaces of the run."""
        self._stores[address] = None

    def check(self) -> None:
        """Raise Leaked if anything is left after a grace time of 2 s; it is removed first.

        Nothing that was there before the run is touched.
        """
        held = _held_by([os.getpid(), *(process.pid for process in self._running())])
        left = self._left_processes()
        left += self._left_state()
        left += self._left_files(held)
        left += self._left_folders()
        if left:
            raise Leaked(left)

    # ------------------------------------------------------------------------------- processes

    def _running(self) -> list[Process]:
        """Processes that came with the run and have not ended."""
        return [
            process
            for process in below([os.getpid()])
            if process.identity not in self._before
            and not process.ended
            and not any(each in command_of(process) for each in _HELPERS)
        ]

    def _left_processes(self) -> list[str]:
        until_ns = now_ns() + _GRACE_NS
        while running := self._running():
            if now_ns() > until_ns:
                break
            sleep_ns(_LOOK_AGAIN_NS)
        left = [f"process {each.pid} ({command_of(each)})" for each in running]
        until_ns = now_ns() + _KILL_WITHIN_NS
        while running and now_ns() < until_ns:
            for process in running:
                _kill(process)
            sleep_ns(_LOOK_AGAIN_NS)
            running = self._running()
        return left

    # ------------------------------------------------------------------------- memory and stores

    def _left_state(self) -> list[str]:
        left = []
        for address in self._stores:
            with suppress(SloschedError):  # a server that has ended has kept nothing
                left += self._left_namespaces(address)
        # Also those of the hosts that the run emulated, whose names begin so.
        for folder in _SHARED_MEMORY.glob(f"{self._state_folder}*"):
            if folder.is_dir() and any(folder.iterdir()):
                left.append(f"state in {folder}")
            shutil.rmtree(folder, ignore_errors=True)
        return left

    def _left_namespaces(self, address: str) -> list[str]:
        mine = (self.namespace, f"engine-{os.getpid()}-")
        store = open_store(address)
        try:
            return [
                f"namespace {name} of {address}"
                for name in store.namespaces()
                if name.startswith(mine) and store.drop(name)
            ]
        finally:
            store.close()

    def _left_files(self, held: set[str]) -> list[str]:
        """Remove new files that a process of the run holds, or that are named after this process. Others may be
        another program's, and stay: `unknown` has those that no process holds."""
        new = [
            path
            for path in _shared_files()
            if path not in self._files and path.is_file() and path.lstat().st_uid == os.getuid()
        ]
        ours = [path for path in new if str(path) in held or f"-{os.getpid()}" in path.name]
        for path in ours:
            with suppress(OSError):
                path.unlink()
        rest = [path for path in new if path not in ours]
        if rest:
            elsewhere = _held_by(process.pid for process in below([1]))
            self.unknown = [str(path) for path in rest if str(path) not in elsewhere]
        return [f"shared memory {path}" for path in ours]

    def _left_folders(self) -> list[str]:
        left = []
        for folder in Path(tempfile.gettempdir()).glob(f"slosched-engine-{os.getpid()}-*"):
            shutil.rmtree(folder, ignore_errors=True)
            left.append(f"folder {folder}")
        return left


@contextmanager
def watched(namespace: str) -> Iterator[LeakCheck]:
    """A LeakCheck whose folder of state this process and its children use within the block.

    The block's end checks nothing: call `check`, and after the last thing that the run opened was closed.
    """
    _remove_left_behind()
    check = LeakCheck(namespace)
    before = os.environ.get(PREFIX_VARIABLE)
    reaper = _is_reaper()
    os.environ[PREFIX_VARIABLE] = check.state_folder
    _be_reaper(True)
    try:
        yield check
    finally:
        _be_reaper(reaper)
        if before is None:
            os.environ.pop(PREFIX_VARIABLE, None)
        else:
            os.environ[PREFIX_VARIABLE] = before


def _remove_left_behind() -> None:
    """Remove the folders of runs that were killed: those whose process is gone."""
    for path in (*_shared_files(), *Path(tempfile.gettempdir()).glob(f"{RUN_FOLDER}*")):
        pid = path.name.removeprefix(RUN_FOLDER).partition("-")[0]
        if not path.name.startswith(RUN_FOLDER) or not pid.isdecimal() or read_process(int(pid)):
            continue
        with suppress(OSError):
            if path.lstat().st_uid == os.getuid():
                shutil.rmtree(path, ignore_errors=True)


def _kill(process: Process) -> None:
    found = read_process(process.pid)
    if found is not None and found.identity == process.identity:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process.pid, signal.SIGKILL)


def _shared_files() -> list[Path]:
    try:
        return sorted(_SHARED_MEMORY.iterdir())
    except OSError:
        return []


def _held_by(pids: Iterable[int]) -> set[str]:
    """Files in shared memory that these processes have open or mapped."""
    found: set[str] = set()
    for pid in pids:
        place = Path("/proc") / str(pid)
        with suppress(OSError):
            for descriptor in (place / "fd").iterdir():
                with suppress(OSError):
                    found.add(os.readlink(descriptor))  # noqa: PTH115 - a text, not a path
        with suppress(OSError):
            for line in (place / "maps").read_text(errors="replace").splitlines():
                if str(_SHARED_MEMORY) in line:
                    found.add(line.split(maxsplit=5)[-1])
    return found


def _is_reaper() -> bool:
    value = ctypes.c_int(0)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_GET_CHILD_SUBREAPER, ctypes.byref(value), 0, 0, 0)
    return value.value != 0


def _be_reaper(wanted: bool) -> None:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, int(wanted), 0, 0, 0)
