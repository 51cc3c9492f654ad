"""slo-exp-1 on one GPU, live and simulated with this run's profile, noise and delays.

The simulation of each rate starts as soon as its live run ended, in a process of its own, while further rows
are measured; the row "slo_exp_1" waits for all of them and judges.

As a program: `exact_sweep.py LIVE.json OUT.json` simulates the live row in the one and writes the other.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from exact_live import actions_of, classes_of, exec_ends, infers_of, prediction_errors
from exact_rig import Rig, RowFailed, check, read_profile

from slosched.analysis.validation import Delays, measure_delays
from slosched.cli.children import Child
from slosched.config import EmulationNoise, SchedulerConfig
from slosched.loadgen.results import RunResult, StepResult
from slosched.telemetry import client_log
from slosched.telemetry.table import LogTable
from slosched.units import NS_PER_MS, NS_PER_S
from slosched.workloads import parse_workload

RATES = (600, 1200, 2400)
_COPIES = 12
_SWEEP = ("1.5", "60", "1.5", "mul")  # ten steps, from 1.5 to 57.7 times b1
_STEPS = 10
#: From which predicted satisfaction on the live one must reach which; else it may differ by so many points.
_SURE, _HELD, _POINTS = 0.9995, 0.999, 2.0
_QUANTILES = 201
_SIMULATED_WITHIN_S = 120.0


def live(rig: Rig, rate: int) -> dict[str, Any]:
    """Row "slo_exp_R": the sweep at one rate, live; starts its simulation."""
    period_s, sent_rate = rig.settings.seconds(5), rig.rate(rate)
    words = [
        "slo-exp-1",
        rig.settings.model,
        str(_COPIES),
        "poisson",
        f"{sent_rate:g}",
        *_SWEEP,
        f"{period_s:g}s",
    ]
    with rig.serving(f"slo-exp-1-{rate}") as served:
        result = rig.client(served, words, period_s * _STEPS)
    actions = actions_of(served.run_dir)
    profile = rig.profile()
    begin_ns = int(
        client_log.read_client_log(served.run_dir / client_log.FILE_NAME)["scheduled_ns"].min()
    )
    found = {
        "rate": rate,
        "sent_rate": sent_rate,
        "period_s": period_s,
        "words": words,
        "live": _plain(result),
        "first_sent_ns": begin_ns,
        "delays": asdict(measure_delays(served.run_dir)),
        "noise": noise_of(actions, profile.model(rig.settings.model).exec_ns),
        "profile": asdict(profile),
        "gpu_busy": busy(actions),
        "prediction": _prediction(actions, profile.model(rig.settings.model).exec_ns),
    }
    live_file = rig.directory / f"slo-exp-1-{rate}.live.json"
    live_file.write_text(json.dumps(found), encoding="utf-8")
    _simulate_beside(rig, rate, live_file)
    return {"figures": found, "checks": []}


def _prediction(actions: LogTable, exec_ns: Mapping[int, int]) -> dict[str, Any]:
    """The same errors as in the row "prediction", under this load; {} of too short a run."""
    try:
        return prediction_errors(actions, exec_ns)
    except RowFailed:
        return {}


def _plain(result: RunResult) -> dict[str, Any]:
    return {**result.as_dict(), "run_dir": None}


def noise_of(actions: LogTable, exec_ns: Mapping[int, int]) -> list[float]:
    """Evenly spaced quantiles of measured over profiled exec, as EmulationNoise takes them.

    The greatest keeps the mean of the last interval: up to a single outlier it would weigh far too much.
    """
    chosen = infers_of(actions)
    classes = classes_of(actions["batch_size"][chosen], exec_ns)
    usual = np.array([exec_ns[int(size)] for size in classes.tolist()], dtype=np.float64)
    ratios = np.sort(np.maximum(actions["worker_exec_duration"][chosen] / usual, 0.01))
    quantiles = np.quantile(ratios, np.linspace(0.0, 1.0, _QUANTILES))
    last = ratios[len(ratios) * (_QUANTILES - 2) // (_QUANTILES - 1) :]
    quantiles[-1] = max(quantiles[-2], 2.0 * float(last.mean()) - quantiles[-2])
    return [round(float(value), 6) for value in np.maximum.accumulate(quantiles)]


def busy(actions: LogTable) -> float:
    """Exec time over the time from the first end to the last."""
    chosen = infers_of(actions)
    ends = exec_ends(actions)[chosen]
    return int(actions["worker_exec_duration"][chosen].sum()) / max(1, int(ends.max() - ends.min()))


# ------------------------------------------------------------------------------------ simulated


def _simulated_file(rig: Rig, rate: int) -> Path:
    return rig.directory / f"slo-exp-1-{rate}.simulated.json"


def _simulate_beside(rig: Rig, rate: int, live_file: Path) -> Child:
    out = _simulated_file(rig, rate)
    out.unlink(missing_ok=True)
    return rig.background.start(
        f"simulation of {rate}/s",
        [str(Path(__file__).resolve()), str(live_file), str(out)],
        rig.directory / f"slo-exp-1-{rate}.simulation.log",
    )


def simulate(found: Mapping[str, Any]) -> RunResult:
    """The live row's sweep in virtual time: same arrivals, this run's profile, noise and delays."""
    from slosched.cli.validate import network_like
    from slosched.sim.run import simulate as run
    from slosched.sim.spec import SimSpec

    words = found["words"]
    workload = parse_workload(words[0], words[1:])
    raw = found["delays"]
    spreads = {name: tuple(values) for name, values in raw["spreads_ns"].items()}
    delays = Delays(**{**raw, "spreads_ns": spreads})
    spec = SimSpec(
        workload=workload,
        scheduler=SchedulerConfig(schedule_ahead_ns=5 * NS_PER_MS),
        profiles=(read_profile(found["profile"]),),
        gpus=1,
        network=network_like(delays),
        noise=EmulationNoise(exec_quantiles=tuple(found["noise"])),
        seed=0,
        duration_ns=round(found["period_s"] * _STEPS * NS_PER_S),
    )
    return run(spec)


def judge(rig: Rig) -> dict[str, Any]:
    """Row "slo_exp_1": each step's live satisfaction against the simulated one."""
    rates = [rate for rate in RATES if f"slo_exp_{rate}" in rig.rows]
    if not rates:
        raise RowFailed("no rate of slo-exp-1 was measured")
    children = {rate: _ensure_simulation(rig, rate) for rate in rates}
    figures: dict[str, Any] = {}
    checks = []
    for rate in rates:
        simulated = _await(rig, rate, children[rate])
        live_result = RunResult.from_dict(rig.rows[f"slo_exp_{rate}"]["figures"]["live"])
        steps = compare(live_result, simulated)
        held = sum(step["holds"] for step in steps)
        figures[str(rate)] = {"steps": steps, "simulated": _plain(simulated)}
        words = f"slo-exp-1 R={rate}: steps that hold, of {len(steps)}"
        checks.append(check(words, float(held), "", f">= {len(steps)}"))
    return {"figures": figures, "checks": checks}


