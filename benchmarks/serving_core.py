"""Measure the serving core with real daemons on loopback: speed, memory, start.

    .venv/bin/python benchmarks/serving_core.py                  # all parts but memory
    .venv/bin/python benchmarks/serving_core.py --only memory    # ten minutes more
    .venv/bin/python benchmarks/serving_core.py --quick          # does each part work? figures mean little

Every window is watched by the stall meter; one that was disturbed beyond the bounds is void, is not
counted, and is run again. All windows go to the results, the void ones with their reasons; the tables
of README.md are made from there (`benchmarks/tables.py`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import load_parts
import process_parts
import tables
from cluster import PROFILE, SCHEDULE_AHEAD
from load_parts import Settings
from stall_meter import BOUNDS, StallMeter
from windows import Recorder

from slosched.cli.machine import NOTED_NS, TICK_NS
from slosched.clock import now_ns
from slosched.errors import SloschedError
from slosched.experiment.children import ended_by_signals
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_S
from slosched.version import __version__

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "serving_core.json"
LOAD_PARTS = {
    "sweep": load_parts.sweep,
    "single": load_parts.single,
    "single-linear": load_parts.single_linear,
    "issue-delay": load_parts.issue_delay,
    "inputs": load_parts.inputs,
}
PARTS = (*LOAD_PARTS, "startup", "memory")
_QUICK = Settings(repeats=1, window_s=2.0, quick=True)
_LIBRARIES = ("pyzmq", "uvloop", "msgspec", "numpy")


def main() -> int:
    options = _options()
    settings = (
        _QUICK if options.quick else Settings(repeats=options.repeats, window_s=options.window)
    )
    until_ns = now_ns() + int(60 * options.limit_minutes * NS_PER_S)
    names = options.only or [name for name in PARTS if options.quick or name != "memory"]
    # An installed package has its byte code; a checkout in such an environment never would.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    print(machine_line(describe_host()))
    try:
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="slosched-bench-") as directory:
            for name in names:
                print(f"\n{name}", flush=True)
                record = _run(name, Path(directory), settings, options, until_ns)
                print("\n" + tables.render(name, record), flush=True)
                if options.out is not None:
                    _merge(options.out, name, record)
    except (SloschedError, ValueError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the parts that ended are in the results", file=sys.stderr)
        return 130
    if options.out is not None:
        print(f"\nwritten to {options.out}; tables: {sys.executable} benchmarks/tables.py")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--only", action="append", choices=PARTS, help="this part; may be repeated")
    parser.add_argument("--repeats", type=int, default=3, help="of each window (default 3)")
    parser.add_argument(
        "--window", type=float, default=5.0, help="length of a window in s (default 5)"
    )
    parser.add_argument("--tries", type=int, default=4, help="of a void window (default 4)")
    parser.add_argument(
        "--limit-minutes",
        type=float,
        default=14.0,
        help="void windows are run again for at most this time (default 14)",
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="length of memory (default 10)")
    parser.add_argument(
        "--quick", action="store_true", help="each part for seconds; writes no results"
    )
    parser.add_argument(
        "--out", type=Path, help=f"results file (default {RESULTS.relative_to(HERE.parent)})"
    )
    options = parser.parse_args()
    if min(options.repeats, options.tries) < 1 or min(options.window, options.minutes) <= 0:
        parser.error("--repeats and --tries must be at least 1, --window and --minutes above 0")
    if options.out is None and not options.quick:
        options.out = RESULTS
    return options


def _run(
    name: str, directory: Path, settings: Settings, options: argparse.Namespace, until_ns: int
) -> dict[str, Any]:
    bounds = BOUNDS
    record = provenance() | {
        "settings": asdict(settings) | {"profile": PROFILE, "schedule_ahead": SCHEDULE_AHEAD}
    }
    if name == "startup":
        return record | process_parts.startup(directory, 3 if options.quick else 15)
    if name == "memory":
        return record | process_parts.memory(directory, 0.3 if options.quick else options.minutes)
    meter_directory = directory / f"meter-{name}"
    meter_directory.mkdir()
    with StallMeter(meter_directory) as meter:
        tries = 1 if options.quick else options.tries
        recorder = Recorder(meter, directory, bounds, tries=tries, until_ns=until_ns)
        LOAD_PARTS[name](recorder, settings)
        readings = meter.readings()
    record["meter"] = {
        "priority": readings.priority,
        "tick_ns": TICK_NS,
        "noted_ns": NOTED_NS,
        "bounds": asdict(bounds),
        "tries": tries,
    }
    record["windows"] = [window.as_dict() for window in recorder.windows]
    return record


def provenance() -> dict[str, Any]:
    """When, on what and with what a part was measured."""
    return {
        "ran_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_host(),
        "versions": {
            "slosched": __version__,
            "commit": commit(),
            **{library: version(library) for library in _LIBRARIES},
        },
    }


def machine_line(host: dict[str, Any]) -> str:
    """What the figures belong to."""
    return (
        f"{host['cpu_model']}, {host['cpu_usable']} of {host['cpu_count']} cores usable, "
        f"{host['memory_bytes'] / 2**30:.0f} GiB, {host['platform']}, Python {host['python']}"
    )


def commit() -> str:
    """The checkout's commit, with a + if it has changes; "" outside a checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"],
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return described.stdout.strip()


def _merge(path: Path, name: str, record: dict[str, Any]) -> None:
    """Put the part's record into the results; the other parts keep theirs, with their own dates."""
    document: dict[str, Any] = {"format": tables.FORMAT, "parts": {}}
    if path.exists():
        document = tables.read_results(path)
    document["parts"][name] = record
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".new")
    draft.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    draft.replace(path)


if __name__ == "__main__":
    sys.exit(main())
