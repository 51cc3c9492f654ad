"""Run the workload that a TOML file describes, and print each step.

Usage: python sweep.py [host:port] [workload.toml] [--seconds LENGTH]
"""

import asyncio
import sys
from pathlib import Path

from slosched.clients.run import run_workload
from slosched.errors import SloschedError
from slosched.units import format_duration, parse_duration_ns
from slosched.workloads.spec_file import load_workload


async def main() -> int:
    words = sys.argv[1:]
    seconds = words.pop(words.index("--seconds") + 1) if "--seconds" in words else None
    words = [word for word in words if word != "--seconds"]
    address = words[0] if words else "127.0.0.1:12346"
    workload = load_workload(Path(words[1]) if len(words) > 1 else Path("workloads/fig7.toml"))
    print(workload.describe())
    ends_ns = None if seconds is None else parse_duration_ns(seconds, bare_unit="s")
    result = await run_workload(address, workload, inputs=False, duration_ns=ends_ns)
    print("step     in time (client, from the scheduled send)   p50       p99")
    for step in result.steps:
        latencies = (step.latency_p50_ns, step.claimed_p99_ns)
        p50, p99 = (format_duration(ns) if ns else "-" for ns in latencies)
        print(
            f"{step.slo:<8} {step.in_time:>6} of {step.sent:<6} {step.satisfaction:>8.2%}"
            f" {p50:>21} {p99:>9}  {step.group}".rstrip()
        )
    print(result.slo_verdict)
    print(result.verdict)
    return 0 if result.complete else 1


if __name__ == "__main__":
    try:
        sys.exit(asyncio.run(main()))
    except SloschedError as error:
        sys.exit(f"error: {error}")