def _ensure_simulation(rig: Rig, rate: int) -> Child | None:
    """The running simulation; None if its result is there. Rows of an earlier run have none yet."""
    found = rig.rows[f"slo_exp_{rate}"]["figures"]
    for child in list(rig.background._children):
        if child.name == f"simulation of {rate}/s":
            return child
    live_file = rig.directory / f"slo-exp-1-{rate}.live.json"
    live_file.write_text(json.dumps(found), encoding="utf-8")
    return _simulate_beside(rig, rate, live_file)


def _await(rig: Rig, rate: int, child: Child | None) -> RunResult:
    out = _simulated_file(rig, rate)
    if child is not None:
        code = rig.background.wait(child, _SIMULATED_WITHIN_S)
        if code != 0:
            ended = f"ended with exit code {code}" if code is not None else "did not end in time"
            raise RowFailed(f"the {child.name} {ended}: {child.last_line()}")
    return RunResult.from_dict(json.loads(out.read_text(encoding="utf-8")))


def compare(live_result: RunResult, simulated: RunResult) -> list[dict[str, Any]]:
    """Each step's two satisfactions (client, from the scheduled send), the rule and whether it holds."""
    theirs = {step.index: step for step in simulated.steps}
    return [_step(step, theirs[step.index]) for step in live_result.steps if step.index in theirs]


def _step(live_step: StepResult, simulated: StepResult) -> dict[str, Any]:
    predicted, measured = simulated.satisfaction, live_step.satisfaction
    sure = predicted >= _SURE
    points = 100 * (measured - predicted)
    return {
        "slo": live_step.slo,
        "sent": live_step.sent,
        "live": measured,
        "live_controller": live_step.controller_satisfaction,
        "simulated": predicted,
        "points": points,
        "rule": f">= {100 * _HELD:g} %" if sure else f"within {_POINTS:g} points",
        "holds": measured >= _HELD if sure else abs(points) <= _POINTS + 1e-9,
        "latency_p99_ns": live_step.latency_p99_ns,
        "issue_delay_p99_ns": live_step.issue_delay_p99_ns,
    }


def main() -> int:
    source, out = (Path(argument) for argument in sys.argv[1:])
    os.nice(10)
    result = simulate(json.loads(source.read_text(encoding="utf-8")))
    draft = out.with_suffix(".new")
    draft.write_text(json.dumps(_plain(result)), encoding="utf-8")
    draft.replace(out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
