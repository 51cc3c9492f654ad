"""What a run must not leave behind: processes, shared memory, folders of engines, namespaces of state.

A `LeakCheck` is made when a run begins and asked when it ends. Processes below this one are found also when
their parent has ended, since this process makes itself the one that inherits them (Linux). State in shared
memory goes to a folder that only this run uses. Other files in /dev/shm count if they came during the run,
belong to this user and no process has them open.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Iterator
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
#: How the folder of a run's state begins, before the number of the run's process.
_FOLDER = "slosched-exp-"
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
        self._stores: dict[str, None] = {}
        self._before = {process.identity for process in below([os.getpid()])}
        self._files = set(_shared_files())
        self._state_folder = f"{_FOLDER}{os.getpid()}-{secrets.token_hex(4)}"

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
        left = self._left_processes()
        left += self._left_state()
        left += self._left_files()
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
        mine = (self.namespace, f"engine-{os.getpid()}-")
        for address in self._stores:
            store = open_store(address)
            try:
                left += [
                    f"namespace {name} of {address}"
                    for name in store.namespaces()
                    if name.startswith(mine) and store.drop(name)
                ]
            finally:
                store.close()
        folder = _SHARED_MEMORY / self._state_folder
        if folder.is_dir() and any(folder.iterdir()):
            left.append(f"state in {folder}")
        shutil.rmtree(folder, ignore_errors=True)
        return left

    def _left_files(self) -> list[str]:
        new = [path for path in _shared_files() if path not in self._files]
        if not new:
            return []
        used = _open_elsewhere()
        left = []
        for path in new:
            if path.name == self._state_folder or str(path) in used:
                continue
            with suppress(OSError):
                if path.stat().st_uid == os.getuid() and path.is_file():
                    path.unlink()
                    left.append(f"shared memory {path}")
        return left

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
    """Remove the state of runs that were killed: those whose process is gone."""
    for path in _shared_files():
        pid = path.name.removeprefix(_FOLDER).partition("-")[0]
        if not path.name.startswith(_FOLDER) or not pid.isdecimal() or read_process(int(pid)):
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


def _open_elsewhere() -> set[str]:
    """Files in shared memory that any process has open or mapped."""
    found: set[str] = set()
    for place in Path("/proc").iterdir():
        if not place.name.isdecimal() or int(place.name) == os.getpid():
            continue
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
