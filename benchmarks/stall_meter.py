"""A meter for the machine itself: how often does it stand still, and who else works on it?

On a shared or virtual machine a measurement says as much about the neighbours as about the program.
This meter runs beside a measurement, in processes of its own, and afterwards says for any stretch of
time what disturbed it, so that a disturbed window can be voided by a rule that was fixed before.

- One *ticker* per CPU, pinned there, sleeps to every 2nd ms and notes when it wakes late. It asks for
  the real-time class, so that it never waits behind the daemons: what it sees late is the machine
  (the hypervisor, an interrupt), not our own load. Without that right it takes what nice it gets;
  `Readings.priority` says which, because a plain ticker also counts our own queueing as a stall.
  A ticker costs about 1 % of its CPU.
- One *sampler*, at the lowest priority, reads /proc twice a second: stolen time, the CPU time of each
  of our processes, and that of every process that is not ours (kernel threads, which mostly work for
  the process that makes the load, are left out). A process that ended is not lost: its time is in its parent's.

Alone it is a check of a machine: `.venv/bin/python benchmarks/stall_meter.py watch 10`. Linux only.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from slosched.child_processes import end_with_parent
from slosched.cli.machine import NOTED_NS, SAMPLE_NS, TICK_NS, Bounds, Disturbance
from slosched.clock import now_ns, set_timer_slack
from slosched.experiment.children import ChildFailed, Children
from slosched.units import NS_PER_MS, NS_PER_S

_READY_S = 10.0
_KTHREADD = 2


@dataclass(frozen=True)
class Stall:
    """A tick of `cpu` that was due at `at_ns` - `late_ns` and came at `at_ns`."""

    cpu: int
    at_ns: int
    late_ns: int


@dataclass(frozen=True)
class Sample:
    """Cumulative times at `at_ns`: stolen by the host; foreign processes'; our processes', by process id."""

    at_ns: int
    steal_ns: int
    foreign_ns: int
    ours_ns: dict[int, int]


#: A benchmark allows others less of a CPU than a command does.
BOUNDS = Bounds(foreign_cores=0.10)


@dataclass(frozen=True)
class Readings:
    """All that the meter noted so far. `priority` is "real-time", or the nice value it ran at."""

    priority: str
    stalls: tuple[Stall, ...]
    samples: tuple[Sample, ...]

    def disturbance(self, start_ns: int, end_ns: int) -> Disturbance:
        """What overlapped [start_ns, end_ns]. Raises ValueError if no sample covers it."""
        overlaps: dict[int, int] = {}
        longest = count = 0
        for stall in self.stalls:
            overlap = min(stall.at_ns, end_ns) - max(stall.at_ns - stall.late_ns, start_ns)
            if overlap > 0:
                count += 1
                longest = max(longest, stall.late_ns)
                overlaps[stall.cpu] = overlaps.get(stall.cpu, 0) + overlap
        first, last = self._around(start_ns, end_ns)
        span_ns = last.at_ns - first.at_ns
        return Disturbance(
            stalls=count,
            longest_stall_ns=longest,
            stalled_share=max(overlaps.values(), default=0) / (end_ns - start_ns),
            steal_cores=(last.steal_ns - first.steal_ns) / span_ns,
            foreign_cores=(last.foreign_ns - first.foreign_ns) / span_ns,
        )

    def cpu_s(self, pid: int, start_ns: int, end_ns: int) -> float:
        """CPU seconds of our process `pid` in the window, interpolated between samples."""
        points = [(s.at_ns, s.ours_ns[pid]) for s in self.samples if pid in s.ours_ns]
        return max(0.0, _at(points, end_ns) - _at(points, start_ns)) / NS_PER_S

    def _around(self, start_ns: int, end_ns: int) -> tuple[Sample, Sample]:
        before = [s for s in self.samples if s.at_ns <= start_ns]
        after = [s for s in self.samples if s.at_ns >= end_ns]
        if not before or not after:
            raise ValueError("the stall meter did not run through the whole window")
        return before[-1], after[0]


def _at(points: Sequence[tuple[int, int]], at_ns: int) -> float:
    """The cumulative value at `at_ns`, linear between points, flat beyond them."""
    if not points:
        return 0.0
    for (t0, v0), (t1, v1) in pairwise(points):
        if t0 <= at_ns <= t1:
            return v0 + (v1 - v0) * (at_ns - t0) / (t1 - t0)
    return float(points[0][1] if at_ns < points[0][0] else points[-1][1])


class StallMeter:
    """Runs the tickers and the sampler as children. A context: leaving it ends them.

    `root` is the process whose descendants are "ours" (default: this one); `cpus` are those that get a
    ticker (default: all that this process may use). Raises ChildFailed if one of them does not start
    or dies.
    """

    def __init__(
        self, directory: Path, *, root: int | None = None, cpus: Sequence[int] | None = None
    ) -> None:
        self._directory = directory
        self._root = os.getpid() if root is None else root
        self._children = Children((sys.executable, str(Path(__file__).resolve())))
        self._cpus = sorted(os.sched_getaffinity(0) if cpus is None else cpus)

    def __enter__(self) -> StallMeter:
        try:
            for cpu in self._cpus:
                self._children.start(f"ticker of CPU {cpu}", ["tick", str(cpu)], self._ticks(cpu))
            arguments = ["sample", str(self._root)]
            self._children.start("sampler", arguments, self._samples)
            for file in (self._samples, *map(self._ticks, self._cpus)):
                self._await(functools.partial(_has_lines, file))
        except BaseException:
            self._children.stop()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        self._children.stop()

    def readings(self, *, past_ns: int | None = None) -> Readings:
        """What was noted so far; waits for a sample at or after `past_ns` (default: now)."""
        past_ns = now_ns() if past_ns is None else past_ns
        self._await(lambda: any(s.at_ns >= past_ns for s in parse_samples(self._lines()[-1:])))
        stalls: list[Stall] = []
        priorities = []
        for cpu in self._cpus:
            lines = _whole_lines(self._ticks(cpu))
            priorities.append(lines[0])
            stalls += parse_stalls(cpu, lines[1:])
        stalls.sort(key=lambda stall: stall.at_ns)
        return Readings(priorities[0], tuple(stalls), tuple(parse_samples(self._lines())))

    def _await(self, ready: Callable[[], bool]) -> None:
        deadline_ns = now_ns() + int(_READY_S * NS_PER_S)
        while not ready():
            self._children.check()
            if now_ns() > deadline_ns:
                raise ChildFailed(f"the stall meter noted nothing for {_READY_S:.0f} s")
            time.sleep(0.05)

    def _ticks(self, cpu: int) -> Path:
        return self._directory / f"ticks-{cpu}.txt"

    @property
    def _samples(self) -> Path:
        return self._directory / "samples.jsonl"

    def _lines(self) -> list[str]:
        return _whole_lines(self._samples)


def _has_lines(path: Path) -> bool:
    return "\n" in path.read_text()


def _whole_lines(path: Path) -> list[str]:
    return path.read_text().rpartition("\n")[0].split("\n")


def parse_stalls(cpu: int, lines: Iterable[str]) -> list[Stall]:
    """Read a ticker's lines: "at_ns late_ns"."""
    return [Stall(cpu, *map(int, line.split())) for line in lines if line]


