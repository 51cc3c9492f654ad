"""Running a workload from the command line: signals, progress, the exit code."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from slosched.cli.output import print_json, print_result, run_display, say, warn
from slosched.clients.run import run_workload
from slosched.loadgen.results import RunResult
from slosched.telemetry.run_dir import default_log_dir
from slosched.units import format_duration
from slosched.workloads.base import Workload

#: Exit code of a run that the controller's end cut short: that of PeerUnreachable.
_CUT_SHORT = 5


def run_live(
    address: str,
    workload: Workload,
    *,
    inputs: bool,
    seed: int,
    duration_ns: int | None,
    out: Path | None,
    json: bool,
    name: str = "",
    weight: float = 1.0,
) -> int:
    """Run `workload`, print its results, and return the exit code.

    SIGINT and SIGTERM end the run early; the partial run is written and printed, and the code is
    128 + the signal's number. A second one ends the process at once.
    """
    import uvloop

    stopped_by: list[int] = []

    async def main() -> RunResult:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            stopped_by.append(number)
            stop.set()
            give_back()
            warn("stopping; press Ctrl-C again to stop immediately")

        def give_back() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            # A loop of uvloop leaves its own handler, and a closed one hears nothing: Ctrl-C would do nothing.
            signal.signal(signal.SIGINT, signal.default_int_handler)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        try:
            with run_display(workload.name) as display:
                return await run_workload(
                    address,
                    workload,
                    inputs=inputs,
                    seed=seed,
                    duration_ns=duration_ns,
                    out=out or default_log_dir(workload.name),
                    progress=display,
                    stop=stop,
                    name=name,
                    weight=weight,
                )
        finally:
            give_back()

    if not json:
        ends = ""
        if duration_ns is not None:
            ends = f", for at most {format_duration(duration_ns)}"
        elif workload.duration_ns is None:
            ends = ", until Ctrl-C"
        say(
            f"{workload.describe()}; inputs {'on' if inputs else 'off'}, seed {seed}, at "
            f"{address}{ends}"
        )
    result = uvloop.run(main())
    if json:
        print_json(result.as_dict())
    else:
        print_result(result)
    for warning in result.warnings:
        warn(warning)
    if stopped_by:
        return 128 + stopped_by[0]
    if not result.complete:
        warn(f"error: the run ended early: {result.problem}")
        return _CUT_SHORT
    return 0
