"""What the processes of a run use: memory and CPU time, sampled by process id, as a bill in GB-seconds.

    with Billing() as bill:
        ...
    bill.record()["gb_s_integral"]

The paper (USENIX ATC'20, section 6) bills the peak memory of a function x the number of functions x time; that
is `gb_s_paper` here. `gb_s_peak` is the highest total of all processes x time, and `gb_s_integral` the total
summed over time. Memory is PSS: a page that n processes share counts 1/n in each, so that a shared tier is
billed once.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

from slosched.clock import now_ns
from slosched.errors import InvalidConfig, SloschedError
from slosched.faasm.billing_gpu import BY_CARD, BY_PROCESS, GpuMemory, Used
from slosched.faasm.billing_host import Host, log_lines
from slosched.faasm.frame_processes import Process, Tree, command_of, memory_of, read_process
from slosched.output_files import new_file
from slosched.units import NS_PER_MS, NS_PER_S

_GB = 1e9
#: Sampling takes at most one part in this many of a core.
_COST_SHARE = 20
#: The first samples are this far apart, and the later ones further and further.
_FIRST_NS = 10 * NS_PER_MS
_HOST_EVERY_NS = 2 * NS_PER_S
#: The published log has a host's name.
HOST_SUFFIX, _SAMPLES_SUFFIX = ".host.log", ".tsv"
_COLUMNS = ("t_s", "pid", "pss_bytes", "rss_bytes", "cpu_s", "command")
_MOST_LINES = 2_000_000
_END_WITHIN_S = 30.0


@dataclass
class ProcessBill:
    """One process: its peaks, its CPU time as last seen, and when it was first and last seen."""

    pid: int
    command: str
    first_ns: int
    last_ns: int
    peak_pss_bytes: int = 0
    peak_rss_bytes: int = 0
    cpu_ns: int = 0


@dataclass(frozen=True, kw_only=True)
class Bill:
    """The end of a Billing. `wall_ns` is the time between its begin and its end.

    `most_processes` is the highest number at a time. `cpu_ns` includes processes that ended between samples, as
    far as their parents waited for them. `gpu_*` are 0 without GPUs; `gpu_by` says whether they are the
    processes' own memory ("process"), or what the cards had more in use than at the begin ("card").
    """

    wall_ns: int
    samples: int
    most_processes: int
    peak_pss_bytes: int
    peak_rss_bytes: int
    largest_pss_bytes: int
    cpu_ns: int
    pss_byte_ns: int
    gpu_peak_bytes: int
    gpu_byte_ns: int
    gpu_by: str = ""

    @property
    def gb_s_paper(self) -> float:
        """Peak of the largest process x the most processes at a time x time."""
        return self.largest_pss_bytes * self.most_processes * self.wall_ns / _GB / NS_PER_S

    @property
    def gb_s_peak(self) -> float:
        return self.peak_pss_bytes * self.wall_ns / _GB / NS_PER_S

    @property
    def gb_s_integral(self) -> float:
        return self.pss_byte_ns / _GB / NS_PER_S

    @property
    def gpu_gb_s_peak(self) -> float:
        """The highest total of the GPUs' memory x time."""
        return self.gpu_peak_bytes * self.wall_ns / _GB / NS_PER_S

    @property
    def gpu_gb_s_integral(self) -> float:
        return self.gpu_byte_ns / _GB / NS_PER_S


@dataclass
class _GpuBill:
    """What is summed of the GPUs' memory, for one way of telling it apart."""

    peak_bytes: int = 0
    byte_ns: int = 0
    before: int = 0

    def add(self, used: int, gone_ns: int) -> None:
        """Take a sample; `gone_ns` after the one before, 0 for the first."""
        self.byte_ns += (self.before + used) * gone_ns // 2
        self.peak_bytes = max(self.peak_bytes, used)
        self.before = used


