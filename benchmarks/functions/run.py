"""What a call of a function costs: slosched beside Dask and bare process pools, on this machine's cores.

    .venv/bin/python benchmarks/functions/run.py              # less than 8 minutes; writes functions.md
    .venv/bin/python benchmarks/functions/run.py --quick      # does it work? figures mean little
    .venv/bin/python benchmarks/functions/run.py --only no_op --out /tmp/results.json

Systems take turns in each repeat, each alone on the machine, with two slots. Wrong answers end the program.
Every process that is started is ended; only free ports of 127.0.0.1 are used.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import bench_page  # noqa: E402
from bench_kills import kills, left_over, marked  # noqa: E402
from bench_parts import FULL, PARTS, QUICK, parts_of  # noqa: E402
from bench_state import QUICK_SIZES, SIZES, state  # noqa: E402
from bench_systems import SYSTEMS, OnEngine, opened  # noqa: E402
from serving_core import commit, machine_line  # noqa: E402

from slosched.clock import monotonic_ns  # noqa: E402
from slosched.errors import MissingPackage, SloschedError  # noqa: E402
from slosched.functions.state.server import Server  # noqa: E402
from slosched.functions.state.state import State  # noqa: E402
from slosched.output_files import write_file  # noqa: E402
from slosched.telemetry.manifest import describe_host  # noqa: E402
from slosched.version import __version__  # noqa: E402

RESULTS = HERE.parent / "results" / "functions.json"
PAGE = HERE.parent / "functions.md"
SLOTS = 2
STATE_SYSTEMS = ("slosched", "local")
KILLED_SYSTEMS = ("slosched", "dask-processes")
_SECONDS = 1_000_000_000

Record = dict[str, Any]


def measure(options: argparse.Namespace) -> Record:
    """All parts on all systems that were asked for."""
    parts = [*PARTS, "state", "kills"] if not options.only else options.only
    found: Record = {"runs": [], "state": {}, "kills": {}}
    sizes, repeats = (QUICK, 1) if options.quick else (FULL, options.repeats)
    for repeat in range(repeats):
        # Each repeat begins with another system, so that no system always follows the same one.
        turn = repeat % len(options.systems)
        for name in options.systems[turn:] + options.systems[:turn]:
            wanted = [part for part in parts_of(name) if part in parts]
            if not wanted:
                continue
            with opened(name, SLOTS) as system:
                for part in wanted:
                    say(f"repeat {repeat + 1} of {repeats}: {name}, {part}")
                    record = PARTS[part](system, sizes)
                    load = os.getloadavg()[0]
                    found["runs"].append(
                        {"system": name, "part": part, "repeat": repeat, "load": load} | record
                    )
    for name in [each for each in STATE_SYSTEMS if "state" in parts and each in options.systems]:
        say(f"{name}, state")
        found["state"][name] = state_part(name, options.quick)
    for name in [each for each in KILLED_SYSTEMS if "kills" in parts and each in options.systems]:
        say(f"{name}, kill -9")
        found["kills"][name] = kills_part(name, 3 if options.quick else options.kill_seconds)
    return found


def state_part(name: str, quick: bool) -> Record:
    sizes, repeats = (QUICK_SIZES, 2) if quick else (SIZES, 5)
    with (
        store() as address,
        State(f"bench-{os.getpid()}", address, own=True) as space,
        opened(name, SLOTS, space) as system,
    ):
        assert isinstance(system, OnEngine)
        found = state(system, space.namespace, address, sizes, repeats)
    return {"store": address.partition(":")[0], "sizes": found}


@contextmanager
def store() -> Iterator[str]:
    """Start a Redis server on loopback and give its address; without the program, the embedded store's."""
    try:
        with Server(free_port()) as server:
            yield f"redis://127.0.0.1:{server.port}"
    except MissingPackage as error:
        say(f"{error}; state is measured with the embedded store")
        yield "embedded"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def kills_part(name: str, seconds: int) -> Record:
    with marked():
        with opened(name, SLOTS, kills=True) as system:
            assert isinstance(system, OnEngine)
            found = kills(system, seconds * _SECONDS, seed=19)
        found["processes_left"] = left_over()
    return found


_begun_ns = monotonic_ns()


def say(text: str) -> None:
    """One line about what comes next, with the seconds since the begin."""
    seconds = (monotonic_ns() - _begun_ns) / _SECONDS
    print(f"{seconds:5.0f} s: {text}", file=sys.stderr, flush=True)


def versions() -> dict[str, str]:
    """The versions of what is compared, and of what it stands on."""
    found = {"slosched": __version__, "commit": commit(), "python": sys.version.split()[0]}
    for name in ("distributed", "tornado", "numpy", "pyzmq", "msgspec", "uvloop", "redis"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = ""
    return found


def arguments(given: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="What a call of a function costs.")
    parser.add_argument("--out", type=Path, help="file of results (default: the committed ones)")
    parser.add_argument("--only", nargs="+", choices=[*PARTS, "state", "kills"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--kill-seconds", type=int, default=20)
    parser.add_argument("--quick", action="store_true", help="does it work? writes only with --out")
    return parser.parse_args(given)


def main(given: list[str]) -> int:
    options = arguments(given)
    try:
        found = measure(options)
    except SloschedError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    host = describe_host()
    document = {
        "format": bench_page.FORMAT,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine_line(host),
        "versions": versions(),
        "slots": SLOTS,
        "seconds": (monotonic_ns() - _begun_ns) / _SECONDS,
        **found,
    }
    print(bench_page.tables(document))
    whole = not (options.quick or options.only or options.systems != list(SYSTEMS))
    if options.out or whole:
        write_file(options.out or RESULTS, f"{json.dumps(document, indent=1)}\n".encode())
    if whole and not options.out:
        write_file(PAGE, bench_page.page(document, PAGE).encode())
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
