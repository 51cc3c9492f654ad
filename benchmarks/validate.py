"""Is the simulator right? Clockwork's Figure 7 load live and simulated, step by step.

    .venv/bin/python benchmarks/validate.py             # 4 to 12 minutes; keep the machine idle
    .venv/bin/python benchmarks/validate.py --quick     # does it work? writes no results

For each rate the whole sweep runs live (emulated GPUs, real processes on loopback) under the stall
meter, and is simulated with the same seed and the delays that the live run had. A step that was
disturbed beyond the meter's bounds is void; the sweep is run again while a step from 3.4x up is void,
three times in all, and the first try that counts is taken. A step that was void each time says so.
Writes results/validate.json and the table, results/validate.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from cluster import PROFILE
from serving_core import commit, machine_line
from stall_meter import BOUNDS, StallMeter
from tables import table

from slosched.analysis.validation import StepDifference
from slosched.cli.local_run import Cluster
from slosched.cli.validate import Meter, Plan, Validation, run_plan
from slosched.config import SchedulerConfig
from slosched.errors import SloschedError
from slosched.experiment.children import ended_by_signals
from slosched.telemetry.manifest import describe_host
from slosched.units import NS_PER_MS
from slosched.version import __version__
from slosched.workloads import parse_workload

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
RATES = (600, 1200, 2400)
#: The table's bound, in points of satisfaction, and from which multiple of b1 up it holds.
TOLERANCE, FROM_SLO = 1.0, 3.4
TRIES = 3


def main() -> int:
    options = _options()
    rates: tuple[int, ...] = RATES
    sweep, period = ("1", "100", "1.5"), options.period
    if options.quick:
        rates, sweep, period = (300,), ("2", "8", "2"), 2.0
    host = describe_host()
    print(machine_line(host))
    found = []
    try:
        with ended_by_signals(), tempfile.TemporaryDirectory(prefix="slosched-bench-") as directory:
            for rate in rates:
                plan = _plan(rate, sweep, period, 1 if options.quick else TRIES)
                print(f"\nR={rate}: {plan.workload.describe()}", flush=True)
                place = Path(directory) / f"r{rate}"
                validation = run_plan(plan, place, partial(_watching, place), show=print)
                print(rows_of(rate, validation.as_dict()), flush=True)
                found.append((rate, validation))
                shutil.rmtree(place)
    except SloschedError as error:
        print(f"benchmark failed: {error}", file=sys.stderr)
        return 1
    if not options.quick:
        _write(found, host, period)
    return 0 if all(holds(validation.differences) for _, validation in found) else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--period", type=float, default=5.0, help="seconds a step (default 5)")
    parser.add_argument("--quick", action="store_true", help="one short sweep; writes no results")
    options = parser.parse_args()
    if options.period <= 0:
        parser.error("--period must be above 0")
    return options


def _plan(rate: int, sweep: tuple[str, ...], period_s: float, tries: int) -> Plan:
    words = ("slo-exp-1", "resnet50_v2", "12", "poisson", str(rate), *sweep, "mul", f"{period_s:g}")
    workload = parse_workload(words[0], words[1:])
    assert workload.duration_ns is not None
    return Plan(
        words=words,
        workload=workload,
        cluster=Cluster(SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS), 6, PROFILE),
        duration_ns=workload.duration_ns,
        tolerance=TOLERANCE,
        from_slo=FROM_SLO,
        tries=tries,
    )


class _Watched:
    """The stall meter as `run_plan` asks it."""

    def __init__(self, meter: StallMeter) -> None:
        self._meter = meter

    def reasons(self, start_ns: int, end_ns: int) -> tuple[str, ...]:
        readings = self._meter.readings(past_ns=end_ns)
        return readings.disturbance(start_ns, end_ns).reasons(BOUNDS)


@contextlib.contextmanager
def _watching(place: Path) -> Iterator[Meter]:
    place.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix="meter-", dir=place) as directory,
        StallMeter(Path(directory)) as meter,
    ):
        yield _Watched(meter)


# -------------------------------------------------------------------------------------- results


def holds(differences: tuple[StepDifference, ...]) -> bool:
    """Whether every step from 3.4x up was measured undisturbed, and is within the bound."""
    held = [d for d in differences if d.held]
    return bool(held) and all(not d.disturbed and d.points <= TOLERANCE for d in held)


def rows_of(rate: int, document: dict[str, Any]) -> str:
    """The table of one rate, from `Validation.as_dict()`."""
    rows = []
    for step in document["steps"]:
        live, simulated = step["live"], step["simulated"]
        points = max(abs(step["client_points"]), abs(step["controller_points"]))
        if step["disturbed"]:
            verdict = "not measured: " + "; ".join(step["disturbed"])
        elif step["held"]:
            verdict = f"≤ {TOLERANCE:g} point: {'met' if points <= TOLERANCE else '**missed**'}"
        else:
            verdict = ""
        ratio = step["goodput_ratio"]
        rows.append(
            [
                str(rate),
                step["step"],
                _percent(live, "in_time"),
                _percent(simulated, "in_time"),
                f"{step['client_points']:+.2f}",
                _percent(live, "met"),
                _percent(simulated, "met"),
                f"{step['controller_points']:+.2f}",
                "–" if ratio is None else f"{ratio:.3f}",  # noqa: RUF001
                _pair_ms(live, simulated, "latency_p50_ns"),
                _pair_ms(live, simulated, "latency_p99_ns"),
                str(step["attempt"]),
                verdict,
            ]
        )
    headings = (
        "R",
        "SLO",
        "in time, live %",
        "simulated",
        "points",
        "met, live %",
        "simulated",
        "points",
        "goodput, simulated / live",
        "p50 ms, live / simulated",
        "p99 ms",
        "try",
        "bound",
    )
    return table(headings, rows)


def _percent(step: dict[str, Any], judge: str) -> str:
    return f"{100 * step[judge] / step['sent']:.2f}"


def _pair_ms(live: dict[str, Any], simulated: dict[str, Any], field: str) -> str:
    if not live[field] or not simulated[field]:
        return "–"  # noqa: RUF001
    return f"{live[field] / NS_PER_MS:.2f} / {simulated[field] / NS_PER_MS:.2f}"


def _write(found: list[tuple[int, Validation]], host: dict[str, Any], period_s: float) -> None:
    document: dict[str, Any] = {
        "ran_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "slosched": __version__,
        "commit": commit(),
        "machine": host,
        "period_s": period_s,
        "rates": {str(rate): validation.as_dict() for rate, validation in found},
    }
    text = [
        "# The simulator beside live runs",
        "",
        "Made by [validate.py](../validate.py), which says how. *points*: simulated less live; judged by "
        "the client from the scheduled send, and by the controller from arrival there.",
        "",
    ]
    for rate, validation in found:
        text += [rows_of(rate, validation.as_dict()), ""]
        text += [f"Delays of the last live run: {validation.delays[-1].text}.", ""]
    text.append(
        f"*{document['ran_at'][:10]}, slosched {__version__} ({document['commit']}); "
        f"{machine_line(host)}. Steps of {period_s:g} s, 12 copies, 6 GPUs of profile {PROFILE}.*"
    )
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "validate.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    (RESULTS / "validate.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    print(f"\nwritten to {RESULTS / 'validate.json'} and validate.md")


if __name__ == "__main__":
    sys.exit(main())
