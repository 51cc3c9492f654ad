"""Where the controller's time goes: a real controller under cProfile, by room and by function.

    .venv/bin/python benchmarks/controller_profile.py            # writes controller_profile.md
    .venv/bin/python benchmarks/controller_profile.py --cells 12/9600 --seconds 4

Worker, controller and client as in controller.py (profile v100, 12 copies, SLO 100x, no inputs). cProfile
makes Python calls dearer than calls of C, so shares matter and times do not; a rate near what the machine can
carry is beyond it here. Calls a request are exact.
"""

from __future__ import annotations

import argparse
import pstats
import sys
import tempfile
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from cluster import PROFILE, SCHEDULE_AHEAD
from serving_core import commit, machine_line

from slosched.errors import SloschedError
from slosched.experiment.children import ChildFailed, Children, ended_by_signals
from slosched.telemetry.manifest import describe_host

HERE = Path(__file__).resolve().parent
PAGE = HERE / "controller_profile.md"
_LOOPBACK = ("--bind", "127.0.0.1", "--port", "0")
_READY_S = 30.0
_FUNCTIONS = 25

#: Rooms by what their files' paths contain; the first that fits.
_ROOMS = (
    ("slosched/core/scheduler/policies", "the policy"),
    ("slosched/core/scheduler/placement", "placement"),
    ("slosched/core/scheduler/answers", "answers"),
    ("slosched/core/scheduler", "the rest of the scheduler"),
    ("slosched/telemetry", "telemetry"),
    ("slosched/daemon", "the shell"),
    ("slosched/transport", "transport"),
    ("zmq", "transport"),
    ("slosched/clock", "clock and timer"),
    ("asyncio", "event loop"),
)


@dataclass(frozen=True)
class Profile:
    """Seconds by room and by function, and how many requests the run answered."""

    rooms: dict[str, float]
    functions: list[tuple[str, int, float]]  # name, calls, seconds in it alone
    requests: int
    calls: int

    @property
    def total_s(self) -> float:
        return sum(self.rooms.values())


def profile(gpus: int, rate: int, seconds: float, directory: Path) -> Profile:
    """Run a cluster with the controller under cProfile. Raises ChildFailed."""
    directory.mkdir()
    stats = directory / "controller.prof"
    profiled = (sys.executable, "-m", "cProfile", "-o", str(stats), "-m", "slosched")
    with Children() as children, Children(profiled) as watched:
        worker = children.start(
            "worker",
            [
                "worker",
                "--device",
                "emulated",
                "--gpus",
                str(gpus),
                "--profile",
                PROFILE,
                *_LOOPBACK,
            ],
            directory / "worker.log",
        )
        port = children.wait_ready(worker, within_s=_READY_S)
        controller = watched.start(
            "controller",
            [
                "controller",
                "INFER5",
                "--workers",
                f"127.0.0.1:{port}",
                *_LOOPBACK,
                "--http-port",
                "-1",
                "--schedule-ahead",
                SCHEDULE_AHEAD,
                "--log-dir",
                str(directory / "run"),
            ],
            directory / "controller.log",
        )
        port = watched.wait_ready(controller, within_s=_READY_S)
        client = children.start(
            "client",
            [
                "client",
                f"127.0.0.1:{port}",
                "slo-exp-1",
                "resnet50_v2",
                "12",
                "poisson",
                str(rate),
                "100",
                "100",
                "1.5",
                "mul",
                f"{seconds:g}s",
                "--no-inputs",
            ],
            directory / "client.log",
        )
        if children.wait(client, seconds + _READY_S) != 0:
            raise ChildFailed(f"the client did not end well: {client.last_line()}")
        children.forget(client)
        watched.end(controller)
    rows = (directory / "run" / "clockwork_request_log.tsv").read_bytes().count(b"\n") - 1
    return _read(stats, rows)


def _read(path: Path, requests: int) -> Profile:
    """Only what the loop did: imports and the command line are not counted."""
    rooms: dict[str, float] = defaultdict(float)
    functions = []
    calls = 0
    stats = pstats.Stats(str(path)).stats  # type: ignore[attr-defined]
    for (file, line, name), (_, count, own_s, _, callers) in stats.items():
        room = _room(file, name, callers)
        if room is None or count < requests // 50:
            continue
        rooms[room] += own_s
        calls += count
        where = f"{file.rpartition('slosched/')[2]}:{line} " if "slosched/" in file else ""
        functions.append((f"{where}{name}", count, own_s))
    functions.sort(key=lambda entry: -entry[2])
    return Profile(dict(rooms), functions[:_FUNCTIONS], requests, calls)


def _room(file: str, name: str, callers: dict[tuple[str, int, str], object]) -> str | None:
    for part, room in _ROOMS:
        if part in file:
            return room
    if file == "~":  # a function of C belongs to the room that calls it most
        if "msgspec" in name or "encode" in name or "decode" in name:
            return "encoding and decoding"
        for caller, _, _ in callers:
            for part, room in _ROOMS:
                if part in caller:
                    return room
    return None


def table(cells: dict[tuple[int, int], Profile]) -> str:
    rooms = sorted({room for p in cells.values() for room in p.rooms})
    heads = [f"{gpus} GPUs, {rate:,}/s" for gpus, rate in cells]
    lines = [
        f"| share of the loop's time | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    order = sorted(
        rooms, key=lambda r: -sum(p.rooms.get(r, 0.0) / p.total_s for p in cells.values())
    )
    for room in order:
        shares = (f"{100 * p.rooms.get(room, 0.0) / p.total_s:.0f} %" for p in cells.values())
        lines.append(f"| {room} | {' | '.join(shares)} |")
    calls = (f"{p.calls / max(1, p.requests):.0f}" for p in cells.values())
    lines.append(f"| *calls a request* | {' | '.join(calls)} |")
    for (gpus, rate), p in cells.items():
        lines += [
            "",
            f"## {gpus} GPUs, {rate:,} requests/s",
            "",
            "| function | calls a request | share |",
        ]
        lines.append("|---|---|---|")
        for name, count, own_s in p.functions:
            share = 100 * own_s / p.total_s
            lines.append(f"| `{name}` | {count / max(1, p.requests):.2f} | {share:.1f} % |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--cells", nargs="*", default=["6/600", "12/6000"], metavar="GPUS/RATE")
    parser.add_argument("--seconds", type=float, default=8.0, help="of load (default 8)")
    parser.add_argument("--dry", action="store_true", help="write no page")
    options = parser.parse_args()
    cells: dict[tuple[int, int], Profile] = {}
    try:
        with (
            ended_by_signals(),
            tempfile.TemporaryDirectory(prefix="slosched-profile-") as directory,
        ):
            for text in options.cells:
                gpus, _, rate = text.partition("/")
                place = Path(directory) / f"{gpus}-{rate}"
                cells[int(gpus), int(rate)] = profile(int(gpus), int(rate), options.seconds, place)
    except (SloschedError, ValueError) as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    made = table(cells)
    print(made)
    if not options.dry:
        intro = (__doc__ or "").split("\n\n")[2].replace("\n", " ")
        where = f"{machine_line(describe_host())}; commit {commit()}."
        PAGE.write_text(
            "# Where the controller's time goes\n\nMade by [controller_profile.py](controller_profile.py). "
            f"{intro}\n\n{made}\n\n{where}\n",
            encoding="utf-8",
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
