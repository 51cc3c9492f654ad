"""The controller's speed beside Clockwork's own, tight SLOs, one GPU's highest rates, overload, memory.

    .venv/bin/python benchmarks/controller.py                        # all parts; keep the machine idle
    .venv/bin/python benchmarks/controller.py --only rate --repeats 1
    .venv/bin/python benchmarks/controller.py --render               # the table again, from the results

All processes on this machine, emulated GPUs of profile v100, inputs off, schedule_ahead 5 ms. Each window is
watched by the stall meter, and a disturbed one is run again, at most --tries times. CPU is that of all
threads of a process over the counted window; a request is one that the client sent. Parts go on where they
stopped: each replaces its own part of the results, and the table is made from those.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import controller_floor
import controller_memory
import controller_tables
from cluster import PROFILE, SCHEDULE_AHEAD, Load, serving
from controller_tables import (
    OVERLOAD_RATES,
    RATE_CELLS,
    REFUSED_AT_ONCE,
    SINGLE_RATES,
    TIGHT_RATES,
    TIGHT_STEPS,
)
from serving_core import machine_line, provenance
from stall_meter import BOUNDS, StallMeter
from windows import SETTLE_NS, Recorder

from slosched.cli.machine import NOTED_NS, TICK_NS
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.experiment.children import ended_by_signals
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_S

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "controller.json"
COPIES = 12
FACTOR = 1.5
_SETTLE_S = SETTLE_NS / NS_PER_S


def rate(recorder: Recorder, options: argparse.Namespace) -> None:
    """GPUs and rates of the original's table, SLO 100x; repeats are interleaved."""
    for repeat in range(options.repeats):
        for gpus, requests in RATE_CELLS:
            load = _steady(requests, "100", options.window, copies=COPIES, seed=repeat)
            with serving(recorder.new_directory(f"rate-{gpus}"), gpus=gpus) as cluster:
                recorder.record(cluster, load, repeat=repeat)


def tight(recorder: Recorder, options: argparse.Namespace) -> None:
    """Six GPUs, 12 copies, SLOs from 1.5x in steps of half: three rates, interleaved repeats."""
    for repeat in range(options.repeats):
        for requests in TIGHT_RATES:
            load = Load(
                rate=requests,
                copies=COPIES,
                slo_start=f"{FACTOR}",
                slo_end=f"{FACTOR**TIGHT_STEPS:.9g}",
                slo_factor=f"{FACTOR}",
                period_s=options.window,
                steps=TIGHT_STEPS,
                seed=repeat,
            )
            with serving(recorder.new_directory(f"tight-{requests}"), gpus=6) as cluster:
                recorder.record(cluster, load, repeat=repeat)


def single(
    recorder: Recorder, options: argparse.Namespace, *, profile: str = "v100-linear"
) -> None:
    """One GPU, one model: the rates that are asked for at each SLO, and the load beyond capacity. On the
    device of the comparison: batches of any size, times linear between the profile's.
    """
    for repeat in range(options.repeats):
        with serving(recorder.new_directory("single"), gpus=1, profile=profile) as cluster:
            for slo, requests in SINGLE_RATES:
                # A window of 8 s: near the border the share in time wanders by a percent in less.
                load = _steady(requests, slo, max(8.0, options.window), copies=1, seed=repeat)
                recorder.record(cluster, load, repeat=repeat)


def single_padded(recorder: Recorder, options: argparse.Namespace) -> None:
    """The same on profile v100, whose batches are padded to 1, 2, 4, 8 or 16."""
    single(recorder, options, profile=PROFILE)


def overload(recorder: Recorder, options: argparse.Namespace) -> None:
    """One GPU, one model (capacity 1,019 requests/s), from below capacity to ten times as much."""
    for repeat in range(options.repeats):
        with serving(recorder.new_directory("overload"), gpus=1) as cluster:
            for requests in OVERLOAD_RATES:
                load = _steady(requests, "100ms", options.window, copies=1, seed=repeat)
                recorder.record(cluster, load, repeat=repeat)
            slo, requests = REFUSED_AT_ONCE
            load = _steady(requests, slo, options.window, copies=1, seed=repeat)
            recorder.record(cluster, load, repeat=repeat)


LOAD_PARTS: dict[str, Callable[[Recorder, argparse.Namespace], None]] = {
    "rate": rate,
    "tight": tight,
    "single": single,
    "single-padded": single_padded,
    "overload": overload,
}
PARTS = ("floor", *LOAD_PARTS, "memory")


def main() -> int:
    options = _options()
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if options.render:
        controller_tables.write(RESULTS)
        return 0
    print(machine_line(describe_host()), flush=True)
    try:
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="slosched-bench-") as directory:
            for name in options.only or PARTS:
                print(f"\n{name}", flush=True)
                record = _run(name, Path(directory), options)
                print("\n" + controller_tables.render(name, record), flush=True)
                if not options.dry:
                    _merge(name, record)
    except (SloschedError, ValueError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the parts that ended are in the results", file=sys.stderr)
        return 130
    if not options.dry:
        controller_tables.write(RESULTS)
    return 0


def _run(name: str, directory: Path, options: argparse.Namespace) -> dict[str, Any]:
    bounds = BOUNDS
    record = provenance() | {
        "settings": {
            "repeats": options.repeats,
            "window_s": options.window,
            "profile": PROFILE,
            "schedule_ahead": SCHEDULE_AHEAD,
        }
    }
    if name == "floor":
        return record | controller_floor.measure()
    if name == "memory":
        return record | asyncio.run(controller_memory.measure(directory))
    meter_directory = directory / f"meter-{name}"
    meter_directory.mkdir()
    until_ns = now_ns() + int(60 * options.limit_minutes * NS_PER_S)
    with StallMeter(meter_directory) as meter:
        recorder = Recorder(meter, directory, bounds, tries=options.tries, until_ns=until_ns)
        LOAD_PARTS[name](recorder, options)
        readings = meter.readings()
    record["meter"] = {
        "priority": readings.priority,
        "tick_ns": TICK_NS,
        "noted_ns": NOTED_NS,
        "bounds": asdict(bounds),
        "tries": options.tries,
    }
    record["windows"] = [window.as_dict() for window in recorder.windows]
    return record


def _steady(requests: float, slo: str, window_s: float, *, copies: int, seed: int) -> Load:
    load = Load(requests, copies, slo, slo, window_s + _SETTLE_S)
    return replace(load, seed=seed)


def _merge(name: str, record: dict[str, Any]) -> None:
    """Put the part's record into the results; the other parts keep theirs, with their own dates."""
    document: dict[str, Any] = {"parts": {}}
    if RESULTS.exists():
        document = json.loads(RESULTS.read_text(encoding="utf-8"))
    document["parts"][name] = record
    draft = RESULTS.with_suffix(".new")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(RESULTS)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="of each window (default 3)")
    parser.add_argument("--window", type=float, default=6.0, help="length in s (default 6)")
    parser.add_argument("--tries", type=int, default=3, help="of a void window (default 3)")
    parser.add_argument(
        "--limit-minutes",
        type=float,
        default=10.0,
        help="void windows of a part are run again for at most this time (default 10)",
    )
    parser.add_argument("--dry", action="store_true", help="write no results")
    parser.add_argument(
        "--render", action="store_true", help="only make the table from the results"
    )
    options = parser.parse_args()
    if min(options.repeats, options.tries) < 1 or options.window <= 0:
        parser.error("--repeats and --tries must be at least 1, --window above 0")
    return options


if __name__ == "__main__":
    raise SystemExit(main())