class Billing:
    """Samples in a thread from `__enter__` to `__exit__`.

    `pids` are the processes to bill with all below them, or a function that tells them at each sample; by
    default those below this process. `own`: this process, too. Samples begin close together and end
    `every_s` apart, or more where one costs more than a twentieth of that. `files`: a path without suffix, to
    which each sample is written (.tsv), and with `host` the host's billing log (.host.log). `gpus`: UUIDs of
    cards whose memory is billed (billing_gpu.py), of which `gpu_idle_bytes` were in use before the run; by
    default what is in use when the bill begins. The end raises SloschedError if nothing could be sampled.
    """

    def __init__(
        self,
        *,
        pids: Sequence[int] | Callable[[], Iterable[int]] | None = None,
        own: bool = False,
        every_s: float = 0.25,
        host: bool = True,
        gpus: Sequence[str] = (),
        gpu_idle_bytes: int | None = None,
        files: Path | None = None,
    ) -> None:
        if not 0.005 <= every_s <= 60:
            raise InvalidConfig(f"every_s is within 0.005..60, not {every_s:g}")
        self._pids, self._own, self._every_ns = pids, own, int(every_s * NS_PER_S)
        self._with_host, self._files = host, files
        self._host, self._tree = Host(), Tree()
        self._opened = ExitStack()
        self._samples_file: BinaryIO | None = None
        self._host_file: BinaryIO | None = None
        self._lines = 0
        self._gpus = GpuMemory(gpus)  # let go when the block ends
        self.processes: dict[tuple[int, int], ProcessBill] = {}
        self.bill: Bill | None = None
        self._stop = threading.Event()
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="slosched billing", daemon=True)
        self._samples = self._most = 0
        self._peak_pss = self._peak_rss = self._pss_byte_ns = 0
        self._gpu_by_process, self._gpu_by_card = _GpuBill(), _GpuBill()
        self._gpu_idle_bytes, self._gpu_named = gpu_idle_bytes, False
        self._total_before = 0
        self._before_ns = self._host_ns = self._began_ns = 0
        self._cpu_began_ns = self._cpu_ns = 0
        self._cpu_first: dict[tuple[int, int], int] = {}  # of processes that were there before

    # ---------------------------------------------------------------------------------- the block

    def __enter__(self) -> Self:
        with ExitStack() as opened:
            opened.callback(self._gpus.close)
            if self._files is not None:
                self._samples_file = opened.enter_context(new_file(self._beside(_SAMPLES_SUFFIX)))
                self._samples_file.write(("\t".join(_COLUMNS) + "\n").encode())
                if self._with_host:
                    self._host_file = opened.enter_context(new_file(self._beside(HOST_SUFFIX)))
                    self._host_file.write(log_lines(now_ns(), self._host.once()).encode())
            self._began_ns = self._before_ns = now_ns()
            there = self._billed()
            self._cpu_began_ns = self._cpu_now_ns(there)
            self._cpu_first = {each.identity: each.cpu_ns for each in there}
            if self._gpus and self._gpu_idle_bytes is None:
                at_first = self._gpus.used([each.pid for each in there])
                self._gpu_idle_bytes = at_first.by_card - (at_first.by_process or 0)
            self._opened = opened.pop_all()
        self._thread.start()
        return self

    def _beside(self, suffix: str) -> Path:
        assert self._files is not None
        return self._files.with_name(self._files.name + suffix)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join(_END_WITHIN_S)
        if self._thread.is_alive():
            self._problem = "a sample did not end"
        self._guarded()
        ended_ns = now_ns()
        gpu = self._gpu_by_process if self._gpu_named else self._gpu_by_card
        self.bill = Bill(
            wall_ns=ended_ns - self._began_ns,
            samples=self._samples,
            most_processes=self._most,
            peak_pss_bytes=self._peak_pss,
            peak_rss_bytes=self._peak_rss,
            largest_pss_bytes=max((p.peak_pss_bytes for p in self.processes.values()), default=0),
            cpu_ns=self._cpu_ns,
            pss_byte_ns=self._pss_byte_ns,
            gpu_peak_bytes=gpu.peak_bytes,
            gpu_byte_ns=gpu.byte_ns,
            gpu_by=(BY_PROCESS if self._gpu_named else BY_CARD) if self._gpus else "",
        )
        self._opened.__exit__(kind, error, traceback)
        if kind is None and self._problem:
            raise SloschedError(f"memory and CPU time were not sampled to the end: {self._problem}")

    def record(self) -> dict[str, Any]:
        """The bill as fields of a record. Raises InvalidConfig before the block has ended."""
        bill = self.bill
        if bill is None:
            raise InvalidConfig("a bill is there when its block has ended")
        fields: dict[str, Any] = {
            "billed_s": bill.wall_ns / NS_PER_S,
            "processes": bill.most_processes,
            "peak_pss_mb": bill.peak_pss_bytes / 1e6,
            "peak_rss_mb": bill.peak_rss_bytes / 1e6,
            "largest_pss_mb": bill.largest_pss_bytes / 1e6,
            "cpu_s": bill.cpu_ns / NS_PER_S,
            "gb_s_paper": bill.gb_s_paper,
            "gb_s_peak": bill.gb_s_peak,
            "gb_s_integral": bill.gb_s_integral,
            "bill_samples": bill.samples,
        }
        if self._gpus:
            fields |= {
                "gpu_peak_mb": bill.gpu_peak_bytes / 1e6,
                "gpu_gb_s_peak": bill.gpu_gb_s_peak,
                "gpu_gb_s_integral": bill.gpu_gb_s_integral,
                "gpu_by": bill.gpu_by,
            }
        if self._files is not None:
            fields["billing"] = self._files.name
        return fields

    # ---------------------------------------------------------------------------------- samples

    @property
    def samples(self) -> int:
        """How many samples there are by now."""
        return self._samples

    def _run(self) -> None:
        every_ns = min(_FIRST_NS, self._every_ns)
        usual_ns = 0
        while True:
            began_ns = now_ns()
            if not self._guarded():
                return
            cost_ns = now_ns() - began_ns
            usual_ns = (3 * usual_ns + cost_ns) // 4  # the first sample looks at all processes
            pause_ns = max(every_ns - cost_ns, usual_ns * (_COST_SHARE - 1), NS_PER_MS)
            every_ns = min(every_ns * 3 // 2, self._every_ns)
            if self._stop.wait(pause_ns / NS_PER_S):
                return

    def _guarded(self) -> bool:
        """Take a sample; keep the reason where it fails, which ends the samples."""
        if self._problem:
            return False
        try:
            self._sample()
        except Exception as error:
            self._problem = f"{type(error).__name__}: {error}"
        return not self._problem

    def _billed(self) -> list[Process]:
        pids = self._pids
        if pids is None:
            roots, with_roots = [os.getpid()], False
        else:
            roots, with_roots = [*(pids() if callable(pids) else pids)], True
        found = {each.identity: each for each in self._tree.look(roots)}
        more = roots if with_roots else []
        if self._own:
            more = [*more, os.getpid()]
        for pid in more:
            if (process := read_process(pid)) is not None:
                found[process.identity] = process
        return [*found.values()]

    def _cpu_now_ns(self, billed: Sequence[Process]) -> int:
        """CPU time of the processes, and of their children that ended and were waited for."""
        total = sum(each.cpu_ns + each.reaped_cpu_ns for each in billed)
        if self._pids is None and not self._own and (own := read_process(os.getpid())) is not None:
            total += own.reaped_cpu_ns
        return total

    def _sample(self) -> None:
        at_ns = now_ns()
        total_pss = total_rss = count = 0
        lines: list[str] = []
        billed = self._billed()
        # It only grows, but for a process that ends with no billed parent that waits for it.
        self._cpu_ns = max(self._cpu_ns, self._cpu_now_ns(billed) - self._cpu_began_ns)
        for process in billed:
            memory = None if process.ended else memory_of(process.pid)
            if memory is None:
                continue
            entry = self.processes.get(process.identity)
            if entry is None:
                entry = ProcessBill(process.pid, command_of(process), at_ns, at_ns)
                self.processes[process.identity] = entry
            entry.last_ns = at_ns
            entry.command = command_of(process)  # a process begins under its parent's
            entry.cpu_ns = process.cpu_ns - self._cpu_first.get(process.identity, 0)
            entry.peak_pss_bytes = max(entry.peak_pss_bytes, memory.pss_bytes)
            entry.peak_rss_bytes = max(entry.peak_rss_bytes, memory.rss_bytes)
            total_pss, total_rss = total_pss + memory.pss_bytes, total_rss + memory.rss_bytes
            count += 1
            t_s = (at_ns - self._began_ns) / NS_PER_S
            lines.append(
                f"{t_s:.3f}\t{process.pid}\t{memory.pss_bytes}\t{memory.rss_bytes}\t"
                f"{entry.cpu_ns / NS_PER_S:.2f}\t{entry.command}\n"
            )
        pids = {each.pid for each in billed if not each.ended}
        self._add(at_ns, total_pss, total_rss, count, self._gpus.used(pids) if self._gpus else None)
        self._write(at_ns, lines)

    def _add(self, at_ns: int, pss: int, rss: int, count: int, gpu: Used | None) -> None:
        """Take the totals of a sample: the memory between two samples is their mean."""
        gone_ns = at_ns - self._before_ns if self._samples else 0
        self._pss_byte_ns += (self._total_before + pss) * gone_ns // 2
        if gpu is not None:
            self._gpu_named |= gpu.by_process is not None
            self._gpu_by_process.add(gpu.by_process or 0, gone_ns)
            self._gpu_by_card.add(max(0, gpu.by_card - (self._gpu_idle_bytes or 0)), gone_ns)
        self._before_ns, self._total_before = at_ns, pss
        self._samples += 1
        self._most = max(self._most, count)
        self._peak_pss, self._peak_rss = max(self._peak_pss, pss), max(self._peak_rss, rss)

    def _write(self, at_ns: int, lines: list[str]) -> None:
        if self._samples_file is not None and self._lines < _MOST_LINES:
            self._lines += len(lines)
            self._samples_file.write("".join(lines).encode(errors="replace"))
        if self._host_file is not None and (
            at_ns - self._host_ns >= _HOST_EVERY_NS or self._stop.is_set()
        ):
            self._host_ns = at_ns
            self._host_file.write(log_lines(at_ns, self._host.read()).encode())


def host_log_name() -> str:
    """What the published billing folder calls this host's log."""
    return f"{socket.gethostname()}.log"
