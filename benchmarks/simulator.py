"""How fast the simulator is, and where its time goes.

    .venv/bin/python benchmarks/simulator.py               # a few minutes; keep the machine idle
    .venv/bin/python benchmarks/simulator.py --only sweep  # one case; the others' results stay
    .venv/bin/python benchmarks/simulator.py --quick       # seconds; writes nothing

Each case runs in a process of its own, which uses one core. CPU time is compared, so that a process
beside it does not count as ours; how long the machine takes for a fixed loop stands beside it, because
a busy neighbour on the same core slows both. Parts are from a second, profiled run: their shares of what
the profiler saw, applied to the CPU time of the first.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import platform
import pstats
import resource
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from slosched.config import SchedulerConfig
from slosched.config_file import load_profile
from slosched.sim.run import simulate
from slosched.sim.spec import SimSpec
from slosched.telemetry.manifest import describe_host, read_manifest
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.version import __version__
from slosched.workloads import parse_workload

RESULTS = Path(__file__).parent / "results" / "simulator.json"
_LIMIT_S = 1800

#: A source file belongs to the first of these that its path holds.
PARTS = {
    "core/worker": "worker",
    "core": "scheduler",
    "sim/run_files": "telemetry",
    "telemetry": "telemetry",
    "sim": "kernel and network",
    "loadgen": "load driver",
    "workloads": "load driver",
}


@dataclass(frozen=True)
class Case:
    """One simulation and what it is held against. `limit_s` is of wall time, `speed` is its least."""

    name: str
    what: str
    workload: tuple[str, ...]
    policy: str = "INFER5"
    gpus: int = 6
    profile: str = "v100"
    max_batch: int | None = None
    duration_ns: int | None = None
    limit_s: float | None = None
    speed: float | None = None  # simulated seconds per wall second, while requests are sent
    limit_mib: float | None = None

    def spec(self) -> SimSpec:
        return SimSpec(
            workload=parse_workload(self.workload[0], self.workload[1:]),
            scheduler=SchedulerConfig(
                policy=self.policy, schedule_ahead_ns=5 * NS_PER_MS, max_batch=self.max_batch
            ),
            profiles=(load_profile(self.profile),),
            gpus=self.gpus,
            seed=1,
            duration_ns=self.duration_ns,
        )


def _sweep(rate: int, period: str) -> tuple[str, ...]:
    return ("slo-exp-1", *f"resnet50_v2 12 poisson {rate} 1 100 1.5 mul {period}".split())


CASES = (
    Case(
        "sweep",
        "slo-exp-1, 12 copies, 2,400/s, 360 s on 6 GPUs",
        _sweep(2400, "30"),
        limit_s=60.0,
        limit_mib=1024.0,
    ),
    Case("light", "the same at 600/s", _sweep(600, "30")),
    Case("echo", "client, network and rows alone: ECHO, 36 s", _sweep(2400, "3"), policy="ECHO"),
    Case(
        "azure",
        "4,026 models on 100 GPUs, Azure-like 9,600/s, 10 s",
        ("azure", "8"),
        gpus=100,
        profile="zoo61",
        max_batch=8,
        duration_ns=10 * NS_PER_S,
        speed=0.1,
        limit_mib=4096.0,
    ),
)


def quick(case: Case) -> Case:
    """The same for seconds: says whether it works."""
    return replace(case, duration_ns=NS_PER_S, limit_s=None, speed=None)


def fixed_loop_s() -> float:
    """CPU time of ten million additions: how fast this machine is just now."""
    begun, total = time.process_time(), 0
    for number in range(10_000_000):
        total += number
    return time.process_time() - begun


def measure(case: Case) -> dict[str, Any]:
    """Run the case in this process and say what it took."""
    spec = case.spec()
    loops_s = [fixed_loop_s()]
    begun_sending: list[tuple[float, float]] = []

    def progress(where: Any) -> None:
        if not begun_sending:
            begun_sending.append((time.perf_counter(), where.elapsed_s))

    with tempfile.TemporaryDirectory() as folder:
        wall, cpu = time.perf_counter(), time.process_time()
        result = simulate(spec, out=Path(folder) / "run", progress=progress)
        ended = time.perf_counter()
        wall_s, cpu_s = ended - wall, time.process_time() - cpu
        outcome = read_manifest(Path(folder) / "run")["outcome"]
    loops_s.append(fixed_loop_s())
    first_wall, first_virtual = begun_sending[0]
    sent_s = sum(step.duration_ns for step in result.steps) / NS_PER_S
    return {
        "what": case.what,
        "requests": result.sent,
        "actions": outcome["action_rows"],
        "events": outcome["events"],
        "virtual_s": sent_s,
        "wall_s": wall_s,
        "cpu_s": cpu_s,
        "cpu_us_per_request": cpu_s / result.sent * 1e6,
        "speed": (sent_s - first_virtual) / max(ended - first_wall, 1e-9),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "fixed_loop_s": sum(loops_s) / len(loops_s),
        "in_time": result.satisfaction,
        "parts": parts_of(case),
    }


def parts_of(case: Case) -> dict[str, float]:
    """Shares of the parts in what a profiler sees of a shorter run of the case."""
    spec = case.spec()
    if "slo-exp-1" in case.workload:
        short = (*case.workload[:-1], "1")
        spec = replace(spec, workload=parse_workload(short[0], short[1:]))
    else:
        spec = replace(spec, duration_ns=2 * NS_PER_S)
    profiler = cProfile.Profile()
    with tempfile.TemporaryDirectory() as folder:
        profiler.enable()
        simulate(spec, out=Path(folder) / "run")
        profiler.disable()
    seconds: dict[str, float] = {}
    stats: dict[Any, Any] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for function, (_, _, own_s, _, callers) in stats.items():
        if function[0] == "~":  # a built-in counts for those who call it
            for caller, (_, _, called_s, _) in callers.items():
                part = part_of(caller[0])
                seconds[part] = seconds.get(part, 0.0) + called_s
        else:
            part = part_of(function[0])
            seconds[part] = seconds.get(part, 0.0) + own_s
    whole = sum(seconds.values())
    return {part: seconds[part] / whole for part in sorted(seconds, key=lambda p: -seconds[p])}


def part_of(path: str) -> str:
    _, _, inside = path.rpartition("slosched/")
    if inside == path:
        return "other"
    return next((part for prefix, part in PARTS.items() if inside.startswith(prefix)), "other")


# ------------------------------------------------------------------------------------ reports


def lines(name: str, found: dict[str, Any], case: Case) -> list[str]:
    """What a case took, ratios first."""
    ratios = []
    if case.limit_s is not None:
        ratios.append(f"{found['wall_s'] / case.limit_s:.2f} of the {case.limit_s:.0f} s allowed")
    if case.speed is not None:
        ratios.append(f"{found['speed'] / case.speed:.1f} times the speed asked for")
    if case.limit_mib is not None:
        ratios.append(f"{found['peak_mib'] / case.limit_mib:.2f} of the memory")
    if not ratios:
        ratios.append(f"{found['speed']:.1f} x real time")
    per_request = found["cpu_us_per_request"]
    parts = ", ".join(f"{p} {share * per_request:.1f}" for p, share in found["parts"].items())
    return [
        f"{name}: {'; '.join(ratios)} ({found['what']})",
        f"    {found['requests']} requests: wall {found['wall_s']:.1f} s, CPU {found['cpu_s']:.1f} s, "
        f"{found['speed']:.2f} x real time, {found['peak_mib']:.0f} MiB, "
        f"{found['events'] / found['requests']:.1f} events a request",
        f"    {per_request:.1f} us of CPU a request: {parts}",
        f"    the fixed loop took {found['fixed_loop_s']:.2f} s",
    ]


def _child(connection: Connection, case: Case) -> None:
    connection.send(measure(case))


def in_a_process(case: Case) -> dict[str, Any]:
    """Measure a case in a process of its own, so that its memory is its own."""
    spawn = multiprocessing.get_context("spawn")
    ours, theirs = spawn.Pipe()
    process = spawn.Process(target=_child, args=(theirs, case), daemon=True)
    process.start()
    theirs.close()
    try:
        if not ours.poll(_LIMIT_S):
            raise SystemExit(f"{case.name} took more than {_LIMIT_S} s")
        found: dict[str, Any] = ours.recv()
    except EOFError:
        raise SystemExit(f"{case.name} ended with an error (above)") from None
    finally:
        process.kill()
        process.join(10)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[case.name for case in CASES], help="one case")
    parser.add_argument("--quick", action="store_true", help="seconds of each; writes nothing")
    given = parser.parse_args()
    chosen = [case for case in CASES if given.only in (None, case.name)]
    results: dict[str, Any] = {}
    if given.only and RESULTS.exists():
        results = json.loads(RESULTS.read_text())["cases"]
    for case in (quick(case) for case in chosen) if given.quick else chosen:
        found = in_a_process(case)
        found["limits"] = {
            key: value
            for key, value in asdict(case).items()
            if key in ("limit_s", "speed", "limit_mib") and value is not None
        }
        results[case.name] = found
        print("\n".join(lines(case.name, found, case)), flush=True)
    if not given.quick:
        document = {
            "date": datetime.now(UTC).date().isoformat(),
            "slosched": __version__,
            "python": platform.python_version(),
            "machine": {k: v for k, v in describe_host().items() if k != "hostname"},
            "cases": {case.name: results[case.name] for case in CASES if case.name in results},
        }
        RESULTS.write_text(json.dumps(document, indent=2) + "\n")
        print(f"written to {RESULTS.relative_to(Path.cwd())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
