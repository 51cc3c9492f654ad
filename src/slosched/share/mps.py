"""CUDA's Multi-Process Service for one run: started by us, in folders of its own, and always ended.

No root is needed and the GPU's compute mode stays as it is: a daemon serves the processes whose environment
names its pipe directory, and no others. Without a daemon there a CUDA program runs as it does without MPS and
says nothing of that, so `clients` asks who is served. (NVIDIA, Multi-Process Service, appendix "Tools and
Interface Reference".)
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.share.keeper import MPS, Keeper
from slosched.share_spec import Job
from slosched.units import NS_PER_S

CONTROL = "nvidia-cuda-mps-control"
#: Bytes of a Unix socket's address, less those of the longest name that the daemon gives to one.
_LONGEST_FOLDER = 108 - 40
_STARTED_WITHIN_S = 20.0
_ANSWERS_WITHIN_S = 10.0
#: Clients are ended before; the servers get this time before the daemon ends them by force.
_QUIT_WITHIN_S = 5
_GONE_WITHIN_NS = 8 * NS_PER_S
_KILLED_WITHIN_NS = 2 * NS_PER_S
_LOOK_S = 0.02


def mps_missing() -> str:
    """Why this machine has no MPS, or "". Nothing is started."""
    return "" if shutil.which(CONTROL) else f"mps: {CONTROL} is not installed"


def client_settings(jobs: Mapping[int, Job]) -> dict[int, dict[str, str]]:
    """The environment of each job's process beside the pipe directory.

    Jobs below the highest priority get client priority 1 ("below normal"), which is the only other one.
    """
    highest = max((job.priority for job in jobs.values()), default=0)
    settings = {}
    for place, job in jobs.items():
        mine = {"CUDA_MPS_CLIENT_PRIORITY": "0" if job.priority == highest else "1"}
        if job.thread_percentage:
            mine["CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"] = str(job.thread_percentage)
        settings[place] = mine
    return settings


class Mps:
    """A running daemon. Use `mps_daemon`, which ends it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pipes, self.logs = folder / "p", folder / "l"
        for each in (self.pipes, self.logs):
            each.mkdir(mode=0o700, exist_ok=True)
        own = dict(os.environ)
        for name in ("CUDA_MPS_CLIENT_PRIORITY", "CUDA_MPS_ACTIVE_THREAD_PERCENTAGE"):
            own.pop(name, None)
        own["CUDA_MPS_PIPE_DIRECTORY"] = str(self.pipes)
        own["CUDA_MPS_LOG_DIRECTORY"] = str(self.logs)
        self._environment = own

    def environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """The whole environment of a client with `settings`.

        CUDA_VISIBLE_DEVICES is the daemon's alone, which numbers the devices that it shows from 0.
        """
        mine = {**self._environment, **settings}
        mine.pop("CUDA_VISIBLE_DEVICES", None)
        return mine

    def start(self) -> None:
        """Start the daemon. Raises SloschedError if it does not start, or does not answer."""
        output = self.logs / "start.txt"
        with output.open("wb") as file:
            try:
                code = subprocess.run(
                    [CONTROL, "-d"],
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                    start_new_session=True,
                    timeout=_STARTED_WITHIN_S,
                    check=False,
                ).returncode
            except (OSError, subprocess.TimeoutExpired) as error:
                raise SloschedError(f"mps: {CONTROL} does not start: {error}") from None
        if code != 0:
            words = output.read_text(encoding="utf-8", errors="replace").strip()[-500:]
            raise SloschedError(
                f"mps: {CONTROL} -d ended with code {code}: {words or 'it wrote nothing'}"
            )
        self.ask("get_server_list")

    def ask(self, command: str) -> str:
        """The daemon's answer to `command`. Raises SloschedError without one."""
        try:
            done = subprocess.run(
                [CONTROL],
                input=f"{command}\n".encode(),
                capture_output=True,
                env=self._environment,
                start_new_session=True,
                timeout=_ANSWERS_WITHIN_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise SloschedError(f"mps: the daemon does not answer {command!r}: {error}") from None
        text = (done.stdout + done.stderr).decode("utf-8", "replace").strip()
        if done.returncode != 0:
            raise SloschedError(
                f"mps: {command!r} failed with code {done.returncode}: {text[-500:]}"
            )
        return text

    def clients(self) -> set[int]:
        """The pids of the processes that it serves. Raises SloschedError if it does not answer."""
        found: set[int] = set()
        for server in _numbers(self.ask("get_server_list")):
            found |= _numbers(self.ask(f"get_client_list {server}"))
        return found

    def stop(self) -> list[str]:
        """End the daemon and its servers. Returns what did not go as it should, in words."""
        problems = []
        if self._processes():
            try:
                self.ask(f"quit -t {_QUIT_WITHIN_S}")
            except SloschedError as error:
                problems.append(str(error))
            if not _until(lambda: not self._processes(), _GONE_WITHIN_NS):
                problems.append("mps: the daemon did not end when asked and was killed")
        for pid in self._processes():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if not _until(lambda: not self._processes(), _KILLED_WITHIN_NS):
            problems.append(f"mps: {self._processes()} do not end; they wait in the kernel")
        return problems

    def _processes(self) -> list[int]:
        """The daemon and its servers, which have inherited its environment."""
        mark = f"CUDA_MPS_PIPE_DIRECTORY={self.pipes}".encode()
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit() or int(entry.name) == os.getpid():
                continue
            with contextlib.suppress(OSError):
                if not (entry / "comm").read_bytes().startswith(b"nvidia-cuda-mps"):
                    continue
                if b"\nState:\tZ" in (entry / "status").read_bytes():
                    continue  # it has ended, and its parent has not asked yet
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found


@contextlib.contextmanager
def mps_daemon(say: Callable[[str], None], keeper: Keeper | None = None) -> Iterator[Mps]:
    """A daemon for this block, in a temporary folder. Raises SloschedError if it does not start.

    The `keeper` ends it should this process be killed.
    """
    folder = _short_folder()
    if keeper is not None:
        keeper.keep(MPS, folder)
    try:
        mps = Mps(folder)
        try:
            mps.start()
            yield mps
        finally:
            for problem in mps.stop():
                say(problem)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if keeper is not None:
            keeper.release(MPS, folder)


def _short_folder() -> Path:
    """A new folder in which the address of a socket has room; TMPDIR may be too deep for that."""
    for parent in (tempfile.gettempdir(), "/tmp", "/dev/shm"):
        if len(parent) + len("/slosched-mps-12345678") <= _LONGEST_FOLDER:
            with contextlib.suppress(OSError):
                return Path(tempfile.mkdtemp(prefix="slosched-mps-", dir=parent))
    raise SloschedError("mps: no folder for its sockets: neither TMPDIR nor /tmp can be written")


def _numbers(text: str) -> set[int]:
    return {int(word) for word in text.split() if word.isdigit()}


def _until(true: Callable[[], bool], within_ns: int) -> bool:
    """Look until `true()`; False after `within_ns`."""
    give_up_ns = now_ns() + within_ns
    pause = threading.Event()
    while not true():
        if now_ns() > give_up_ns:
            return False
        pause.wait(_LOOK_S)
    return True