def parse_samples(lines: Iterable[str]) -> list[Sample]:
    """Read the sampler's lines: one JSON object each."""
    samples = []
    for line in lines:
        if line:
            fields = json.loads(line)
            ours = {int(pid): ns for pid, ns in fields.pop("ours_ns").items()}
            samples.append(Sample(**fields, ours_ns=ours))
    return samples


# ------------------------------------------------------------------------------------ children


def tick(cpu: int) -> None:
    """Note on stdout every wake-up on `cpu` that is late, for ever. The first line is the priority."""
    os.sched_setaffinity(0, {cpu})
    print(_raise_priority(), flush=True)
    set_timer_slack()
    gc.disable()
    due_ns = now_ns()
    while True:
        due_ns += TICK_NS
        time.sleep(max(0, due_ns - now_ns()) / NS_PER_S)
        woke_ns = now_ns()
        if woke_ns - due_ns > NOTED_NS:
            print(woke_ns, woke_ns - due_ns, flush=True)
            due_ns = now_ns()  # a slow disk under this line does not count as a stall


def _raise_priority() -> str:
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
        return "real-time"
    except OSError:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, -20)
        return f"nice {os.getpriority(os.PRIO_PROCESS, 0)}"


def sample(root: int) -> None:
    """Write a Sample to stdout twice a second, for ever."""
    os.nice(19)
    counter = CpuCounter(root)
    while True:
        print(json.dumps(asdict(counter.sample())), flush=True)
        time.sleep(SAMPLE_NS / NS_PER_S)


