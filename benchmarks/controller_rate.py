"""The controller's speed: requests/s, CPU of every process and goodput, beside Clockwork's own figures.

    .venv/bin/python benchmarks/controller_rate.py              # the whole table, two repeats
    .venv/bin/python benchmarks/controller_rate.py --only 6/4800 --repeats 1

All processes on this machine, emulated GPUs of profile v100, inputs off, schedule_ahead 5 ms, SLO 100
times the model's own time, 12 copies of ResNet-50. CPU of a process is that of all its threads, over the
counted window; a request is one that the client sent. Each window is watched by the stall meter: one that
was disturbed says so and is run again. `--profile DIR` runs the controller under cProfile as well.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from cluster import PROFILE, SCHEDULE_AHEAD, Load, serving
from stall_meter import NOTED_NS, TICK_NS, Bounds, StallMeter
from windows import SETTLE_NS, Recorder

from slosched.clock import now_ns
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_S
from slosched.version import __version__

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "controller_rate.json"
COPIES = 12
SLO = "100"

#: GPUs, requests/s: satisfied, controller cores and CPU us a request of Clockwork's C++ controller, measured on
#: such a machine; the satisfaction that is asked of ours.
ORIGINAL: dict[tuple[int, int], tuple[float, float, float, float]] = {
    (6, 600): (0.997, 0.67, 1121.0, 0.995),
    (6, 2400): (0.976, 0.78, 326.0, 0.995),
    (6, 4800): (0.998, 0.82, 172.0, 0.995),
    (12, 9600): (0.992, 0.96, 101.0, 0.995),
    (24, 19200): (0.975, 1.00, 53.0, 0.98),
}


def main() -> int:
    options = _options()
    cells = [_cell(text) for text in options.only] or list(ORIGINAL)
    bounds = Bounds()
    with (
        tempfile.TemporaryDirectory(prefix="slosched-rate-") as directory,
        StallMeter(Path(directory)) as meter,
    ):
        recorder = Recorder(
            meter,
            Path(directory),
            bounds,
            tries=options.tries,
            until_ns=now_ns() + int(60 * options.limit_minutes * NS_PER_S),
        )
        for repeat in range(options.repeats):
            for gpus, rate in cells:
                load = Load(
                    rate, COPIES, SLO, SLO, options.window + SETTLE_NS / NS_PER_S, seed=repeat
                )
                with serving(recorder.new_directory(f"{gpus}-{rate}"), gpus=gpus) as cluster:
                    recorder.record(cluster, load, repeat=repeat)
        document = {
            "what": __doc__.split("\n")[0] if __doc__ else "",
            "at": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": __version__,
            "host": describe_host(),
            "libraries": {name: version(name) for name in ("pyzmq", "uvloop", "msgspec")},
            "profile": PROFILE,
            "schedule_ahead": SCHEDULE_AHEAD,
            "bounds": {**asdict(bounds), "noted_ns": NOTED_NS, "tick_ns": TICK_NS},
            "windows": [window.as_dict() for window in recorder.windows],
        }
    print(table(document["windows"]))
    if options.out is not None:
        options.out.write_text(json.dumps(document, indent=1) + "\n")
    return 0


def table(windows: list[dict[str, Any]]) -> str:
    """The table of the README from windows: medians of those that count."""
    lines = [
        "| GPUs, R | satisfied (original, asked) | controller us/request (original, ratio) "
        "| controller, client, worker cores | client's delay p50 / p99 | windows (void) |",
        "|---|---|---|---|---|---|",
    ]
    for (gpus, rate), (share, _, cpu_us, asked) in ORIGINAL.items():
        here = [w for w in windows if (w["gpus"], w["rate"]) == (gpus, rate)]
        clean = [w for w in here if not w["void"]] or here
        if not here:
            continue
        satisfied = median(w["in_time"] / w["sent"] for w in clean)
        ours_us = median(1e6 * w["cpu_s"]["controller"] / w["sent"] for w in clean)
        cores = " / ".join(
            f"{median(w['cpu_s'][name] / w['duration_s'] for w in clean):.2f}"
            for name in ("controller", "client", "worker")
        )
        delays = " / ".join(
            f"{median(w[f'issue_delay_{p}_ns'] for w in clean) / 1e6:.2f}" for p in ("p50", "p99")
        )
        lines.append(
            f"| {gpus}, {rate:,} | {satisfied:.4f} ({share}, {asked}) | {ours_us:.0f} "
            f"({cpu_us:.0f}, {ours_us / cpu_us:.2f}) | {cores} | {delays} ms "
            f"| {len(here)} ({sum(bool(w['void']) for w in here)}) |"
        )
    return "\n".join(lines)


def _cell(text: str) -> tuple[int, int]:
    gpus, _, rate = text.partition("/")
    return int(gpus), int(rate)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="*", default=[], metavar="GPUS/RATE", help="some of the cells"
    )
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--window", type=float, default=8.0, help="seconds counted of each run")
    parser.add_argument("--tries", type=int, default=3, help="of a window that was disturbed")
    parser.add_argument(
        "--limit-minutes", type=float, default=30, help="nothing is repeated after that"
    )
    parser.add_argument("--out", type=Path, default=None, help=f"for the record: {RESULTS.name}")
    return parser.parse_args()


if __name__ == "__main__":
    raise SystemExit(main())
