"""Goodput of a controller with a tenth of a core, offered up to five times what it carries.

The controller's process gets `--cores` of a CPU in periods of 10 ms (a control group of its own, so this needs
root and a writable cgroup v1 `cpu` or v2 hierarchy); worker and client have what they need. Each row is a
run of its own against the same controller, without inputs, SLO 100 ms. First the rate rises until less than
90 % is in time in two runs; the best goodput so far is the *peak*. Then 2, 3 and 5 times the peak are offered.

    .venv/bin/python benchmarks/shedding.py [--cores 0.1] [--gpus 6] [--seconds 8] [--repeats 3] [--keep]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

from cluster import Cluster, Load, serving

from slosched.codes import Code
from slosched.output_files import write_file
from slosched.units import NS_PER_MS, NS_PER_S

_HERE = Path(__file__).resolve().parent
_HERE = Path(__file__).resolve().parent
_SLO = "100ms"
_PERIOD_US = 10_000
_FIRST_RATE, _RISE = 400.0, 1.3
_CARRIED = 0.9
_SETTLE_NS = int(1.5 * NS_PER_S)
_TIMES = (2, 3, 5)
_ENOUGH = 0.8


@dataclass(frozen=True)
class Row:
    """One run, for each second after it settled; `cpu` counts cores of the controller in all of it."""

    offered: float
    in_time: float
    served: float
    refused: float  # at the door
    lost: float  # refused later, failed or never answered
    refusal_p50_ms: float
    cpu: float


@contextlib.contextmanager
def limited(pid: int, cores: float) -> Iterator[None]:
    """The process `pid` and its threads get `cores` of a CPU. Raises OSError where that cannot be set."""
    root = Path("/sys/fs/cgroup")
    second = (root / "cgroup.controllers").exists()
    group = (root if second else root / "cpu") / f"slosched-shedding-{os.getpid()}"
    quota_us = int(_PERIOD_US * cores)
    group.mkdir()
    try:
        if second:
            _put(group / "cpu.max", f"{quota_us} {_PERIOD_US}")
        else:
            _put(group / "cpu.cfs_period_us", str(_PERIOD_US))
            _put(group / "cpu.cfs_quota_us", str(quota_us))
        _put(group / "cgroup.procs", str(pid))
        yield
    finally:
        with contextlib.suppress(OSError):
            _put(group.parent / "cgroup.procs", str(pid))
        group.rmdir()


def _put(file: Path, text: str) -> None:
    with file.open("w") as out:
        out.write(text)


def cpu_s(pid: int) -> float:
    """CPU time of all threads of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(cluster: Cluster, rate: float, seconds: float, seed: int) -> Row:
    """Offer `rate` for `seconds`, and count as the client does."""
    pid = cluster.controller.process.pid
    before_s = cpu_s(pid)
    load = Load(rate=rate, copies=12, slo_start=_SLO, slo_end=_SLO, period_s=seconds, seed=seed)
    log, _ = cluster.run_client(load)
    used_s = cpu_s(pid) - before_s
    sent_ns = log["scheduled_ns"]
    counted = sent_ns > sent_ns.min() + _SETTLE_NS
    span_s = (int(sent_ns.max()) - int(sent_ns.min()) - _SETTLE_NS) / NS_PER_S
    codes, latencies = log["code"][counted], log["latency_ns"][counted]
    refused = codes == Code.CONTROLLER_OVERLOADED
    served = codes == Code.OK
    row = Row(
        offered=len(codes) / span_s,
        in_time=int(log["in_time"][counted].sum()) / span_s,
        served=int(served.sum()) / span_s,
        refused=int(refused.sum()) / span_s,
        lost=int((~refused & ~served).sum()) / span_s,
        refusal_p50_ms=sorted(latencies[refused])[int(refused.sum()) // 2] / NS_PER_MS
        if refused.any()
        else 0.0,
        cpu=used_s / seconds,
    )
    print(
        f"  {row.offered:7.0f}/s offered: {row.in_time:6.0f} in time, {row.refused:6.0f} refused at the door "
        f"after {row.refusal_p50_ms:.1f} ms, {row.lost:5.0f} lost otherwise; {row.cpu:.3f} cores",
        flush=True,
    )
    return row


def series(options: argparse.Namespace, seed: int) -> dict[str, list[Row]]:
    """One controller: the rise to its peak, and what comes beyond."""
    with (
        tempfile.TemporaryDirectory() as directory,
        serving(Path(directory) / "shedding", gpus=options.gpus) as cluster,
        limited(cluster.controller.process.pid, options.cores),
    ):
        rising: list[Row] = []
        rate = options.first
        while len(rising) < 2 or any(row.in_time >= _CARRIED * row.offered for row in rising[-2:]):
            rising.append(measure(cluster, rate, options.seconds, seed))
            rate *= _RISE
        peak = max(row.in_time for row in rising)
        beyond = [measure(cluster, n * peak, options.seconds, seed) for n in _TIMES]
    return {"rising": rising, "beyond": beyond}


def page(runs: Sequence[dict[str, list[Row]]], options: argparse.Namespace) -> str:
    """The table, in Markdown."""
    lines = [
        "# A controller that is short of CPU",
        "",
        f"Made by [shedding.py](shedding.py): {options.cores:g} of a core for the controller, in periods of 10 "
        f"ms; {options.gpus} emulated GPUs of profile v100, 12 copies of ResNet-50, SLO {_SLO}, no inputs, "
        f"{options.seconds:g} s each run, of which the first 1.5 s are not counted. The peak is the best "
        "goodput while the rate rose by 1.3 from run to run. *A refusal* is the CPU that is left after each "
        "served request was given what one took at the peak, over the refusals, beside that of a served "
        "request; it is 0 where served requests took less than at the peak, in larger batches.",
        "",
        "| run | offered /s | in time / peak | in time /s | refused at the door /s | after, p50 ms | "
        "lost otherwise /s | cores | a refusal / served |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for number, run in enumerate(runs, 1):
        best = max(run["rising"], key=lambda row: row.in_time)
        each = best.cpu / best.served
        lines.append(_line(f"{number}: peak", best, best, "-"))
        for times, row in zip(_TIMES, run["beyond"], strict=True):
            left = (row.cpu - row.served * each) / row.refused if row.refused else 0.0
            lines.append(_line(f"{number}: {times}x", row, best, f"{max(0.0, left / each):.3f}"))
    shares = [
        row.in_time / max(each.in_time for each in run["rising"])
        for run in runs
        for row in run["beyond"]
    ]
    enough = sum(share >= _ENOUGH for share in shares)
    stamp = f"{datetime.now(UTC):%Y-%m-%d}, {platform.platform()}"
    lines += [
        "",
        f"In {len(shares)} runs beyond the peak, {enough} keep {_ENOUGH} of it or more; the median is "
        f"{median(shares):.2f}. A process that is stopped 100 times each second, with cold caches after "
        "each stop, gets a quarter more or less done from run to run.",
        "",
        f"{stamp}, Python {platform.python_version()}, {os.cpu_count()} CPUs.",
        "",
    ]
    return "\n".join(lines)


def _line(name: str, row: Row, best: Row, refusal: str) -> str:
    share = row.in_time / best.in_time
    return (
        f"| {name} | {row.offered:,.0f} | {share:.2f} | {row.in_time:,.0f} | {row.refused:,.0f} | "
        f"{row.refusal_p50_ms:.1f} | {row.lost:,.0f} | {row.cpu:.3f} | {refusal} |"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cores", type=float, default=0.1, help="CPU of the controller")
    parser.add_argument("--gpus", type=int, default=6)
    parser.add_argument("--first", type=float, default=_FIRST_RATE, help="rate of the first run")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each run")
    parser.add_argument("--repeats", type=int, default=3, help="controllers, one after another")
    parser.add_argument(
        "--keep", action="store_true", help="write shedding.md and results/shedding.json"
    )
    options = parser.parse_args()
    runs = []
    for seed in range(options.repeats):
        print(f"controller {seed + 1} of {options.repeats}, {options.cores:g} cores", flush=True)
        runs.append(series(options, seed))
    text = page(runs, options)
    print(text)
    if options.keep:
        rows = [{part: [asdict(row) for row in rows] for part, rows in run.items()} for run in runs]
        write_file(_HERE / "shedding.md", text.encode())
        write_file(_HERE / "results" / "shedding.json", json.dumps(rows, indent=1).encode() + b"\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