class CpuCounter:
    """Cumulative CPU times out of /proc, split into the descendants of `root` and all others."""

    def __init__(self, root: int) -> None:
        self._root = root
        self._ns_per_clock_tick = NS_PER_S // os.sysconf("SC_CLK_TCK")
        self._last_foreign = self._foreign_total = 0
        self._started = False

    def sample(self) -> Sample:
        processes = self._processes()
        ours = {pid for pid in processes if self._is_ours(pid, processes)}
        foreign = sum(
            own + reaped
            for pid, (parent, own, reaped) in processes.items()
            if pid not in ours and _KTHREADD not in (pid, parent)
        )
        # Less than before: a process ended whose parent does not collect times, or it ended while we
        # read. The next sample may then count it twice, which voids a window rather than sparing one.
        if self._started:
            self._foreign_total += max(0, foreign - self._last_foreign)
        self._started, self._last_foreign = True, foreign
        return Sample(
            at_ns=now_ns(),
            steal_ns=self._steal_ns(),
            foreign_ns=self._foreign_total,
            ours_ns={pid: processes[pid][1] for pid in sorted(ours)},
        )

    def _processes(self) -> dict[int, tuple[int, int, int]]:
        """Process id -> (parent, own CPU ns, CPU ns of children that ended and were waited for)."""
        found = {}
        for directory in Path("/proc").iterdir():
            if not directory.name.isdigit():
                continue
            try:
                text = (directory / "stat").read_text(errors="replace")
            except OSError:  # it ended meanwhile
                continue
            fields = text.rpartition(")")[2].split()
            user, system, reaped_user, reaped_system = (int(f) for f in fields[11:15])
            found[int(directory.name)] = (
                int(fields[1]),
                (user + system) * self._ns_per_clock_tick,
                (reaped_user + reaped_system) * self._ns_per_clock_tick,
            )
        return found

    def _is_ours(self, pid: int, processes: dict[int, tuple[int, int, int]]) -> bool:
        while pid in processes:
            if pid == self._root:
                return True
            pid = processes[pid][0]
        return False

    def _steal_ns(self) -> int:
        fields = Path("/proc/stat").read_text().partition("\n")[0].split()
        return int(fields[8]) * self._ns_per_clock_tick


def watch(seconds: float) -> None:
    """Print what disturbs this machine for `seconds`."""
    with tempfile.TemporaryDirectory() as directory, StallMeter(Path(directory)) as meter:
        start_ns = now_ns()
        time.sleep(seconds)
        end_ns = now_ns()
        readings = meter.readings(past_ns=end_ns)
    found = readings.disturbance(start_ns, end_ns)
    print(f"{seconds:g} s, tickers at {readings.priority} priority")
    print(
        f"stalls over {NOTED_NS / NS_PER_MS:g} ms: {found.stalls}, the longest "
        f"{found.longest_stall_ns / NS_PER_MS:.1f} ms, {100 * found.stalled_share:.2f} % of the time"
    )
    print(
        f"taken by the host {found.steal_cores:.3f} CPU, others used {found.foreign_cores:.3f} CPU"
    )
    print("; ".join(found.reasons(BOUNDS)) or "a measurement in this stretch would count")


def main(arguments: Sequence[str]) -> None:
    """`tick CPU` and `sample PID` are the meter's children; `watch SECONDS` prints for a reader."""
    match list(arguments):
        case ["watch", seconds]:
            watch(float(seconds))
        case [("tick" | "sample") as verb, number]:
            # The process that started us may be killed: the kernel then ends us too.
            end_with_parent(signal.SIGTERM)
            with contextlib.suppress(KeyboardInterrupt):
                (tick if verb == "tick" else sample)(int(number))
        case _:
            raise SystemExit("usage: stall_meter.py watch SECONDS")


if __name__ == "__main__":
    main(sys.argv[1:])
