"""A gate in shared memory: jobs in processes of their own, of which the low ones wait while a higher one runs.

A file of 8-byte words, mapped by each process; a slot of one cache line for each job, which that job alone
writes. Any number of jobs may want the GPU at a time, on any number of levels: a low job waits until no higher
one wants it. (Deft, NSDI'23, has one flag for all: the end of one high job lets the low ones run beside the
next, and a low one that sleeps or has ended blocks the high ones.)

    a high job   want() -> enter(): waits for each lower job that runs -> its request -> leave()
    a low job    enter() -> at each boundary: must_wait(), and if so pause(): drained, waits, resumes -> leave()

A job is both at once: low to the jobs above it, high to those below. Jobs of one level run side by side.

Times are of `clock.now_ns`, which members take as the host's monotonic clock.

What is assumed of memory: a store of an aligned word is never seen in part (every 64-bit processor), and stores
of one process are seen in their order (x86-64). Between its own store and the look at the others' words each
side passes a fence, so that never both sides miss each other; see `_fence`. No lock is held anywhere, so a
process that dies blocks none: the others see that its pid is gone.
"""

from __future__ import annotations

import math
import mmap
import os
import re
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from slosched.clock import now_ns, sleep_ns
from slosched.errors import InvalidConfig, OutOfResources
from slosched.share_spec import Interruption
from slosched.units import NS_PER_MS, NS_PER_S, NS_PER_US

#: Jobs that a gate has room for; a job's slot is its place in the experiment.
MOST_JOBS = 256
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_FOLDER = Path("/dev/shm")

_WORDS = 8  # of a slot: 64 bytes, so that two processes never write one cache line
_PRIORITY, _PID, _BORN, _WANTED, _STATE, _ALIVE, _STARTED, _STEPS = range(_WORDS)
_BYTES = MOST_JOBS * _WORDS * 8
#: The values of _STATE. An idle job is outside a request, and a drained one waits at a boundary: neither has
#: work on the GPU.
_IDLE, _RUNNING, _DRAINED = range(3)

#: How long a waiting job spins before it sleeps, and how long a sleep then is. A high job waits for what is in
#: flight only, and its latency counts, so it spins for longer.
_SPIN_NS = 200 * NS_PER_US
_SPIN_HIGH_NS = 2 * NS_PER_MS
_SLEEP_NS = 50 * NS_PER_US
#: How often a waiting job looks whether those that it waits for are alive.
_LOOK_NS = 100 * NS_PER_MS
#: A job that says nothing for this time, though it wants the GPU, hangs: the others no longer wait for it.
SILENT_NS = 60 * NS_PER_S
#: How long a high job waits for the lower ones that run. It then runs beside them.
ENTER_NS = 2 * NS_PER_S


class Entered(NamedTuple):
    """A job came in. `timed_out`: lower ones still ran after the time allowed, and it runs beside them."""

    wanted_ns: int
    entered_ns: int
    timed_out: bool


class Pause(NamedTuple):
    """A wait at a boundary: when it began, after the drain, and the higher requests that went first."""

    began_ns: int
    resumed_ns: int
    parts: tuple[Interruption, ...]


class Gate:
    """The shared memory of one experiment. `open` makes the file if it is missing: any process may be first."""

    def __init__(self, path: Path, memory: mmap.mmap) -> None:
        self.path, self._memory = path, memory
        self.words = memoryview(memory).cast("q")

    @classmethod
    def open(cls, name: str) -> Gate:
        """The gate `name`: a file in memory, or that of a path if `name` has a slash.

        Raises InvalidConfig if `name` is not valid, and OutOfResources if there is no room.
        """
        path = gate_path(name)
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                if os.fstat(file).st_size < _BYTES:
                    os.posix_fallocate(file, 0, _BYTES)
                return cls(path, mmap.mmap(file, _BYTES))
            finally:
                os.close(file)
        except (OSError, ValueError) as error:
            raise OutOfResources(f"no memory for the gate {path}: {error}") from None

    @classmethod
    def create(cls, name: str, jobs: Mapping[int, int]) -> Gate:
        """The gate `name` with the priorities of its `jobs`, known before their processes come.

        Raises InvalidConfig, OutOfResources.
        """
        gate = cls.open(name)
        for job, priority in jobs.items():
            gate.words[gate.slot(job) + _PRIORITY] = priority
        return gate

    @staticmethod
    def slot(job: int) -> int:
        """The first word of a job's slot. Raises InvalidConfig beyond MOST_JOBS."""
        if not 0 <= job < MOST_JOBS:
            raise InvalidConfig(f"job {job}: a gate has room for {MOST_JOBS} jobs, 0 and up")
        return job * _WORDS

    def member(self, job: int, priority: int) -> GateMember:
        """This process as `job`. A slot of a process that died is taken over."""
        return GateMember(self, job, priority)

    def close(self) -> None:
        """Leave the memory; members must not be used after that. Other processes keep it."""
        with suppress(BufferError):
            self.words.release()
            self._memory.close()

    def remove(self) -> None:
        """Remove the file's name: the memory is free once each process has closed it."""
        self.path.unlink(missing_ok=True)


