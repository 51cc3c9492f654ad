"""How long it takes to read ten million telemetry rows and to plot them, and how much memory.

    .venv/bin/python benchmarks/log_reading.py [--rows 10000000] [--quick]

A request log and an action log of a made-up run are written once (about 0.7 and 1.6 GB for ten million
rows, in a temporary directory); then each measurement runs in a process of its own, pinned to one CPU.
The targets are 60 s and 6 GiB for each. Time is judged as CPU time, which on one pinned CPU is what it
takes on a machine that does nothing else; the wall time is told beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from slosched.clock import now_ns
from slosched.telemetry import action_log, request_log
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__

RESULTS = Path(__file__).resolve().parent / "results" / "log_reading.json"
TARGET_S, TARGET_BYTES = 60.0, 6 * 2**30
START_NS = 1_600_000_000_000_000_000
MODELS, CHUNK = 4026, 50_000
WIDTH_NS = 10 * NS_PER_S
_TIMEOUT_S = 900.0


def write_requests(path: Path, rows: int) -> None:
    """A log of an SLO sweep over thousands of models at 2,400 requests/s, in order of departure."""
    chance = np.random.default_rng(1)
    step = max(1, rows // 12)
    with path.open("w") as file:
        file.write(request_log.HEADER + "\n")
        t = START_NS
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            times = t + np.cumsum(chance.integers(0, 833_000, count))
            t = int(times[-1])
            columns = (times, chance.integers(0, MODELS, count), chance.integers(2, 90, count))
            file.writelines(
                f"{at}\t{first + i}\t{0 if ms < 88 else 8}\t{model}\t{model}"
                f"\t{1.5 ** ((first + i) // step):g}\t{ms * NS_PER_MS + i}\t100000000"
                f"\t{1 if ms < 88 else 0}\t{1 if i % 50 else 0}\t1\t{0 if i % 50 else 1}\n"
                for i, (at, model, ms) in enumerate(
                    zip(*map(np.ndarray.tolist, columns), strict=True)
                )
            )


def write_actions(path: Path, rows: int) -> None:
    """A log of inferences of batches of 1 to 8 and, one in fifty, loads, over six GPUs."""
    chance = np.random.default_rng(2)
    with path.open("w") as file:
        file.write(action_log.HEADER + "\n")
        t = START_NS
        for first in range(0, rows, CHUNK):
            count = min(CHUNK, rows - first)
            times = t + np.cumsum(chance.integers(0, 833_000, count))
            t = int(times[-1])
            errors = chance.normal(0, 30_000, count).astype(np.int64)
            file.writelines(
                f"{at}\t{first + i}\t{2 if i % 50 else 1}\t0\t{i % 6}\t0\t{i % MODELS}\t{1 << i % 4}"
                f"\t2600000\t{2600000 + error}\t5200000\t{5200000 + 2 * error}\t1380\t1380\t1380"
                f"\t5300000\t300000\t5350000\t5600000\t5610000\t{2600000 + error}\t3\t2\n"
                for i, (at, error) in enumerate(zip(times.tolist(), errors.tolist(), strict=True))
            )


# --------------------------------------------------------------------------- what is measured


def _read_requests(run: Path, out: Path) -> None:
    request_log.read_request_log(run / request_log.FILE_NAME)


def _read_actions(run: Path, out: Path) -> None:
    action_log.read_action_log(run / action_log.FILE_NAME)


def _fig7(run: Path, out: Path) -> None:
    from slosched.analysis.fig7 import plot_fig7

    plot_fig7([run / request_log.FILE_NAME], out)


def _fig7_published(run: Path, out: Path) -> None:
    from slosched.analysis.fig7 import plot_fig7

    plot_fig7([run / request_log.FILE_NAME], out, published=True)


def _fig9(run: Path, out: Path) -> None:
    from slosched.analysis.fig9 import plot_fig9

    plot_fig9(run, out, window_ns=WIDTH_NS, skip_ns=0)


def _fig10(run: Path, out: Path) -> None:
    from slosched.analysis.fig10 import plot_fig10

    plot_fig10(run, out)


#: Name -> what runs on (run directory, where figures go).
PARTS: dict[str, Callable[[Path, Path], None]] = {
    "read the request log": _read_requests,
    "read the action log": _read_actions,
    "figure 7": _fig7,
    "figure 7, published form": _fig7_published,
    "figure 9 (both logs)": _fig9,
    "figure 10 (action log)": _fig10,
}


def measure(part: str, run: Path) -> dict[str, Any]:
    """Run one part in a process of its own on one CPU; return what it took."""
    command = [sys.executable, __file__, "--part", part, "--run", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode != 0:
        sys.exit(f"{part} failed:\n{done.stderr}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _child(part: str, run: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cpus[-1:])
    began_ns = now_ns()
    with tempfile.TemporaryDirectory() as out:
        PARTS[part](run, Path(out))
    wall_s = (now_ns() - began_ns) / NS_PER_S
    used = resource.getrusage(resource.RUSAGE_SELF)
    document = {
        "part": part,
        "wall_s": round(wall_s, 2),
        "cpu_s": round(used.ru_utime + used.ru_stime, 2),
        "peak_bytes": used.ru_maxrss * 1024,
    }
    print(json.dumps(document))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--quick", action="store_true", help="100,000 rows; writes no results")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--run", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        _child(options.part, options.run)
        return
    rows = 100_000 if options.quick else options.rows
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder)
        print(f"writing two logs of {rows:,} rows", flush=True)
        write_requests(run / request_log.FILE_NAME, rows)
        write_actions(run / action_log.FILE_NAME, rows)
        results = []
        for part in PARTS:
            found = measure(part, run)
            results.append(found)
            met = found["cpu_s"] < TARGET_S and found["peak_bytes"] < TARGET_BYTES
            print(
                f"{part}: {found['wall_s']} s ({found['cpu_s']} s of CPU), "
                f"{found['peak_bytes'] / 2**30:.2f} GiB; < {TARGET_S:.0f} s and < 6 GiB: "
                f"{'met' if met else 'MISSED'}",
                flush=True,
            )
    if options.quick:
        return
    document = {
        "version": __version__,
        "host": {k: v for k, v in describe_host().items() if k != "hostname"},
        "rows": rows,
        "target": {"s": TARGET_S, "bytes": TARGET_BYTES},
        "results": results,
    }
    RESULTS.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {RESULTS}")


if __name__ == "__main__":
    main()
