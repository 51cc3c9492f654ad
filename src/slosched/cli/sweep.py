"""Running a sweep from the command line: signals, progress, the table at the end."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

from slosched.cli.output import print_json, say, sweep_display, table_text, warn
from slosched.clients.sweep import SweepResult, run_slo_exp_1
from slosched.telemetry.run_dir import default_log_dir
from slosched.units import format_duration
from slosched.workloads.slo_exp_1 import SloExp1

#: Exit code of a sweep that the controller's end cut short: what PeerUnreachable has.
_CUT_SHORT = 5


def run_sweep(
    address: str, spec: SloExp1, *, inputs: bool, seed: int, out: Path | None, json: bool
) -> int:
    """Run `spec`, print what came of it, and return the exit code.

    SIGINT and SIGTERM end the sweep early; the partial run is written and printed, and the code is
    128 + the signal's number. A second one ends the process at once.
    """
    import uvloop

    stopped_by: list[int] = []

    async def main() -> SweepResult:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()

        def on_signal(number: int) -> None:
            stopped_by.append(number)
            stop.set()
            for each in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(each)
            # The loop's own handling of Ctrl-C ends with it; a second signal acts at once.
            signal.signal(signal.SIGINT, signal.default_int_handler)
            warn("stopping; once more to stop at once")

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_signal, number)
        with sweep_display(spec.model) as display:
            return await run_slo_exp_1(
                address,
                spec,
                inputs=inputs,
                seed=seed,
                out=out or default_log_dir("slo-exp-1"),
                progress=display,
                stop=stop,
            )

    if not json:
        say(f"{spec.describe()}; inputs {'on' if inputs else 'off'}, seed {seed}, at {address}")
    result = uvloop.run(main())
    if json:
        print_json(result.as_dict())
    else:
        _print(result)
    for warning in result.warnings:
        warn(warning)
    if stopped_by:
        return 128 + stopped_by[0]
    if not result.complete:
        warn(f"error: the sweep ended early: {result.problem}")
        return _CUT_SHORT
    return 0


def _print(result: SweepResult) -> None:
    say(sweep_table(result))
    say("in time: client, from the scheduled send; met: controller, from arrival there")
    say(
        f"in all {result.sent} requests, {100 * result.satisfaction:.2f} % in time (client), "
        f"{100 * result.controller_satisfaction:.2f} % met (controller)"
    )
    if result.random_weights:
        say("the model has random weights: its answers mean nothing, their times do")
    if not result.complete:
        say(f"this is a part of the run: {result.problem}")
    say(result.verdict)
    if result.run_dir is not None:
        say(f"written to {result.run_dir}")


def sweep_table(result: SweepResult) -> str:
    """Return the sweep's steps as a plain table."""
    rows = [
        (
            step.slo,
            format_duration(step.slo_ns),
            step.sent,
            f"{100 * step.satisfaction:.2f} %",
            f"{100 * step.controller_satisfaction:.2f} %",
            format_duration(step.latency_p50_ns) if step.latency_p50_ns else "-",
            format_duration(step.latency_p99_ns) if step.latency_p99_ns else "-",
            ", ".join(f"{count} {name}" for name, count in step.codes.items() if name != "ok"),
        )
        for step in result.steps
    ]
    return table_text(
        ("SLO", "deadline", "sent", "in time", "met", "p50", "p99", "not served"), rows
    )