def gate_path(name: str) -> Path:
    """Where the gate `name` lies. Raises InvalidConfig for a name that cannot be one."""
    if "/" in name:
        return Path(name)
    if not _NAME.fullmatch(name):
        raise InvalidConfig(f"gate {name!r}: a name has letters, digits and . _ - (at most 100)")
    folder = _FOLDER if os.access(_FOLDER, os.W_OK) else Path(os.environ.get("TMPDIR", "/tmp"))
    return folder / f"slosched-gate-{name}"


class GateMember:
    """One job's side of the gate. One thread uses it."""

    def __init__(self, gate: Gate, job: int, priority: int) -> None:
        self.job, self.priority = job, priority
        self._gate, self._words = gate, gate.words
        self._slot = gate.slot(job)
        self._higher: tuple[int, ...] = ()  # the words _WANTED of the jobs above
        self._lower: tuple[int, ...] = ()  # the slots of the jobs below
        self._lock = threading.Lock()
        words, slot = self._words, self._slot
        words[slot + _STATE], words[slot + _WANTED] = _IDLE, 0
        words[slot + _PRIORITY] = priority
        words[slot + _BORN] = _born(os.getpid())
        words[slot + _ALIVE] = now_ns()
        words[slot + _PID] = os.getpid()
        self.look_around()

    # ---------------------------------------------------------------------- of a request

    def want(self) -> int:
        """Ask for the GPU: lower jobs stop at their next boundary. Returns since when it is wanted."""
        words, slot = self._words, self._slot
        if not words[slot + _WANTED]:
            now = now_ns()
            words[slot + _ALIVE] = now
            words[slot + _STARTED] = 0
            words[slot + _WANTED] = now
            _fence(self._lock)
        return words[slot + _WANTED]

    def enter(self, timeout_ns: int = ENTER_NS) -> Entered:
        """Wait until no higher job wants the GPU and no lower one runs; then this job runs.

        A lower job that still runs after `timeout_ns` is waited for no longer. Higher jobs are waited for as
        long as they want the GPU, live and are not silent.
        """
        words, slot, wanted_ns = self._words, self._slot, self.want()
        self._run_when_free(_IDLE)
        end = now_ns() + timeout_ns
        waited, timed_out = _Waiting(_SPIN_HIGH_NS), False
        while self._lower_runs(look=waited.look()):
            if now_ns() >= end:
                timed_out = True
                break
            if self.must_wait() and self._blocking():
                words[slot + _STATE] = _IDLE
                self._run_when_free(_IDLE)
                end = max(end, now_ns() + timeout_ns)
            waited.rest()
        now = now_ns()
        words[slot + _STARTED] = now
        return Entered(wanted_ns, now, timed_out)

    def leave(self) -> None:
        """The request is over, and nothing of it is on the GPU: lower jobs resume."""
        words, slot = self._words, self._slot
        words[slot + _STATE] = _IDLE
        words[slot + _WANTED] = 0

    # ------------------------------------------------------------------------- at a boundary

    def must_wait(self) -> bool:
        """True if a higher job wants the GPU. Costs well under a microsecond."""
        words = self._words
        for wanted in self._higher:  # noqa: SIM110 - any() of a generator takes twice the time
            if words[wanted]:
                return True
        return False

    def pause(self, sync: Callable[[], None], *, boundary: int = 0) -> Pause:
        """Wait at a boundary while higher jobs want the GPU. `sync` drains what this job has launched."""
        sync()
        words, slot = self._words, self._slot
        began_ns = now_ns()
        words[slot + _STATE] = _DRAINED
        seen = self._run_when_free(_DRAINED)
        resumed_ns = now_ns()
        parts = tuple(
            Interruption(
                job=self.job,
                by=by,
                wanted_ns=wanted_ns,
                started_ns=started_ns or wanted_ns,
                resumed_ns=gone_ns or resumed_ns,
                boundary=boundary,
            )
            for (by, wanted_ns), (started_ns, gone_ns) in seen.items()
        )
        return Pause(began_ns, resumed_ns, parts)

    def count(self) -> None:
        """Count a step of this job where the other processes can see it, which shows whether it runs."""
        self._words[self._slot + _STEPS] += 1

    def steps(self, job: int) -> int:
        """The steps that `job` has counted."""
        return self._words[self._gate.slot(job) + _STEPS]

    # ---------------------------------------------------------------------------- the others

    def look_around(self) -> None:
        """See which jobs are above and below; done before this job runs or resumes."""
        words = self._words
        others = [
            slot
            for slot in range(0, MOST_JOBS * _WORDS, _WORDS)
            if words[slot + _PID] and slot != self._slot
        ]
        self._higher = tuple(
            slot + _WANTED for slot in others if words[slot + _PRIORITY] > self.priority
        )
        self._lower = tuple(slot for slot in others if words[slot + _PRIORITY] < self.priority)

    @property
    def is_highest(self) -> bool:
        """True if no job that was there at the last look is above this one."""
        return not self._higher

    def _run_when_free(self, state: int) -> dict[tuple[int, int], tuple[int, int]]:
        """Wait while higher jobs want the GPU, in `state`, and then say that this job runs.

        Returns what went first: (job, wanted_ns) -> (started_ns, gone_ns); 0 where it was not seen.
        """
        words, slot = self._words, self._slot
        seen: dict[tuple[int, int], tuple[int, int]] = {}
        waiting = _Waiting()
        while True:
            blocking = self._blocking(look=waiting.look()) if self.must_wait() else {}
            now = now_ns()
            for key, (started_ns, gone_ns) in seen.items():
                if key not in blocking and not gone_ns:
                    # It may have come and gone between two looks; its start is there until its next request.
                    late_ns = words[key[0] * _WORDS + _STARTED]
                    seen[key] = (started_ns or (late_ns if key[1] <= late_ns <= now else 0), now)
            for key, started_ns in blocking.items():
                seen[key] = (started_ns, 0)
            if not blocking:
                words[slot + _STATE] = _RUNNING
                _fence(self._lock)
                # A job that came before the fence is seen by this look; a later one sees that this runs.
                self.look_around()
                if not self.must_wait() or not self._blocking():
                    return seen
                words[slot + _STATE] = state
            words[slot + _ALIVE] = now
            waiting.rest()

    def _blocking(self, *, look: bool = False) -> dict[tuple[int, int], int]:
        """The higher jobs that want the GPU and live: (job, wanted_ns) -> started_ns."""
        words, found = self._words, {}
        now = now_ns()
        for wanted in self._higher:
            wanted_ns, slot = words[wanted], wanted - _WANTED
            if not wanted_ns or now - words[slot + _ALIVE] > SILENT_NS:
                continue
            if look and self._died(slot):
                continue
            found[slot // _WORDS, wanted_ns] = words[slot + _STARTED]
        return found

    def _lower_runs(self, *, look: bool) -> bool:
        words = self._words
        return any(
            words[slot + _STATE] == _RUNNING and not (look and self._died(slot))
            for slot in self._lower
        )

    def _died(self, slot: int) -> bool:
        """True if the process of the slot is gone; its words then say so, for all."""
        words = self._words
        pid = words[slot + _PID]
        if pid and _born(pid) == words[slot + _BORN]:
            return False
        if words[slot + _PID] == pid:  # no new process has taken the slot
            words[slot + _WANTED], words[slot + _STATE] = 0, _IDLE
        return True


class _Waiting:
    """How a process waits for words of others: it spins at first, and sleeps for short times then."""

    def __init__(self, spin_ns: int = _SPIN_NS) -> None:
        self._sleeps_ns = now_ns() + spin_ns
        self._looked_ns = -math.inf

    def look(self) -> bool:
        """True if it is time to look whether the others live: at first, and every tenth of a second."""
        now = now_ns()
        if now - self._looked_ns < _LOOK_NS:
            return False
        self._looked_ns = now
        return True

    def rest(self) -> None:
        if now_ns() > self._sleeps_ns:
            sleep_ns(_SLEEP_NS)


def _fence(lock: threading.Lock) -> None:
    """What this process stored is seen by the others before it looks at their words.

    x86-64 may delay a store behind a later load of another word. The atomic operation in taking a lock orders
    both. The interpreter gives no other means.
    """
    lock.acquire(False)
    lock.release()


def _born(pid: int) -> int:
    """When the process began, in the kernel's ticks, at least 1; 0 if there is none, or it is a zombie.

    With the pid that tells a process from a later one of the same number. Elsewhere than on Linux it is 1 for
    each process that lives.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return 0
    except OSError:
        return 0
    else:
        fields = text.rpartition(")")[2].split()  # the name before it may have spaces
        return 0 if fields[0] in "ZX" else max(1, int(fields[19]))
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return 0
    except OSError:
        return 1
    return 1
