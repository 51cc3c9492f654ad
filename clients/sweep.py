"""Run a workload that a TOML file describes, and print each SLO step.

Usage: python sweep.py [host:port] [workload.toml] [--seconds PERIOD]
"""

import asyncio
import sys
import tomllib
from pathlib import Path

from slosched.clients.run import run_workload
from slosched.errors import InvalidConfig, SloschedError
from slosched.units import format_duration
from slosched.workloads import Workload, workload_from_table


def read_spec(path: Path, period: str | None) -> Workload:
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidConfig(f"cannot read the workload {path}: {error}") from None
    return workload_from_table(table if period is None else {**table, "period": period})


async def main() -> int:
    words = sys.argv[1:]
    period = words.pop(words.index("--seconds") + 1) if "--seconds" in words else None
    words = [word for word in words if word != "--seconds"]
    address = words[0] if words else "127.0.0.1:12346"
    path = Path(words[1]) if len(words) > 1 else Path("workloads/fig7.toml")
    spec = read_spec(path, period)
    print(spec.describe())
    result = await run_workload(address, spec, inputs=False)
    print("SLO      in time (client, from the scheduled send)   p50       p99")
    for step in result.steps:
        latencies = (step.latency_p50_ns, step.latency_p99_ns)
        p50, p99 = (format_duration(ns) if ns else "-" for ns in latencies)
        print(f"{step.slo:<8} {step.in_time:>6} of {step.sent:<6} {step.satisfaction:>8.2%}"
              f" {p50:>21} {p99:>9}")  # fmt: skip
    print(result.verdict)
    return 0 if result.complete else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except SloschedError as error:
        sys.exit(f"error: {error}")
